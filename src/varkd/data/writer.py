"""Writing a codes folder, shard by shard, so that a stopped job goes on where it stopped.

The whole manifest except the reconstruction check is known before the first shard. It stands as `partial.json`
while shards are missing, which is how a folder of another tokenizer, source or choice of views is told from our own;
the manifest itself is written last. Shard i is written by rank i % size.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from varkd.data.codes import FORMAT, MANIFEST, PARTIAL, VERSION, map_shard, sequence_length
from varkd.errors import VarkdError
from varkd.files import atomic_file, file_hash, read_json, write_json
from varkd.folders import Own, json_with
from varkd.world import World

Manifest = dict[str, Any]
CODES = Own("codes", (MANIFEST, PARTIAL), json_with(format=(FORMAT,)))


def plan_manifest(
    *, tokenizer: Manifest, grid: tuple[int, int], scales: tuple[int, ...] | None = None,
    image_shape: tuple[int, int, int], class_names: tuple[str, ...], views: tuple[str, ...], source: Manifest,
    nums: dict[str, int], shard_size: int, class_map: list[int] | None = None,
) -> Manifest:  # fmt: skip
    """The manifest of a folder that is still to be written; `nums` gives each split's number of images.

    Raises:
        VarkdError: codes of this tokenizer do not fit into 16 bits, or the shard size is not positive.
    """
    if tokenizer["vocab_size"] > 2**16:
        raise VarkdError(f"the tokenizer has {tokenizer['vocab_size']} codes, but shards hold at most 65536 (16 bits)")
    if shard_size < 1:
        raise VarkdError(f"shard_size={shard_size} must be at least 1 image")
    splits = {split: {"num": num, "shards": _shards(split, num, shard_size)} for split, num in nums.items()}
    layout: Manifest = {"grid": list(grid), "scales": list(scales)} if scales else {"grid": list(grid)}
    return {
        "format": FORMAT,
        "version": VERSION,
        "tokenizer": tokenizer,
        "image_shape": list(image_shape),
        **layout,
        "class_names": list(class_names),
        **({} if class_map is None else {"class_map": class_map}),
        "views": list(views),
        "source": source,
        "splits": splits,
    }


def _shards(split: str, num: int, shard_size: int) -> list[Manifest]:
    return [
        {
            "file": f"{split}-{shard:05d}.npy",
            "labels": f"{split}-{shard:05d}-labels.npy",
            "start": start,
            "num": min(shard_size, num - start),
        }
        for shard, start in enumerate(range(0, num, shard_size))
    ]


class CodeWriter:
    """The shards of `planned` (see `plan_manifest`) under `folder`; shards that stand there already are kept.

    Raises:
        VarkdError: the folder holds codes of another tokenizer, source, views or shard size, or other things.
    """

    def __init__(self, folder: Path, planned: Manifest, world: World) -> None:
        self.folder, self.planned, self.world = folder, planned, world
        CODES.check(folder)
        for name in (MANIFEST, PARTIAL):
            if (folder / name).exists():
                _same_job(folder, read_json(folder / name), planned)
        if world.is_main and not self.is_finished:
            write_json(folder / PARTIAL, planned)

    @property
    def is_finished(self) -> bool:
        return (self.folder / MANIFEST).exists() and not any(True for _ in self._missing())

    def todo(self) -> list[tuple[str, Manifest]]:
        """(split, shard) of the shards that this rank has still to write."""
        mine = self.world.rank
        return [(split, shard) for index, split, shard in self._missing() if index % self.world.size == mine]

    def write(self, split: str, shard: Manifest, codes_NvL: NDArray[np.uint16], label_N: NDArray[np.int64]) -> None:
        """Write one shard; it counts as complete once its codes stand, so they go last."""
        shape = (shard["num"], self._num_views(split), self._length)
        if codes_NvL.shape != shape or codes_NvL.dtype != np.uint16:
            raise ValueError(f"shard {shard['file']} takes uint16 {shape}, not {codes_NvL.dtype} {codes_NvL.shape}")
        _save(self.folder / shard["labels"], label_N.astype(np.int64))
        _save(self.folder / shard["file"], codes_NvL)

    def finish(self, reconstruction: Manifest) -> Manifest:
        """Write the manifest (one rank calls this, when all have written their shards) and return it.

        Raises:
            VarkdError: shards are missing.
        """
        for _, _, shard in self._missing():
            raise VarkdError(
                f"{self.folder / shard['file']} is missing: all processes must see the same folder; run again"
            )
        manifest = {**self.planned, "reconstruction": reconstruction, "sha256": self._hashes()}
        write_json(self.folder / MANIFEST, manifest)
        (self.folder / PARTIAL).unlink(missing_ok=True)
        return manifest

    def _hashes(self) -> dict[str, str]:
        shards = [shard for entry in self.planned["splits"].values() for shard in entry["shards"]]
        return {shard[kind]: file_hash(self.folder / shard[kind]) for shard in shards for kind in ("file", "labels")}

    def note(self, **values: Any) -> None:
        """Change what a finished manifest says besides what the codes are."""
        write_json(self.folder / MANIFEST, {**read_json(self.folder / MANIFEST), **values})

    def _missing(self) -> Iterator[tuple[int, str, Manifest]]:
        shards = [(split, shard) for split, entry in self.planned["splits"].items() for shard in entry["shards"]]
        for index, (split, shard) in enumerate(shards):
            if not _is_complete(self.folder, shard, self._num_views(split), self._length):
                yield index, split, shard

    def _num_views(self, split: str) -> int:
        return len(self.planned["views"]) if split == "train" else 1

    @property
    def _length(self) -> int:
        return sequence_length(self.planned)


def _same_job(folder: Path, found: Manifest, planned: Manifest) -> None:
    """The paths of tokenizer and source may differ (a moved folder); what they hold may not."""

    def identity(manifest: Manifest) -> dict[str, Any]:
        try:
            return {
                "format": manifest["version"],
                "tokenizer": manifest["tokenizer"]["hash"][:12],
                "source": "/".join(manifest["source"]["fingerprints"].values()),
                "views": ",".join(manifest["views"]),
                "shard size": manifest["splits"]["train"]["shards"][0]["num"],
                "splits": manifest["splits"],
            }
        except (KeyError, TypeError, IndexError, AttributeError):
            raise VarkdError(f"{folder} is not a codes folder of this version: choose another folder") from None

    was, now = identity(found), identity(planned)
    for what in was:
        if was[what] != now[what]:
            values = "" if what == "splits" else f" ({was[what]}, now {now[what]})"
            raise VarkdError(f"{folder} holds codes of another {what}{values}: choose another folder or remove it")


def _is_complete(folder: Path, shard: Manifest, num_views: int, length: int) -> bool:
    try:
        map_shard(folder / shard["file"], (shard["num"], num_views, length), np.uint16)
        map_shard(folder / shard["labels"], (shard["num"],), np.int64)
    except VarkdError as error:
        refused = isinstance(error.__cause__, OSError) and error.__cause__.errno is not None
        if refused:  # by the system: the shard may be good, and is not written again
            raise
        return False
    return True


def _save(path: Path, array: NDArray[Any]) -> None:
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        np.save(file, array, allow_pickle=False)
