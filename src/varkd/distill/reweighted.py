"""Sequence weights on student samples, by how plausible the teacher finds them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from varkd.distill.mixture import Mixture
from varkd.distill.prefixes import Rollout
from varkd.distill.replay import Replay
from varkd.distill.scene import Prefixes, Scene, State
from varkd.distill.schedule import check_range
from varkd.distill.scores import code_logp
from varkd.distill.spaces import Products
from varkd.errors import VarkdError
from varkd.rollout import Sampler, evaluating
from varkd.types import Batch, Context, Part, Source
from varkd.world import Rng


@dataclass(frozen=True)
class Reweighted(Prefixes):
    """Sequence weights on student contexts by how plausible the teacher finds them.

    w(x) = clip(B softmax(kappa r(x)), 1/clip, clip) with r(x) the mean over positions of log p - log q, renormalised to
    mean 1. kappa = 0 is uniform; the number of codes L would be self-normalised importance weighting, which collapses
    on one sequence. So kappa is lowered, by bisection, until the effective sample size (sum w)^2 / sum w^2 is at least
    `ess_floor` of the batch. `shuffle=True` is the control: the same weights on the wrong sequences.
    An independent reading of "student samples with a reweighted distillation signal" (arXiv 2606.06078).
    """

    contexts: Mixture | Rollout | Replay
    kappa: float = 4.0
    clip: float = 4.0
    ess_floor: float = 0.5
    shuffle: bool = False
    kind: Literal["reweighted"] = "reweighted"

    def __post_init__(self) -> None:
        check_range("reweighted", "ess_floor", self.ess_floor, 0, 1)
        if self.kappa < 0 or self.clip < 1:
            raise VarkdError(f"reweighted: need kappa >= 0 and clip >= 1, got {self.kappa} and {self.clip}")

    @property
    def splices(self) -> bool:
        return self.contexts.splices

    @property
    def needs_teacher(self) -> bool:
        return True

    @property
    def sources(self) -> tuple[Source, ...]:
        return self.contexts.sources

    @property
    def samplers(self) -> tuple[Sampler, ...]:
        return self.contexts.samplers

    def no_reward(self, source: Source) -> str | None:
        return self.contexts.no_reward(source)

    def prepare(self, codebook_VE: Tensor) -> Products:
        return self.contexts.prepare(codebook_VE)

    def __call__(self, batch: Batch, scene: Scene) -> Context:
        context = self.contexts(batch, scene)
        student = [part for part in context.parts if part.source == "student"]
        none = batch.codes_BL.new_zeros(0)
        ratio_B = torch.cat([none.float(), *(log_ratio(part, scene) for part in student)])
        row_B = torch.cat([none, *(part.row_B for part in student)])
        # Every rank takes part in both gathers, also one that holds no student row in this step.
        weight_of_row = self._weights(scene.world.gather_varied(ratio_B), scene.world.gather_varied(row_B), scene.rng)
        weighed = [replace(p, weight_B=weight_of_row(p.row_B)) if p.source == "student" else p for p in context.parts]
        return Context(tuple(weighed))

    def update(self, context: Context, state: State, rng: Rng) -> State:
        return self.contexts.update(context, state, rng)

    def _weights(self, ratio_B: Tensor, row_B: Tensor, rng: Rng) -> Callable[[Tensor], Tensor]:
        """A function from global rows to their weights, from the whole step's log ratios."""
        order = torch.argsort(row_B)
        row_B, ratio_B = row_B[order], ratio_B[order]  # so that the shuffle does not depend on the number of ranks
        weight_B = sequence_weights(ratio_B, self.kappa, self.clip, self.ess_floor) if len(ratio_B) else ratio_B
        if self.shuffle:
            shuffled = torch.randperm(len(weight_B), generator=rng.generator("shuffle-weights"))
            weight_B = weight_B[shuffled.to(weight_B.device)]
        return lambda rows: weight_B[torch.searchsorted(row_B, rows)]


@torch.no_grad()
def log_ratio(part: Part, scene: Scene) -> Tensor:
    """r(x) = mean over positions of log p(code) - log q(code), in nats, float32 (B,)."""
    logp = []
    for model in (scene.model("teacher"), scene.student):
        with evaluating(model):
            hidden_BLD = model(part.codes_BL, part.condition, part.plan)
        logp.append(code_logp(model.head, hidden_BLD, part.codes_BL, scene.chunk_rows))
    return (logp[0] - logp[1]).mean(1)


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
