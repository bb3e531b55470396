"""Tables of images through the `datasets` library: parquet files, WebDataset shards (`.tar`), the Hugging Face hub."""

from __future__ import annotations

import glob
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path, PurePath, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from varkd.data.remote import open_url
from varkd.data.rows import VALIDATION_NAMES, ImageRows, Source
from varkd.errors import VarkdError, did_you_mean
from varkd.files import read_errors

if TYPE_CHECKING:
    import datasets

BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}
P = TypeVar("P", bound=PurePath)
_LABELS = ("label", "labels")
_SHARD = re.compile(r"(train|validation|val|valid|test)\b.*")
ONE_CLASS = "none"
"""As the name of the label column: all images are one class."""


def read_files(source: str, splits: dict[str, list[Path]], label: str | None) -> Source:
    """Rows of parquet files or WebDataset shards, by split.

    Raises:
        VarkdError: files of several kinds, a file that cannot be read, or see `_of_splits`.
    """
    paths = [path for found in splits.values() for path in found]
    endings = {path.suffix for path in paths}
    if len(endings) > 1 or not endings <= set(BUILDERS):
        raise VarkdError(f"{source} holds files of several kinds ({', '.join(sorted(endings))}): give one kind")
    for path in paths:
        with read_errors(path):
            path.open("rb").close()
    files = {split: [glob.escape(str(path.resolve())) for path in found] for split, found in splits.items()}
    return _load(source, BUILDERS[endings.pop()], files, label)


def read_urls(source: str, splits: dict[str, list[str]], label: str | None) -> Source:
    """`read_files` for files behind URLs, which `datasets` downloads into its cache."""
    endings = {PurePosixPath(url).suffix for found in splits.values() for url in found}
    if len(endings) > 1 or not endings <= set(BUILDERS):
        raise VarkdError(f"{source} holds files of several kinds ({', '.join(sorted(endings))}): give one kind")
    open_url(next(iter(splits.values()))[0])  # says what is not installed
    return _load(source, BUILDERS[endings.pop()], splits, label)


def _load(source: str, kind: str, files: dict[str, list[str]], label: str | None) -> Source:
    import datasets

    with _quiet_datasets():
        try:
            found = datasets.load_dataset(kind, data_files=files)
        except Exception as error:  # the library raises many types, and none of them is ours
            what = "a whole parquet file" if kind == "parquet" else "whole WebDataset shards"
            raise VarkdError(f"cannot read {source} ({_reason(error)}): is it {what} of images?") from error
    label = "cls" if kind == "webdataset" and label is None else label
    return _of_splits(source, {str(name): rows for name, rows in found.items()}, label)


def splits_of(paths: Sequence[P]) -> dict[str, list[P]]:
    """Shards by split, as their names tell (`train-00000-of-00005.parquet`); all are train where no name tells."""
    named = {path: match[1] for path in paths if (match := _SHARD.fullmatch(path.name))}
    if "train" not in named.values():
        return {"train": list(paths)}
    splits: dict[str, list[P]] = {}
    for path in paths:
        if path not in named:
            raise VarkdError(f"{path} belongs to no split, as {next(iter(named))} does: name it train-*, or move it")
        splits.setdefault(named[path], []).append(path)
    return splits


def read_hub(source: str, label: str | None) -> Source:
    """Rows of a dataset on the Hugging Face hub, or in its cache on this machine.

    Raises:
        VarkdError: there is no such dataset, it could not be downloaded, or see `_of_splits`.
    """
    import datasets
    from datasets.exceptions import DatasetsError

    with _quiet_datasets(), nullcontext() if hub_answers() else _offline():
        try:
            splits = datasets.load_dataset(source)
        except FileNotFoundError as error:
            raise VarkdError(
                f"no folder {source} here and no such dataset on the Hugging Face hub: check it"
            ) from error
        except (OSError, DatasetsError) as error:
            raise VarkdError(
                f"no folder {source} here, and could not download it from the Hugging Face hub ({_reason(error)}): "
                "check the name and the network and run it again; what has been downloaded is kept"
            ) from error
        except Exception as error:
            # The library and its HTTP client raise many types here, and none of them is ours.
            raise VarkdError(
                f"no folder {source} here, and could not load it from the Hugging Face hub ({_reason(error)}): "
                "check the name, or run it again"
            ) from error
    return _of_splits(source, {str(name): rows for name, rows in splits.items()}, label)


