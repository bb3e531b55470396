"""Images of one split as uint8 tensors, whatever they came from.

They are resized as ADM does (Dhariwal and Nichol 2021). A source without a validation split of its own gets one that
is held out by class, as a function of the seed.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from itertools import chain
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from varkd import progress
from varkd.data.sources import TargetRows, load_source
from varkd.errors import VarkdError
from varkd.files import sha256_of
from varkd.world import Rng

Split = Literal["train", "validation"]

_KEEP_BYTES = 512 * 2**20
_LONG_PIXELS = 2**25  # decoding more than this takes long enough for a bar
_PROBES = 64
_GRAY_MODES = ("1", "L", "LA")
_DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")


def open_images(
    source: str, split: Split, *, image_size: int | None = None, validation: float = 0.1, seed: int = 0
) -> ImageSet:
    """One split of `source`.

    `source` is "digits", a folder, `a.parquet`, `train.parquet,validation.parquet` or a hub id `org/name`.

    A validation (else test) split of the source is used as it is. Otherwise a share `validation` of the images, at
    least one, is held out, the same ones for the same seed: of a folder those whose names have small hashes (images
    that come or go move no others), of the rows of a file round(`validation` * N), of each class its share to within 1.
    `image_size` resizes the shorter side and crops the center; None asks for images of one size.
    Images are gray (C = 1) where a spread of them holds no color, else RGB.

    Raises:
        VarkdError: the source is missing, empty, unreadable or unreachable, or its labels are out of range.
    """
    if not 0 < validation < 1:
        raise VarkdError(f"validation={validation} must be a fraction between 0 and 1, such as 0.1")
    if image_size is not None and image_size < 1:
        raise VarkdError(f"image_size={image_size} must be a positive number of pixels")
    found = load_source(source)
    settings: dict[str, object] = {"split": split, "image_size": image_size}
    if found.validation is not None:
        rows = found.train if split == "train" else found.validation
        index_N = np.arange(len(rows))
    else:
        rows = found.train
        settings |= {"validation": validation, "seed": seed}
        if len(rows) < 2:
            raise VarkdError(f"{source} holds one image: training and validation need at least one each")
        held_N = (_held_out(rows.label_N, validation, seed) if rows.keys is None
                  else _held_out_by_name(rows.keys, validation, seed))  # fmt: skip
        index_N = np.flatnonzero(held_N if split == "validation" else ~held_N)
    shape = _image_shape(found.train, image_size)
    return ImageSet(source, split, rows, index_N, found.class_names, shape, image_size, settings)


def _held_out(label_N: NDArray[np.int64], fraction: float, seed: int) -> NDArray[np.bool_]:
    """Which images are held out: bool (N,).

    Each class is shuffled and spread evenly over [0, 1) from a random offset; the smallest numbers are held out,
    so every class gives its share to within one image and the total is exact.
    """
    num_held = min(max(round(fraction * len(label_N)), 1), len(label_N) - 1)
    generator = Rng(seed).generator("validation split")
    order_N = torch.randperm(len(label_N), generator=generator).numpy()
    key_N = np.empty(len(label_N))
    for label in np.unique(label_N):
        members = order_N[label_N[order_N] == label]
        offset = float(torch.rand((), generator=generator, dtype=torch.float64))
        key_N[members] = (np.arange(len(members)) + offset) / len(members)
    held_N = np.zeros(len(label_N), dtype=np.bool_)
    held_N[np.argsort(key_N, kind="stable")[:num_held]] = True
    return held_N


def _held_out_by_name(keys: Sequence[str], fraction: float, seed: int) -> NDArray[np.bool_]:
    """Which images are held out by their own names alone: bool (N,), at least one and not all."""
    hash_N = np.array([int(sha256_of(f"{seed}/{key}".encode())[:13], 16) / 16**13 for key in keys])
    held_N = hash_N < fraction
    held_N[hash_N.argmin()], held_N[hash_N.argmax()] = True, False
    return held_N


def _image_shape(rows: TargetRows, image_size: int | None) -> tuple[int, int, int]:
    """(C, H, W): the size of the first image; gray only if none of a spread of images has color."""
    spread = np.unique(np.linspace(0, len(rows) - 1, _PROBES).astype(int))
    channels = 1 if all(_open(rows, int(row)).mode in _GRAY_MODES for row in spread) else 3
    pixels_HWC = _pixels(rows, 0, channels, image_size)
    return channels, pixels_HWC.shape[0], pixels_HWC.shape[1]


class ImageSet:
    """One split, decoded on first use and kept where it fits into 512 MB, else decoded on access.

    `fingerprint` names what the images are (labels, classes, a sample of the encoded bytes) and how they were split
    and resized, but not where they lie.
    """

    def __init__(
        self, name: str, split: Split, rows: TargetRows, index_N: NDArray[np.int64], class_names: tuple[str, ...],
        image_shape: tuple[int, int, int], image_size: int | None, settings: dict[str, object],
    ) -> None:  # fmt: skip
        self.name, self.split, self.class_names, self.image_shape = name, split, class_names, image_shape
        self.labels: NDArray[np.int64] = rows.label_N[index_N]
        self._rows, self._index_N, self._image_size = rows, index_N, image_size
        self._kept_NCHW: NDArray[np.uint8] | None = None
        self.fingerprint = self._fingerprint(settings)

    def __len__(self) -> int:
        return len(self._index_N)

    def batch(self, indices: Sequence[int] | NDArray[np.int64] | Tensor) -> Tensor:
        """The images at `indices` of this split: uint8 (B, C, H, W).

        Raises:
            VarkdError: an image is corrupt, or differs in size or channels from the first.
        """
        index_B = np.asarray(indices, dtype=np.int64)
        if len(self) * int(np.prod(self.image_shape)) > _KEEP_BYTES:
            return torch.from_numpy(self._decode(index_B, quiet=True))
        if self._kept_NCHW is None:
            quiet = len(self) * self.image_shape[1] * self.image_shape[2] < _LONG_PIXELS
            self._kept_NCHW = self._decode(np.arange(len(self)), quiet)
        return torch.from_numpy(self._kept_NCHW[index_B])

    def _decode(self, index_B: NDArray[np.int64], quiet: bool) -> NDArray[np.uint8]:
        images_BCHW = np.empty((len(index_B), *self.image_shape), dtype=np.uint8)
        rows_B = self._index_N[index_B]
        for slot, row in enumerate(progress.track(rows_B, f"decoding {self.split}", len(rows_B), quiet)):
            pixels_HWC = _pixels(self._rows, int(row), self.image_shape[0], self._image_size)
            if pixels_HWC.shape[:2] != self.image_shape[1:]:
                (height, width), (_, first_height, first_width) = pixels_HWC.shape[:2], self.image_shape
                raise VarkdError(
                    f"{self._rows.name(int(row))} is {width}x{height} pixels but the first image is "
                    f"{first_width}x{first_height}: set an image size to resize all of them"
                )
            images_BCHW[slot] = pixels_HWC.transpose(2, 0, 1)
        return images_BCHW

    def _fingerprint(self, settings: dict[str, object]) -> str:
        head = json.dumps({**settings, "classes": self.class_names, "shape": self.image_shape, "num": len(self)})
        sample = self._index_N[np.unique(np.linspace(0, len(self) - 1, 16).astype(int))]
        encoded = (self._rows.encoded(int(row)) for row in sample)
        if self._rows.keys is not None:
            encoded = chain(encoded, ("\0".join(self._rows.keys[int(row)] for row in self._index_N).encode(),))
        return sha256_of(head.encode(), np.ascontiguousarray(self.labels).tobytes(), *encoded)[:12]


def _open(rows: TargetRows, row: int) -> Image.Image:
    try:
        return Image.open(io.BytesIO(rows.encoded(row)))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, VarkdError):
            raise
        raise _corrupt(rows, row) from error


def _corrupt(rows: TargetRows, row: int) -> VarkdError:
    return VarkdError(f"cannot decode {rows.name(row)}: it is corrupt or truncated; repair or remove it")


def _pixels(rows: TargetRows, row: int, channels: int, image_size: int | None) -> NDArray[np.uint8]:
    """Decode one image: uint8 (H, W, channels)."""
    image = _open(rows, row)
    if image.mode in _DEEP_MODES:
        raise VarkdError(f"{rows.name(row)} has more than 8 bits a channel: convert it to 8 bits")
    if channels == 1 and image.mode not in _GRAY_MODES:
        raise VarkdError(f"{rows.name(row)} is in color but the images before it are gray: make them all one kind")
    try:
        image = ImageOps.exif_transpose(image).convert("L" if channels == 1 else "RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _corrupt(rows, row) from error
    if image_size is not None:
        image = _resize(image, image_size)
    return np.asarray(image, dtype=np.uint8).reshape(image.height, image.width, channels)


def _resize(image: Image.Image, size: int) -> Image.Image:
    """Halve by BOX while at least twice too large, BICUBIC to a shorter side of `size`, crop the center."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
