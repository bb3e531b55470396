"""AdamW with the field's parameter groups, a warm-up + cosine schedule, and an exponential moving average."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from varkd.distill.schedule import check_range
from varkd.errors import VarkdError


@dataclass(frozen=True)
class OptimizerConfig:
    """How weights move. `lr` rises linearly over `warmup` updates, then falls to `min_lr_ratio` lr along a cosine."""

    lr: float = 1e-3
    warmup: int = 20
    min_lr_ratio: float = 0.1
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    ema: float = 0.99

    def __post_init__(self) -> None:
        check_range("optim", "ema", self.ema, 0, 1)
        check_range("optim", "min_lr_ratio", self.min_lr_ratio, 0, 1)
        if not (self.lr > 0 and self.clip > 0 and self.warmup >= 0 and self.weight_decay >= 0):
            raise VarkdError("optim: need lr > 0, clip > 0, warmup >= 0 and weight_decay >= 0")

    def lr_at(self, step: int, updates: int) -> float:
        """The learning rate of update `step` (0-based) of `updates`."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        share = (step - self.warmup) / max(1, updates - self.warmup)
        return self.lr * (self.min_lr_ratio + (1 - self.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * share)))

    def build(self, model: nn.Module) -> torch.optim.AdamW:
        """AdamW that decays matrices (embeddings included) and leaves gains and biases alone."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, fused=True)


class Ema:
    """A moving average of the parameters: evaluation uses it, rollouts use the live weights.

    Early on the decay is (1 + n) / (10 + n), so that short runs are not dominated by their initialization.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.live = dict(model.named_parameters())
        self.average: dict[str, Tensor] = {name: p.detach().clone() for name, p in self.live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Follow the live weights after update `step` (0-based)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        live = [self.live[name].detach() for name in self.average]
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
            list(self.average.values()), live, 1 - decay
        )

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over saved averages (already laid out like the parameters)."""
        for name, value in self.average.items():
            value.copy_(state[name])
