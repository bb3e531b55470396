"""The distillation loss of a micro-batch: select, then heads in chunks, then space, divergence, one normalizer.

The logits of a whole batch are never held. A chunk of rows is projected by both heads, every term is evaluated on it,
and its gradient is pushed back to the hidden states and the head at once; only (N, D) gradients survive the chunk.
Value and gradient equal the plain computation for every combination of parts and every chunk size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate, pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varkd.distill.audit import Stats, kept_divergence, sequence_stats, teacher_drift
from varkd.distill.divergences import TargetRows
from varkd.distill.inputs import StepInputs, merge
from varkd.distill.logspace import log_softmax, to_logits
from varkd.distill.method import Term
from varkd.distill.schedule import value_of
from varkd.distill.scores import Score, ScoreInputs, Scores, StudentLogp, TeacherLogp, chunks, position_scores
from varkd.distill.skew import SequenceSkew
from varkd.distill.spaces import CodebookTables, Comparison
from varkd.distill.teachers import TeacherRows, live_rows
from varkd.errors import VarkdError
from varkd.rollout import evaluating
from varkd.types import Context, Part


@dataclass(frozen=True)
class Group:
    """Parts with the same step sizes, stacked for one forward pass; `bounds` are their row ranges."""

    stacked: Part
    parts: tuple[Part, ...]
    bounds: tuple[tuple[int, int], ...]

    @classmethod
    def all_of(cls, context: Context) -> list[Group]:
        by_sizes: dict[tuple[int, ...], list[Part]] = {}
        for part in context.parts:
            by_sizes.setdefault(part.plan.sizes, []).append(part)
        return [cls._stack(parts) for parts in by_sizes.values()]

    @classmethod
    def _stack(cls, parts: list[Part]) -> Group:
        ends = list(accumulate((len(part) for part in parts), initial=0))
        return cls(merge(parts), tuple(parts), tuple(pairwise(ends)))


def distill_loss(
    inputs: StepInputs, context: Context, denominators: Mapping[str, float], gradient_scale: float = 1.0
) -> tuple[Tensor, Stats]:
    """The loss of one micro-batch, to be summed over the micro-batches of an optimizer step.

    Args:
        inputs: the method (schedules already turned into numbers), the models, state and products.
        context: one of `Context.micro_batches`.
        denominators: per term, from `denominators` over the whole step.
        gradient_scale: factor of the loss (the number of ranks, where gradients are averaged over ranks).

    Returns:
        A scalar with gradient (zero, but attached, when nothing is selected), and detached statistics.
    """
    total, stats = torch.zeros((), device=inputs.student.head.weight.device), Stats()
    for group in Group.all_of(context):
        hidden_BLD = inputs.student(group.stacked.codes_BL, group.stacked.condition, group.stacked.plan)
        teacher = _teacher_rows(inputs, group.stacked)
        rows = _term_rows(inputs, group, teacher, hidden_BLD.detach().flatten(0, 1), stats)
        if inputs.audit:
            _audit(inputs, group, hidden_BLD.detach().flatten(0, 1), teacher, rows, stats)
        total = total + _group_loss(inputs, group, hidden_BLD, teacher, rows, denominators, stats)
    return total * gradient_scale, stats


@torch.no_grad()
def denominators(inputs: StepInputs, context: Context) -> dict[str, float]:
    """One denominator per term, over the whole optimizer step and all ranks; at least 1."""
    counts = []
    for term in inputs.method.terms:
        if term.normalizer == "total":
            counts.append(sum(int(term.positions_BL(part).sum()) for part in context.parts))
        else:
            counts.append(_selected_mass(inputs, context, term))
    summed = inputs.world.sum(torch.tensor(counts, dtype=torch.float64)).clamp_min(1)
    return dict(zip([term.name for term in inputs.method.terms], summed.tolist(), strict=True))


def _selected_mass(inputs: StepInputs, context: Context, term: Term) -> float:
    alone = replace(inputs, method=replace(inputs.method, terms=(term,)), audit=False)
    mass = 0.0
    for group in Group.all_of(context):
        student_hidden_ND = None
        if term.reads_student:
            with evaluating(inputs.student):
                part = group.stacked
                student_hidden_ND = inputs.student(part.codes_BL, part.condition, part.plan).flatten(0, 1)
        rows = _term_rows(alone, group, _teacher_rows(alone, group.stacked), student_hidden_ND, Stats())
        mass += float(rows[term.name].weight_N.double().sum())
    return mass


def _teacher_rows(inputs: StepInputs, part: Part) -> TeacherRows | None:
    """The word of the teacher, live or cached, on `part`; None where no term asks for it."""
    if not any(term.needs_teacher for term in inputs.method.terms):
        return None
    if inputs.cache is not None:
        return inputs.cache.rows(part, inputs.method.target)
    return None if inputs.teacher is None else live_rows(inputs.teacher, part, inputs.method.target)


@dataclass(frozen=True)
class TermRows:
    """What a term makes of every row of a group: its weight (source, sequence, selection, credit; not normalized), the
    skew of its sequence where there is one, and for an audit its kept share (-1 on rows of other sources)."""

    weight_N: Tensor
    alpha_N: Tensor | None = None
    kept_N: Tensor | None = None

    def select(self, row_N: Tensor | slice) -> TermRows:
        others = (None if value_N is None else value_N[row_N] for value_N in (self.alpha_N, self.kept_N))
        return TermRows(self.weight_N[row_N], *others)


@torch.no_grad()
def _term_rows(
    inputs: StepInputs, group: Group, teacher: TeacherRows | None, student_hidden_ND: Tensor | None, stats: Stats
) -> dict[str, TermRows]:
    """Weights and skews per term."""
    terms, shape = inputs.method.terms, group.stacked.codes_BL.shape
    scores = _scores(inputs, group.stacked, teacher, student_hidden_ND)
    found = {}
    stats.declare(terms, group.stacked, inputs.audit)
    for part in group.parts:
        sequence_stats(part, stats)
    for term in terms:
        weight_BL = torch.zeros(shape, device=group.stacked.codes_BL.device)
        alpha_BL = torch.ones_like(weight_BL) if term.skew else None
        audited = inputs.audit and not term.selection.keeps_all
        kept_BL = torch.full_like(weight_BL, -1.0) if audited else None
        for part, (begin, end) in zip(group.parts, group.bounds, strict=True):
            if part.source in term.on:
                mine = {score: value_BL[begin:end] for score, value_BL in scores.items()}
                selected_BL = _part_selection(inputs, term, part, mine, stats) * term.positions_BL(part)
                weight_BL[begin:end] = selected_BL * part.weight_B.unsqueeze(1) * term.credit(mine, part)
                if alpha_BL is not None and term.skew:
                    alpha_BL[begin:end] = _part_skew(inputs, term, term.skew, part, mine, stats)
                if kept_BL is not None:
                    kept_BL[begin:end] = term.selection.kept_share(selected_BL)
        others = (None if value_BL is None else value_BL.flatten() for value_BL in (alpha_BL, kept_BL))
        found[term.name] = TermRows(weight_BL.flatten(), *others)
    return found


def _scores(
    inputs: StepInputs, part: Part, teacher: TeacherRows | None, student_hidden_ND: Tensor | None
) -> dict[Score, Tensor]:
    """Every score that some term reads, (B, L) each."""
    wanted = list(dict.fromkeys(score for term in inputs.method.terms for score in term.reads))
    if not wanted:
        return {}
    shape, uniform_N2 = part.codes_BL.shape, None
    if any(score.draws for score in wanted):
        uniform_N2 = inputs.rng.uniform("verify", part.row_B, 2 * shape[1]).view(-1, 2)
    student = None
    if student_hidden_ND is not None:
        head, hidden_ND = inputs.student.head, student_hidden_ND
        student = lambda rows: head(hidden_ND[rows])
    codes = part.supervision_BL.flatten(), part.codes_BL.flatten()
    sides = ScoreInputs(codes[0], teacher.logits if teacher else None, student, uniform_N2, seen_N=codes[1])
    found = position_scores(wanted, sides, inputs.codebook_tables, inputs.chunk_rows)
    return {score: value_N.view(shape) for score, value_N in found.items()}


def _part_selection(inputs: StepInputs, term: Term, part: Part, scores: Scores, stats: Stats) -> Tensor:
    selected_BL = term.selection(scores, part, term.space, term.threshold(inputs.state), inputs.rng)
    if (remembering := term.selection.remembers) is not None:
        stats.observe(term.key(remembering), remembering.observed(scores, part, term.space))
    stats.add(f"kept/{term.name}", (selected_BL == 1).double().sum(), selected_BL.numel())
    for name, (numerator, denominator) in term.selection.statistics(selected_BL, part).items():
        stats.add(f"{name}/{term.name}", numerator, denominator)
    if term.rewarded:
        reward_BL = scores[TeacherLogp()] - scores[StudentLogp()]
        stats.add(f"reward/{term.name}", reward_BL.double().sum(), reward_BL.numel())
    return selected_BL


def _part_skew(inputs: StepInputs, term: Term, skew: SequenceSkew, part: Part, scores: Scores, stats: Stats) -> Tensor:
    gap_B1 = skew.observed(scores, part, term.space)
    alpha_B1 = skew.alpha(gap_B1, inputs.state.get(term.key(skew)))
    stats.observe(term.key(skew), gap_B1)
    stats.add(f"skew/{term.name}", alpha_B1.double().sum(), len(alpha_B1))
    return alpha_B1.expand(part.codes_BL.shape)


def _group_loss(
    inputs: StepInputs,
    group: Group,
    hidden_BLD: Tensor,
    teacher: TeacherRows | None,
    rows_of: Mapping[str, TermRows],
    denominators: Mapping[str, float],
    stats: Stats,
) -> Tensor:
    terms = inputs.method.terms
    factor_T = [value_of(term.weight) / denominators[term.name] for term in terms]
    scaled_TN = torch.stack([rows_of[t.name].weight_N.double() * f for t, f in zip(terms, factor_T, strict=True)])
    # Rows that no term selects need neither head: this saves compute as well as noise.
    row_N = (scaled_TN != 0).any(0).nonzero().squeeze(1)
    scaled_TN, code_N = scaled_TN[:, row_N], group.stacked.supervision_BL.flatten()[row_N]
    chosen = {name: rows.select(row_N) for name, rows in rows_of.items()}
    sums_T = torch.zeros(len(terms), dtype=torch.float64, device=code_N.device)
    scale_T = torch.tensor([max(factor, 1e-30) for factor in factor_T], dtype=torch.float64, device=code_N.device)

    weighted = _compiled() if inputs.compiled else _weighted

    def evaluate(student_NV: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """The weighted sum of all terms over one chunk of rows, and its gradient with respect to the logits."""
        teacher_NV = None if teacher is None else teacher.logits(row_N[rows])
        about = [TargetRows(code_N[rows], chosen[term.name].select(rows).alpha_N) for term in terms]
        summed_T, gradient_NV = weighted(
            terms, student_NV, teacher_NV, about, scaled_TN[:, rows], inputs.codebook_tables
        )
        sums_T.add_(summed_T / scale_T)
        return summed_T.sum(), gradient_NV

    hidden_ND = hidden_BLD.flatten(0, 1)[row_N]
    loss = chunked_head_loss(hidden_ND, inputs.student.head, evaluate, inputs.chunk_rows)
    for term, value in zip(terms, sums_T, strict=True):
        positions = sum(int(term.positions_BL(part).sum()) for part in group.parts)
        stats.add(f"terms/{term.name}", value, positions)
    return loss


def _weighted(
    terms: tuple[Term, ...],
    student_NV: Tensor,
    teacher_NV: Tensor | None,
    rows_T: list[TargetRows],
    weight_TN: Tensor,
    codebook_tables: CodebookTables,
) -> tuple[Tensor, Tensor]:
    """Of logits: each term's weighted sum over the rows, float64 (T,), and the gradient of their total, (N, V)."""
    student_NV = log_softmax(student_NV)
    teacher_NV = None if teacher_NV is None else log_softmax(teacher_NV).to(student_NV.dtype)
    sums, gradient_NV = [], None
    for term, about, weight_N in zip(terms, rows_T, weight_TN, strict=True):
        value_N, term_NV = _term_gradient(term, student_NV, teacher_NV, about, codebook_tables)
        term_NV.mul_(weight_N.to(term_NV.dtype).unsqueeze(1))
        if len(terms) > 1:  # a row of weight 0 may hold anything, also what is not finite, and must not count
            value_N = torch.where(weight_N != 0, value_N, 0.0)
            term_NV.masked_fill_((weight_N == 0).unsqueeze(1), 0.0)
        sums.append((value_N.double() * weight_N).sum())
        gradient_NV = term_NV if gradient_NV is None else gradient_NV.add_(term_NV)
    assert gradient_NV is not None
    return torch.stack(sums), to_logits(gradient_NV, student_NV)


@cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor]]:
    """`_weighted` with its dozens of passes over (N, V) fused into a few."""
    return torch.compile(_weighted, dynamic=True)


@torch.no_grad()
def _audit(
    inputs: StepInputs,
    group: Group,
    hidden_ND: Tensor,
    teacher: TeacherRows | None,
    rows_of: Mapping[str, TermRows],
    stats: Stats,
) -> None:
    """Numbers for the log only: the student's drift, and how much divergence each selection keeps."""
    length = group.stacked.codes_BL.shape[1]
    for part, (begin, _) in zip(group.parts, group.bounds, strict=True):
        if teacher is not None:
            logits = lambda rows, at=begin * length: teacher.plain_logits(slice(at + rows.start, at + rows.stop))
            teacher_drift(part, logits, inputs.chunk_rows, stats)
    audited = [(t, kept_N) for t in inputs.method.terms if (kept_N := rows_of[t.name].kept_N) is not None]
    if not audited:
        return
    code_N = group.stacked.supervision_BL.flatten()
    row_N = (torch.stack([kept_N for _, kept_N in audited]) >= 0).any(0).nonzero().squeeze(1)
    for chunk in chunks(len(row_N), inputs.chunk_rows):
        rows = row_N[chunk]
        student_NV = log_softmax(inputs.student.head(hidden_ND[rows]))
        teacher_NV = None if teacher is None else log_softmax(teacher.logits(rows))
        with torch.autocast(hidden_ND.device.type, enabled=False):  # as in the loss
            for term, kept_N in audited:
                about = TargetRows(code_N[rows], rows_of[term.name].select(rows).alpha_N)
                value_N = _term_value(term, student_NV, teacher_NV, about, inputs.codebook_tables)
                kept_divergence(term, value_N, kept_N[rows], stats)


