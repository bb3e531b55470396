"""Images to be judged, read in file order: an .npz of ADM's layout, a folder of pictures, or an array.

An .npz holds `arr_0`, uint8 (N, H, W, 3); it is read a slice at a time, so that 50,000 images need no memory. A folder
is read in natural order of its paths (`9.png` before `10.png`), and every picture as RGB.
"""

from __future__ import annotations

import hashlib
import re
import struct
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from varkd.errors import VarkdError
from varkd.files import NPY_ERRORS

_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm")
_LOSSY = (".jpg", ".jpeg", ".webp")
_STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")
_LABELS = ("arr_1", "label", "labels")


@dataclass
class ImageFiles(ABC):
    """N images of one size. `warnings` holds what a person should know of them, one line each.

    Gray images (one channel) are given out as RGB with three equal channels.
    """

    name: str
    num: int
    height: int
    width: int
    channels: int = 3
    labels: NDArray[np.int64] | None = None
    warnings: list[str] = field(default_factory=list)

    @abstractmethod
    def batches(self, begin: int, end: int, size: int) -> Iterator[Tensor]:
        """Images `begin` to `end` in order, as uint8 (B, 3, H, W) with B = `size` but for the last."""

    @abstractmethod
    def hash(self) -> str:
        """SHA-256 that names the images and their order."""

    def statistics(self) -> dict[str, NDArray[np.float64]]:
        """What is stored beside the images of mu, sigma, mu_s and sigma_s."""
        return {}


def open_image_files(source: str | Path | Tensor | NDArray[Any]) -> ImageFiles:
    """Images in a folder, an .npz file, or an array (N, H, W, 3) (a tensor may also be (N, 3, H, W)).

    Raises:
        VarkdError: nothing there, a damaged file, no `arr_0`, or images that are not uint8 RGB of one size.
    """
    if isinstance(source, Tensor | np.ndarray):
        return _Array.of(source)
    path = Path(source)
    if path.is_dir():
        return _Folder.of(path)
    if not path.exists():
        raise VarkdError(f"no such file or folder: {path}")
    if path.suffix != ".npz":
        raise VarkdError(f"{path} is neither an .npz file nor a folder of images")
    return _Npz.of(path)


def class_sorted(labels_N: NDArray[np.int64]) -> bool:
    """Whether images of the same class stand together: neighbors agree far more often than in random order.

    Under a random order the number of agreeing neighbors is about binomial with share sum_c p_c^2.
    """
    num = len(labels_N)
    if num < 8:
        return False
    _, counts = np.unique(labels_N, return_counts=True)
    chance = float(((counts / num) ** 2).sum())
    agreeing, pairs = float((labels_N[1:] == labels_N[:-1]).sum()), num - 1
    return chance < 0.9 and agreeing > chance * pairs + 5 * np.sqrt(chance * (1 - chance) * pairs + 1)


@dataclass
class _Array(ImageFiles):
    images_NCHW: Tensor = field(default_factory=lambda: torch.empty(0))

    @classmethod
    def of(cls, images: Tensor | NDArray[Any]) -> _Array:
        is_tensor = isinstance(images, Tensor)
        rows = images if isinstance(images, Tensor) else torch.from_numpy(np.ascontiguousarray(images))
        _check_dtype("the array", str(rows.dtype).removeprefix("torch."))
        if is_tensor and rows.ndim == 4 and rows.shape[1] == 3:
            rows = rows.permute(0, 2, 3, 1)
        shape = _check_shape("the array", tuple(rows.shape))
        return cls("array", *shape, images_NCHW=rows.permute(0, 3, 1, 2))

    def batches(self, begin: int, end: int, size: int) -> Iterator[Tensor]:
        for batch_BCHW in self.images_NCHW[begin:end].split(size):
            yield batch_BCHW.expand(-1, 3, -1, -1)

    def hash(self) -> str:
        digest = hashlib.sha256()
        for batch in self.batches(0, self.num, 256):
            digest.update(batch.permute(0, 2, 3, 1).contiguous().cpu().numpy().tobytes())
        return digest.hexdigest()


@dataclass
class _Npz(ImageFiles):
    path: Path = Path()

    @classmethod
    def of(cls, path: Path) -> _Npz:
        with _npz_errors(path), zipfile.ZipFile(path) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
            if "arr_0" not in names:
                raise VarkdError(
                    f"{path} has no key arr_0 (keys: {', '.join(sorted(names)) or 'none'}): write images "
                    f"with np.savez(path, images)"
                )
            with archive.open("arr_0.npy") as member:
                shape, fortran, dtype = _header(member)
            _check_dtype(f"{path}: arr_0", str(dtype))
            num, height, width, channels = _check_shape(f"{path}: arr_0", shape)
            if fortran:
                raise VarkdError(f"{path}: arr_0 is in Fortran order: store np.ascontiguousarray(images)")
            labels = next((_array(archive, name) for name in _LABELS if name in names), None)
        if labels is not None and (labels.ndim != 1 or len(labels) != num or labels.dtype.kind not in "iu"):
            labels = None
        label_N = None if labels is None else labels.astype(np.int64)
        result = cls(str(path), num, height, width, channels, label_N, path=path)
        if channels == 1:
            result.warnings.append(
                f"{path} holds gray images: they are judged as RGB with three equal channels, which "
                "OpenAI's evaluator would refuse"
            )
        return result

    def batches(self, begin: int, end: int, size: int) -> Iterator[Tensor]:
        bytes_each = self.height * self.width * self.channels
        with _npz_errors(self.path), zipfile.ZipFile(self.path) as archive:
            member, data = self._at(archive, begin * bytes_each)
            with member:
                for start in range(begin, end, size):
                    wanted = (min(start + size, end) - start) * bytes_each
                    content = bytearray(data.read(wanted))
                    if len(content) < wanted:
                        raise EOFError
                    pixels = torch.frombuffer(content, dtype=torch.uint8).view(
                        -1, self.height, self.width, self.channels
                    )
                    yield pixels.permute(0, 3, 1, 2).expand(-1, 3, -1, -1)

    def _at(self, archive: zipfile.ZipFile, offset: int) -> tuple[IO[bytes], IO[bytes]]:
        """A file that stands at this offset of the array's data; only compressed data are read from the start."""
        info = archive.getinfo("arr_0.npy")
        member = archive.open(info)
        _header(member)
        if info.compress_type != zipfile.ZIP_STORED:
            while offset > 0:
                offset -= len(member.read(min(offset, 1 << 24))) or offset
            return member, member
        before = member.tell()
        member.close()
        file = self.path.open("rb")
        file.seek(info.header_offset + 26)
        name_length, extra_length = struct.unpack("<HH", file.read(4))
        file.seek(info.header_offset + 30 + name_length + extra_length + before + offset)
        return file, file

    def hash(self) -> str:
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def statistics(self) -> dict[str, NDArray[np.float64]]:
        return stored_statistics(self.path)


