"""What a method keeps, and whom it favors: its own selection and its own sequence weights, applied to given sequences.

A selection by confidence may keep easy positions on which both models agree, and then nothing is learnt: so the share
of positions kept stands beside the share of the KL kept. Weights may rest on a few sequences, or on those nearest to
the training images: so the effective sample size stands beside rank correlations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from varkd.backbones.protocol import Backbone
from varkd.distill.method import Method, Term, threshold_key
from varkd.distill.reweighted import effective_share, sequence_weights
from varkd.distill.scores import ScoreInputs, of_student, position_scores
from varkd.distill.target import Guided
from varkd.errors import VarkdError
from varkd.evaluate.diagnostics import CHUNK_ROWS, Sequences
from varkd.evaluate.intervals import Estimate, centered_bootstrap, centered_curve
from varkd.rollout import evaluating
from varkd.types import Part, Source
from varkd.world import Rng


@torch.no_grad()
def kept_positions(
    method: Method, term: Term, source: Source, sequences: Sequences, student: Backbone, teacher: Backbone,
    state: Mapping[str, Tensor], codebook_tables: Mapping[str, Tensor], seed: int, batch_size: int = 128,
) -> Tensor:  # fmt: skip
    """Where the term's selection gives full weight: bool (B, L), raster order, on the CPU.

    `method` is the method at the end of training (`Method.at`), `state` what its last checkpoint remembers.

    Raises:
        VarkdError: a guided target, whose scores need both branches of the teacher.
    """
    if isinstance(method.target, Guided):
        raise VarkdError("the selection audit reads an unguided teacher: this method's target is guided")
    kept, rng, device = [], Rng(seed), sequences.codes_BL.device
    row_B = torch.arange(len(sequences), device=device)
    for chunk, row in zip(sequences.split(batch_size), row_B.split(batch_size), strict=True):
        part = Part.of(source, chunk.codes_BL, chunk.condition, chunk.plan, row)
        scores = _scores(method, term, part, student, teacher, codebook_tables, rng)
        weight_BL = term.selection(scores, part, term.space, state.get(threshold_key(term)), rng)
        kept.append((weight_BL == 1).cpu())
    return torch.cat(kept)


def _scores(
    method: Method, term: Term, part: Part, student: Backbone, teacher: Backbone, codebook_tables: Mapping[str, Tensor],
    rng: Rng,
) -> dict[str, Tensor]:  # fmt: skip
    names = term.selection.score_names(term.space)
    with evaluating(teacher), evaluating(student):
        p_ND = teacher(part.codes_BL, part.condition, part.plan).flatten(0, 1)
        looks = any(map(of_student, names))
        q_ND = student(part.codes_BL, part.condition, part.plan).flatten(0, 1) if looks else None
    length = part.codes_BL.shape[1]
    sides = ScoreInputs(
        part.codes_BL.flatten(),
        lambda rows: method.target(teacher.head(p_ND[rows]), None, None),
        None if q_ND is None else lambda rows: student.head(q_ND[rows]),
        rng.uniform("verify", part.row_B, 2 * length).view(-1, 2),
    )
    found = position_scores(names, sides, codebook_tables, CHUNK_ROWS)
    return {name: score_N.view(part.codes_BL.shape) for name, score_N in found.items()}


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


@dataclass(frozen=True)
class Weights:
    """Sequence weights of optimizer steps of `batch` rows each, and the mean effective share of those steps."""

    weight_N: Tensor
    effective: float
    batch: int


def step_weights(ratio_N: Tensor, batch: int, kappa: float, clip: float, ess_floor: float) -> Weights:
    """The weights that `Reweighted` would give, step by step, as training does: each has mean 1 in its own step."""
    batch = max(1, min(batch, len(ratio_N)))
    steps = ratio_N.float().split(batch)
    steps = steps[:-1] if len(steps) > 1 and len(steps[-1]) < batch else steps  # a short step is none of training's
    weights = [sequence_weights(step, kappa, clip, ess_floor) for step in steps]
    effective = sum(effective_share(weight) for weight in weights) / len(weights)
    return Weights(torch.cat(weights), effective, batch)


def rank_correlation(first_N: Tensor, second_N: Tensor, resamples: int = 200, seed: int = 0) -> Estimate:
    """Spearman's correlation: Pearson's of the ranks, ties sharing their mean rank; 0 where one of them is constant."""
    a_N, b_N = _ranks(first_N), _ranks(second_N)
    moments_N5 = torch.stack([a_N, b_N, a_N * a_N, b_N * b_N, a_N * b_N], dim=1)

    def statistic(counts_RN: Tensor) -> Tensor:
        a, b, aa, bb, ab = (counts_RN @ moments_N5 / len(a_N)).unbind(1)
        scale = ((aa - a * a) * (bb - b * b)).clamp_min(0).sqrt()
        return torch.where(scale > 1e-12, (ab - a * b) / scale.clamp_min(1e-12), 0.0)

    return centered_bootstrap(statistic, len(a_N), resamples, seed, bounds=(-1, 1))


def _ranks(value_N: Tensor) -> Tensor:
    """Ranks from 0 to 1, centered."""
    value_N = value_N.double()
    _, inverse_N, count_U = torch.unique(value_N, return_inverse=True, return_counts=True)
    last_U = count_U.cumsum(0).double()
    rank_N = (last_U - (count_U.double() - 1) / 2)[inverse_N]
    return (rank_N - rank_N.mean()) / len(value_N)