def _term_value(
    term: Term, student_NV: Tensor, teacher_NV: Tensor | None, rows: TargetRows, codebook_tables: CodebookTables
) -> Tensor:
    """The value (N,) of a term, of log-probabilities."""
    value_N = torch.zeros((), device=student_NV.device)
    for each in _comparisons(term, student_NV, teacher_NV, rows, codebook_tables):
        teacher_NK = cast(Tensor, each.teacher_NK)  # None only for a divergence that does not look at it
        value_N = value_N + each.weight * term.divergence(each.student_NK, teacher_NK, each.rows)
    return value_N


def _term_gradient(
    term: Term, student_NV: Tensor, teacher_NV: Tensor | None, rows: TargetRows, codebook_tables: CodebookTables
) -> tuple[Tensor, Tensor]:
    """The value (N,) of a term, and its gradient (N, V) with respect to the student's log-probabilities."""
    value_N, gradient_NV = torch.zeros((), device=student_NV.device), None
    for each in _comparisons(term, student_NV, teacher_NV, rows, codebook_tables):
        teacher_NK = cast(Tensor, each.teacher_NK)
        value_N = value_N + each.weight * term.divergence(each.student_NK, teacher_NK, each.rows)
        part_NV = each.back(term.divergence.gradient(each.student_NK, teacher_NK, each.rows))
        part_NV = part_NV if each.weight == 1 else part_NV.mul_(each.weight)
        gradient_NV = part_NV if gradient_NV is None else gradient_NV.add_(part_NV)
    assert gradient_NV is not None
    return value_N, gradient_NV


