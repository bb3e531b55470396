"""ARPG: weights there and back, teacher forcing strictly causal and by blocks, guided runs, greedy codes, sizes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from varkd.backbones.arpg import ARPG, ARPGConfig, step_sizes
from varkd.errors import VarkdError
from varkd.rollout import Sampler, guidance_per_step
from varkd.types import Condition, Plan
from varkd.verify.golden import (
    Check,
    Golden,
    compare,
    described,
    forced_logits,
    greedy_codes,
    in_order,
    official_state,
    per_code,
)


@torch.no_grad()
def checks(golden: Golden) -> Iterator[Check]:
    size, state, tolerance = golden.info["config"], golden.state(), golden.info["tolerance"]
    inferred = ARPG.infer({name: tuple(tensor.shape) for name, tensor in state.items()})
    grid = (size["grid"], size["grid"])
    config = ARPGConfig(
        **inferred, grid=grid, num_heads=size["n_head"], rope_base=size["rope_base"], norm_eps=size["norm_eps"]
    )
    model = ARPG(config).eval()
    model.load_state_dict(state)
    yield from _sizes(model, size)
    yield official_state(model, state)

    codes_BL, condition = golden["codes"], Condition(golden["labels"])
    plan = model.plan(len(codes_BL), order_BL=golden["order"])
    logits = in_order(model.head(model(codes_BL, condition, plan)), plan)
    yield golden.compare("tf.logits", logits, tolerance["tf"])
    for name, run in golden.info["runs"].items():
        yield from _run(golden, model, condition, name, run)


def schedule(params: dict[str, Any]) -> tuple[tuple[int, ...], Tensor]:
    """Codes per step and guidance per step of one `schedule-arpg.json` entry."""
    sizes = step_sizes(params["N"], params["num_iter"], params["sample_schedule"])
    return sizes, guidance_per_step(
        _sampler(params), Plan(torch.arange(params["N"]).unsqueeze(0), sizes), ARPG.guidance
    )


def _run(golden: Golden, model: ARPG, condition: Condition, name: str, run: dict[str, Any]) -> Iterator[Check]:
    tolerance = golden.info["tolerance"]
    plan, sampler = _plan(model, golden[f"{name}.order"], condition, run), _sampler(run)
    yield from _check_sizes(golden, name, plan, run)
    if run["kind"] == "argmax":
        yield golden.compare(f"{name}.codes", greedy_codes(model, condition, plan, sampler), "exact")
        return
    codes_BL, block = golden[run["codes"]], name.replace("sample", "tf_block")
    guidance_S = guidance_per_step(sampler, plan, model.guidance)
    yield golden.compare(f"{name}.guidance", per_code(guidance_S, plan), tolerance["runs"])
    yield golden.compare(f"{name}.logits", forced_logits(model, codes_BL, condition, plan, sampler), tolerance["runs"])
    plan = _plan(model, golden[f"{block}.order"], condition, run)
    yield from _check_sizes(golden, block, plan, run)
    logits = in_order(model.head(model(codes_BL, condition, plan)), plan)
    yield golden.compare(f"{block}.logits", logits, tolerance["tf"])


def _plan(model: ARPG, order_L: Tensor, condition: Condition, run: dict[str, Any]) -> Plan:
    """Upstream draws one order for the whole batch."""
    order_BL = order_L.expand(len(condition), -1)
    return model.plan(len(condition), steps=run["num_iter"], order_BL=order_BL, schedule=run["sample_schedule"])


def _check_sizes(golden: Golden, name: str, plan: Plan, run: dict[str, Any]) -> Iterator[Check]:
    sizes = torch.tensor(plan.sizes)
    yield golden.compare(f"{name}.sizes", sizes, "exact")
    yield compare(f"{name}: tokens_per_step", sizes, torch.tensor(run["tokens_per_step"]), "exact")


def _sizes(model: ARPG, size: dict[str, Any]) -> Iterator[Check]:
    """Every size of the description against what the shapes say."""
    _, first = model.class_rows(model.config)
    rows = {"mask": model.vocab_size, "first_class": first, "null_class": first + model.null_label}
    ours = {
        "n_layer": model.config.num_layers,
        "dim": model.config.dim,
        "vocab_size": model.vocab_size,
        "num_classes": model.num_classes,
        "block_size": model.sequence_length,
        "head_dim": model.config.head_dim,
        "self_layers": len(model.layers.self_dec),
        "cross_layers": len(model.layers.cross_dec),
        "ffn_hidden": model.config.ffn_width,
        "null_label": model.null_label,
        "embedding_rows": {**rows, "unused": len(model.embeddings.weight) - 1},
    }
    yield from described(ours, size)


def _sampler(run: dict[str, Any]) -> Sampler:
    if run["cfg_schedule"] not in ("linear", "constant"):
        raise VarkdError(f"no check for the cfg_schedule '{run['cfg_schedule']}'")
    kind = "decoded_after" if run["cfg_schedule"] == "linear" else "constant"
    return Sampler(guidance=run["guidance_scale"], guidance_schedule=kind)
