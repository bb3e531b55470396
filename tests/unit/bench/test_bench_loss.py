"""The loss bench compares equal problems, and would notice unequal ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from varkd.bench.loss import Heads, _ours, _plain, same_results
from varkd.bench.sizes import sizes_for
from varkd.distill.divergences import JSD, ForwardKL
from varkd.distill.method import Term
from varkd.divergences import jsd

CPU = torch.device("cpu")


@pytest.fixture
def heads() -> Heads:
    return Heads.of(sizes_for("tiny", CPU), CPU, "fp32")


def test_both_sides_compute_the_same(heads: Heads):
    ours, theirs = _ours(heads, Term("kd", ForwardKL()))(), _plain(heads, False)()
    verdict = same_results(ours, theirs, 1e-5)
    assert verdict.same and "agree" in verdict.text and float(ours["value"]) > 0.1


def test_in_bfloat16_they_agree_to_its_rounding():
    heads = Heads.of(sizes_for("tiny", CPU), CPU, "bf16")
    ours, theirs = _ours(heads, Term("kd", ForwardKL()))(), _plain(heads, False)()
    exact = _plain(replace(heads, precision="fp32"), False)()
    assert same_results(ours, theirs, 5e-2).same and same_results(ours, exact, 5e-2).same
    assert not same_results(theirs, exact, 1e-5).same  # else autocast was not on


def test_another_problem_would_be_noticed(heads: Heads):
    ours = _ours(heads, Term("jsd", JSD(0.5)))()
    verdict = same_results(ours, _plain(heads, False)(), 1e-2)
    assert not verdict.same and "differ" in verdict.text


def test_jsd_is_that_of_whole_logits(heads: Heads):
    student_ND, teacher_ND = heads.hidden_states
    plain = jsd(F.linear(student_ND, heads.student.output.weight), F.linear(teacher_ND, heads.teacher.output.weight))
    ours = _ours(heads, Term("jsd", JSD(0.5)))()
    assert float(ours["value"]) == pytest.approx(float(plain.detach().mean()), rel=1e-5)


def test_flops_are_five_products(heads: Heads):
    """Both heads forward, and backward to the student's input and its weights."""
    assert heads.flops == 2 * 64 * 64 * (32 + 48 + 32 + 32)
