"""Where images come from: digits, a folder, parquet files or the Hugging Face hub, as rows of encoded bytes.

Parquet and the hub go through the `datasets` library. A folder is listed here: the library's imagefolder reads
splits out of file names (`cat/test_1.png` becomes a test split) and drops the labels of a folder with one class.
"""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from varkd.errors import VarkdError
from varkd.folders import locate, relative

if TYPE_CHECKING:
    import datasets

_VALIDATION_NAMES = ("validation", "val", "valid", "test")  # in the order of preference
_IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".jp2")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class TargetRows:
    """The labeled images of one split, still encoded. `name(i)` says where row i lies, for messages.

    `keys` name images that are files of their own (class and file name): who is held out follows from them, so that
    images which come or go move no other one to the other split. None: the rows of one fixed file.
    """

    encoded: Callable[[int], bytes]
    name: Callable[[int], str]
    label_N: NDArray[np.int64]
    keys: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.label_N)


@dataclass(frozen=True)
class Source:
    """All rows of a source; `validation` is None where the source has no split of its own."""

    train: TargetRows
    validation: TargetRows | None
    class_names: tuple[str, ...]

    @classmethod
    def of(
        cls, name: str, train: TargetRows, validation: TargetRows | None, class_names: tuple[str, ...] | None
    ) -> Source:
        """Check the labels; without `class_names` the classes are "0" to "K-1" for K = 1 + the largest label.

        Raises:
            VarkdError: no images, or a label that is negative or has no class name.
        """
        splits = {"train": train} if validation is None else {"train": train, "validation": validation}
        for split, rows in splits.items():
            if len(rows) == 0:
                raise VarkdError(f"no images in the {split} split of {name}: nothing to read")
        if class_names is None:
            largest = max(int(rows.label_N.max()) for rows in splits.values())
            class_names = tuple(str(label) for label in range(largest + 1))
        for rows in splits.values():
            wrong = np.flatnonzero((rows.label_N < 0) | (rows.label_N >= len(class_names)))
            if len(wrong):
                row = int(wrong[0])
                raise VarkdError(
                    f"label {rows.label_N[row]} of {rows.name(row)} is outside 0..{len(class_names) - 1} "
                    f"({len(class_names)} classes): repair the labels or the class names"
                )
        return cls(train, validation, class_names)


def relative_source(source: str, folder: Path) -> str:
    """A source as a file in `folder` records it: parts that lie on this disk as seen from there, others as they are."""
    return ",".join(relative(part, folder) if Path(part).exists() else part for part in source.split(","))


def locate_source(recorded: str, folder: Path, given: str) -> str:
    """The source that a file in `folder` records (see `folders.locate`)."""
    if recorded == given and not Path(recorded).exists():  # built in, or on the hub
        return given
    parts = zip(recorded.split(","), given.split(","), strict=True)
    return ",".join(str(locate(part, folder, as_given)) for part, as_given in parts)


def load_source(source: str) -> Source:
    """Find out what `source` names and list its rows.

    Raises:
        VarkdError: it does not exist, holds no images, cannot be read or cannot be downloaded.
    """
    if source == "digits":
        return _digits()
    if source.endswith(".parquet"):
        return _parquet(source)
    if Path(source).is_dir():
        return _folder(Path(source))
    if Path(source).exists():
        raise VarkdError(f"{source} is neither a folder of images nor a .parquet file: give one of these")
    if not _HUB_ID.fullmatch(source) or Path(source).parent.is_dir():  # a mistyped path is not looked for elsewhere
        raise VarkdError(f"no such folder or file: {source} (or give digits, or a Hugging Face id such as org/name)")
    return _hub(source)


