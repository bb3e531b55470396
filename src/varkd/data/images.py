"""Images of one split as uint8 tensors, whatever they came from.

They are resized as ADM does (Dhariwal and Nichol 2021). A source without a validation split of its own gets one that
is held out by class, as a function of the seed.
"""

from __future__ import annotations

import io
import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from varkd import progress
from varkd.data.memory import Indexed
from varkd.data.rows import ImageRows
from varkd.data.sources import load_source, source_name
from varkd.data.workers import mapped
from varkd.errors import VarkdError
from varkd.files import sha256_of
from varkd.world import Rng, World

Split = Literal["train", "validation"]
Skipped = dict[Split, list[str]]
"""Keys of images that are left out, by split of the source."""

_KEEP_BYTES = 512 * 2**20
_LONG_PIXELS = 2**25  # decoding more than this takes long enough for a bar
_PROBES = 64
_STRIP = 4  # times longer than wide; ADM's order (resize, then crop) is kept below
_NAMED = 50  # bad images in one message
_PIECE = 32  # images that a process decodes at a time
_GRAY_MODES = ("1", "L", "LA")
_DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")


class BadImage(VarkdError):
    """One image that cannot be used, however often it is read."""


def open_images(
    source: str | Indexed,
    split: Split,
    *,
    image_size: int | None = None,
    validation: float = 0.1,
    seed: int = 0,
    label: str | None = None,
    skip: Skipped | None = None,
) -> ImageSet:
    """One split of `source`.

    `source` may be in memory (`data.memory.Indexed`), or is "digits", a folder, `a.parquet`,
    `train.parquet,validation.parquet`, `shards-*.tar` or a hub id `org/name`; `label` names the label column of a table
    ("none": one class). `skip` names images to leave out.

    A validation (else test) split of the source is used as it is. Otherwise a share `validation` of the images, at
    least one, is held out, the same ones for the same seed: of a folder those whose names have small hashes (images
    that come or go move no others), of the rows of a file round(`validation` * N), of each class its share to within 1.
    `image_size` resizes the shorter side and crops the center; None asks for images of one size. What is transparent
    becomes white. Images are gray (C = 1) where a spread of them holds no color, else RGB.

    Raises:
        VarkdError: the source is missing, empty, unreadable or unreachable, or its labels are out of range.
    """
    if not 0 < validation < 1:
        raise VarkdError(f"validation={validation} must be a fraction between 0 and 1, such as 0.1")
    if image_size is not None and image_size < 1:
        raise VarkdError(f"image_size={image_size} must be a positive number of pixels")
    found = load_source(source, label)
    settings: dict[str, object] = {"split": split, "image_size": image_size}
    train, own = found.train, found.validation
    if skip:
        settings["skip"] = skip
        train = train.without(skip.get("train", ()))
        own = own.without(skip.get("validation", ())) if own is not None else None
    if own is not None:
        rows = train if split == "train" else own
        index_N = np.arange(len(rows))
    else:
        rows = train
        settings |= {"validation": validation, "seed": seed}
        if len(rows) < 2:
            raise VarkdError(f"{source_name(source)} holds one image: training and validation need at least one each")
        held_N = (
            _held_out(rows.label_N, validation, seed)
            if rows.keys is None
            else _held_out_by_name(rows.keys, validation, seed)
        )
        index_N = np.flatnonzero(held_N if split == "validation" else ~held_N)
    shape = _image_shape(train, image_size)
    name = source_name(source)
    return ImageSet(
        name,
        split,
        rows,
        index_N,
        found.class_names,
        shape,
        image_size,
        settings,
        found.skipped,
        "train" if own is None else split,
    )


def open_checked(
    source: str | Indexed,
    *,
    skip_corrupt: bool = False,
    workers: int = 0,
    world: World | None = None,
    quiet: bool = False,
    **options: Any,
) -> tuple[dict[Split, ImageSet], Skipped]:
    """Both splits of `source` once every image has been decoded, and what was left out (`skip` of `open_images`).

    Ranks share the decoding, each with `workers` processes (0: threads). Small sets are decoded once, large ones again
    when they are used.

    Raises:
        VarkdError: as `open_images`; images that cannot be used, all of them named (unless `skip_corrupt`).
    """
    splits: tuple[Split, ...] = ("train", "validation")
    sets: dict[Split, ImageSet] = {split: open_images(source, split, **options) for split in splits}
    faults = [fault for images in sets.values() for fault in images.faults(world or World(), quiet, workers)]
    if not faults:
        return sets, {}
    if not skip_corrupt:
        raise VarkdError(_all_faults([error for _, _, error in faults]))
    skip: Skipped = {}
    for split, key, _ in faults:
        skip.setdefault(split, []).append(key)
    return {split: open_images(source, split, skip=skip, **options) for split in splits}, skip


