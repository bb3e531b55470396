import pytest
import torch

from varkd.errors import VarkdError
from varkd.evaluate.precision_recall import precision_recall, radii


def normal(num, width=8, seed=0):
    return torch.randn(num, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def clusters(num, kinds, seed=0):
    centers = 20 * torch.eye(8, dtype=torch.float64)
    return centers[torch.arange(num) % kinds] + normal(num, seed=seed)


def test_the_same_set_is_precise_and_complete():
    result = precision_recall(normal(300), normal(300))
    assert result.precision.value == result.recall.value == 1


def test_mode_collapse_is_precise_and_incomplete():
    result = precision_recall(clusters(400, kinds=1, seed=1), clusters(400, kinds=8))
    assert result.precision.value > 0.6
    assert result.recall.value < 0.2


def test_one_repeated_real_image_is_precise_and_covers_itself_only():
    real = normal(100)
    result = precision_recall(real[:1].expand(100, -1), real)
    assert result.precision.value == 1
    assert result.recall.value == 0.01


def test_noise_is_imprecise():
    real = 0.1 * normal(300, seed=1)
    assert precision_recall(10 * normal(300, seed=2), real).precision.value < 0.05


def test_swapping_the_sets_swaps_the_numbers():
    a, b = clusters(200, 3, seed=1), clusters(200, 8, seed=2)
    forth, back = precision_recall(a, b), precision_recall(b, a)
    assert forth.precision.value == pytest.approx(back.recall.value)
    assert forth.recall.value == pytest.approx(back.precision.value)


def test_against_the_definition_by_loops(monkeypatch):
    monkeypatch.setattr("varkd.evaluate.precision_recall._CHUNK", 7)
    samples, real = normal(25, 3, seed=1), normal(30, 3, seed=2)

    def share_inside(points, centers):
        def radius(index):
            others = sorted((centers[index] - other).norm() for other in centers)
            return others[3]  # others[0] is the point itself

        inside = [any((p - c).norm() <= radius(i) for i, c in enumerate(centers)) for p in points]
        return sum(inside) / len(inside)

    result = precision_recall(samples, real)
    assert result.precision.value == pytest.approx(share_inside(samples, real))
    assert result.recall.value == pytest.approx(share_inside(real, samples))


def test_intervals_contain_their_numbers():
    result = precision_recall(clusters(200, 4, seed=1), clusters(200, 8, seed=2))
    for value, low, high in (result.precision, result.recall):
        assert 0 <= low <= value <= high <= 1
        assert low < high


def test_the_cap_is_seeded_and_named():
    samples, real = normal(300, seed=1), 1 + normal(200, seed=2)
    first = precision_recall(samples, real, max_points=100, seed=1)
    assert (first.num, first.num_reference) == (100, 100)
    assert first == precision_recall(samples, real, max_points=100, seed=1)
    assert first != precision_recall(samples, real, max_points=100, seed=2)


def test_radii_of_a_line():
    points = torch.arange(6, dtype=torch.float64)[:, None]
    assert radii(points, 1).tolist() == [1] * 6
    assert radii(points, 3).tolist() == [3, 2, 2, 2, 2, 3]


@pytest.mark.parametrize(
    "samples, real, message",
    [
        (normal(3), normal(10), "more than 3"),
        (normal(10), normal(3), "more than 3"),
        (normal(1), normal(10), "at least 2"),
        (normal(10, width=4), normal(10), "two networks"),
        (normal(10) / 0, normal(10), "not finite"),
    ],
)
def test_bad_sets_are_one_line(samples, real, message):
    with pytest.raises(VarkdError, match=message) as caught:
        precision_recall(samples, real)
    assert "\n" not in str(caught.value)