def _digits() -> Source:
    """scikit-learn's 1,797 digits: 8x8 gray with 17 levels, as uint8 = round(level * 255 / 16)."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    pixels_NHW = np.round(bunch.images * (255 / 16)).astype(np.uint8)

    def encoded(row: int) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(pixels_NHW[row]).save(buffer, format="PNG")
        return buffer.getvalue()

    rows = TargetRows(encoded, lambda row: f"digit {row}", bunch.target.astype(np.int64))
    return Source.of("digits", rows, None, tuple(str(name) for name in bunch.target_names))


def _folder(root: Path) -> Source:
    """`root/class/*.png`, or that under train/ and val|validation|test/; a flat folder is one class."""
    folders = {path.name: path for path in _visible(root) if path.is_dir()}
    if "train" not in folders or not set(folders) <= {"train", *_VALIDATION_NAMES}:
        by_class = _images_by_class(root, root.resolve().name)
        return Source.of(str(root), _file_rows(root, by_class, by_class), None, tuple(by_class))
    one_class = root.resolve().name
    train = _images_by_class(folders["train"], one_class)
    own = next((name for name in _VALIDATION_NAMES if name in folders), None)
    if own is None:
        return Source.of(str(root), _file_rows(folders["train"], train, train), None, tuple(train))
    validation = _images_by_class(folders[own], one_class)
    unknown = sorted(set(validation) - set(train))
    if unknown:
        raise VarkdError(f"class '{unknown[0]}' of {folders[own]} has no folder under {folders['train']}: add it")
    return Source.of(
        str(root), _file_rows(folders["train"], train, train), _file_rows(folders[own], validation, train), tuple(train)
    )


def _images_by_class(root: Path, one_class: str) -> dict[str, list[Path]]:
    """The images of each class, everything sorted by name."""
    loose = [path for path in _visible(root) if path.is_file() and _is_image(path)]
    folders = [path for path in _visible(root) if path.is_dir()]
    images = {folder.name: sorted(path for path in folder.rglob("*") if _is_image(path)) for folder in folders}
    by_class = {name: paths for name, paths in images.items() if paths}
    if loose and by_class:
        raise VarkdError(
            f"{loose[0]} lies beside class folders: move it into one of them, or all images into one folder"
        )
    if not loose and not by_class:
        raise VarkdError(f"no images in {root}: put them into one folder for each class")
    return by_class or {one_class: loose}


def _visible(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if not path.name.startswith((".", "__")))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in _IMAGE_ENDINGS and not path.name.startswith(".")


def _file_rows(root: Path, by_class: dict[str, list[Path]], all_classes: dict[str, list[Path]]) -> TargetRows:
    label_of = {name: label for label, name in enumerate(all_classes)}
    files = [path for paths in by_class.values() for path in paths]
    label_N = np.array([label_of[name] for name, paths in by_class.items() for _ in paths], dtype=np.int64)
    keys = tuple(path.relative_to(root).as_posix() for path in files)
    return TargetRows(lambda row: files[row].read_bytes(), lambda row: str(files[row]), label_N, keys)


def _parquet(source: str) -> Source:
    paths = source.split(",")
    if len(paths) > 2:
        raise VarkdError(f"{source} names {len(paths)} files: give train.parquet or train.parquet,validation.parquet")
    for path in paths:
        if not Path(path).is_file():
            raise VarkdError(f"no such file: {path}")
    import datasets

    files: dict[str, str] = dict(zip(("train", "validation"), paths, strict=False))
    with _quiet_datasets():
        try:
            splits = datasets.load_dataset("parquet", data_files=files)
        except Exception as error:
            raise VarkdError(
                f"cannot read {source} ({_reason(error)}): is it a whole parquet file of images?"
            ) from error
    return _of_splits(source, {str(name): rows for name, rows in splits.items()})


def _hub(source: str) -> Source:
    import datasets
    from datasets.exceptions import DatasetsError

    with _quiet_datasets():
        try:
            splits = datasets.load_dataset(source)
        except FileNotFoundError as error:
            raise VarkdError(
                f"no folder {source} here and no such dataset on the Hugging Face hub: check it"
            ) from error
        except (OSError, DatasetsError) as error:
            raise VarkdError(
                f"could not download {source} from the Hugging Face hub ({_reason(error)}): check the network and "
                "run it again; what has been downloaded is kept"
            ) from error
        except Exception as error:
            # The library and its HTTP client raise many types here, and none of them is ours.
            raise VarkdError(
                f"could not load {source} from the Hugging Face hub ({_reason(error)}): run it again"
            ) from error
    return _of_splits(source, {str(name): rows for name, rows in splits.items()})


def _reason(error: BaseException) -> str:
    """The first line of the innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """No progress bars of `datasets` and no log lines of the two libraries; their settings are put back."""
    import datasets

    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    bars, levels = datasets.are_progress_bars_disabled(), [logger.level for logger in loggers]
    datasets.disable_progress_bars()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


def _of_splits(source: str, splits: dict[str, datasets.Dataset]) -> Source:
    """Rows of a `datasets` dictionary; without a train split the first one is taken for it."""
    train = splits["train"] if "train" in splits else next(iter(splits.values()))
    own = next((splits[name] for name in _VALIDATION_NAMES if name in splits and splits[name] is not train), None)
    image, label = _columns(source, train)
    class_names = _class_names(train, label)
    if own is not None and (image not in own.features or _class_names(own, label) != class_names):
        raise VarkdError(f"the splits of {source} differ in their columns or class names: make them agree")
    validation = None if own is None else _dataset_rows(source, own, image, label)
    return Source.of(source, _dataset_rows(source, train, image, label), validation, class_names)


def _columns(source: str, dataset: datasets.Dataset) -> tuple[str, str | None]:
    """The names of the image column and of the label column (None: all images are one class)."""
    import datasets

    features = dataset.features
    image = next((name for name, kind in features.items() if isinstance(kind, datasets.Image)), None)
    if image is None:  # written without the library's schema metadata
        image = next((name for name, kind in features.items() if isinstance(kind, dict) and "bytes" in kind), None)
    if image is None:
        raise VarkdError(f"{source} has no image column (columns: {', '.join(features)}): it needs a struct with bytes")
    classes = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    label = next((name for name in ("label", "labels", *classes) if name in features), None)
    if label is None:
        return image, None
    kind = features[label]
    if label not in classes and not (isinstance(kind, datasets.Value) and "int" in kind.dtype):
        raise VarkdError(f"column '{label}' of {source} does not hold integers: store class numbers there")
    return image, label


def _class_names(dataset: datasets.Dataset, label: str | None) -> tuple[str, ...] | None:
    if label is None:
        return ("all",)
    names = getattr(dataset.features.get(label), "names", None)
    return None if names is None else tuple(names)


def _dataset_rows(source: str, dataset: datasets.Dataset, image: str, label: str | None) -> TargetRows:
    """Rows straight from the memory-mapped Arrow columns: the library's row access costs more than decoding."""
    struct_N = dataset.data.column(image)

    def place(row: int) -> str:
        path = struct_N[row]["path"].as_py() if "path" in struct_N.type.names else None
        return f"row {row} of {source}" + (f" ({path})" if path else "")

    def encoded(row: int) -> bytes:
        data = struct_N[row]["bytes"].as_py()
        if data is not None:
            return data
        path = struct_N[row]["path"].as_py() if "path" in struct_N.type.names else None
        if path is None:
            raise VarkdError(f"{place(row)} holds no image: remove the row")
        return Path(path).read_bytes()

    if label is None:
        return TargetRows(encoded, place, np.zeros(len(dataset), dtype=np.int64))
    column = dataset.data.column(label)
    if column.null_count:
        raise VarkdError(f"{column.null_count} rows of {source} have no label: remove them or label them")
    return TargetRows(encoded, place, column.to_numpy().astype(np.int64))
