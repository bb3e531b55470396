"""Images and codes that lie behind a URL: `s3://`, `gs://`, `hf://` or whatever else fsspec opens (extra `remote`).

Codes are downloaded once, into the user's cache, and every file is compared with its hash in the manifest. Images of a
folder are read one by one when they are needed; tables (parquet, tar) go through `datasets`, which keeps its own cache.
"""

from __future__ import annotations

import fcntl
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from varkd.data.image_folders import is_hidden, is_image
from varkd.data.rows import VALIDATION_NAMES, ImageRows, Source
from varkd.data.shards import MANIFEST
from varkd.errors import VarkdError
from varkd.files import atomic_file, cache_folder, file_hash, sha256_of, write_json

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://.+")
_TOKENIZER_FILES = ("config.json", "model.safetensors")


def is_url(text: str | Path) -> bool:
    return isinstance(text, str) and _URL.fullmatch(text) is not None


def open_url(url: str) -> tuple[Any, str]:
    """fsspec's file system and the path in it.

    Raises:
        VarkdError: fsspec or the package of the protocol is missing, or there is no such protocol.
    """
    try:
        import fsspec
    except ImportError:
        raise VarkdError(f"{url} needs fsspec, which is not installed: pip install 'varkd[remote]'") from None
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise VarkdError(f"{url} needs another package ({error}): install it with pip, beside fsspec") from None
    except ValueError as error:
        raise VarkdError(f"{url}: {error}: give s3://, gs://, hf:// or another URL that fsspec opens") from None


@contextmanager
def _told(url: str) -> Iterator[None]:
    """Turn what a file system raises, of many types that are not ours, into one line."""
    try:
        yield
    except VarkdError:
        raise
    except FileNotFoundError:
        raise VarkdError(f"nothing at {url}: check the address") from None
    except Exception as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise VarkdError(
            f"cannot read {url} ({reason}): check the address, the network and your credentials"
        ) from error


def list_files(url: str) -> list[str]:
    """The files below a URL, or those that a pattern names, as sorted URLs without what is hidden."""
    fs, path = open_url(url)
    with _told(url):
        found = fs.glob(path) if any(sign in path for sign in "*?[") else fs.find(path)
        return sorted(fs.unstrip_protocol(name) for name in found if not is_hidden(PurePosixPath(name).name))


def read_url_folder(url: str) -> Source:
    """Images below a URL, with the rules of `image_folders`: a folder for each class, under train/ and val/ or not.

    Object stores know no empty folders, so a class without images is not seen.

    Raises:
        VarkdError: no images, images beside class folders, or a class that only the validation split has.
    """
    fs, root = open_url(url)
    with _told(url):
        names = [name.removeprefix(root).lstrip("/") for name in fs.find(root)]
    names = [name for name in names if not any(is_hidden(part) for part in name.split("/"))]
    images = sorted(name for name in names if is_image(PurePosixPath(name)))
    skipped: dict[str, int] = {}
    for name in set(names) - set(images):
        ending = PurePosixPath(name).suffix.lower() or PurePosixPath(name).name
        skipped[ending] = skipped.get(ending, 0) + 1
    tops = {name.split("/")[0] for name in images if "/" in name}
    splits = {top.lower(): top for top in tops if top.lower() in ("train", *VALIDATION_NAMES)}
    own = next((splits[name] for name in VALIDATION_NAMES if name in splits), None)
    if "train" not in splits or (own is None and len(tops) > 1):
        by_class = _by_class(url, images)
        return Source.of(url, _rows(url, by_class, list(by_class)), None, tuple(by_class), skipped)
    others = sorted(tops - set(splits.values()))
    if others:
        raise VarkdError(f"{url} holds images in {others[0]}/ beside {splits['train']}/: move them elsewhere")
    parts = [_by_class(f"{url.rstrip('/')}/{top}", _below(images, top)) for top in (splits["train"], own) if top]
    classes = list(parts[0])
    unknown = sorted(set(parts[-1]) - set(classes))
    if unknown:
        raise VarkdError(f"class '{unknown[0]}' of {url}/{own} has no images under {splits['train']}/: add some")
    rows = [
        _rows(f"{url.rstrip('/')}/{top}", part, classes)
        for top, part in zip((splits["train"], own), parts, strict=False)
    ]
    return Source.of(url, rows[0], rows[1] if own else None, tuple(classes), skipped)


