"""Grids of images as PNG files: numpy and Pillow only."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from varkd.files import atomic_file

_GAP_GRAY = 255
_SMALLEST_SIDE = 48
_TINT = (40, 110, 255)


def grid(images_NHWC: NDArray[np.uint8], columns: int, gap: int = 2) -> NDArray[np.uint8]:
    """Arrange uint8 images (N, H, W, C) row by row on white: uint8 (H', W', 3).

    Small images are enlarged by a whole factor (nearest neighbor), so that a person can see the pixels.
    """
    images = np.repeat(images_NHWC, 3, axis=3) if images_NHWC.shape[3] == 1 else images_NHWC
    scale = max(1, -(-_SMALLEST_SIDE // images.shape[1]))
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    canvas = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), _GAP_GRAY, np.uint8)
    for index, image in enumerate(images):
        top, left = (index // columns) * (height + gap), (index % columns) * (width + gap)
        canvas[top : top + height, left : left + width] = image
    return canvas


def labeled(rows: Mapping[str, NDArray[np.uint8]], gap: int = 2) -> NDArray[np.uint8]:
    """One row of uint8 images (N, H, W, C) under each other per entry, its name to the left: uint8 (H', W', 3)."""
    font = ImageFont.load_default(14)
    margin = 12 + max(int(font.getlength(name)) for name in rows)
    strips = []
    for name, images_NHWC in rows.items():
        strip = grid(images_NHWC, len(images_NHWC), gap)
        label = Image.new("RGB", (margin, strip.shape[0]), (255, 255, 255))
        ImageDraw.Draw(label).text((margin - 6, strip.shape[0] // 2), name, (60, 60, 60), font, anchor="rm")
        strips.append(np.concatenate([np.asarray(label), strip], axis=1))
        strips.append(np.full((gap, strips[-1].shape[1], 3), _GAP_GRAY, np.uint8))
    return np.concatenate(strips[:-1])


def tinted(images_NHWC: NDArray[np.uint8], where_NHW: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """RGB images with a blue tint where asked for."""
    images = np.repeat(images_NHWC, 3, axis=3) if images_NHWC.shape[3] == 1 else images_NHWC
    blend = (0.65 * images + 0.35 * np.array(_TINT)).astype(np.uint8)
    return np.where(where_NHW[..., None], blend, images)


def save_png(path: Path, image_HWC: NDArray[np.uint8]) -> None:
    """Write one uint8 image (H, W, 3) atomically."""
    save_image(path, Image.fromarray(image_HWC), optimize=True)


def save_image(path: Path, image: Image.Image, *, optimize: bool = False) -> None:
    """Write a PNG atomically. It is made in memory: Pillow, writing itself, forgets what the system said was wrong."""
    content = io.BytesIO()
    image.save(content, format="PNG", optimize=optimize)
    with atomic_file(path) as temporary:
        temporary.write_bytes(content.getvalue())
