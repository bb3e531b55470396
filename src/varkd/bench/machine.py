"""What this device can do at best, measured: bytes per second and FLOP/s; and the bounds that follow from it.

A decode step reads its weights and the cache once, and computes two FLOPs for each weight and position: it takes no
less than the slower of the two. A training step takes no less than its FLOPs. Both are lower bounds: activations, the
optimizer's state, launches and whatever does not overlap come on top.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from varkd.backbones.protocol import Backbone

Precision = Literal["fp32", "bf16"]
"""Of what is computed; where weights stay in float32, bf16 means autocast."""
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
_REPEATS = 5
_ONCE = ("ada_lin", "cls_embedding", "class_emb", "guidance_embedding")
"""Layers that read the class only: a decode needs them once, not in each step."""


@dataclass(frozen=True)
class Machine:
    """Bytes per second of a large copy (read and written), and FLOP/s of a large matrix product."""

    device: str
    threads: int
    torch: str
    bandwidth: float
    peak_fp32: float
    peak_bf16: float

    @classmethod
    def measure(cls, device: torch.device, copied_bytes: int, side: int) -> Machine:
        """Best of a few runs each, a second or two in all.

        Args:
            copied_bytes: of the buffer that is copied; larger than the caches, or the figure is theirs.
            side: of the square matrices that are multiplied.
        """
        source = torch.ones(copied_bytes // 4, device=device)
        target = torch.empty_like(source)
        bandwidth = 2 * copied_bytes / _best(lambda: target.copy_(source), device)
        peaks = []
        for dtype in DTYPES.values():
            a, b = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
            peaks.append(2 * side**3 / _best(lambda a=a, b=b: a @ b, device))
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        return cls(name, torch.get_num_threads(), torch.__version__, bandwidth, *peaks)

    def peak(self, precision: Precision) -> float:
        return self.peak_bf16 if precision == "bf16" else self.peak_fp32

    def seconds(self, flops: float, precision: Precision) -> float:
        """The bound of something that only computes."""
        return flops / self.peak(precision)

    def rollout_seconds(self, model: Backbone, rows: int, sizes: Iterable[int], precision: Precision) -> float:
        """The bound of a decode of `rows` sequences (both branches of guidance counted) with these step sizes."""
        weights, total, seen = decode_weights(model), 0.0, 0
        width = torch.finfo(DTYPES[precision]).bits // 8
        per_slot = cached_numbers(model)
        for size in sizes:
            moved = width * (weights + rows * seen * per_slot)
            computed = 2 * rows * size * (weights + seen * per_slot)  # two products per cached number and query
            total += max(moved / self.bandwidth, computed / self.peak(precision))
            seen += size
        return total


def autocast_to(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def decode_weights(model: nn.Module) -> int:
    """Numbers in the matrices that every decode step multiplies by; embeddings are looked up, not read."""
    return sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not any(part in name for part in _ONCE)
    )


def cached_numbers(model: Backbone) -> int:
    """Keys and values of one slot. ARPG's second half of layers shares one key and value (`backbones.arpg`)."""
    config: Any = model.config
    layers = config.num_layers // 2 + 1 if model.family == "arpg" else config.num_layers
    return 2 * layers * config.dim


def forward_flops(model: Backbone) -> float:
    """Of one sequence, head included: two for each weight and position, and attention's two products of L x L."""
    config, length = model.config, model.sequence_length
    return 2.0 * length * decode_weights(model) + 4.0 * length**2 * config.dim * config.num_layers


def step_flops(cost: dict[str, float], student: Backbone, teacher: Backbone | None, batch: int) -> float:
    """Of one update, by the passes that its method makes (`Method.cost`); a backward pass counts two forward ones."""
    own = (3 * cost["student_train"] + cost["student_read"] + cost["student_decode"]) * forward_flops(student)
    taught = 0.0 if teacher is None else (cost["teacher_read"] + cost["teacher_decode"]) * forward_flops(teacher)
    return batch * (own + taught)


def _best(run: Callable[[], object], device: torch.device) -> float:
    found = []
    for _ in range(_REPEATS + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begun = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - begun)
    return min(found[1:])
