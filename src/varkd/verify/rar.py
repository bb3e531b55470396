"""RAR: weights there and back, teacher forcing in raster and permuted order, runs, greedy codes, guidance per step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from varkd.backbones.rar import RAR, RARConfig
from varkd.rollout import Sampler, guidance_per_step
from varkd.types import Condition, Plan
from varkd.verify.golden import Check, Golden, described, forced_logits, greedy_codes, in_order, official_state


@torch.no_grad()
def checks(golden: Golden) -> Iterator[Check]:
    size, state, tolerance = golden.info["config"], golden.state(), golden.info["tolerance"]
    inferred = RAR.infer({name: tuple(tensor.shape) for name, tensor in state.items()})
    model = RAR(RARConfig(grid=(size["grid"], size["grid"]), norm_eps=size["norm_eps"], **inferred)).eval()
    model.load_state_dict(state)
    yield from _sizes(model, size, inferred)
    yield official_state(model, state)

    codes_BL, condition = golden["codes"], Condition(golden["labels"])
    plan, permuted = model.plan(len(codes_BL)), model.plan(len(codes_BL), order_BL=golden["order"])
    yield golden.compare("tf.logits", model.head(model(codes_BL, condition, plan)), tolerance["tf"])
    logits = in_order(model.head(model(codes_BL, condition, permuted)), permuted)
    yield golden.compare("tf_perm.logits", logits, tolerance["tf"])
    for name, run in golden.info["runs"].items():
        sampler = _sampler(run)
        if run["kind"] == "argmax":
            yield golden.compare(f"{name}.codes", greedy_codes(model, condition, plan, sampler), "exact")
        else:
            guidance_S = guidance_per_step(sampler, plan, model.guidance)
            yield golden.compare(f"{name}.guidance", guidance_S, tolerance["runs"])
            logits = forced_logits(model, golden[run["codes"]], condition, plan, sampler)
            yield golden.compare(f"{name}.logits", logits, tolerance["runs"])


def schedule(params: dict[str, Any]) -> tuple[tuple[int, ...], Tensor]:
    """Codes per step and guidance per step of one `schedule-rar.json` entry."""
    plan = Plan(torch.arange(params["N"]).unsqueeze(0), (1,) * params["N"])
    return plan.sizes, guidance_per_step(_sampler(params), plan, RAR.guidance)


def _sizes(model: RAR, size: dict[str, Any], inferred: dict[str, Any]) -> Iterator[Check]:
    """Every size of the description against what the shapes say."""
    ours = {
        "num_hidden_layers": inferred["num_layers"],
        "hidden_size": inferred["dim"],
        "num_attention_heads": inferred["num_heads"],
        "intermediate_size": inferred["ffn_dim"],
        "codebook_size": inferred["vocab_size"],
        "num_classes": inferred["num_classes"],
        "image_seq_len": model.sequence_length,
        "head_dim": model.config.head_dim,
        "null_label": model.null_label,
        "embedding_rows": _embedding_rows(model),
        "position_rows": model.pos_embed.shape[1],
        "timestep_rows": model.timesteps_embeddings.shape[1],
    }
    yield from described(ours, size)


def _embedding_rows(model: RAR) -> dict[str, int]:
    _, first = model.class_rows(model.config)
    return {"mask": model.vocab_size, "first_class": first, "null_class": first + model.null_label}


def _sampler(run: dict[str, Any]) -> Sampler:
    """The official names; `randomize_temperature` (absent in schedules) divides the logits only when they are drawn."""
    return Sampler(
        guidance=run["guidance_scale"],
        guidance_power=run["guidance_scale_pow"],
        temperature=run.get("randomize_temperature", 1.0),
    )
