"""Weights on student samples by how plausible the teacher finds them: sequences, or positions by their prefix."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from varkd.distill.bestof import BestOf
from varkd.distill.inputs import Prefixes, State, StepInputs
from varkd.distill.mixture import Mixture
from varkd.distill.prefixes import Rollout
from varkd.distill.replay import Replay
from varkd.distill.schedule import check_range
from varkd.distill.spaces import CodebookTables
from varkd.errors import VarkdError
from varkd.rollout import Sampler
from varkd.types import Batch, Context, Part, Source
from varkd.world import Rng


@dataclass(frozen=True)
class _Weighed(Prefixes):
    """Other contexts whose student rows get weights, from the log ratios of the whole step on all ranks."""

    contexts: Mixture | Rollout | Replay | BestOf

    @property
    def splices(self) -> bool:
        return self.contexts.splices

    @property
    def needs_teacher(self) -> bool:
        return True

    @property
    def needs_reference(self) -> bool:
        return self.contexts.needs_reference

    @property
    def sources(self) -> tuple[Source, ...]:
        return self.contexts.sources

    @property
    def samplers(self) -> tuple[Sampler, ...]:
        return self.contexts.samplers

    def no_reward(self, source: Source) -> str | None:
        return self.contexts.no_reward(source)

    def prepare(self, codebook_VE: Tensor) -> CodebookTables:
        return self.contexts.prepare(codebook_VE)

    def update(self, context: Context, state: State, rng: Rng) -> State:
        return self.contexts.update(context, state, rng)

    def __call__(self, batch: Batch, inputs: StepInputs) -> Context:
        context = self.contexts(batch, inputs)
        student = [part for part in context.parts if part.source == "student"]
        none = batch.row_B[:0]
        empty_0X = none.float().view(0, 1).expand(0, self._width(batch.codes_BL.shape[1]))
        ratio_BX = torch.cat([empty_0X, *(self._measure(part, inputs) for part in student)])
        row_B = torch.cat([none, *(part.row_B for part in student)])
        # Every rank takes part in both gathers, also one that holds no student row in this step.
        ratio_BX, row_B = inputs.world.gather_varied(ratio_BX), inputs.world.gather_varied(row_B)
        order = torch.argsort(row_B)  # so that nothing depends on the number of ranks
        row_B, weight_BX = row_B[order], self._weights(ratio_BX[order], inputs.rng)
        weigh = lambda part: self._weighed(part, weight_BX[torch.searchsorted(row_B, part.row_B)])
        return Context(tuple(weigh(part) if part.source == "student" else part for part in context.parts))

    @abstractmethod
    def _width(self, length: int) -> int:
        """How many numbers `_measure` takes of a sequence."""

    @abstractmethod
    def _measure(self, part: Part, inputs: StepInputs) -> Tensor:
        """The log ratios that the weights of some sequences hang on, (B, X)."""

    @abstractmethod
    def _weights(self, ratio_BX: Tensor, rng: Rng) -> Tensor:
        """Weights, (B, X), from the log ratios of all sequences of the step, in the order of their rows."""

    @abstractmethod
    def _weighed(self, part: Part, weight_BX: Tensor) -> Part:
        """`part` with its weights."""


@dataclass(frozen=True)
class Reweighted(_Weighed):
    """Sequence weights on student contexts by how plausible the teacher finds them.

    w(x) = clip(B softmax(kappa r(x)), 1/clip, clip) with r(x) the mean over positions of log p - log q, renormalized to
    mean 1. kappa = 0 is uniform; the number of codes L would be self-normalized importance weighting, which collapses
    on one sequence. So kappa is lowered, by bisection, until the effective sample size (sum w)^2 / sum w^2 is at least
    `ess_floor` of the batch. `shuffle=True` is the control: the same weights on the wrong sequences.
    An independent reading of "student samples with a reweighted distillation signal" (arXiv 2606.06078).
    """

    kappa: float = 4.0
    clip: float = 4.0
    ess_floor: float = 0.5
    shuffle: bool = False
    kind: Literal["reweighted"] = "reweighted"

    def __post_init__(self) -> None:
        check_range("reweighted", "ess_floor", self.ess_floor, 0, 1)
        if self.kappa < 0 or self.clip < 1:
            raise VarkdError(f"reweighted: need kappa >= 0 and clip >= 1, got {self.kappa} and {self.clip}")

    def _width(self, length: int) -> int:
        del length
        return 1

    def _measure(self, part: Part, inputs: StepInputs) -> Tensor:
        return log_ratio(part, inputs).unsqueeze(1)

    def _weights(self, ratio_BX: Tensor, rng: Rng) -> Tensor:
        if not len(ratio_BX):
            return ratio_BX
        weight_B = sequence_weights(ratio_BX.squeeze(1), self.kappa, self.clip, self.ess_floor)
        if self.shuffle:
            shuffled = torch.randperm(len(weight_B), generator=rng.generator("shuffle-weights"))
            weight_B = weight_B[shuffled.to(weight_B.device)]
        return weight_B.unsqueeze(1)

    def _weighed(self, part: Part, weight_BX: Tensor) -> Part:
        return replace(part, weight_B=weight_BX.squeeze(1))


@dataclass(frozen=True)
class PrefixReweighted(_Weighed):
    """Position weights on student contexts by how plausible the teacher finds the prefix, and only the prefix.

    w_t = clip(exp(kappa S), 0, clip) with S the sum of log p - log q over the codes of strictly earlier steps,
    renormalized over the batch to mean 1 at every generation rank. kappa = 1 is the importance weight that turns the
    student's prefixes into the teacher's (before clipping); 1 / L is mild. Late codes of drifted samples count less,
    early ones as before. Nothing keeps the effective sample size up: watch `ess/student`.
    """

    kappa: float = 0.05
    clip: float = 4.0
    kind: Literal["prefix_reweighted"] = "prefix_reweighted"

    def __post_init__(self) -> None:
        if self.kappa < 0 or not self.clip > 0:
            raise VarkdError(f"prefix_reweighted: need kappa >= 0 and clip > 0, got {self.kappa} and {self.clip}")

    def _width(self, length: int) -> int:
        return length

    def _measure(self, part: Part, inputs: StepInputs) -> Tensor:
        return part.plan.before(code_log_ratios(part, inputs)).gather(1, part.plan.order_BL)

    def _weights(self, ratio_BX: Tensor, rng: Rng) -> Tensor:
        del rng
        return prefix_weights(ratio_BX, self.kappa, self.clip)

    def _weighed(self, part: Part, weight_BX: Tensor) -> Part:
        return replace(part, position_weight_BL=weight_BX.gather(1, part.plan.rank_BL))


def code_log_ratios(part: Part, inputs: StepInputs) -> Tensor:
    """log p(code) - log q(code) at every position, in nats, float32 (B, L)."""
    return inputs.logp("teacher", part) - inputs.logp("student", part)


def log_ratio(part: Part, inputs: StepInputs) -> Tensor:
    """r(x) = mean over positions of log p(code) - log q(code), in nats, float32 (B,)."""
    return code_log_ratios(part, inputs).mean(1)


def prefix_weights(sum_BL: Tensor, kappa: float, clip: float) -> Tensor:
    """The weights of `PrefixReweighted` from prefix sums of log ratios: mean exactly 1 in every column."""
    return (kappa * sum_BL).clamp_max(math.log(clip)).softmax(0) * len(sum_BL)  # exp(...) alone may all underflow


def sequence_weights(ratio_B: Tensor, kappa: float, clip: float, ess_floor: float) -> Tensor:
    """The weights of `Reweighted`: mean exactly 1, effective sample size at least `ess_floor` * B."""

    def weights(strength: float) -> Tensor:
        clipped = ((strength * ratio_B).softmax(0) * len(ratio_B)).clamp(1 / clip, clip)
        return clipped / clipped.mean()

    strong = weights(kappa)
    if effective_share(strong) >= ess_floor:
        return strong
    low, high = 0.0, kappa
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if effective_share(weights(middle)) >= ess_floor else (low, middle)
    return weights(low)


def effective_share(weight_B: Tensor) -> float:
    """Effective sample size over the number of samples: (sum w)^2 / (B sum w^2)."""
    return float(weight_B.sum().square() / weight_B.square().sum() / len(weight_B))
