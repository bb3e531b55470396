"""Images that are in memory already: anything that is indexed by 0 .. N - 1 and gives an image and a label."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from varkd.data.rows import ImageRows, Source
from varkd.errors import VarkdError

_IMAGE_COLUMNS, _LABEL_COLUMNS = ("image", "img"), ("label", "labels")


class Indexed(Protocol):
    """A list of (image, label), a `torch.utils.data.Dataset`, or a `datasets.Dataset` with an image column.

    Images are PIL images or uint8 arrays (H, W), (H, W, 1) or (H, W, 3); labels are numbers from 0.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def memory_name(images: Indexed) -> str:
    """What such a source is called in messages and in the manifest of its codes."""
    return f"{len(images)} images in memory ({type(images).__name__})"


def read_memory(images: Indexed) -> Source:
    """List the rows; images are read one by one when they are needed.

    Class names are those of `features["label"]`, `classes` or `class_names` where there are some, else the numbers.

    Raises:
        VarkdError: nothing in it, or items that are no (image, label).
    """
    name = memory_name(images)
    if len(images) == 0:
        raise VarkdError(f"{name}: there is nothing to read")
    label_N = _labels(images, name)
    rows = ImageRows(lambda row: _png(images[row], row, name), lambda row: f"image {row} of {name}", label_N)
    return Source.of(name, rows, None, _class_names(images, int(label_N.max())))


def _labels(images: Indexed, name: str) -> NDArray[np.int64]:
    columns = getattr(images, "column_names", ())
    known = getattr(images, "targets", None)
    try:
        if label := next((column for column in _LABEL_COLUMNS if column in columns), None):
            return np.asarray(images[label], dtype=np.int64)  # type: ignore[call-overload, index] - datasets.Dataset
        if known is not None and len(known) == len(images):  # torchvision's data sets
            return np.asarray(known, dtype=np.int64)
        return np.array([int(_pair(images[row])[1]) for row in range(len(images))], dtype=np.int64)
    except (TypeError, ValueError, KeyError) as error:
        raise VarkdError(f"{name}: give (image, label) items with labels that are numbers from 0 ({error})") from error


def _pair(item: Any) -> tuple[Any, Any]:
    if isinstance(item, Mapping):
        image, label = (
            next((item[column] for column in columns if column in item), None)
            for columns in (_IMAGE_COLUMNS, _LABEL_COLUMNS)
        )
        if image is None or label is None:
            raise ValueError(f"its columns are {', '.join(map(str, item))}")
        return image, label
    image, label = item
    return image, label


def _png(item: Any, row: int, name: str) -> bytes:
    image = _pair(item)[0]
    if not isinstance(image, Image.Image):
        pixels = np.asarray(image)
        if (
            pixels.dtype != np.uint8
            or pixels.ndim not in (2, 3)
            or (pixels.ndim == 3 and pixels.shape[2] not in (1, 3))
        ):
            raise VarkdError(
                f"image {row} of {name} is {pixels.dtype} {pixels.shape}: give a PIL image, or uint8 "
                "(H, W), (H, W, 1) or (H, W, 3)"
            )
        image = Image.fromarray(pixels[:, :, 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _class_names(images: Indexed, largest: int) -> tuple[str, ...]:
    features = getattr(images, "features", None) or {}
    declared = (getattr(features.get(column), "names", None) for column in _LABEL_COLUMNS)
    found: Sequence[Any] | None = next((names for names in declared if names), None)
    found = found or getattr(images, "classes", None) or getattr(images, "class_names", None)
    return tuple(map(str, found)) if found else tuple(map(str, range(largest + 1)))
