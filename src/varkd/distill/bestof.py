"""Several samples for one label, of which the best is kept: what a stronger sampler would have drawn."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from varkd.distill.inputs import Cost, Prefixes, StepInputs
from varkd.distill.prefixes import MixedRollout, MixtureSampling, Rollout, SpeculativeSampling
from varkd.errors import VarkdError
from varkd.rollout import Sampler
from varkd.types import Batch, Context, Part, Source

FAR = 2**40
"""From one try of a row to its next: as another row, far from every real one, it has random numbers of its own."""


@dataclass(frozen=True)
class BestOf(Prefixes):
    """Of `count` samples for each label, the one that the teacher rates highest.

    `score="difference"`: the mean over positions of log p - log r, r being the student as it was at the start of the
    run. Difference sampling (MiniPLM, 2410.17215) on samples instead of data: what makes an image likely under any
    model cancels. `"teacher"` is log p alone, which prefers smooth images without detail to others of the same class.
    `shuffle=True` is the control: the scores are randomly permuted among a label's samples.
    All are decoded in one pass, so the cache takes `count` times the memory of a plain rollout's.
    """

    rollout: Rollout | MixtureSampling | SpeculativeSampling | MixedRollout = Rollout()
    count: int = 4
    score: Literal["difference", "teacher"] = "difference"
    shuffle: bool = False
    kind: Literal["best_of"] = "best_of"
    label: ClassVar[str] = "{rollout}, best of {count}"

    def __post_init__(self) -> None:
        if self.count < 1:
            raise VarkdError(f"best_of: count must be at least 1, got {self.count}")

    @property
    def summary(self) -> str:
        best = "log p - log r, r the student at its start" if self.score == "difference" else "log p"
        dealt = ", the scores randomly permuted" if self.shuffle else ""
        return f"{self.rollout.summary}; of {self.count} for each label, the one with the largest {best}{dealt}"

    @property
    def cost(self) -> Cost:
        reads = Cost(teacher_read=1.0, student_read=float(self.needs_reference))
        return (self.rollout.cost + reads).times(self.count)

    @property
    def needs_teacher(self) -> bool:
        return True

    @property
    def needs_reference(self) -> bool:
        return self.score == "difference"

    @property
    def sources(self) -> tuple[Source, ...]:
        return self.rollout.sources

    @property
    def sampler(self) -> Sampler:
        return self.rollout.sampler

    @property
    def samplers(self) -> tuple[Sampler, ...]:
        return self.rollout.samplers

    def no_reward(self, source: Source) -> str | None:
        return self.rollout.no_reward(source) or "the best of several is not a sample of a known probability"

    def __call__(self, batch: Batch, inputs: StepInputs) -> Context:
        # All tries in one pass, try by try: decoding is bound by its steps, not by its rows (benchmarks/best_of.py).
        nth_C1 = torch.arange(self.count, device=batch.row_B.device).unsqueeze(1)
        every = batch.select(torch.arange(len(batch), device=batch.row_B.device).repeat(self.count))
        made = self.rollout(replace(every, row_B=(batch.row_B + nth_C1 * FAR).flatten()), inputs).parts[0]
        score_BC = self._score(made, inputs).view(self.count, len(batch)).T
        if self.shuffle:
            chance_BC = inputs.rng.uniform("best-of/shuffle", batch.row_B, self.count)
            score_BC = score_BC.gather(1, chance_BC.argsort(1))
        chosen_B = score_BC.argmax(1) * len(batch) + torch.arange(len(batch), device=score_BC.device)
        return Context((replace(made.select(chosen_B), row_B=batch.row_B),))

    def _score(self, part: Part, inputs: StepInputs) -> Tensor:
        logp_BL = inputs.logp("teacher", part)
        if self.score == "difference":
            logp_BL = logp_BL - inputs.logp("reference", part)
        return logp_BL.mean(1)
