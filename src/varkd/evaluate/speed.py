"""Samples per second of the decode loop (codes only; the tokenizer's decoder is the same for every model), codes per
second of a forward pass, and memory."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from varkd.backbones.protocol import Backbone
from varkd.rollout import Sampler, evaluating, rollout
from varkd.types import Condition
from varkd.world import Rng


def samples_per_second(
    model: Backbone, sampler: Sampler, batch_size: int = 64, repeats: int = 3, planner: Backbone | None = None
) -> float:
    """Median over `repeats` batches, after one warm-up batch, under plans of `planner` (by default the model's own)."""
    row_B, condition = _rows(model, batch_size)
    plan = sampler.plan(planner or model, Rng(0), row_B)
    uniform_BL = Rng(0).uniform("speed", row_B, plan.order_BL.shape[1])
    device = model.head.weight.device
    return batch_size / _median(lambda: rollout(model, condition, plan, sampler, uniform_BL), repeats, device)


@torch.no_grad()
def forward_codes_per_second(model: Backbone, planner: Backbone, batch_size: int = 64, repeats: int = 5) -> float:
    """Codes per second of one forward pass without gradient, all logits included; median after one warm-up."""
    row_B, condition = _rows(model, batch_size)
    plan = planner.plan(batch_size, Rng(0), row_B)
    codes_BL = torch.zeros_like(plan.order_BL)
    run = lambda: model.head(model(codes_BL, condition, plan))
    with evaluating(model):
        return codes_BL.numel() / _median(run, repeats, model.head.weight.device)


def peak_memory(device: torch.device) -> float | None:
    """MB at most held so far: by tensors on a CUDA device, by this whole process on the CPU; None if no one knows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _rows(model: Backbone, batch_size: int) -> tuple[Tensor, Condition]:
    row_B = torch.arange(batch_size, device=model.head.weight.device)
    return row_B, Condition(row_B % model.num_classes)


def _median(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Seconds of a call, after one to warm up."""
    seconds = []
    for _ in range(repeats + 1):
        _wait(device)
        begun = time.perf_counter()
        run()
        _wait(device)
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