def _comparisons(
    term: Term, student_NV: Tensor, teacher_NV: Tensor | None, rows: TargetRows, codebook_tables: CodebookTables
) -> list[Comparison]:
    if teacher_NV is None and term.divergence.needs_teacher:
        raise VarkdError(f"the term '{term.name}' compares with a teacher: give teacher=RUN")
    return term.space(student_NV, teacher_NV, rows, codebook_tables)


def chunked_head_loss(
    hidden_ND: Tensor, head: nn.Linear, evaluate: Callable[[Tensor, slice], tuple[Tensor, Tensor]], chunk_rows: int
) -> Tensor:
    """sum over chunks of evaluate(head(hidden[chunk]), chunk) without ever holding (N, V) logits.

    `evaluate` returns a sum over its rows, and the gradient of that sum with respect to the logits it was given; it
    runs without autograd. The gradient with respect to `hidden_ND` and the head's parameters is computed chunk by chunk
    in the forward pass and only scaled in the backward pass.
    """
    return _ChunkedHead.apply(hidden_ND, head.weight, head.bias, evaluate, chunk_rows)  # type: ignore[no-any-return]


class _ChunkedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, evaluate, chunk_rows):
        device = hidden_ND.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VD.dtype
        wants_grad = any(ctx.needs_input_grad[:3])
        weight = weight_VD.detach().to(dtype)
        bias = None if bias_V is None else bias_V.detach().to(dtype)
        grad_hidden, grad_weight = torch.zeros_like(hidden_ND), torch.zeros_like(weight_VD)
        grad_bias = None if bias_V is None else torch.zeros_like(bias_V)
        total = torch.zeros((), dtype=torch.float64, device=hidden_ND.device)
        with torch.autocast(device, enabled=False):
            for rows in chunks(len(hidden_ND), chunk_rows):
                hidden = hidden_ND[rows].detach().to(dtype)
                logits = F.linear(hidden, weight, bias)
                value, grad_logits = evaluate(logits, rows)
                total += value
                if not wants_grad:
                    continue
                grad_logits = grad_logits.to(dtype)
                grad_hidden[rows] = (grad_logits @ weight).to(hidden_ND.dtype)
                grad_weight += grad_logits.T @ hidden
                if grad_bias is not None:
                    grad_bias += grad_logits.sum(0)
        ctx.grads = (grad_hidden, grad_weight, grad_bias)
        return total.to(torch.promote_types(hidden_ND.dtype, torch.float32))

    @staticmethod
    def backward(ctx, *grad_outputs):
        scaled = [None if grad is None else grad * grad_outputs[0] for grad in ctx.grads]
        return (*scaled, None, None)
