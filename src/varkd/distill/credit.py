"""Credit: what multiplies -log q(x_t) (or a divergence) at a position, `(scores, part) -> coefficient_BL`.

A coefficient is a detached number: a sampled reward, which needs codes that were drawn under a known probability. With
cross-entropy on the student's own samples it makes a policy gradient: `Reward` alone has the reverse KL of each step as
its mean (OPD); `FutureReturn` adds what the later steps say about this one (MiniLLM); `PrefixDiscrepancy` weighs
rewards by how far the prefix has drifted (IW-OPD). Sums over a prefix or a future run over strictly earlier or later
*steps* of the plan. r = log p(x) - log q(x) at the sampled code, in nats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from varkd.distill.schedule import Schedule, check_range, value_of, words
from varkd.distill.scores import Score, Scores, StudentLogp, TeacherLogp
from varkd.errors import VarkdError
from varkd.types import Part


@dataclass(frozen=True)
class NoCredit:
    """Every position speaks for itself."""

    kind: Literal["no_credit"] = "no_credit"
    reads: ClassVar[tuple[Score, ...]] = ()
    sampled: ClassVar[bool] = False

    @property
    def summary(self) -> str:
        return "1"

    def __call__(self, scores: Scores, part: Part) -> Tensor:
        del scores
        return torch.ones(part.codes_BL.shape, device=part.codes_BL.device)


@dataclass(frozen=True)
class Importance:
    """q(x) / b(x), at most `largest`: MiniLLM's weight. b is the probability that the code was drawn with."""

    largest: float = 10.0
    kind: Literal["importance"] = "importance"
    reads: ClassVar[tuple[Score, ...]] = (StudentLogp(),)
    sampled: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.largest > 0:
            raise VarkdError(f"importance: largest must be above 0, got {self.largest}")

    @property
    def summary(self) -> str:
        return f"q(x) / b(x), at most {words(self.largest)}; b is the probability that the code was drawn with"

    def __call__(self, scores: Scores, part: Part) -> Tensor:
        return _ratio(scores, part).clamp_max(self.largest)


@dataclass(frozen=True)
class Reward:
    """(q / b) r: with cross-entropy its mean gradient is that of the reverse KL at each step (OPD).

    Rewards whose ratio has left [1 - clip, 1 + clip] in the direction that they push count 0 (PPO); on fresh samples at
    temperature 1 the ratio is 1.
    """

    clip: float | None = 0.2
    kind: Literal["reward"] = "reward"
    reads: ClassVar[tuple[Score, ...]] = (TeacherLogp(), StudentLogp())
    sampled: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_clip("reward", self.clip)

    @property
    def summary(self) -> str:
        return f"the reward r = log p - log q of the sampled code, times q / b{_told(self.clip)}"

    def __call__(self, scores: Scores, part: Part) -> Tensor:
        return _clipped(_ratio(scores, part), _reward(scores), self.clip)


@dataclass(frozen=True)
class FutureReturn:
    """(q / b) R with R_t = sum over later steps of r, divided by how many codes those are (MiniLLM, eq. 9).

    r_t itself is left out: the exact single-step term (`Importance` with the reverse KL) already holds it. `scale`
    divides the rewards (0.5 in MiniLLM). With `mean=False` R is the plain sum, and `Reward(None)` + this one are the
    gradient of the sequence-level reverse KL.
    """

    mean: bool = True
    scale: float = 1.0
    clip: float | None = 0.2
    kind: Literal["future_return"] = "future_return"
    reads: ClassVar[tuple[Score, ...]] = (TeacherLogp(), StudentLogp())
    sampled: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_clip("future_return", self.clip)
        if not self.scale > 0:
            raise VarkdError(f"future_return: scale must be above 0, got {self.scale}")

    @property
    def summary(self) -> str:
        what = "mean" if self.mean else "sum"
        scale = "" if self.scale == 1 else f", divided by {words(self.scale)}"
        return f"the {what} of the rewards r = log p - log q of later steps{scale}, times q / b{_told(self.clip)}"

    def __call__(self, scores: Scores, part: Part) -> Tensor:
        reward_BL = _reward(scores)
        future_BL = part.plan.after(reward_BL) / self.scale
        if self.mean:
            future_BL = future_BL / part.plan.after(torch.ones_like(reward_BL)).clamp_min(1)
        return _clipped(_ratio(scores, part), future_BL, self.clip)


@dataclass(frozen=True)
class PrefixDiscrepancy:
    """(1 + gamma (1 - S_before / S)) (q / b) r, S the sum of |r| (IW-OPD, 2606.22600): early codes count more.

    A negative gamma turns it round (PW-OPSD's hypothesis). S_before runs over strictly earlier steps.
    """

    gamma: Schedule = 0.5
    clip: float | None = 0.2
    kind: Literal["prefix_discrepancy"] = "prefix_discrepancy"
    reads: ClassVar[tuple[Score, ...]] = (TeacherLogp(), StudentLogp())
    sampled: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_range("prefix_discrepancy", "gamma", self.gamma, -1, 10)
        _check_clip("prefix_discrepancy", self.clip)

    @property
    def summary(self) -> str:
        return (
            f"the reward r = log p - log q of the sampled code, times q / b{_told(self.clip)}; early "
            f"codes count more, by 1 + {words(self.gamma)} (1 - S_before / S), S the sum of |r|"
        )

    def __call__(self, scores: Scores, part: Part) -> Tensor:
        reward_BL = _reward(scores)
        weight_BL = _decayed(reward_BL.abs(), part, value_of(self.gamma))
        return weight_BL * _clipped(_ratio(scores, part), reward_BL, self.clip)


Credit = NoCredit | Importance | Reward | FutureReturn | PrefixDiscrepancy


def _decayed(gap_BL: Tensor, part: Part, gamma: float) -> Tensor:
    """1 + gamma (1 - S_before / S) for S the sum of `gap_BL`."""
    drift_BL = part.plan.before(gap_BL) / gap_BL.sum(1, keepdim=True).clamp_min(1e-12)
    return 1 + gamma * (1 - drift_BL)


def _reward(scores: Scores) -> Tensor:
    return scores[TeacherLogp()] - scores[StudentLogp()]


def _ratio(scores: Scores, part: Part) -> Tensor:
    """q(x) / b(x) per code."""
    if part.behavior_logp_BL is None:
        raise VarkdError("sampled rewards need codes with stored log-probabilities: use them on fresh student samples")
    return (scores[StudentLogp()] - part.behavior_logp_BL).exp()


def _clipped(ratio_BL: Tensor, reward_BL: Tensor, clip: float | None) -> Tensor:
    """ratio * reward, 0 where PPO's clipped objective is flat."""
    value_BL = ratio_BL * reward_BL
    if clip is None:
        return value_BL
    flat_BL = ((reward_BL > 0) & (ratio_BL > 1 + clip)) | ((reward_BL < 0) & (ratio_BL < 1 - clip))
    return torch.where(flat_BL, 0.0, value_BL)


def _told(clip: float | None) -> str:
    return "" if clip is None else f", clipped as in PPO beyond 1 +- {words(clip)}"


def _check_clip(owner: str, clip: float | None) -> None:
    if clip is not None and not clip > 0:
        raise VarkdError(f"{owner}: clip must be above 0 (or null for none), got {clip}")
