"""Where images come from: digits, a folder, parquet files, WebDataset shards or the Hugging Face hub."""

from __future__ import annotations

import glob
import io
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from varkd.data.image_folders import read_folder
from varkd.data.memory import Indexed, memory_name, read_memory
from varkd.data.remote import is_url, list_files, read_url_folder
from varkd.data.rows import ImageRows, Source
from varkd.data.tables import BUILDERS, read_files, read_hub, read_urls, splits_of
from varkd.errors import VarkdError
from varkd.folders import expand, relative

DIGITS = "builtin:digits"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_FORMS = "an image folder, .parquet or .tar files, a folder or a pattern (*.parquet) of them"


def relative_source(source: str | Indexed, folder: Path) -> str:
    """A source as a file in `folder` records it: parts that lie on this disk as seen from there, others as they are."""
    if not isinstance(source, str):
        return memory_name(source)
    return ",".join(relative(part, folder) if _is_here(part) else part for part in _parts(source))


def locate_source(recorded: str, folder: Path, given: str) -> str:
    """The source that a file in `folder` records: seen from there, else as it was given (see `folders.locate`)."""
    there = [os.path.normpath(folder.resolve() / part) for part in _parts(recorded)]
    return ",".join(there) if all(map(_is_here, there)) else given


def is_gone(source: str) -> bool:
    """Whether a source that was read once lies on this disk no more."""
    if source in ("digits", DIGITS) or is_url(source) or all(map(_is_here, _parts(source))):
        return False
    return Path(source).is_absolute() or not _HUB_ID.fullmatch(source)


def _parts(source: str) -> list[str]:
    """The files of `train,validation`; a comma may also belong to a name."""
    return [source] if Path(source).exists() else source.split(",")


def _is_here(part: str) -> bool:
    return part not in ("digits", DIGITS) and (Path(part).exists() or bool(_matches(part)))


def _matches(pattern: str) -> list[Path]:
    """The files that a pattern names; none where it is no pattern."""
    if not glob.has_magic(pattern):
        return []
    return sorted(Path(path) for path in glob.glob(pattern, recursive=True))  # noqa: PTH207 - any root, any depth


def source_name(source: str | Indexed) -> str:
    """What a source is called: a path, pattern or id as it was given."""
    return source if isinstance(source, str) else memory_name(source)


def load_source(source: str | Indexed, label: str | None = None) -> Source:
    """Find out what `source` names and list its rows.

    Args:
        label: the name of a table's label column, or "none" for one class; by default `label`, `labels` or the only
            column with class names.

    Raises:
        VarkdError: it does not exist, holds no images, cannot be read or cannot be downloaded.
    """
    if not isinstance(source, str):
        return read_memory(source)
    source = ",".join(expand(part) for part in _parts(source))
    if source == "digits" and Path(source).exists():
        raise VarkdError(f"digits is the embedded data set, and a folder here: give ./digits or {DIGITS}")
    if source in ("digits", DIGITS):
        return _digits()
    if is_url(source):
        return _behind_url(source, label)
    path = Path(source)
    if path.is_dir():
        shards = _shards_below(path)
        return read_files(source, splits_of(shards), label) if shards else _only(label, read_folder(path))
    if path.exists() and path.suffix not in BUILDERS:
        raise VarkdError(f"{source} is neither a folder of images nor a .parquet or .tar file: give one of these")
    if path.suffix in BUILDERS or _matches(source):
        return read_files(source, _files_of(source), label)
    if not _HUB_ID.fullmatch(source) or path.parent.is_dir():  # a mistyped path is not looked for elsewhere
        raise VarkdError(f"no such folder or file: {source} (give digits, {_FORMS}, or a Hugging Face id org/name)")
    return read_hub(source, label)


def _behind_url(source: str, label: str | None) -> Source:
    """Tables (one, `train,validation`, a pattern or a folder of them) or an image folder behind a URL."""
    parts = source.split(",")
    if len(parts) > 2:
        raise VarkdError(f"{source} names {len(parts)} files: give train.parquet or train.parquet,validation.parquet")
    tables = [_tables_at(part) for part in parts]
    if not all(tables):
        if len(parts) == 2 or glob.has_magic(source):
            raise VarkdError(f"no .parquet or .tar files at {source}: check the address")
        return _only(label, read_url_folder(source))
    if len(parts) == 2:
        return read_urls(source, dict(zip(("train", "validation"), tables, strict=True)), label)
    if len(tables[0]) == 1:
        return read_urls(source, {"train": tables[0]}, label)
    url_of = {PurePosixPath(url): url for url in tables[0]}  # a path has one slash where a URL has two
    splits = {split: [url_of[path] for path in paths] for split, paths in splits_of(list(url_of)).items()}
    return read_urls(source, splits, label)


def _tables_at(url: str) -> list[str]:
    """The parquet files or tar shards that a URL names, or that lie below it."""
    if url.endswith(tuple(BUILDERS)) and not glob.has_magic(url):
        return [url]
    return [found for found in list_files(url) if found.endswith(tuple(BUILDERS))]


def _only(label: str | None, source: Source) -> Source:
    if label is not None:
        raise VarkdError(f"--label {label}: image folders have no columns, their labels are the folders' names")
    return source


def _shards_below(folder: Path) -> list[Path]:
    """The parquet files or WebDataset shards of a folder that holds nothing else worth reading."""
    found = [
        sorted(path for path in folder.rglob(f"*{ending}") if not path.name.startswith(".")) for ending in BUILDERS
    ]
    return next((paths for paths in found if paths), [])


def _files_of(source: str) -> dict[str, list[Path]]:
    """`train` or `train,validation`, each a file or a pattern; the shards of one pattern may name their splits."""
    parts = _parts(source)
    if len(parts) > 2:
        raise VarkdError(f"{source} names {len(parts)} files: give train.parquet or train.parquet,validation.parquet")
    found = []
    for part in parts:
        paths = [Path(part)] if Path(part).is_file() else _matches(part)
        if not paths:
            raise VarkdError(f"no such file: {part}")
        found.append(paths)
    if len(found) == 1:
        return splits_of(found[0]) if len(found[0]) > 1 else {"train": found[0]}
    return dict(zip(("train", "validation"), found, strict=True))


def _digits() -> Source:
    """scikit-learn's 1,797 digits: 8x8 gray with 17 levels, as uint8 = round(level * 255 / 16)."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    pixels_NHW = np.round(bunch.images * (255 / 16)).astype(np.uint8)

    def encoded(row: int) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(pixels_NHW[row]).save(buffer, format="PNG")
        return buffer.getvalue()

    rows = ImageRows(encoded, lambda row: f"digit {row}", bunch.target.astype(np.int64))
    return Source.of("digits", rows, None, tuple(str(name) for name in bunch.target_names))
