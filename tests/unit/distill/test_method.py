"""Methods as values: schedules, presets, refusals."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields

import pytest
import torch

from varkd.distill.divergences import JSD, CrossEntropy, ForwardKL
from varkd.distill.method import Method, Term
from varkd.distill.prefixes import Completions, Rollout
from varkd.distill.schedule import ExponentialSchedule, LinearSchedule, check_range, resolve, value_of
from varkd.distill.selection import Confidence
from varkd.distill.spaces import Clusters, Full
from varkd.errors import VarkdError
from varkd.methods import METHODS


def test_ramp():
    ramp = LinearSchedule(1.0, 3.0, 0.2, 0.6)
    progress = [0.0, 0.2, 0.3, 0.4, 0.6, 0.9, 1.0]
    assert [ramp.at(p) for p in progress] == pytest.approx([1, 1, 1.5, 2, 3, 3, 3])
    jump = LinearSchedule(0.0, 1.0, 0.5, 0.5)
    assert [jump.at(p) for p in (0.49, 0.5)] == [0, 1]


@pytest.mark.parametrize("bounds", [(-0.1, 0.5), (0.6, 0.5), (0.0, 1.1)])
def test_ramp_refuses_nonsense(bounds):
    with pytest.raises(VarkdError, match="linear"):
        LinearSchedule(0.0, 1.0, *bounds)


def test_resolve_reaches_every_depth_and_leaves_the_original():
    method = Method(
        (
            Term(
                "a",
                JSD(LinearSchedule(0.0, 1.0)),
                weight=LinearSchedule(2.0, 4.0),
                space=Full(LinearSchedule(1.0, 3.0)),
            ),
        )
    )
    half = method.at(0.5)
    term = half.terms[0]
    assert isinstance(term.divergence, JSD) and isinstance(term.space, Full)
    assert (term.divergence.beta, term.weight, term.space.temperature) == (0.5, 3.0, 2.0)
    assert isinstance(method.terms[0].weight, LinearSchedule)
    assert resolve(half, 0.9) == half  # nothing left to change


def test_a_ramp_used_before_it_is_fixed_is_a_programming_error():
    assert value_of(0.25) == 0.25
    with pytest.raises(TypeError, match="at\\(progress, state\\)"):
        value_of(LinearSchedule(0.0, 1.0))


def test_ranges_look_at_both_ends_of_a_ramp():
    check_range("x", "y", LinearSchedule(0.0, 1.0), 0, 1)
    with pytest.raises(VarkdError, match=r"x: y must lie in \[0, 1\]"):
        check_range("x", "y", LinearSchedule(0.5, 1.5), 0, 1)


@pytest.mark.parametrize("terms", [(), (Term("a", ForwardKL()), Term("a", CrossEntropy()))])
def test_terms_need_different_names(terms):
    with pytest.raises(VarkdError, match="different names"):
        Method(terms)


def test_a_negative_weight_is_refused():
    with pytest.raises(VarkdError, match="weight"):
        Term("a", ForwardKL(), weight=-1.0)


def test_who_needs_a_teacher():
    assert not METHODS["ce"].method.needs_teacher
    assert not Method((Term("ce", CrossEntropy()),), Rollout()).needs_teacher
    assert Method((Term("ce", CrossEntropy()),), Rollout("teacher")).needs_teacher
    assert Method((Term("ce", CrossEntropy(), selection=Confidence(score="margin")),)).needs_teacher
    alone = [name for name, preset in METHODS.items() if not preset.method.needs_teacher]
    assert alone == ["ce", "scheduled_sampling", "scheduled_sampling_parallel"]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("progress", [0.0, 0.05, 0.25, 0.5, 1.0])
def test_presets_resolve_and_prepare(name, progress):
    preset = METHODS[name]
    method = preset.method.at(progress)
    assert resolve(method, 0.0) == method
    codebook_tables = method.prepare(torch.randn(16, 4, generator=torch.Generator().manual_seed(0)))
    wanted = {term.space.key for term in method.terms if isinstance(term.space, Clusters)}
    wanted |= {"codebook"} if isinstance(method.contexts, Completions) else set()
    assert {key for key in codebook_tables if not key.endswith("/members")} == wanted
    assert preset.source and preset.equation and preset.summary.endswith(".")
    with pytest.raises(FrozenInstanceError):
        preset.method.terms = ()  # type: ignore[misc]


_ABLATION = ("varkd_mixed", "varkd_weight")
"""Rows on the way from `gkd_prefix` to `varkd`, each a step from its neighbors (tests/unit/distill/test_varkd.py)."""


@pytest.mark.parametrize("whole", ["varkd", "best_of_n"])
def test_ablations_and_controls_change_one_part(whole: str):
    method = METHODS[whole].method
    names = [name for name in METHODS if name.startswith(f"{whole}_") and name not in _ABLATION]
    assert len(names) >= 5
    for name in names:
        other = METHODS[name].method
        changed = [
            field.name
            for mine, theirs in zip(method.terms, other.terms, strict=True)
            for field in fields(Term)
            if getattr(mine, field.name) != getattr(theirs, field.name)
        ]
        assert len(changed) + (method.contexts != other.contexts) + (method.target != other.target) == 1, name


def test_decay_by_hand():
    decay, growth = ExponentialSchedule(1.0, 0.0), ExponentialSchedule(0.0, 1.0)
    assert [decay.at(0.0), growth.at(0.0)] == [1.0, 0.0]
    assert decay.at(1.0) == pytest.approx(1 / 200) and decay.at(0.5) == pytest.approx(200**-0.5)
    for progress in (0.1, 0.7, 1.0):  # the two shares of a mixture
        assert decay.at(progress) + growth.at(progress) == pytest.approx(1)
    assert ExponentialSchedule(4.0, 2.0, base=2.0).at(1.0) == 3.0
    with pytest.raises(VarkdError, match="base must be above 1"):
        ExponentialSchedule(1.0, 0.0, base=1.0)
    with pytest.raises(TypeError, match=r"method\.at"):
        value_of(decay)
