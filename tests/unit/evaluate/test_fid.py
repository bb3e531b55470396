import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from varkd.errors import VarkdError
from varkd.evaluate.fid import frechet_distance, frechet_estimate, gaussian
from varkd.evaluate.intervals import bootstrap


def normal(num, width, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, dtype=torch.float64, generator=generator)
    return scale * torch.randn(num, width, dtype=torch.float64, generator=generator) @ mix


def distance(a, b):
    return frechet_distance(*gaussian(a), *gaussian(b))


def test_gaussian_is_numpys_mean_and_covariance():
    features = normal(50, 4)
    mean, covariance = gaussian(features)
    torch.testing.assert_close(mean, features.mean(0))
    torch.testing.assert_close(covariance, torch.cov(features.T))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(*[st.floats(-5, 5), st.floats(-5, 5), st.floats(0, 9), st.floats(0, 9)]), min_size=1, max_size=6)
)
def test_closed_form_of_diagonal_gaussians(rows):
    mean_a, mean_b, variance_a, variance_b = torch.tensor(rows, dtype=torch.float64).T
    expected = ((mean_a - mean_b) ** 2 + (variance_a.sqrt() - variance_b.sqrt()) ** 2).sum()
    measured = frechet_distance(mean_a, variance_a.diag(), mean_b, variance_b.diag())
    assert measured == pytest.approx(expected.item(), abs=1e-6)


def test_parity_with_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Identity(torch.nn.Module):
        num_features = 12

        def forward(self, features):
            return features

    real, fake = normal(300, 12, seed=1), normal(200, 12, seed=2) + 0.5
    metric = FrechetInceptionDistance(feature=Identity())
    metric.update(real, real=True)
    metric.update(fake, real=False)
    assert distance(real, fake) == pytest.approx(metric.compute().item(), rel=1e-9)
    assert "torchvision" not in sys.modules


def test_zero_for_identical_sets_whatever_their_order():
    features = normal(100, 8)
    shuffled = features[torch.randperm(100, generator=torch.Generator().manual_seed(0))]
    assert distance(features, features) == pytest.approx(0, abs=1e-9)
    assert distance(features, shuffled) == pytest.approx(0, abs=1e-9)


def test_symmetric_and_invariant_to_order():
    a, b = normal(100, 6, seed=1), normal(80, 6, seed=2)
    assert distance(a, b) == pytest.approx(distance(b, a), rel=1e-9)
    assert distance(a.flip(0), b) == pytest.approx(distance(a, b), rel=1e-9)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-10, 10), min_size=5, max_size=5))
def test_a_translation_costs_its_squared_length(shift):
    features, offset = normal(60, 5), torch.tensor(shift, dtype=torch.float64)
    assert distance(features, features + offset) == pytest.approx(offset.square().sum().item(), abs=1e-6)


def test_rank_deficient_covariances():
    few = normal(4, 32, seed=3)  # rank 3 in 32 dimensions
    assert distance(few, few) == pytest.approx(0, abs=1e-6)
    constant = torch.full((10, 32), 2.0)
    assert distance(constant, constant) == 0
    assert distance(constant, few) == pytest.approx(
        ((few.mean(0) - 2) ** 2).sum().item() + torch.cov(few.T).trace().item(), rel=1e-9
    )


def test_the_interval_contains_the_distance_where_the_percentile_bootstrap_misses_it():
    samples, real = normal(200, 16, seed=5), normal(5000, 16, seed=5)
    mean, covariance = gaussian(real)
    value, low, high = frechet_estimate(samples, mean, covariance, resamples=200, seed=0)
    assert value == distance(samples, real)
    assert 0 <= low < value < high

    resampled = []
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        drawn = samples[torch.randint(200, (200,), generator=generator)]
        resampled.append(frechet_distance(*gaussian(drawn), mean, covariance))
    assert torch.tensor(resampled).quantile(0.025) > value  # biased upwards: all of the interval lies above


def test_resampled_distances_are_those_of_the_resampled_features():
    samples, real = normal(40, 5, seed=1) + 1, normal(300, 5, seed=2)
    seen = []

    def spy(statistic, num, resamples, seed):
        drawn = torch.randint(num, (3, num), generator=torch.Generator().manual_seed(0))
        counts = torch.stack([row.bincount(minlength=num) for row in drawn]).double()
        seen.extend(zip(counts, statistic(counts), strict=True))
        return bootstrap(statistic, num, resamples, seed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("varkd.evaluate.fid.bootstrap", spy)
        patch.setattr("varkd.evaluate.fid._ROWS", 7)
        frechet_estimate(samples, *gaussian(real))
    for counts, measured in seen:
        drawn = samples.repeat_interleave(counts.long(), dim=0)
        assert len(drawn) == len(samples)
        assert measured.item() == pytest.approx(distance(drawn, real), rel=1e-9)


def test_the_interval_covers_the_mean_distance_at_this_n():
    generator = torch.Generator().manual_seed(0)
    mean, covariance = torch.zeros(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    estimates = [
        frechet_estimate(
            0.5 + torch.randn(150, 4, dtype=torch.float64, generator=generator), mean, covariance, 100, seed
        )
        for seed in range(100)
    ]
    expected = sum(estimate.value for estimate in estimates) / len(estimates)
    assert 85 <= sum(estimate.low <= expected <= estimate.high for estimate in estimates) <= 100


@pytest.mark.parametrize(
    "features, message",
    [
        (torch.zeros(1, 4), "at least 2 samples"),
        (torch.zeros(4), "at least 2 samples"),
        (torch.tensor([[0.0, 1.0], [float("nan"), 0.0]]), "not finite"),
        (torch.tensor([[0.0, 1.0], [float("inf"), 0.0]]), "not finite"),
    ],
)
def test_bad_features_are_one_line(features, message):
    with pytest.raises(VarkdError, match=message) as caught:
        gaussian(features)
    assert "\n" not in str(caught.value)
