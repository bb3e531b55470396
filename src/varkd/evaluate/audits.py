"""What a method keeps: its own selection, applied to given sequences.

A selection by confidence may keep easy positions on which both models agree, and then nothing is learnt: so the share
of positions kept stands beside the share of the KL kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from varkd.backbones.protocol import Backbone
from varkd.distill.method import Method, Term
from varkd.distill.scores import Score, ScoreInputs, position_scores
from varkd.errors import VarkdError
from varkd.evaluate.diagnostics import CHUNK_ROWS, Sequences
from varkd.evaluate.intervals import Estimate, centered_curve
from varkd.rollout import evaluating
from varkd.types import Part, Source
from varkd.world import Rng


@torch.no_grad()
def kept_positions(
    method: Method,
    term: Term,
    source: Source,
    sequences: Sequences,
    student: Backbone,
    teacher: Backbone,
    state: Mapping[str, Tensor],
    codebook_tables: Mapping[str, Tensor],
    seed: int,
    batch_size: int = 128,
) -> Tensor:
    """Where the term's selection gives full weight: bool (B, L), raster order, on the CPU.

    `method` is the method at the end of training (`Method.at`), `state` what its last checkpoint remembers.

    Raises:
        VarkdError: a guided target, whose scores need both branches of the teacher.
    """
    if method.target.guided:
        raise VarkdError("the selection audit reads an unguided teacher: this method's target is guided")
    kept, rng, device = [], Rng(seed), sequences.codes_BL.device
    row_B = torch.arange(len(sequences), device=device)
    for chunk, row in zip(sequences.split(batch_size), row_B.split(batch_size), strict=True):
        part = Part.of(source, chunk.codes_BL, chunk.condition, chunk.plan, row)
        scores = _scores(method, term, part, student, teacher, codebook_tables, rng)
        weight_BL = term.selection(scores, part, term.space, term.threshold(state), rng)
        kept.append((weight_BL == 1).cpu())
    return torch.cat(kept)


def _scores(
    method: Method,
    term: Term,
    part: Part,
    student: Backbone,
    teacher: Backbone,
    codebook_tables: Mapping[str, Tensor],
    rng: Rng,
) -> dict[Score, Tensor]:
    wanted = term.selection.reads(term.space)
    with evaluating(teacher), evaluating(student):
        p_ND = teacher(part.codes_BL, part.condition, part.plan).flatten(0, 1)
        looks = any(score.reads_student for score in wanted)
        q_ND = student(part.codes_BL, part.condition, part.plan).flatten(0, 1) if looks else None
    length = part.codes_BL.shape[1]
    sides = ScoreInputs(
        part.codes_BL.flatten(),
        lambda rows: method.target(teacher.head(p_ND[rows]), None, None),
        None if q_ND is None else lambda rows: student.head(q_ND[rows]),
        rng.uniform("verify", part.row_B, 2 * length).view(-1, 2),
    )
    found = position_scores(wanted, sides, codebook_tables, CHUNK_ROWS)
    return {score: value_N.view(part.codes_BL.shape) for score, value_N in found.items()}


@dataclass(frozen=True)
class Kept:
    """The share of positions, and the share of their forward KL, that a selection keeps."""

    positions: Estimate
    kl: Estimate


def kept_share(kept_BL: Tensor, kl_BL: Tensor, resamples: int = 200, seed: int = 0) -> Kept:
    """Both shares, with intervals over sequences. The kept KL is 1 where there is no KL at all."""
    fraction_N = kept_BL.double().mean(1)
    mass_N, total_N = (kept_BL * kl_BL.double()).sum(1), kl_BL.double().sum(1)

    def statistic(counts_RN: Tensor) -> Tensor:
        total_R = counts_RN @ total_N
        share_R = torch.where(total_R > 1e-9, counts_RN @ mass_N / total_R.clamp_min(1e-9), 1.0)
        return torch.stack([counts_RN @ fraction_N / len(fraction_N), share_R], dim=1)

    curve = centered_curve(statistic, len(fraction_N), resamples, seed, bounds=(0, 1))
    return Kept(*(Estimate(*(float(part[i]) for part in curve)) for i in range(2)))
