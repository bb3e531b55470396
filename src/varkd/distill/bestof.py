"""Several samples for one label, of which the best is kept: what a stronger sampler would have drawn."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from varkd.distill.prefixes import Interleaved, PrefixRestart, Rollout, TokenMix
from varkd.distill.scene import Prefixes, Scene, merge
from varkd.errors import VarkdError
from varkd.rollout import Sampler
from varkd.types import Batch, Context, Part, Source
from varkd.world import Rng


@dataclass(frozen=True)
class BestOf(Prefixes):
    """Of `count` samples for each label, the one that the teacher rates highest.

    `score="difference"`: the mean over positions of log p - log r, r being the student as it was at the start of the
    run. Difference sampling (MiniPLM, 2410.17215) on samples instead of data: what makes an image likely under any
    model cancels. `"teacher"` is log p alone, which prefers smooth images without detail to others of the same class.
    """

    rollout: Rollout | TokenMix | Interleaved | PrefixRestart = Rollout()
    count: int = 4
    score: Literal["difference", "teacher"] = "difference"
    kind: Literal["best_of"] = "best_of"

    def __post_init__(self) -> None:
        if self.count < 1:
            raise VarkdError(f"best_of: count must be at least 1, got {self.count}")

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

    def __call__(self, batch: Batch, scene: Scene) -> Context:
        tries = [self.rollout(batch, replace(scene, rng=_nth(scene.rng, nth))).parts[0] for nth in range(self.count)]
        score_BC = torch.stack([self._score(part, scene) for part in tries], dim=1)
        # Row b of try c stands at place c B + b of all tries.
        chosen_B = score_BC.argmax(1) * len(batch) + torch.arange(len(batch), device=score_BC.device)
        return Context((merge(tries).select(chosen_B),))

    def _score(self, part: Part, scene: Scene) -> Tensor:
        logp_BL = scene.logp("teacher", part)
        if self.score == "difference":
            logp_BL = logp_BL - scene.logp("reference", part)
        return logp_BL.mean(1)


def _nth(rng: Rng, nth: int) -> Rng:
    """Other random numbers for every try; the first try has those of a plain rollout."""
    return rng if nth == 0 else replace(rng, seed=rng.generator(f"best-of/{nth}").initial_seed())
