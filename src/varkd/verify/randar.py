"""RandAR: weights there and back, teacher forcing, parallel steps replayed, guided runs, greedy codes, sizes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from varkd.backbones.randar import RandAR, RandARConfig, step_sizes
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
    inferred = RandAR.infer({name: tuple(tensor.shape) for name, tensor in state.items()})
    grid = (size["grid"], size["grid"])
    config = RandARConfig(
        **inferred, grid=grid, num_heads=size["n_head"], rope_base=size["rope_base"], norm_eps=size["norm_eps"]
    )
    model = RandAR(config).eval()
    model.load_state_dict(state)
    yield from _sizes(model, size)
    yield official_state(model, state)

    codes_BL, condition, order_BL = golden["codes"], Condition(golden["labels"]), golden["order"]
    plan = model.plan(len(codes_BL), order_BL=order_BL)
    logits = in_order(model.head(model(codes_BL, condition, plan)), plan)
    yield golden.compare("tf.logits", logits, tolerance["tf"])
    plan = model.plan(len(codes_BL), order_BL=order_BL, steps=_steps(golden.info["runs"]["sample"]))
    yield golden.compare("replay.sizes", torch.tensor(plan.sizes), "exact")
    logits = in_order(model.head(model(codes_BL, condition, plan)), plan)
    yield golden.compare("replay.logits", logits, tolerance["tf"])
    for name, run in golden.info["runs"].items():
        yield from _run(golden, model, condition, name, run)


def schedule(params: dict[str, Any]) -> tuple[tuple[int, ...], Tensor]:
    """Codes per step and guidance per step of one `schedule-randar.json` entry."""
    length, steps = params["N"], _steps(params)
    sizes = step_sizes(length, steps or length)
    return sizes, guidance_per_step(_sampler(params), Plan(torch.arange(length).unsqueeze(0), sizes), RandAR.guidance)


def _run(golden: Golden, model: RandAR, condition: Condition, name: str, run: dict[str, Any]) -> Iterator[Check]:
    tolerance, sampler = golden.info["tolerance"]["runs"], _sampler(run)
    plan = model.plan(len(condition), order_BL=golden[run["order"]], steps=_steps(run))
    sizes = torch.tensor(plan.sizes)
    if "tokens_per_step" in run:  # a run of one code a step has neither the list nor the tensor
        yield golden.compare(f"{name}.sizes", sizes, "exact")
        yield compare(f"{name}: tokens_per_step", sizes, torch.tensor(run["tokens_per_step"]), "exact")
    if run["kind"] == "argmax":
        yield golden.compare(f"{name}.codes", greedy_codes(model, condition, plan, sampler), "exact")
        return
    guidance_S = guidance_per_step(sampler, plan, model.guidance)
    yield golden.compare(f"{name}.guidance", per_code(guidance_S, plan), tolerance)
    logits = forced_logits(model, golden[run["codes"]], condition, plan, sampler)
    yield golden.compare(f"{name}.logits", logits, tolerance)


def _sizes(model: RandAR, size: dict[str, Any]) -> Iterator[Check]:
    """Every size of the description against what the shapes say."""
    ours = {
        "n_layer": model.config.num_layers,
        "dim": model.config.dim,
        "vocab_size": model.vocab_size,
        "num_classes": model.num_classes,
        "block_size": model.sequence_length,
        "head_dim": model.config.head_dim,
        "ffn_hidden": model.config.ffn_width,
        "null_label": model.null_label,
        "cls_token_num": 1,
    }
    yield from described(ours, size)


def _steps(run: dict[str, Any]) -> int | None:
    """-1 upstream is one code a step."""
    return None if run["num_inference_steps"] == -1 else run["num_inference_steps"]


def _sampler(run: dict[str, Any]) -> Sampler:
    start, end = run["cfg_scales"]
    return Sampler(guidance=end, guidance_start=start)
