"""The distillation loss of a micro-batch: select, then heads in chunks, then space, divergence, one normaliser.

The logits of a whole batch are never held. A chunk of rows is projected by both heads, every term is evaluated on it,
and its gradient is pushed back to the hidden states and the head at once; only (N, D) gradients survive the chunk.
Value and gradient equal the plain computation for every combination of parts and every chunk size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varkd.backbones.protocol import Backbone
from varkd.distill.contexts import merge
from varkd.distill.divergences import Rows
from varkd.distill.method import Method, Term, threshold_key
from varkd.distill.schedule import number
from varkd.distill.scores import Scores, chunks, teacher_scores
from varkd.distill.spaces import Products
from varkd.errors import VarkdError
from varkd.rollout import evaluating
from varkd.types import Context, Part
from varkd.world import Rng, World

DEFAULT_CHUNK_ROWS = 2048


@dataclass
class Stats:
    """Sums over micro-batches: `sums[name]` is (numerator, denominator); `scores[term]` holds (rows, L) by rank."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    scores: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, name: str, numerator: Tensor | float, denominator: Tensor | float) -> None:
        pair = torch.stack([torch.as_tensor(value, dtype=torch.float64).cpu() for value in (numerator, denominator)])
        self.sums[name] = self.sums.get(name, torch.zeros(2, dtype=torch.float64)) + pair

    def declare(self, terms: tuple[Term, ...], scores: Scores, part: Part) -> None:
        """Enter every name with nothing: a rank without rows of some source must still join the collectives."""
        for name in ("ess/student", "age/student", *(f"kept/{term.name}" for term in terms)):
            self.add(name, 0.0, 0.0)
        for term in terms:
            score_name = term.selection.score_name(term.space)
            if score_name is not None:
                empty = scores[score_name].new_zeros(0, part.codes_BL.shape[1])
                self.scores.setdefault(term.name, []).append(empty)

    def merge(self, other: Stats) -> None:
        for name, pair in other.sums.items():
            self.add(name, pair[0], pair[1])
        for name, parts in other.scores.items():
            self.scores.setdefault(name, []).extend(parts)

    def means(self, world: World) -> dict[str, float]:
        """Each name's numerator over its denominator, summed over ranks (names are the same on every rank)."""
        names = sorted(self.sums)
        if not names:
            return {}
        total = world.sum(torch.stack([self.sums[name] for name in names]))
        return {name: float(top / bottom) for name, (top, bottom) in zip(names, total, strict=True) if bottom > 0}

    def gathered_scores(self, world: World, terms: tuple[Term, ...]) -> dict[str, Tensor]:
        """Per term with a confidence selection: this step's scores of all ranks."""
        found = {}
        for term in terms:
            parts = self.scores.get(term.name)
            if term.selection.score_name(term.space) is not None and parts is not None:
                found[term.name] = world.gather_varied(torch.cat(parts))
        return found


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


@dataclass(frozen=True)
class LossInputs:
    """Everything of a step that the loss reads beside the micro-batch."""

    method: Method
    student: Backbone
    teacher: Backbone | None
    state: Mapping[str, Tensor]
    products: Products
    rng: Rng
    chunk_rows: int = DEFAULT_CHUNK_ROWS


