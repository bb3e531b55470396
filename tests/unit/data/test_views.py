"""Views: names, and what they do to the pixels."""

from __future__ import annotations

import pytest
import torch

from varkd.data.views import apply_view, check_views, load_size, ten_crop_names, view_names
from varkd.errors import VarkdError

IMAGES = torch.arange(2 * 3 * 4 * 5, dtype=torch.uint8).reshape(2, 3, 4, 5)


def test_names() -> None:
    assert view_names() == ("identity",)
    assert view_names(flip=True) == ("identity", "flip")
    nine, eighteen = view_names(shifts=1), view_names(flip=True, shifts=1)
    assert len(nine) == 9 and len(eighteen) == 18 and eighteen[:9] == nine
    check_views(eighteen)
    assert len({apply_view(name, IMAGES).numpy().tobytes() for name in eighteen}) == 18


def test_identity_and_flip() -> None:
    assert apply_view("identity", IMAGES).equal(IMAGES)
    assert apply_view("flip", IMAGES).equal(IMAGES.flip(-1))


def test_shift_repeats_the_border() -> None:
    moved = apply_view("shift(1,-2)", IMAGES)
    assert moved.dtype == torch.uint8 and moved.shape == IMAGES.shape
    assert moved[:, :, 1:, :3].equal(IMAGES[:, :, :-1, 2:])
    assert moved[:, :, 0].equal(moved[:, :, 1])
    assert moved[:, :, :, 3].equal(moved[:, :, :, 2]) and moved[:, :, :, 4].equal(moved[:, :, :, 2])
    assert apply_view("flip+shift(1,-2)", IMAGES).equal(apply_view("shift(1,-2)", IMAGES.flip(-1)))


def test_ten_crops_are_those_of_torchvision() -> None:
    """Five crops (its center rounds half to even), then five of the mirror image, each of the asked size."""
    images = torch.randint(256, (2, 3, 9, 9), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    names = ten_crop_names(6, 1.5)
    check_views(names)
    assert load_size(names) == 9 and load_size(("identity", "flip")) is None and len(set(names)) == 10
    expected = []
    for picture in (images, images.flip(-1)):
        expected += [picture[..., 2:8, 2:8], picture[..., :6, :6], picture[..., :6, 3:], picture[..., 3:, :6],
                     picture[..., 3:, 3:]]  # fmt: skip
    assert all(apply_view(name, images).equal(crop) for name, crop in zip(names, expected, strict=True))
    assert load_size(ten_crop_names(256, 1.1)) == 281 and load_size(ten_crop_names(384, 1.1)) == 422


def test_a_ten_crop_needs_room() -> None:
    with pytest.raises(VarkdError, match="leaves no room"):
        ten_crop_names(8, 1.0)


@pytest.mark.parametrize("name", ["mirror", "shift(1)", "shift(1,2)+flip", "flip+", "identity+flip", ""])
def test_unknown_names(name: str) -> None:
    with pytest.raises(VarkdError, match="unknown view"):
        apply_view(name, IMAGES)


@pytest.mark.parametrize("names", [(), ("flip",), ("identity", "flip", "flip")])
def test_lists_that_are_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(VarkdError, match="must start with identity"):
        check_views(names)
    with pytest.raises(VarkdError, match="shifts=-1"):
        view_names(shifts=-1)
