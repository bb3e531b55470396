"""Shards: arrays in .npy files that are memory-mapped, and the folders that are written one shard after the other.

The whole manifest but for what is measured in the end is known before the first shard. It stands as `partial.json`
while shards are missing, which is how a folder of another job is told from our own; the manifest itself is written
last. Shard i is written by rank i % size, and what a killed job has finished stays.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from varkd.errors import VarkdError
from varkd.files import NPY_ERRORS, atomic_file, file_hash, read_errors, read_json, write_json
from varkd.folders import Own
from varkd.world import World

Manifest = dict[str, Any]
MANIFEST, PARTIAL = "manifest.json", "partial.json"
_checked: dict[tuple[str, int, int], str] = {}


class _Plain:
    """A file that numpy writes through Python: written by itself, it forgets what the system said was wrong."""

    def __init__(self, file: BinaryIO) -> None:
        self.write = file.write


def save_array(path: Path, array: NDArray[Any]) -> None:
    """Write an .npy file atomically."""
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        np.lib.format.write_array(_Plain(file), array, allow_pickle=False)  # type: ignore[arg-type]


def map_array(path: Path, shape: tuple[int, ...], dtype: DTypeLike, verb: str) -> NDArray[Any]:
    """Memory-map one array that `verb` wrote, read-only.

    Raises:
        VarkdError: the file is missing or truncated, or holds another shape or dtype.
    """
    if not path.exists() and not path.is_symlink():
        raise VarkdError(f"{path} is missing: run `{verb}` again to write it")
    with read_errors(path, f"is truncated or not a shard: move it away and run `{verb}` again", NPY_ERRORS):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.shape != shape or array.dtype != dtype:
        raise VarkdError(
            f"{path} holds {array.dtype} {array.shape}, expected {np.dtype(dtype)} {shape}: move it "
            f"away and run `{verb}` again"
        )
    return array


def check_content(path: Path, manifest: Manifest, verb: str) -> None:
    """Compare a shard's file with its hash in the finished manifest (older ones have none), once a process.

    Raises:
        VarkdError: it is not what `verb` wrote: a disk or a copy has changed it.
    """
    expected, stat = manifest.get("sha256", {}).get(path.name), path.stat()
    key = (str(path.resolve()), stat.st_mtime_ns, stat.st_size)
    if expected is None or _checked.get(key) == expected:
        return
    if file_hash(path) != expected:
        raise VarkdError(
            f"{path} is not what was written (its hash differs): move it away and run the same `{verb}` "
            "again, which writes it anew"
        )
    _checked[key] = expected


def cut(num: int, shard_size: int) -> list[tuple[int, int]]:
    """The first row and the number of rows of every shard.

    Raises:
        VarkdError: the shard size is not positive.
    """
    if shard_size < 1:
        raise VarkdError(f"shard_size={shard_size} must be at least 1 image")
    return [(start, min(shard_size, num - start)) for start in range(0, num, shard_size)]


def gather_rows(
    out_BX: NDArray[Any],
    start_S: NDArray[np.int64],
    opened: Callable[[int], NDArray[Any]],
    index_B: NDArray[np.int64],
    *axes_B: NDArray[np.int64],
) -> None:
    """Fill `out_BX` with the entries [index, *axes] of an array that stands in shards, of which `start_S` begin."""
    shard_B = np.searchsorted(start_S, index_B, side="right") - 1
    for shard in np.unique(shard_B):
        rows = np.flatnonzero(shard_B == shard)
        out_BX[rows] = opened(int(shard))[index_B[rows] - start_S[shard], *(axis_B[rows] for axis_B in axes_B)]


class ShardWriter(ABC):
    """The shards of `planned` under `folder`; shards that stand there already are kept.

    Raises:
        VarkdError: the folder holds what another job wrote, or other things.
    """

    own: ClassVar[Own]

    def __init__(self, folder: Path, planned: Manifest, world: World) -> None:
        self.folder, self.planned, self.world = folder, planned, world
        self.own.check(folder)
        for name in (MANIFEST, PARTIAL):
            if (folder / name).exists():
                self._check_same(read_json(folder / name))
        if not world.is_main:
            return
        if not self.is_finished:
            write_json(folder / PARTIAL, planned)
        elif (folder / PARTIAL).exists():  # a process was killed between the manifest and this
            (folder / PARTIAL).unlink()

    @abstractmethod
    def identity(self, manifest: Manifest) -> dict[str, Any]:
        """What must agree between the folder and the job, by name; places may differ (a moved folder)."""

    @abstractmethod
    def map(self, split: str, shard: Manifest) -> None:
        """Raise `VarkdError` unless all files of a shard stand there."""

    @property
    def is_finished(self) -> bool:
        return (self.folder / MANIFEST).exists() and not any(True for _ in self._missing())

    def todo(self) -> list[tuple[str, Manifest]]:
        """(split, shard) of the shards that this rank has still to write."""
        mine = self.world.rank
        return [(split, shard) for index, split, shard in self._missing() if index % self.world.size == mine]

    def finish_with(self, **found: Any) -> Manifest:
        """Write the manifest with what was `found` (one rank, when all have written their shards) and return it.

        Raises:
            VarkdError: shards are missing.
        """
        for _, _, shard in self._missing():
            raise VarkdError(
                f"{self.folder / shard['file']} is missing: all processes must see the same folder; run again"
            )
        manifest = {**self.planned, **found, "sha256": self._hashes()}
        write_json(self.folder / MANIFEST, manifest)
        (self.folder / PARTIAL).unlink(missing_ok=True)
        return manifest

    def _hashes(self) -> dict[str, str]:
        """SHA-256 of every file of every shard, by name."""
        shards = [shard for entry in self.planned["splits"].values() for shard in entry["shards"]]
        names = [name for shard in shards for name in shard.values() if str(name).endswith(".npy")]
        return {name: file_hash(self.folder / name) for name in names}

    def _missing(self) -> Iterator[tuple[int, str, Manifest]]:
        shards = [(split, shard) for split, entry in self.planned["splits"].items() for shard in entry["shards"]]
        for index, (split, shard) in enumerate(shards):
            if not self._is_complete(split, shard):
                yield index, split, shard

    def _is_complete(self, split: str, shard: Manifest) -> bool:
        try:
            self.map(split, shard)
        except VarkdError as error:
            refused = isinstance(error.__cause__, OSError) and error.__cause__.errno is not None
            if refused:  # by the system: the shard may be good, and is not written again
                raise
            return False
        return True

    def _check_same(self, found: Manifest) -> None:
        try:
            was = self.identity(found)
        except (KeyError, TypeError, IndexError, AttributeError):
            raise VarkdError(f"{self.folder} was written by another version: choose another folder") from None
        now = self.identity(self.planned)
        for name in was:
            if was[name] != now[name]:
                values = "" if name == "splits" else f" ({was[name]}, now {now[name]})"
                raise VarkdError(
                    f"{self.folder} holds {self.own.what} of another {name}{values}: choose another folder or remove it"
                )
