"""Means over seeds and paired differences: intervals that contain their value, and cover as often as they claim."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from varkd.study.statistics import mean_estimate, paired_difference, wins

numbers = st.lists(st.floats(-50, 50), min_size=1, max_size=6)


@given(numbers, st.integers(0, 10**6))
def test_the_interval_contains_the_mean(values: list[float], seed: int):
    random = np.random.default_rng(seed)
    for draws in (None, [(value + random.exponential(size=40)).tolist() for value in values]):
        found = mean_estimate(values, draws)
        assert found["low"] <= found["value"] <= found["high"]
        assert found["value"] == pytest.approx(np.mean(values))


def test_one_seed_without_draws_says_nothing_of_its_spread():
    assert mean_estimate([3.0]) == {"value": 3.0, "low": 3.0, "high": 3.0}


def test_samples_alone_give_the_interval_of_their_draws():
    draws = np.random.default_rng(0).normal(5, 0.5, size=4000)
    found = mean_estimate([5.0], [draws.tolist()])
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * 0.5, rel=0.1)
    two = mean_estimate([5.0, 5.0], [draws.tolist(), draws[::-1].tolist()])
    assert two["high"] - two["low"] == pytest.approx((found["high"] - found["low"]) / 2**0.5, rel=0.1)


def test_it_covers_the_true_mean_of_many_seeds():
    """Twelve seeds of normal numbers; three would be covered less often, for a bootstrap does not know Student's t."""
    random, covered = np.random.default_rng(0), 0
    for _ in range(200):
        found = mean_estimate(random.normal(1.0, 2.0, size=12).tolist())
        covered += found["low"] <= 1.0 <= found["high"]
    assert 175 <= covered <= 199


def test_pairs_take_out_what_both_share():
    """Seeds differ by 10, methods by 1 on each of them."""
    first, second = [11.0, 21.0, 31.0], [10.0, 20.0, 30.0]
    assert paired_difference(first, second) == {"value": 1.0, "low": 1.0, "high": 1.0}
    noise = np.random.default_rng(0).normal(size=(3, 100))
    draws = [(np.array(values)[:, None] + noise).tolist() for values in (first, second)]
    found = paired_difference(first, second, (draws[0], draws[1]))  # the same samples: the same noise
    assert found["low"] == pytest.approx(1.0) and found["high"] == pytest.approx(1.0)
    alone = mean_estimate(first, draws[0])
    assert alone["high"] - alone["low"] > 5


def test_wins_and_losses_leave_ties_out():
    assert wins([1.0, 2.0, 3.0, 4.0], [2.0, 2.0, 1.0, 5.0]) == (2, 1)


def test_unequal_numbers_of_seeds_are_no_pairs():
    with pytest.raises(ValueError, match="shorter"):
        paired_difference([1.0, 2.0], [1.0])
