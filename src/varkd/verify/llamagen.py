"""LlamaGen: teacher forcing, guided runs, greedy codes, guidance per step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from varkd.backbones.llamagen import LlamaGen, LlamaGenConfig
from varkd.rollout import Sampler, guidance_per_step
from varkd.types import Condition, Plan
from varkd.verify.golden import Check, Golden, forced_logits, greedy_codes


@torch.no_grad()
def checks(golden: Golden) -> Iterator[Check]:
    size = golden.info["config"]
    config = LlamaGenConfig(
        size["vocab_size"],
        size["num_classes"],
        (size["grid"], size["grid"]),
        size["n_layer"],
        size["dim"],
        size["n_head"],
        None,
        size["rope_base"],
        size["norm_eps"],
    )
    model = LlamaGen(config).eval()
    model.load_state_dict(golden.state())
    codes_BL, condition = golden["codes"], Condition(golden["labels"])
    plan = model.plan(len(codes_BL))
    tolerance = golden.info["tolerance"]
    yield golden.compare("tf.logits", model.head(model(codes_BL, condition, plan)), tolerance["tf"])
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
    """Codes per step and guidance per step of one `schedule-llamagen.json` entry."""
    plan = Plan(torch.arange(params["N"]).unsqueeze(0), (1,) * params["N"])
    return plan.sizes, guidance_per_step(_sampler(params), plan, LlamaGen.guidance)


def _sampler(run: dict[str, Any]) -> Sampler:
    return Sampler(guidance=run["cfg_scale"], guidance_interval=run["cfg_interval"])
