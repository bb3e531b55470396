"""Views: named augmentations of uint8 images that are made once, before encoding.

A name is "identity", "flip" (left to right), "shift(dy,dx)" (the picture moves dy pixels down and dx to the right)
or "flip+shift(dy,dx)", flipped first. A shift repeats the border pixels, so that no black edge appears that no image
has.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from varkd.errors import VarkdError

_NAME = re.compile(r"identity|flip|(?:flip\+)?shift\((?P<dy>-?\d+),(?P<dx>-?\d+)\)")


def view_names(flip: bool = False, shifts: int = 0) -> tuple[str, ...]:
    """Identity, then every shift by at most `shifts` pixels each way, then (with `flip`) all of them flipped."""
    if shifts < 0:
        raise VarkdError(f"shifts={shifts} must be 0 or more pixels")
    reach = range(-shifts, shifts + 1)
    moved = [f"shift({dy},{dx})" for dy in reach for dx in reach if (dy, dx) != (0, 0)]
    flipped = ["flip", *(f"flip+{name}" for name in moved)] if flip else []
    return ("identity", *moved, *flipped)


def check_views(names: tuple[str, ...]) -> None:
    """Raises VarkdError unless all names are known, different, and "identity" comes first."""
    for name in names:
        _parse(name)
    if not names or names[0] != "identity" or len(set(names)) < len(names):
        raise VarkdError(f"views {', '.join(names) or '(none)'} must start with identity and name each view once")


def apply_view(name: str, images_BCHW: Tensor) -> Tensor:
    """The view of images of any dtype: same shape and dtype."""
    flip, dy, dx = _parse(name)
    images_BCHW = images_BCHW.flip(3) if flip else images_BCHW
    if dy == dx == 0:
        return images_BCHW
    height, width = images_BCHW.shape[2:]
    row_H = (torch.arange(height, device=images_BCHW.device) - dy).clamp(0, height - 1)
    column_W = (torch.arange(width, device=images_BCHW.device) - dx).clamp(0, width - 1)
    return images_BCHW[:, :, row_H][:, :, :, column_W]


def _parse(name: str) -> tuple[bool, int, int]:
    match = _NAME.fullmatch(name)
    if match is None:
        raise VarkdError(f"unknown view '{name}': known are identity, flip, shift(dy,dx) and flip+shift(dy,dx)")
    return "flip" in name, int(match["dy"] or 0), int(match["dx"] or 0)
