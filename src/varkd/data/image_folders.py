"""Image folders: one folder for each class, under train/ and val/ or not; or images alone, which are one class.

A folder is listed here and not by `datasets`, whose imagefolder reads splits out of file names (`cat/test_1.png`
becomes a test split) and drops the labels of a folder with one class. Every folder is a class, also one without images:
one that vanished would shift the labels of all that follow.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path, PurePath

import numpy as np

from varkd.data.rows import VALIDATION_NAMES, ImageRows, Source
from varkd.errors import VarkdError
from varkd.files import read_errors

ENDINGS = (".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".ppm",
           ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".avif", ".tga")  # fmt: skip
Files = dict[str, list[Path]]


def read_folder(root: Path) -> Source:
    """The images under `root`: `class/*.png`, or that under train/ and val|validation|valid|test/, in any case.

    Raises:
        VarkdError: no images, images beside class folders, a folder that cannot be listed, or a class that only the
            validation split has.
    """
    skipped: Counter[str] = Counter()
    splits = _split_folders(root)
    one_class = root.resolve().name
    if not splits:
        by_class = _by_class(root, one_class, skipped)
        return Source.of(str(root), _rows(root, by_class, by_class), None, tuple(by_class), skipped)
    train = _by_class(splits["train"], one_class, skipped)
    own = next((splits[name] for name in VALIDATION_NAMES if name in splits), None)
    if own is None:
        return Source.of(str(root), _rows(splits["train"], train, train), None, tuple(train), skipped)
    validation = {name: paths for name, paths in _by_class(own, one_class, skipped).items() if paths}
    unknown = sorted(set(validation) - set(train))
    if unknown:
        raise VarkdError(f"class '{unknown[0]}' of {own} has no folder under {splits['train']}: add it")
    rows = _rows(splits["train"], train, train), _rows(own, validation, train)
    return Source.of(str(root), *rows, tuple(train), skipped)


def _split_folders(root: Path) -> dict[str, Path]:
    """The folders of splits by their names in small letters; empty where the folders are classes ("train" may be one).

    Raises:
        VarkdError: train/ and val/ beside other folders with images, which would be neither.
    """
    folders = [path for path in _visible(root) if path.is_dir()]
    known = ("train", *VALIDATION_NAMES)
    splits = {path.name.lower(): path for path in folders if path.name.lower() in known}
    others = [path for path in folders if path.name.lower() not in known]
    if "train" not in splits or (others and len(splits) == 1):
        return {}
    twice = [path for path in folders if path.name.lower() in known and splits[path.name.lower()] != path]
    if twice:
        raise VarkdError(f"{root} holds {twice[0].name}/ and {splits[twice[0].name.lower()].name}/: keep one of them")
    for path in others:
        if _images_below(path, Counter()):
            raise VarkdError(
                f"{path} holds images beside {splits['train']}: move it elsewhere, or give "
                "the folder of the classes itself"
            )
    return splits


def _by_class(root: Path, one_class: str, skipped: Counter[str]) -> Files:
    """The images of each class. Classes are sorted by name, or by number where all names are numbers."""
    visible = _visible(root)
    loose = [path for path in visible if path.is_file() and is_image(path)]
    skipped.update(_ending(path) for path in visible if path.is_file() and not is_image(path))
    folders = [path for path in visible if path.is_dir()]
    if folders and all(path.name.isdecimal() for path in folders):
        folders.sort(key=lambda path: (int(path.name), path.name))
    by_class = {folder.name: _images_below(folder, skipped) for folder in folders}
    if loose and any(by_class.values()):
        raise VarkdError(
            f"{loose[0]} lies beside class folders: move it into one of them, or all images into one folder"
        )
    if not loose and not any(by_class.values()):
        raise VarkdError(f"no images in {root}: put them into one folder for each class")
    return {one_class: loose} if loose else by_class


def _images_below(folder: Path, skipped: Counter[str]) -> list[Path]:
    """All images below a folder, sorted by path; links are followed, what is hidden is not read."""
    found, seen = [], set()

    def refuse(error: OSError) -> None:
        with read_errors(Path(error.filename or folder)):
            raise error

    for place, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        real = os.path.realpath(place)
        if real in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        for path in (Path(place, name) for name in names if not is_hidden(name)):
            if is_image(path):
                found.append(path)
            else:
                skipped[_ending(path)] += 1
    return sorted(found)


def _visible(root: Path) -> list[Path]:
    with read_errors(root):
        return sorted(path for path in root.iterdir() if not is_hidden(path.name))


def is_hidden(name: str) -> bool:
    return name.startswith((".", "__"))


def is_image(path: PurePath) -> bool:
    return path.suffix.lower() in ENDINGS


def _ending(path: Path) -> str:
    return path.suffix.lower() or path.name


def _rows(root: Path, by_class: Files, all_classes: Files) -> ImageRows:
    label_of = {name: label for label, name in enumerate(all_classes)}
    files = [path for paths in by_class.values() for path in paths]
    label_N = np.array([label_of[name] for name, paths in by_class.items() for _ in paths], dtype=np.int64)
    keys = tuple(path.relative_to(root).as_posix() for path in files)

    def encoded(row: int) -> bytes:
        with read_errors(files[row]):
            return files[row].read_bytes()

    return ImageRows(encoded, lambda row: str(files[row]), label_N, keys)
