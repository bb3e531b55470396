"""Audits: they change nothing, count all rows, also those that no term reads, and speak up where they should."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from reference import FirstHalf, step_inputs
from varkd.distill import loss as module
from varkd.distill.audit import guard_rails
from varkd.distill.divergences import CrossEntropy, ForwardKL
from varkd.distill.inputs import StepInputs
from varkd.distill.loss import Stats, denominators, distill_loss
from varkd.distill.method import Method, Term
from varkd.distill.mixture import Mixture, Share
from varkd.distill.prefixes import Data, Rollout
from varkd.distill.selection import Accepted, Random, Selection
from varkd.distill.spaces import Clusters
from varkd.distill.target import Target, Truncated
from varkd.types import Context
from varkd.world import Rng, World

RNG = Rng(0, 3)
MIXTURE = Mixture((Share(Data(), 0.5), Share(Rollout(), 0.5)))


def inputs_of(
    student, teacher, terms: tuple[Term, ...], batch, contexts=MIXTURE, **other
) -> tuple[StepInputs, Context]:
    method = Method(terms, contexts, **other)
    context = contexts(batch, step_inputs(student, teacher, {}, RNG))
    codebook_tables = method.prepare(torch.randn(12, 3, generator=torch.Generator().manual_seed(0)))
    return StepInputs(
        method, student, teacher, {}, RNG, codebook_tables=codebook_tables, chunk_rows=7, audit=True
    ), context


def step(inputs: StepInputs, context: Context, micro_batches: int = 1) -> tuple[Tensor, list[Tensor], dict[str, float]]:
    totals, stats, total = denominators(inputs, context), Stats(), torch.zeros(())
    inputs.student.zero_grad()
    for micro in context.micro_batches(micro_batches):
        value, found = distill_loss(inputs, micro, totals)
        value.backward()
        total = total + value.detach()
        stats.merge(found)
    return total, [parameter.grad.clone() for parameter in inputs.student.parameters()], stats.collect(World()).means


@torch.no_grad()
def laws(inputs: StepInputs, context: Context, source: str) -> tuple[Tensor, Tensor, Tensor]:
    """log p and log q on the rows of one source, and their codes."""
    (part,) = [part for part in context.parts if part.source == source]
    read = lambda model: model.head(model(part.codes_BL, part.condition, part.plan)).log_softmax(-1)
    return read(inputs.teacher), read(inputs.student), part.codes_BL


@pytest.mark.parametrize("floor", [0.0, 0.3])
@pytest.mark.parametrize("source", ["data", "student"])
def test_the_kept_divergence_by_hand(student, teacher, batch, floor: float, source):
    """With floor 0 the loss skips rows, and the audit must not; rows of the other source are none of its business."""
    terms = (Term("kd", ForwardKL(), on=(source,), selection=FirstHalf(floor)), Term("ce", CrossEntropy()))
    inputs, context = inputs_of(student, teacher, terms, batch)
    for count in (1, 3, 8):
        means = step(inputs, context, count)[2]
        p, q, _ = laws(inputs, context, source)
        kl_BL = (p.exp() * (p - q)).sum(2)
        assert means["kept_kl/kd"] == pytest.approx(float(kl_BL[:, :3].sum() / kl_BL.sum()), rel=1e-9)
        assert means["kept/kd"] == 0.5 and "kept_kl/ce" not in means, "a term without a selection keeps everything"


@pytest.mark.parametrize("credit_free_weight", [0.2, 3.0])
def test_weights_of_terms_and_sequences_do_not_count(student, teacher, batch, credit_free_weight: float):
    term = Term("kd", ForwardKL(), on=("student",), selection=FirstHalf(), weight=credit_free_weight)
    inputs, context = inputs_of(student, teacher, (term,), batch)
    plain = step(inputs, context)[2]["kept_kl/kd"]
    odd = replace(context.parts[1], weight_B=torch.rand(4) * 2)
    assert step(inputs, Context((context.parts[0], odd)))[2]["kept_kl/kd"] == pytest.approx(plain, rel=1e-12)


def test_a_soft_selection_counts_by_its_height_above_the_floor(student, teacher, batch):
    selection = Accepted("code", floor=0.2)
    inputs, context = inputs_of(student, teacher, (Term("kd", ForwardKL(), selection=selection),), batch, Data())
    p, q, codes_BL = laws(inputs, context, "data")
    ratio_BL = (p - q).gather(2, codes_BL.unsqueeze(2)).squeeze(2).exp()
    kl_BL, height_BL = (p.exp() * (p - q)).sum(2), ratio_BL.clamp_max(1)
    expected = float((kl_BL * height_BL).sum() / kl_BL.sum())
    assert step(inputs, context)[2]["kept_kl/kd"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("target", [None, Truncated(top_p=0.5)])
def test_the_drift_is_that_of_the_teacher_itself(student, teacher, batch, target: Target | None):
    inputs, context = inputs_of(
        student, teacher, (Term("kd", ForwardKL()),), batch, **({} if target is None else {"target": target})
    )
    means = step(inputs, context, 3)[2]
    p, _, codes_BL = laws(inputs, context, "student")
    nll = -p.gather(2, codes_BL.unsqueeze(2)).mean()
    entropy = -(p.exp() * p).sum(2).mean()
    assert means["teacher_nll/student"] == pytest.approx(float(nll), rel=1e-6)
    assert means["teacher_surprise/student"] == pytest.approx(float(nll - entropy), rel=1e-5)


def test_the_teachers_own_samples_do_not_surprise_it(teacher, make_batch):
    terms = (Term("kd", ForwardKL()),)
    inputs, context = inputs_of(teacher.requires_grad_(True), teacher, terms, make_batch(600), Rollout())
    with torch.no_grad():
        stats = distill_loss(inputs, context, {"kd": 1.0})[1].collect(World()).means
    assert abs(stats["teacher_surprise/student"]) < 0.05


@pytest.mark.parametrize("selection", [Random(0.5, 0.0), Random(0.5, 0.1), Accepted("nucleus", floor=0.0)])
def test_an_audit_changes_no_bit(student, teacher, batch, selection: Selection):
    term = Term("kd", ForwardKL(), selection=selection, space=Clusters(3, 0.3), normalizer="selected")
    inputs, context = inputs_of(student, teacher, (term, Term("ce", CrossEntropy(), ("data",))), batch)
    value, gradient, means = step(inputs, context, 2)
    plain_value, plain_gradient, plain_means = step(replace(inputs, audit=False), context, 2)
    assert torch.equal(value, plain_value)
    assert all(torch.equal(one, other) for one, other in zip(gradient, plain_gradient, strict=True))
    more = {"kept_kl/kd", "teacher_nll/student", "teacher_surprise/student"}
    assert set(means) == set(plain_means) | more and not more & set(plain_means)
    assert all(means[name] == value for name, value in plain_means.items())


def test_without_an_audit_rows_are_still_skipped(student, teacher, batch, monkeypatch):
    inputs, context = inputs_of(student, teacher, (Term("kd", ForwardKL(), selection=FirstHalf()),), batch)
    monkeypatch.setattr(module, "_audit", lambda *_: pytest.fail("an audit that nobody asked for"))
    step(replace(inputs, audit=False), context)


def test_a_run_without_a_teacher_is_audited_too(student, batch):
    inputs, context = inputs_of(student, None, (Term("ce", CrossEntropy(), selection=FirstHalf()),), batch)
    means = step(inputs, context)[2]
    assert 0 < means["kept_kl/ce"] < 1 and "teacher_nll/student" not in means


def test_guard_rails():
    fine = {"kept_kl/kd": 0.1, "kept/kd": 0.01, "loss": 0.0, "terms/kd": 0.0}
    assert guard_rails(fine, warm=True) == {}
    bad = {"kept_kl/kd": 0.099, "kept_kl/other": 0.0}
    found = guard_rails(bad, warm=True)
    assert set(found) == set(bad) and all("\n" not in text for text in found.values())
    assert "'kd' keeps 9.9% of its divergence (less than 10%)" in found["kept_kl/kd"]
    assert guard_rails(bad, warm=False) == {}, "early divergences say little"
    assert guard_rails({"kept_kl/kd": float("nan")}, warm=True) == {}