@dataclass
class _Folder(ImageFiles):
    paths: list[Path] = field(default_factory=list)

    @classmethod
    def of(cls, folder: Path) -> _Folder:
        found = [path for path in folder.rglob("*") if path.suffix.lower() in _ENDINGS and path.name[0] != "."]
        paths = sorted(found, key=lambda path: _natural(path.relative_to(folder)))
        if not paths:
            raise VarkdError(f"no images in {folder}")
        first = _picture(paths[0])
        parents = [path.parent for path in paths]
        known = {parent: index for index, parent in enumerate(dict.fromkeys(parents))}
        labels = np.array([known[parent] for parent in parents], dtype=np.int64) if len(known) > 1 else None
        result = cls(str(folder), len(paths), first.shape[0], first.shape[1], 3, labels, paths=paths)
        if lossy := sum(path.suffix.lower() in _LOSSY for path in paths):
            result.warnings.append(
                f"{lossy} of {len(paths)} images in {folder} are stored with loss ({_LOSSY[0]} and "
                "the like): compression moves FID by tenths and more; write PNG"
            )
        return result

    def batches(self, begin: int, end: int, size: int) -> Iterator[Tensor]:
        for start in range(begin, end, size):
            batch = [_picture(path) for path in self.paths[start : min(start + size, end)]]
            for path, pixels in zip(self.paths[start:], batch, strict=False):
                if pixels.shape[:2] != (self.height, self.width):
                    raise VarkdError(
                        f"{path} is {pixels.shape[1]}x{pixels.shape[0]} pixels but {self.paths[0].name} "
                        f"is {self.width}x{self.height}: make all images one size"
                    )
            yield torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2)

    def hash(self) -> str:
        digest = hashlib.sha256()
        for path in self.paths:
            digest.update(path.name.encode())
            digest.update(path.read_bytes())
        return digest.hexdigest()


def stored_statistics(path: Path) -> dict[str, NDArray[np.float64]]:
    """Those of mu, sigma, mu_s and sigma_s that an .npz holds, as float64.

    Raises:
        VarkdError: the file is damaged.
    """
    with _npz_errors(path), zipfile.ZipFile(path) as archive:
        names = {name.removesuffix(".npy") for name in archive.namelist()}
        return {name: np.asarray(_array(archive, name), dtype=np.float64) for name in _STATISTICS if name in names}


def npz_keys(path: Path) -> set[str]:
    """The names of the arrays of an .npz.

    Raises:
        VarkdError: the file is damaged.
    """
    with _npz_errors(path), zipfile.ZipFile(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}


def _array(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    with archive.open(f"{name}.npy") as member:
        return np.lib.format.read_array(member, allow_pickle=False)


def _header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(member)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(member)
    return np.lib.format.read_array_header_2_0(member)


class _npz_errors:
    """What a damaged .npz raises while it is read, as one line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        del kind, trace
        if isinstance(error, VarkdError) or error is None:
            return
        damaged = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, struct.error, KeyError, RuntimeError)
        if isinstance(error, (*damaged, OSError, *NPY_ERRORS)):
            raise VarkdError(f"{self.path} is truncated or not an .npz file: write or download it again") from error


def _check_dtype(what: str, dtype: str) -> None:
    if dtype != "uint8":
        raise VarkdError(
            f"{what} is {dtype}, not uint8: convert images to 0..255 by the sampler's own rule "
            f"(rounding or truncation) before you judge them"
        )


def _check_shape(what: str, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    if len(shape) != 4 or shape[3] not in (1, 3) or 0 in shape:
        raise VarkdError(f"{what} has shape {shape}, not (N, height, width, 3)")
    return shape[0], shape[1], shape[2], shape[3]


def _natural(path: Path) -> list[tuple[int, str]]:
    """A key under which numbers in names sort by value."""
    parts = re.split(r"(\d+)", str(path))
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def _picture(path: Path) -> NDArray[np.uint8]:
    try:
        with Image.open(path) as image:
            if image.mode in ("I", "F", "I;16", "I;16L", "I;16B", "I;16N"):
                raise VarkdError(f"{path} has more than 8 bits a channel: convert it to 8 bits")
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise VarkdError(f"cannot decode {path}: it is corrupt or truncated; repair or remove it") from error