def _all_faults(errors: Sequence[BadImage]) -> str:
    if len(errors) == 1:
        return f"{errors[0]} (--skip-corrupt leaves it out)"
    told = [str(error).split(": ")[0] for error in errors[:_NAMED]]
    more = f"; and {len(errors) - _NAMED} more" if len(errors) > _NAMED else ""
    return (
        f"{len(errors)} images cannot be used: {'; '.join(told)}{more}. Repair them, or leave them out: --skip-corrupt"
    )


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


def _image_shape(rows: ImageRows, image_size: int | None) -> tuple[int, int, int]:
    """(C, H, W): the size of the first image; gray only if none of a spread of images has color. Bad ones do not count.

    Raises:
        VarkdError: none of the spread can be decoded.
    """
    spread = [int(row) for row in np.unique(np.linspace(0, len(rows) - 1, _PROBES).astype(int))]
    modes, failed = {}, None
    for row in spread:
        try:
            modes[row] = _open(rows, row).mode
        except BadImage as error:
            failed = failed or error
    channels = 1 if all(mode in _GRAY_MODES for mode in modes.values()) else 3
    for row in modes:
        try:
            height, width = _pixels(rows, row, channels, image_size).shape[:2]
            return channels, height, width
        except BadImage as error:
            failed = failed or error
    raise failed or VarkdError("there are no images")


class ImageSet:
    """One split, decoded on first use and kept where it fits into 512 MB, else decoded on access.

    `fingerprint` names what the images are (labels, classes, a sample of the encoded bytes) and how they were split
    and resized, but not where they lie. `ignored` counts files of the source by ending that are no images.
    """

    def __init__(
        self,
        name: str,
        split: Split,
        rows: ImageRows,
        index_N: NDArray[np.int64],
        class_names: tuple[str, ...],
        image_shape: tuple[int, int, int],
        image_size: int | None,
        settings: dict[str, object],
        ignored: Mapping[str, int] | None = None,
        part: Split = "train",
    ) -> None:
        self.name, self.split, self.class_names, self.image_shape = name, split, class_names, image_shape
        self.labels: NDArray[np.int64] = rows.label_N[index_N]
        self.ignored = dict(ignored or {})
        self._rows, self._index_N, self._image_size, self._part = rows, index_N, image_size, part
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
        if not self._is_kept:
            return torch.from_numpy(self._decode(index_B, quiet=True))
        if self._kept_NCHW is None:
            self._kept_NCHW = self._decode(np.arange(len(self)), self._is_quick)
        return torch.from_numpy(self._kept_NCHW[index_B])

    def decoded(self, index_B: NDArray[np.int64]) -> NDArray[np.uint8]:
        """`batch` for one use in a process of its own: nothing is kept for later."""
        return self._decode(index_B, quiet=True) if self._kept_NCHW is None else self._kept_NCHW[index_B]

    def faults(self, world: World, quiet: bool = False, workers: int = 0) -> list[tuple[Split, str, BadImage]]:
        """The images that cannot be used: (split of the source, key, what is wrong), the same on every rank."""
        mine = np.arange(world.rank, len(self), world.size)
        kept = np.empty((len(self), *self.image_shape), dtype=np.uint8) if self._is_kept and world.size == 1 else None
        wrong_N = torch.zeros(len(self))

        def look(index_B: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint8] | None]:
            good, bad, images = [], [], []
            for index in index_B.tolist():
                try:
                    pixels_CHW = self._one(index)
                except BadImage:
                    bad.append(index)
                else:
                    good.append(index)
                    images += [] if kept is None else [pixels_CHW]
            return np.array(good, np.int64), np.array(bad, np.int64), np.stack(images) if images else None

        pieces = [mine[start : start + _PIECE] for start in range(0, len(mine), _PIECE)]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            looked = mapped(look, pieces, workers) if workers else pool.map(look, pieces)
            done = 0
            with progress.bar(f"checking {self.split}", len(mine), quiet or self._is_quick or not world.is_main) as bar:
                for good_B, bad_B, images_BCHW in looked:
                    wrong_N[bad_B] = 1
                    if kept is not None and images_BCHW is not None:
                        kept[good_B] = images_BCHW
                    bar.update(done := done + len(good_B) + len(bad_B))
        found = []
        for index in torch.nonzero(world.sum(wrong_N)).flatten().tolist():
            try:
                self._one(index)
            except BadImage as error:
                found.append((self._part, self._rows.key(int(self._index_N[index])), error))
        if not found:
            self._kept_NCHW = kept
        return found

    @property
    def _is_kept(self) -> bool:
        return len(self) * int(np.prod(self.image_shape)) <= _KEEP_BYTES

    @property
    def _is_quick(self) -> bool:
        return len(self) * self.image_shape[1] * self.image_shape[2] < _LONG_PIXELS

    def _decode(self, index_B: NDArray[np.int64], quiet: bool) -> NDArray[np.uint8]:
        images_BCHW = np.empty((len(index_B), *self.image_shape), dtype=np.uint8)
        for slot, index in enumerate(progress.track(index_B, f"decoding {self.split}", len(index_B), quiet)):
            images_BCHW[slot] = self._one(int(index))
        return images_BCHW

    def _one(self, index: int) -> NDArray[np.uint8]:
        """One image: uint8 (C, H, W)."""
        row = int(self._index_N[index])
        pixels_HWC = _pixels(self._rows, row, self.image_shape[0], self._image_size)
        if pixels_HWC.shape[:2] != self.image_shape[1:]:
            (height, width), (_, first_height, first_width) = pixels_HWC.shape[:2], self.image_shape
            raise BadImage(
                f"{self._rows.name(row)} is {width}x{height} pixels but the first image is "
                f"{first_width}x{first_height}: set an image size to resize all of them"
            )
        return pixels_HWC.transpose(2, 0, 1)

    def _fingerprint(self, settings: dict[str, object]) -> str:
        head = json.dumps({**settings, "classes": self.class_names, "shape": self.image_shape, "num": len(self)})
        sample = self._index_N[np.unique(np.linspace(0, len(self) - 1, 16).astype(int))]
        encoded = (self._rows.encoded(int(row)) for row in sample)
        if self._rows.keys is not None:
            encoded = chain(encoded, ("\0".join(self._rows.keys[int(row)] for row in self._index_N).encode(),))
        return sha256_of(head.encode(), np.ascontiguousarray(self.labels).tobytes(), *encoded)[:12]


