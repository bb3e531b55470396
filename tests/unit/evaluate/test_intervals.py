import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from varkd.errors import VarkdError
from varkd.evaluate.intervals import centered_bootstrap, share


def mean_of(values_N):
    return lambda counts_RN: counts_RN @ values_N / len(values_N)


def test_the_interval_of_a_mean_is_the_textbook_one():
    values = torch.randn(400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    value, low, high = centered_bootstrap(mean_of(values), 400, 2000, seed=1)
    half = 1.96 * values.std().item() / math.sqrt(400)
    assert value == pytest.approx(values.mean().item())
    assert low == pytest.approx(value - half, abs=0.15 * half)
    assert high == pytest.approx(value + half, abs=0.15 * half)


def test_it_covers_the_true_mean_about_95_times_in_100():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for repeat in range(200):
        values = torch.rand(100, dtype=torch.float64, generator=generator)
        _, low, high = centered_bootstrap(mean_of(values), 100, 200, seed=repeat)
        covered += low <= 0.5 <= high
    assert 178 <= covered <= 199


def test_the_seed_decides_and_the_block_size_does_not(monkeypatch):
    values = torch.arange(50, dtype=torch.float64)
    first = centered_bootstrap(mean_of(values), 50, 100, seed=3)
    assert first == centered_bootstrap(mean_of(values), 50, 100, seed=3)
    assert first != centered_bootstrap(mean_of(values), 50, 100, seed=4)
    monkeypatch.setattr("varkd.evaluate.intervals._DRAWS_AT_ONCE", 500)
    assert first == pytest.approx(centered_bootstrap(mean_of(values), 50, 100, seed=3))


def test_a_biased_statistic_keeps_its_estimate_inside():
    values = torch.randn(200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    num_distinct = lambda counts_RN: (counts_RN > 0).double().mean(1)  # 1 on the data, about 0.63 on every resample
    value, low, high = centered_bootstrap(num_distinct, 200, bounds=(0.0, 1.0))
    assert value == 1
    assert low < value == high
    assert (values.square() > 0).all()


@given(num=st.integers(2, 5000), part=st.floats(0, 1))
def test_a_share_contains_its_value_and_shrinks(num, part):
    successes = round(part * num)
    value, low, high = share(successes, num)
    assert 0 <= low <= value <= high <= 1
    assert value == successes / num
    wider = share(successes * 4, num * 4)
    assert wider.high - wider.low < high - low


def test_wilson_at_the_edge():
    # Newcombe 1998, table I: 0 of 20 and 1 of 29 by the score method without continuity correction.
    assert share(0, 20) == pytest.approx((0, 0, 0.1611), abs=1e-4)
    assert share(1, 29) == pytest.approx((1 / 29, 0.0061, 0.1718), abs=1e-4)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=30))
def test_any_data_is_inside_its_interval(numbers):
    values = torch.tensor(numbers, dtype=torch.float64)
    value, low, high = centered_bootstrap(mean_of(values), len(numbers), 20)
    assert low <= value <= high


@pytest.mark.parametrize("num, resamples", [(1, 100), (0, 100), (10, 1)])
def test_too_little_is_refused(num, resamples):
    with pytest.raises(VarkdError, match="at least 2"):
        centered_bootstrap(lambda counts: counts.sum(1), num, resamples)


@pytest.mark.parametrize("successes, num", [(1, 1), (3, 2), (-1, 5)])
def test_a_share_that_is_none_is_refused(successes, num):
    with pytest.raises(VarkdError, match="share"):
        share(successes, num)
