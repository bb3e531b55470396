"""What the teacher says at a position: `(logits_NV, null_NV, scale_N) -> logits_NV`, applied chunk by chunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from varkd.backbones.protocol import Backbone, GuidanceKind
from varkd.distill.schedule import Schedule, check_range, value_of
from varkd.distill.spaces import at_least_float32
from varkd.errors import VarkdError
from varkd.rollout import Sampler, filter_logits, guidance_per_step
from varkd.types import Part
from varkd.world import Rng


@dataclass(frozen=True)
class Plain:
    """The teacher's conditional distribution."""

    kind: Literal["plain"] = "plain"

    def __call__(self, logits_NV: Tensor, null_NV: Tensor | None, scale_N: Tensor | None) -> Tensor:
        del null_NV, scale_N
        return logits_NV


@dataclass(frozen=True)
class Temperature:
    """The teacher at another temperature than the student: below 1 its target is sharper, and the student with it."""

    temperature: Schedule = 0.8
    kind: Literal["temperature"] = "temperature"

    def __post_init__(self) -> None:
        check_range("temperature", "temperature", self.temperature, 1e-3, 1e3)

    def __call__(self, logits_NV: Tensor, null_NV: Tensor | None, scale_N: Tensor | None) -> Tensor:
        del null_NV, scale_N
        return at_least_float32(logits_NV) / value_of(self.temperature)


@dataclass(frozen=True)
class Truncated:
    """The teacher without its tail: top-k, then top-p, renormalized. The student is taught to sample like a filter."""

    top_k: int = 0
    top_p: float = 0.95
    kind: Literal["truncated"] = "truncated"

    def __post_init__(self) -> None:
        if not (self.top_k >= 0 and 0 < self.top_p <= 1):
            raise VarkdError(
                f"truncated: need top_k >= 0 and top_p in (0, 1], got top_k {self.top_k} and top_p {self.top_p}"
            )

    def __call__(self, logits_NV: Tensor, null_NV: Tensor | None, scale_N: Tensor | None) -> Tensor:
        del null_NV, scale_N
        return filter_logits(at_least_float32(logits_NV), self.top_k, self.top_p)


@dataclass(frozen=True)
class Guided:
    """The guided teacher, null + s (cond - null): a student of it needs one pass where the teacher needs two.

    `scale` is the largest s while an image is decoded; how s gets there is `schedule`, by default the teacher family's
    own (`rollout.guidance_per_step`). With `highest`, each sequence draws its own scale from [scale, highest] and a
    student with `model.guidance_conditioned` is told which (Meng et al. 2023, 2210.03142). Where the label
    was dropped both branches are the null branch, and so is the target.
    """

    scale: float = 1.5
    highest: float | None = None
    schedule: Literal["family", GuidanceKind] = "family"
    start: float = 1.0
    power: float = 1.0
    kind: Literal["guided"] = "guided"

    def __post_init__(self) -> None:
        if self.scale < 0 or (self.highest is not None and self.highest < self.scale):
            raise VarkdError(f"guided: need 0 <= scale <= highest, got {self.scale} and {self.highest}")

    def __call__(self, logits_NV: Tensor, null_NV: Tensor | None, scale_N: Tensor | None) -> Tensor:
        if null_NV is None or scale_N is None:
            raise ValueError("a guided target needs the null branch and the scales")
        null = at_least_float32(null_NV)
        return null + scale_N.unsqueeze(1) * (at_least_float32(logits_NV) - null)

    def guidance_B(self, row_B: Tensor, rng: Rng) -> Tensor | None:
        """This step's scale for each global row, float32 (B,); None where one scale serves all."""
        if self.highest is None:
            return None
        return self.scale + (self.highest - self.scale) * rng.uniform("guidance", row_B, 1).squeeze(1)

    def scale_BL(self, part: Part, teacher: Backbone) -> Tensor:
        """The scale at every position of `part`, by the schedule, float32 (B, L)."""
        given_B = part.condition.guidance_B
        largest = [self.scale] if given_B is None else given_B.tolist()
        scale_XS = torch.stack([
            guidance_per_step(self._sampler(each), part.plan, teacher.guidance) for each in largest
        ])  # fmt: skip
        return scale_XS.to(part.codes_BL.device).expand(len(part), -1).gather(1, part.plan.step_BL)

    def _sampler(self, scale: float) -> Sampler:
        return Sampler(
            guidance=scale, guidance_schedule=self.schedule, guidance_start=self.start, guidance_power=self.power
        )


Target = Plain | Temperature | Truncated | Guided
