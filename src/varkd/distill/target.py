"""What the teacher says at a position: `(logits_NV, null_NV, scale_N) -> logits_NV`, applied chunk by chunk."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from varkd.backbones.protocol import Backbone, GuidanceKind
from varkd.distill.logspace import at_least_float32
from varkd.distill.schedule import Schedule, check_range, value_of, words
from varkd.errors import VarkdError
from varkd.rollout import Sampler, filter_logits, guidance_per_step
from varkd.types import Part
from varkd.world import Rng


class TargetRule(ABC):
    """Base of all targets."""

    guided: ClassVar[bool] = False
    """Whether it needs the teacher's null branch (and the scale at every position) beside the conditional one."""
    excludes: ClassVar[bool] = False
    """Whether it may give codes no mass that the teacher does not exclude itself."""

    @property
    @abstractmethod
    def summary(self) -> str:
        """What the student is compared with, in words and with its settings."""

    @abstractmethod
    def __call__(self, logits_NV: Tensor, null_NV: Tensor | None, scale_N: Tensor | None) -> Tensor: ...

    @property
    def most_codes(self) -> int | None:
        """How many of the likeliest codes have mass at most; None where there is no such number."""
        return None

    @property
    def per_row_guidance(self) -> bool:
        """Whether every sequence has a guidance scale of its own, which the student must be told."""
        return False

    @property
    def one_scale(self) -> float | None:
        """The guidance scale of all sequences, where a guided target has one for all."""
        return None

    def guidance_B(self, row_B: Tensor, rng: Rng) -> Tensor | None:
        """This step's scale for each global row, float32 (B,); None where one scale serves all."""
        del row_B, rng
        return None

    def scale_BL(self, part: Part, teacher: Backbone) -> Tensor:
        """The scale at every position of `part`, float32 (B, L): 1, the conditional branch alone, unless guided."""
        del teacher
        return torch.ones_like(part.codes_BL, dtype=torch.float32)


@dataclass(frozen=True)
class Plain(TargetRule):
    """The teacher's conditional distribution."""

    kind: Literal["plain"] = "plain"

    @property
    def summary(self) -> str:
        return "the teacher's own distribution"

    def __call__(self, logits_NV: Tensor, null_NV: Tensor | None, scale_N: Tensor | None) -> Tensor:
        del null_NV, scale_N
        return logits_NV


@dataclass(frozen=True)
class Temperature(TargetRule):
    """The teacher at another temperature than the student: below 1 its target is sharper, and the student with it."""

    temperature: Schedule = 0.8
    kind: Literal["temperature"] = "temperature"

    def __post_init__(self) -> None:
        check_range("temperature", "temperature", self.temperature, 1e-3, 1e3)

    @property
    def summary(self) -> str:
        return f"the teacher's distribution at temperature {words(self.temperature)}"

    def __call__(self, logits_NV: Tensor, null_NV: Tensor | None, scale_N: Tensor | None) -> Tensor:
        del null_NV, scale_N
        return at_least_float32(logits_NV) / value_of(self.temperature)


@dataclass(frozen=True)
class Truncated(TargetRule):
    """The teacher without its tail: top-k, then top-p, renormalized. The student is taught to sample like a filter."""

    top_k: int = 0
    top_p: float = 0.95
    kind: Literal["truncated"] = "truncated"
    excludes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (self.top_k >= 0 and 0 < self.top_p <= 1):
            raise VarkdError(
                f"truncated: need top_k >= 0 and top_p in (0, 1], got top_k {self.top_k} and top_p {self.top_p}"
            )

    @property
    def summary(self) -> str:
        sets = [f"its {self.top_k} likeliest codes"] if self.top_k else []
        sets += [f"its nucleus of mass {words(self.top_p)}"] if self.top_p < 1 else []
        return f"the teacher's distribution over {' and '.join(sets) or 'all codes'}, renormalized"

    @property
    def most_codes(self) -> int | None:
        return self.top_k or None

    def __call__(self, logits_NV: Tensor, null_NV: Tensor | None, scale_N: Tensor | None) -> Tensor:
        del null_NV, scale_N
        return filter_logits(at_least_float32(logits_NV), self.top_k, self.top_p)


@dataclass(frozen=True)
class Guided(TargetRule):
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
    guided: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.scale < 0 or (self.highest is not None and self.highest < self.scale):
            raise VarkdError(f"guided: need 0 <= scale <= highest, got {self.scale} and {self.highest}")

    @property
    def summary(self) -> str:
        high = "" if self.highest is None else f" to {words(self.highest)}, drawn for each sequence"
        start = "" if self.start == 1 else f", from {words(self.start)}"
        power = "" if self.power == 1 else f", power {words(self.power)}"
        course = f"{self.schedule} schedule{start}{power}"
        return f"the guided teacher, null + s (cond - null), scale {words(self.scale)}{high} ({course})"

    def __call__(self, logits_NV: Tensor, null_NV: Tensor | None, scale_N: Tensor | None) -> Tensor:
        if null_NV is None or scale_N is None:
            raise ValueError("a guided target needs the null branch and the scales")
        null = at_least_float32(null_NV)
        return null + scale_N.unsqueeze(1) * (at_least_float32(logits_NV) - null)

    @property
    def per_row_guidance(self) -> bool:
        return self.highest is not None

    @property
    def one_scale(self) -> float | None:
        return self.scale if self.highest is None else None

    def guidance_B(self, row_B: Tensor, rng: Rng) -> Tensor | None:
        if self.highest is None:
            return None
        return self.scale + (self.highest - self.scale) * rng.uniform("guidance", row_B, 1).squeeze(1)

    def scale_BL(self, part: Part, teacher: Backbone) -> Tensor:
        """The scale at every position of `part`, by the schedule, float32 (B, L)."""
        given_B = part.condition.guidance_B
        largest = [self.scale] if given_B is None else given_B.tolist()
        scale_XS = torch.stack(
            [guidance_per_step(self._sampler(each), part.plan, teacher.guidance) for each in largest]
        )
        return scale_XS.to(part.codes_BL.device).expand(len(part), -1).gather(1, part.plan.step_BL)

    def _sampler(self, scale: float) -> Sampler:
        return Sampler(
            guidance=scale, guidance_schedule=self.schedule, guidance_start=self.start, guidance_power=self.power
        )


Target = Plain | Temperature | Truncated | Guided