def distill_loss(
    inputs: LossInputs, context: Context, denominators: Mapping[str, float], gradient_scale: float = 1.0
) -> tuple[Tensor, Stats]:
    """The loss of one micro-batch, to be summed over the micro-batches of an optimiser step.

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
        teacher_hidden_ND = _teacher_hidden(inputs, group.stacked)
        weights = _term_weights(inputs, group, teacher_hidden_ND, stats)
        total = total + _group_loss(inputs, group, hidden_BLD, teacher_hidden_ND, weights, denominators, stats)
    return total * gradient_scale, stats


@torch.no_grad()
def denominators(inputs: LossInputs, context: Context, world: World) -> dict[str, float]:
    """One denominator per term, over the whole optimiser step and all ranks; at least 1."""
    counts = []
    for term in inputs.method.terms:
        if term.normaliser == "total":
            counts.append(sum(part.codes_BL.numel() for part in context.parts if part.source in term.on))
        else:
            counts.append(_selected_mass(inputs, context, term))
    summed = world.sum(torch.tensor(counts, dtype=torch.float64)).clamp_min(1)
    return dict(zip([term.name for term in inputs.method.terms], summed.tolist(), strict=True))


def _selected_mass(inputs: LossInputs, context: Context, term: Term) -> float:
    alone = replace(inputs, method=replace(inputs.method, terms=(term,)))
    mass = 0.0
    for group in Group.all_of(context):
        weights = _term_weights(alone, group, _teacher_hidden(alone, group.stacked), Stats())
        mass += float(weights[term.name].double().sum())
    return mass


@torch.no_grad()
def _teacher_hidden(inputs: LossInputs, part: Part) -> Tensor | None:
    if inputs.teacher is None or not any(term.needs_teacher for term in inputs.method.terms):
        return None
    with evaluating(inputs.teacher):
        return inputs.teacher(part.codes_BL, part.condition, part.plan).flatten(0, 1)


@torch.no_grad()
def _term_weights(
    inputs: LossInputs, group: Group, teacher_hidden_ND: Tensor | None, stats: Stats
) -> dict[str, Tensor]:
    """Per term the weight of every row of the group, (N,): source, sequence weight and selection; not normalised."""
    terms = inputs.method.terms
    wanted = {name for term in terms if (name := term.selection.score_name(term.space))}
    scores: Scores = {}
    if wanted:
        assert inputs.teacher is not None and teacher_hidden_ND is not None
        scores = teacher_scores(wanted, inputs.teacher.head, teacher_hidden_ND, inputs.products, inputs.chunk_rows)
        scores = {name: score_N.view(group.stacked.codes_BL.shape) for name, score_N in scores.items()}
    found = {}
    stats.declare(terms, scores, group.stacked)
    for term in terms:
        weight_BL = torch.zeros(group.stacked.codes_BL.shape, device=group.stacked.codes_BL.device)
        for part, (begin, end) in zip(group.parts, group.bounds, strict=True):
            if part.source in term.on:
                mine = {name: score_BL[begin:end] for name, score_BL in scores.items()}
                weight_BL[begin:end] = _part_weight(inputs, term, part, mine, stats)
        found[term.name] = weight_BL.flatten()
    return found


def _part_weight(inputs: LossInputs, term: Term, part: Part, scores: Scores, stats: Stats) -> Tensor:
    threshold_L = inputs.state.get(threshold_key(term))
    selected_BL = term.selection(scores, part, term.space, threshold_L, inputs.rng)
    name = term.selection.score_name(term.space)
    if name is not None:
        by_rank = scores[name].gather(1, part.plan.order_BL)
        stats.scores.setdefault(term.name, []).append(by_rank)
    stats.add(f"kept/{term.name}", selected_BL.double().sum(), selected_BL.numel())
    if part.source == "student":
        # (sum w)^2 / (B sum w^2) over the whole step, where the weights have mean 1
        stats.add("ess/student", len(part), part.weight_B.double().square().sum())
        stats.add("age/student", part.age_B.sum(), len(part))
    return selected_BL * part.weight_B.unsqueeze(1)


def _group_loss(
    inputs: LossInputs, group: Group, hidden_BLD: Tensor, teacher_hidden_ND: Tensor | None,
    weights: Mapping[str, Tensor], denominators: Mapping[str, float], stats: Stats,
) -> Tensor:  # fmt: skip
    terms = inputs.method.terms
    scaled_TN = torch.stack([weights[t.name].double() * (number(t.weight) / denominators[t.name]) for t in terms])
    # Rows that no term selects need neither head: this saves compute as well as noise.
    row_N = (scaled_TN != 0).any(0).nonzero().squeeze(1)
    scaled_TN, code_N = scaled_TN[:, row_N], group.stacked.supervision_BL.flatten()[row_N]
    inverse_T = [1 / max(number(t.weight) / denominators[t.name], 1e-30) for t in terms]
    sums_T = torch.zeros(len(terms), dtype=torch.float64, device=code_N.device)

    def evaluate(student_NV: Tensor, rows: slice) -> Tensor:
        """The weighted sum of all terms over one chunk of rows."""
        teacher_NV = None
        if teacher_hidden_ND is not None and inputs.teacher is not None:
            with torch.no_grad():
                teacher_NV = inputs.teacher.head(teacher_hidden_ND[row_N[rows]])
        total = student_NV.new_zeros((), dtype=torch.float64)
        for index, term in enumerate(terms):
            weight_N = scaled_TN[index, rows]
            value_N = _term_value(term, student_NV, teacher_NV, Rows(code_N[rows]), inputs.products)
            # A row of weight 0 may hold anything, also a non-finite value, without reaching the sum.
            weighed = torch.where(weight_N != 0, value_N, 0.0).double() * weight_N
            total = total + weighed.sum()
            sums_T[index] += weighed.detach().sum() * inverse_T[index]
        return total

    hidden_ND = hidden_BLD.flatten(0, 1)[row_N]
    loss = chunked_head_loss(hidden_ND, inputs.student.head, evaluate, inputs.chunk_rows)
    for term, value in zip(terms, sums_T, strict=True):
        positions = sum(part.codes_BL.numel() for part in group.parts if part.source in term.on)
        stats.add(f"terms/{term.name}", value, positions)
    return loss


def _term_value(term: Term, student_NV: Tensor, teacher_NV: Tensor | None, rows: Rows, products: Products) -> Tensor:
    if teacher_NV is None and term.divergence.needs_teacher:
        raise VarkdError(f"the term '{term.name}' compares with a teacher: give teacher=RUN")
    value_N = torch.zeros((), device=student_NV.device)
    for view in term.space(student_NV, teacher_NV, rows, products):
        teacher_NK = cast(Tensor, view.teacher_NK)  # None only for a divergence that does not look at it
        value_N = value_N + view.weight * term.divergence(view.student_NK, teacher_NK, view.rows)
    return value_N


def chunked_head_loss(
    hidden_ND: Tensor, head: nn.Linear, evaluate: Callable[[Tensor, slice], Tensor], chunk_rows: int
) -> Tensor:
    """sum over chunks of evaluate(head(hidden[chunk]), chunk) without ever holding (N, V) logits.

    `evaluate` must be a sum over its rows. The gradient with respect to `hidden_ND` and the head's parameters is
    computed chunk by chunk in the forward pass and only scaled in the backward pass.
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
                if not wants_grad:
                    total += evaluate(logits, rows).detach()
                    continue
                with torch.enable_grad():
                    value = evaluate(logits.requires_grad_(), rows)
                    (grad_logits,) = torch.autograd.grad(value, logits)
                total += value.detach()
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
