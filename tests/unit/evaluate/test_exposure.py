"""Accumulated error, calibration and the selection audit, against loops."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from varkd.backbones.llamagen import LlamaGen
from varkd.distill.divergences import ForwardKL
from varkd.distill.method import Method, Term
from varkd.distill.selection import Accepted, Confidence
from varkd.distill.target import Guided, Temperature
from varkd.errors import VarkdError
from varkd.evaluate.audits import kept_positions, kept_share
from varkd.evaluate.calibration import calibration, expected_error
from varkd.evaluate.diagnostics import Sequences
from varkd.evaluate.exposure import accumulated, difference, excess_accumulated, risk
from varkd.types import Batch, Condition

Models = Callable[..., LlamaGen]
VALUES = torch.rand(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
OTHERS = torch.rand(7, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_accumulated_error_is_a_running_sum():
    curve = accumulated(VALUES)
    for length in range(1, 6):
        expected = sum(float(VALUES[:, place].mean()) for place in range(length))
        assert float(curve.value[length - 1]) == pytest.approx(expected)
        assert float(curve.low[length - 1]) <= expected <= float(curve.high[length - 1])


def test_excess_by_its_formula():
    curve = excess_accumulated(VALUES, OTHERS)
    for length in range(1, 6):
        top, bottom = float(VALUES[:, :length].mean(0).sum()), float(OTHERS[:, :length].mean(0).sum())
        assert float(curve.value[length - 1]) == pytest.approx((top - bottom) / bottom)


def test_data_has_no_excess_over_data():
    """In value and in every resample, for the rows are drawn in pairs."""
    for part in excess_accumulated(VALUES, VALUES):
        assert float(part.abs().max()) == 0
    assert float(excess_accumulated(VALUES * 0, VALUES * 0).value.abs().max()) == 0
    assert all(float(part.abs().max()) == 0 for part in difference(VALUES, VALUES))


def test_the_risk_is_a_mean_over_codes():
    assert risk(VALUES).value == pytest.approx(float(VALUES.mean()))


def test_bins_by_loops():
    hits = (VALUES > OTHERS).double()
    bins = calibration(VALUES, hits, bins=4)
    for each in bins:
        members = [(b, place) for b in range(7) for place in range(5) if each.low <= VALUES[b, place] < each.high]
        assert each.num == len(members)
        assert each.confidence == pytest.approx(sum(float(VALUES[m]) for m in members) / len(members))
        assert each.value.value == pytest.approx(sum(float(hits[m]) for m in members) / len(members))
        assert each.value.low <= each.value.value <= each.value.high
    assert sum(each.num for each in bins) == 35
    off = sum(each.num / 35 * abs(each.value.value - each.confidence) for each in bins)
    assert expected_error(bins) == pytest.approx(off)


def test_full_confidence_is_in_the_last_bin_and_empty_bins_are_left_out():
    (each,) = calibration(torch.ones(3, 2), torch.ones(3, 2))
    assert (each.low, each.high, each.num, each.value.value) == (0.9, 1.0, 6, 1.0)
    assert expected_error([each]) == 0


def test_kept_shares_by_loops():
    kept = VALUES > 0.6
    found = kept_share(kept, OTHERS)
    assert found.positions.value == pytest.approx(float(kept.double().mean()))
    mass = sum(float(OTHERS[b, place]) for b in range(7) for place in range(5) if kept[b, place])
    assert found.kl.value == pytest.approx(mass / float(OTHERS.sum()))
    assert kept_share(kept, OTHERS * 0).kl.value == 1  # where there is nothing to learn, nothing is lost


# ---- the method's own selection


def sequences(batch: Batch, model: LlamaGen) -> Sequences:
    return Sequences(batch.codes_BL, Condition(batch.label_B), model.plan(len(batch)))


def method_of(selection: Confidence | Accepted, target=None) -> Method:
    more = {} if target is None else {"target": target}
    return Method(terms=(Term("student", ForwardKL(), selection=selection),), **more)


@torch.no_grad()
def test_a_confidence_selection_is_its_threshold(make_model: Models, batch: Batch):
    student, teacher = make_model(1), make_model(2)
    method, data = method_of(Confidence(quantile=0.5)), sequences(batch, student)
    threshold_L = torch.linspace(0.1, 0.4, 6)
    state = {method.terms[0].key(method.terms[0].selection): threshold_L}
    kept = kept_positions(method, method.terms[0], "data", data, student, teacher,
                          state, {}, 0, batch_size=3)  # fmt: skip
    p = teacher.head(teacher(data.codes_BL, data.condition, data.plan)).softmax(-1)
    assert torch.equal(kept, p.amax(-1) >= threshold_L)  # raster: the rank of a position is its place
    assert kept.any() and not kept.all()
    hot = method_of(Confidence(quantile=0.5), Temperature(0.5))
    sharper = kept_positions(hot, hot.terms[0], "data", data, student, teacher,
                             state, {}, 0)  # fmt: skip
    assert sharper.sum() > kept.sum(), "the target's distribution is what is selected by"


@torch.no_grad()
def test_a_selection_that_reads_the_student(make_model: Models, batch: Batch):
    student, teacher = make_model(1), make_model(2)
    method, data = method_of(Accepted(rule="top_k", top_k=2)), sequences(batch, student)
    kept = kept_positions(method, method.terms[0], "student", data, student, teacher, {}, {}, 0)
    q, p = (model.head(model(data.codes_BL, data.condition, data.plan)) for model in (student, teacher))
    assert torch.equal(kept, (p.topk(2).indices == q.argmax(-1, keepdim=True)).any(-1))


def test_a_guided_target_is_refused(make_model: Models, batch: Batch):
    model = make_model(1)
    method = method_of(Confidence(), Guided())
    with pytest.raises(VarkdError, match="guided"):
        kept_positions(method, method.terms[0], "data", sequences(batch, model), model, model, {}, {}, 0)
