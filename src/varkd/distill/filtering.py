"""Which images are trained on at all: decided once, before training, from scores of two models.

Difference sampling (MiniPLM, Gu et al. 2024, 2410.17215): keep the images that the teacher finds likelier than a small
reference model does, so that its knowledge shapes the data instead of the loss.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from varkd.backbones.protocol import Backbone
from varkd.distill.schedule import check_range, words
from varkd.distill.scores import code_logp
from varkd.rollout import evaluating
from varkd.types import Batch
from varkd.world import Rng


@dataclass(frozen=True)
class AllImages:
    """Every training image."""

    kind: Literal["all_images"] = "all_images"

    @property
    def summary(self) -> str:
        return "every training image"

    @property
    def needs_teacher(self) -> bool:
        return False

    def kept(self, score_M: Tensor, label_M: Tensor) -> Tensor:
        """All of them."""
        del label_M
        return torch.arange(len(score_M))


@dataclass(frozen=True)
class DifferenceSampling:
    """The share `keep` of the images of every class with the largest NLL_reference - NLL_teacher (nats per code).

    The reference is the student at its start (`init`). Ranked within the class, so that the label marginal stays.
    """

    keep: float = 0.5
    kind: Literal["difference_sampling"] = "difference_sampling"

    def __post_init__(self) -> None:
        check_range("difference_sampling", "keep", self.keep, 0.01, 1)

    @property
    def summary(self) -> str:
        return (
            f"a share {words(self.keep)} of every class, chosen once: the images that the teacher finds likelier than "
            "the student at its start does"
        )

    @property
    def needs_teacher(self) -> bool:
        return True

    def kept(self, score_M: Tensor, label_M: Tensor) -> Tensor:
        """The images that are kept, ascending int64; at least one of each class."""
        kept = []
        for label in label_M.unique().tolist():
            image = (label_M == label).nonzero().squeeze(1)
            count = max(1, round(self.keep * len(image)))
            best = torch.argsort(score_M[image], descending=True, stable=True)[:count]
            kept.append(image[best])
        return torch.cat(kept).sort().values


@torch.no_grad()
def difference_scores(
    teacher: Backbone, reference: Backbone, batches: Iterable[Batch], seed: int = 0, chunk_rows: int = 2048
) -> Tensor:
    """log p(x) - log q(x), mean over the codes (nats), of every image of `batches` in turn: float32 (M,).

    Both models read an image under the same plan, which the reference draws.
    """
    found = [torch.zeros(0)]
    device = reference.head.weight.device
    with evaluating(teacher), evaluating(reference):
        for batch in batches:
            plan = reference.plan(len(batch), Rng(seed), batch.row_B)
            codes_BL = batch.codes_BL.to(device)
            condition = Batch(codes_BL, batch.label_B.to(device), batch.row_B).condition
            logp = [
                code_logp(model.head, model(codes_BL, condition, plan), codes_BL, chunk_rows)
                for model in (teacher, reference)
            ]
            found.append((logp[0] - logp[1]).mean(1).cpu())
    return torch.cat(found)