class ArchivedImages(ImageSet):
    """Images that are no longer there: known by what codes record of them, which is all that a cache is asked for."""

    def __init__(self, name: str, split: Split, class_names: tuple[str, ...], fingerprint: str, num: int) -> None:
        self.name, self.split, self.class_names, self.fingerprint, self._num = (
            name,
            split,
            class_names,
            fingerprint,
            num,
        )

    def __len__(self) -> int:
        return self._num

    def batch(self, indices: Sequence[int] | NDArray[np.int64] | Tensor) -> Tensor:
        del indices
        self.refuse()

    def refuse(self) -> NoReturn:
        raise VarkdError(f"no images at {self.name}, where the codes come from: put them back")


def _open(rows: ImageRows, row: int) -> Image.Image:
    encoded = rows.encoded(row)  # what the system refuses is not the image's fault
    with _decoding(rows, row):
        return Image.open(io.BytesIO(encoded))


@contextmanager
def _decoding(rows: ImageRows, row: int) -> Iterator[None]:
    """What a decoder says of bytes that lie in memory: they are no image, or only a part of one, or a huge one."""
    try:
        yield
    except Image.DecompressionBombError:
        raise BadImage(f"{rows.name(row)} has more pixels than are safe to decode: make it smaller") from None
    except MemoryError:
        raise VarkdError(f"not enough memory to decode {rows.name(row)}: make the image smaller") from None
    except (OSError, ValueError, SyntaxError, EOFError, struct.error) as error:
        raise BadImage(f"cannot decode {rows.name(row)}: it is corrupt or truncated; repair or remove it") from error


def _pixels(rows: ImageRows, row: int, channels: int, image_size: int | None) -> NDArray[np.uint8]:
    """Decode one image: uint8 (H, W, channels)."""
    image = _open(rows, row)
    if image.mode in _DEEP_MODES:
        raise BadImage(f"{rows.name(row)} has more than 8 bits a channel: convert it to 8 bits")
    if channels == 1 and image.mode not in _GRAY_MODES:
        raise BadImage(f"{rows.name(row)} is in color but the images before it are gray: make them all one kind")
    with _decoding(rows, row):
        return pixels_of(image, channels, image_size)


def pixels_of(image: Image.Image, channels: int, image_size: int | None = None) -> NDArray[np.uint8]:
    """A picture upright on white, gray or RGB, with `image_size` resized and cropped: uint8 (H, W, channels)."""
    image = _on_white(ImageOps.exif_transpose(image)).convert("L" if channels == 1 else "RGB")
    if image_size is not None:
        image = _resize(image, image_size)
    return np.asarray(image, dtype=np.uint8).reshape(image.height, image.width, channels)


def _on_white(image: Image.Image) -> Image.Image:
    """What is transparent shows a white page, not the color that happens to lie under it."""
    if not image.has_transparency_data:
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))


def _resize(image: Image.Image, size: int) -> Image.Image:
    """Halve by BOX while at least twice too large, BICUBIC to a shorter side of `size`, crop the center.

    A strip is cut to four times its width first: enlarged as a whole it may need gigabytes.
    """
    reach = _STRIP * min(image.size)
    if max(image.size) > reach:
        width, height = (min(side, reach) for side in image.size)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
