"""Views: named augmentations of uint8 images that are made once, before encoding.

A name is "identity", "flip" (left to right), "shift(dy,dx)" (the picture moves dy pixels down and dx to the right) or
"crop(load,size,top,left)" (of an image loaded at `load` pixels a side), the last two also as "flip+...", flipped first.
A shift repeats the border pixels, so that no black edge appears that no image has.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from varkd.errors import VarkdError

_SHIFT = r"shift\((?P<dy>-?\d+),(?P<dx>-?\d+)\)"
_CROP = r"crop\((?P<load>\d+),(?P<size>\d+),(?P<top>\d+),(?P<left>\d+)\)"
_NAME = re.compile(rf"identity|flip|(?:flip\+)?(?:{_SHIFT}|{_CROP})")


def view_names(flip: bool = False, shifts: int = 0) -> tuple[str, ...]:
    """Identity, then every shift by at most `shifts` pixels each way, then (with `flip`) all of them flipped."""
    if shifts < 0:
        raise VarkdError(f"shifts={shifts} must be 0 or more pixels")
    reach = range(-shifts, shifts + 1)
    moved = [f"shift({dy},{dx})" for dy in reach for dx in reach if (dy, dx) != (0, 0)]
    flipped = ["flip", *(f"flip+{name}" for name in moved)] if flip else []
    return ("identity", *moved, *flipped)


def ten_crop_names(size: int, ratio: float) -> tuple[str, ...]:
    """The center and the four corners of images loaded at int(`ratio` * `size`), then the same of mirror images.

    LlamaGen's augmentation of its training images (`--ten-crop --crop-range 1.1`), with torchvision's centers.
    """
    load = int(ratio * size)
    if load <= size:
        raise VarkdError(f"ten-crop {ratio:g} leaves no room to crop {size} pixels: use a ratio above 1, such as 1.1")
    far, center = load - size, round((load - size) / 2)
    places = ((center, center), (0, 0), (0, far), (far, 0), (far, far))
    crops = tuple(f"crop({load},{size},{top},{left})" for top, left in places)
    return (*crops, *(f"flip+{crop}" for crop in crops))


def load_size(names: tuple[str, ...]) -> int | None:
    """The side at which images are loaded for these views; None where it is their own."""
    match = _parse(names[0])
    return int(match["load"]) if match["load"] else None


def has_flips(names: Sequence[str]) -> bool:
    return any(name.startswith("flip") for name in names)


def check_views(names: tuple[str, ...]) -> None:
    """Raises VarkdError unless all names are known, different, of one loaded size, and the plain one comes first."""
    loads = {_parse(name)["load"] for name in names}
    plain = names and (names[0] == "identity" or names[0].startswith("crop"))
    if not plain or len(loads) > 1 or len(set(names)) < len(names):
        raise VarkdError(f"views {', '.join(names) or '(none)'} must start with identity and name each view once")


def apply_view(name: str, images_BCHW: Tensor) -> Tensor:
    """The view of images of any dtype: the same dtype, and the same shape but for a crop."""
    match = _parse(name)
    images_BCHW = images_BCHW.flip(3) if has_flips((name,)) else images_BCHW
    if match["load"]:
        top, left, size = int(match["top"]), int(match["left"]), int(match["size"])
        return images_BCHW[:, :, top : top + size, left : left + size]
    dy, dx = int(match["dy"] or 0), int(match["dx"] or 0)
    if dy == dx == 0:
        return images_BCHW
    height, width = images_BCHW.shape[2:]
    row_H = (torch.arange(height, device=images_BCHW.device) - dy).clamp(0, height - 1)
    column_W = (torch.arange(width, device=images_BCHW.device) - dx).clamp(0, width - 1)
    return images_BCHW[:, :, row_H][:, :, :, column_W]


def _parse(name: str) -> re.Match[str]:
    match = _NAME.fullmatch(name)
    if match is None:
        raise VarkdError(
            f"unknown view '{name}': known are identity, flip, shift(dy,dx), crop(load,size,top,left), "
            "and flip+ before the last two"
        )
    return match
