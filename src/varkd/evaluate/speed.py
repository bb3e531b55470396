"""Samples per second of the decode loop (codes only; the tokenizer's decoder is the same for every model)."""

from __future__ import annotations

import statistics
import time

import torch

from varkd.backbones.protocol import Backbone
from varkd.rollout import Sampler, rollout
from varkd.types import Condition
from varkd.world import Rng


def samples_per_second(model: Backbone, sampler: Sampler, batch_size: int = 64, repeats: int = 3) -> float:
    """Median over `repeats` batches, after one warm-up batch."""
    device = model.head.weight.device
    row_B = torch.arange(batch_size, device=device)
    condition = Condition(row_B % model.num_classes)
    plan = sampler.plan(model, Rng(0), row_B)
    uniform_BL = Rng(0).uniform("speed", row_B, plan.order_BL.shape[1])
    seconds = []
    for _ in range(repeats + 1):
        _wait(device)
        begun = time.perf_counter()
        rollout(model, condition, plan, sampler, uniform_BL)
        _wait(device)
        seconds.append(time.perf_counter() - begun)
    return batch_size / statistics.median(seconds[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