def _below(names: list[str], top: str) -> list[str]:
    return [name.removeprefix(f"{top}/") for name in names if name.startswith(f"{top}/")]


def _by_class(url: str, images: list[str]) -> dict[str, list[str]]:
    """The images of each class; classes sorted by name, or by number where all names are numbers."""
    loose = [name for name in images if "/" not in name]
    tops = sorted({name.split("/")[0] for name in images if "/" in name})
    if loose and tops:
        raise VarkdError(f"{url}/{loose[0]} lies beside class folders: move it into one of them")
    if not images:
        raise VarkdError(f"no images at {url}: put them into one folder for each class, or give .parquet or .tar files")
    if loose:
        return {PurePosixPath(url).name: loose}
    if all(top.isdecimal() for top in tops):
        tops.sort(key=lambda top: (int(top), top))
    return {top: [name for name in images if name.startswith(f"{top}/")] for top in tops}


def _rows(url: str, by_class: dict[str, list[str]], classes: list[str]) -> ImageRows:
    keys = tuple(name for names in by_class.values() for name in names)
    label_N = np.array([classes.index(name) for name, names in by_class.items() for _ in names], dtype=np.int64)
    places = [f"{url.rstrip('/')}/{key}" for key in keys]

    def encoded(row: int) -> bytes:
        return _read(places[row])  # opened anew: a forked process needs a connection of its own

    return ImageRows(encoded, lambda row: places[row], label_N, keys)


def fetch_codes(url: str) -> Path:
    """The codes folder behind a URL, in the user's cache: downloaded once for each manifest.

    Raises:
        VarkdError: nothing there, no codes folder, or a file that is not what its manifest says.
    """
    url = url.rstrip("/")
    text = _read(f"{url}/{MANIFEST}")
    try:
        manifest = json.loads(text)
        shards = [shard for entry in manifest["splits"].values() for shard in entry["shards"]]
        names = [shard[part] for shard in shards for part in ("file", "labels")]
        hashes, tokenizer = manifest["sha256"], manifest["tokenizer"]
        place = str(tokenizer["path"])
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise VarkdError(f"{url}/{MANIFEST} is no manifest of codes with hashes (at {error}): encode again") from None
    folder = cache_folder() / "codes" / sha256_of(text)[:32]
    if (folder / MANIFEST).is_file():
        return folder
    for name in names:
        if PurePosixPath(name).name != name or name not in hashes:
            raise VarkdError(f"{url}/{MANIFEST} names '{name}' without a hash or outside its folder: encode again")
    with _turn(folder):
        if (folder / MANIFEST).is_file():  # another process was faster
            return folder
        for name in names:
            _download(f"{url}/{name}", folder / name, hashes[name])
        for place in (f"{_joined(url, place)}/{name}" for name in _TOKENIZER_FILES):
            if place.endswith("config.json") or _exists(place):  # pixels have no weights
                _download(place, folder / "tokenizer" / place.rpartition("/")[2])
        write_json(folder / MANIFEST, {**manifest, "tokenizer": {**tokenizer, "path": "tokenizer"}})
    return folder


def _joined(url: str, relative: str) -> str:
    """Where a path leads as seen from a URL: `s3://b/codes` and `../tokenizer` -> `s3://b/tokenizer`."""
    protocol, _, path = url.partition("://")
    parts = path.split("/")
    for part in relative.split("/"):
        if part == "..":
            parts = parts[:-1]
        elif part not in ("", "."):
            parts.append(part)
    return f"{protocol}://{'/'.join(parts)}"


def _exists(url: str) -> bool:
    fs, path = open_url(url)
    with _told(url):
        return fs.exists(path)


def _read(url: str) -> bytes:
    fs, path = open_url(url)
    with _told(url):
        return fs.cat_file(path)


def _download(url: str, path: Path, expected: str | None = None) -> None:
    """Get a file, unless it stands there already (a download that was stopped goes on)."""
    if expected and path.is_file() and file_hash(path) == expected:
        return
    fs, remote = open_url(url)
    with atomic_file(path) as temporary:
        with _told(url):
            fs.get_file(remote, str(temporary))
        if expected and file_hash(temporary) != expected:
            raise VarkdError(f"{url} is not what was written (its hash differs from the manifest's): upload it again")


@contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """One process downloads, the others of this machine wait; where a file system knows no locks, all of them do it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.lock").open("w") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