def hub_answers() -> bool:
    """Whether the hub can be reached at all, asked once: the library asks six times, for half a minute."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception:  # of whatever HTTP client the library uses
        return False
    return True


@contextmanager
def _offline() -> Iterator[None]:
    """What was downloaded before, and nothing else; at once."""
    from datasets import config
    from huggingface_hub import constants

    before = config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


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


def _of_splits(source: str, splits: dict[str, datasets.Dataset], label: str | None) -> Source:
    """Rows of a `datasets` dictionary; without a train split the first one is taken for it.

    Raises:
        VarkdError: no image column, no column that is surely the label, labels that are none, or splits that differ.
    """
    train = splits["train"] if "train" in splits else next(iter(splits.values()))
    own = next((splits[name] for name in VALIDATION_NAMES if name in splits and splits[name] is not train), None)
    image, column = _columns(source, train, label)
    if own is not None and (image not in own.features or _kind(own, column) != _kind(train, column)):
        raise VarkdError(f"the splits of {source} differ in their columns or class names: make them agree")
    parts = [train] if own is None else [train, own]
    class_names, numbers = _classes(source, parts, column)
    rows = [_rows(source, part, image, label_N) for part, label_N in zip(parts, numbers, strict=True)]
    return Source.of(source, rows[0], rows[1] if own is not None else None, class_names)


def _kind(dataset: datasets.Dataset, column: str | None) -> Any:
    return None if column is None else dataset.features.get(column)


def _columns(source: str, dataset: datasets.Dataset, label: str | None) -> tuple[str, str | None]:
    """The names of the image column and of the label column (None: all images are one class)."""
    import datasets

    features = dataset.features
    image = next((name for name, kind in features.items() if isinstance(kind, datasets.Image)), None)
    if image is None:  # written without the library's schema metadata
        image = next((name for name, kind in features.items() if isinstance(kind, dict) and "bytes" in kind), None)
    if image is None:
        raise VarkdError(f"{source} has no image column (columns: {', '.join(features)}): it needs a struct with bytes")
    if label == ONE_CLASS:
        return image, None
    if label is not None:
        if label not in features:
            raise VarkdError(
                f"{source} has no column '{label}': {did_you_mean(label, features)} "
                f"(--label NAME, or --label {ONE_CLASS} for one class)"
            )
        return image, label
    classes = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    found = [name for name in _LABELS if name in features] or classes
    if len(found) > 1:
        raise VarkdError(f"{source} has the label columns {', '.join(found)}: say which by --label NAME")
    numbers = [name for name, kind in features.items() if isinstance(kind, datasets.Value) and "int" in kind.dtype]
    if not found and numbers:
        raise VarkdError(
            f"which column of {source} is the label ({', '.join(numbers)})? Give --label NAME, or --label "
            f"{ONE_CLASS} for one class"
        )
    return image, found[0] if found else None


def _classes(
    source: str, parts: Sequence[datasets.Dataset], column: str | None
) -> tuple[tuple[str, ...], list[np.ndarray]]:
    """Class names, and the labels of every part: int64 (N,) each. Without names, classes are the values that occur."""
    import datasets

    if column is None:
        return ("all",), [np.zeros(len(part), dtype=np.int64) for part in parts]
    values = [part.data.column(column) for part in parts]
    nulls = sum(value.null_count for value in values)
    if nulls:
        raise VarkdError(f"{nulls} rows of {source} have no label: remove them or label them")
    kind = parts[0].features[column]
    if isinstance(kind, datasets.ClassLabel):
        return tuple(kind.names), [value.to_numpy().astype(np.int64) for value in values]
    if not isinstance(kind, datasets.Value) or not ("int" in kind.dtype or "string" in kind.dtype):
        raise VarkdError(f"column '{column}' of {source} does not hold integers or texts: store class numbers there")
    arrays = [np.asarray(value.to_pylist()) for value in values]
    known = np.unique(np.concatenate(arrays))
    if "int" in kind.dtype and known[0] < 0:
        row = next(int(found[0]) for array in arrays if len(found := np.flatnonzero(array == known[0])))
        raise VarkdError(f"label {known[0]} of row {row} of {source} is negative: label it, or remove the row")
    return tuple(str(value) for value in known), [np.searchsorted(known, array) for array in arrays]


def _rows(source: str, dataset: datasets.Dataset, image: str, label_N: np.ndarray) -> ImageRows:
    """Rows straight from the memory-mapped Arrow columns: the library's row access costs more than decoding."""
    struct_N = dataset.data.column(image)

    def path_of(row: int) -> str | None:
        return struct_N[row]["path"].as_py() if "path" in struct_N.type.names else None

    def place(row: int) -> str:
        path = path_of(row)
        return f"row {row} of {source}" + (f" ({path})" if path else "")

    def encoded(row: int) -> bytes:
        data = struct_N[row]["bytes"].as_py()
        if data is not None:
            return data
        path = path_of(row)
        if path is None:
            raise VarkdError(f"{place(row)} holds no image: remove the row")
        with read_errors(Path(path)):
            return Path(path).read_bytes()

    return ImageRows(encoded, place, label_N.astype(np.int64))
