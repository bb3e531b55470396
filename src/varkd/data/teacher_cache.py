"""The teacher cache: what a teacher says at every position of every training sequence, in memory-mapped shards.

Of each image, in each view, under its label and under the null label: the log-probabilities of the `top_k` likeliest
codes (largest first), which codes those are, and the log of the mass of all others. Shards cut the images as those of
codes do. The layout stands in docs/architecture.md, what a student makes of it in `distill.teachers`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from varkd.data.shards import MANIFEST, PARTIAL, Manifest, ShardWriter, check_content, cut, gather_rows, map_array
from varkd.errors import VarkdError
from varkd.files import atomic_file, read_json, sha256_of
from varkd.folders import Own, json_with, locate

FORMAT, VERSION = "varkd-teacher-cache", 1
CACHE = Own("a teacher cache", (MANIFEST, PARTIAL), json_with(format=(FORMAT,)), ("train-*.npy",))
Dtype = Literal["float16", "float32"]
Append = Callable[..., None]
_OPEN_SHARDS = 32  # of three files each
_FIELDS = ("teacher", "codes", "vocab_size", "num_classes", "sizes", "views", "branches", "guidance", "top_k", "dtype",
           "splits")  # fmt: skip


class Entries(NamedTuple):
    """What the cache holds of B sequences; the codes are int32, the rest in the dtype of the cache."""

    logp_BLK: NDArray[Any]
    tail_BL: NDArray[Any]
    code_BLK: NDArray[np.int32]


def plan_cache(
    *,
    teacher: Manifest,
    codes: Manifest,
    tokenizer_hash: str,
    vocab_size: int,
    num_classes: int,
    sizes: tuple[int, ...],
    views: list[str],
    num: int,
    top_k: int,
    dtype: Dtype,
    null: bool,
    guidance: float | None,
    shard_size: int,
) -> Manifest:
    """The manifest of a cache that is still to be written.

    Args:
        teacher, codes: where they lie (`path`, `given`) and their `hash`.
        sizes: the step sizes of the one plan (raster order) that the teacher followed.
        num: training images, of which each has all `views`.
        null: whether the null branch is kept too, for rows whose label is dropped.
        guidance: the scale of the guided teacher that was asked, None for the teacher itself.

    Raises:
        VarkdError: `top_k` is not between 1 and the number of codes, or the shard size is not positive.
    """
    if not 1 <= top_k <= vocab_size:
        raise VarkdError(f"top_k={top_k} must be between 1 and the {vocab_size} codes of the tokenizer")
    return {
        "format": FORMAT,
        "version": VERSION,
        "teacher": teacher,
        "codes": codes,
        "tokenizer_hash": tokenizer_hash,
        "vocab_size": vocab_size,
        "num_classes": num_classes,
        "sizes": list(sizes),
        "views": views,
        "branches": ["label", "null"] if null else ["label"],
        "guidance": guidance,
        "top_k": top_k,
        "dtype": dtype,
        "splits": {
            "train": {
                "num": num,
                "shards": [
                    {
                        "file": f"train-{shard:05d}-logp.npy",
                        "tail": f"train-{shard:05d}-tail.npy",
                        "codes": f"train-{shard:05d}-codes.npy",
                        "start": start,
                        "num": size,
                    }
                    for shard, (start, size) in enumerate(cut(num, shard_size))
                ],
            }
        },
    }


def cache_identity(manifest: Manifest) -> dict[str, Any]:
    """What a cache is, by name: another value anywhere makes another cache."""
    return {
        "version": manifest["version"],
        "teacher": manifest["teacher"]["hash"][:12],
        "codes": manifest["codes"]["hash"][:12],
        "guidance": manifest["guidance"],
        "top_k": manifest["top_k"],
        "dtype": manifest["dtype"],
        "branches": ", ".join(manifest["branches"]),
        "plan": manifest["sizes"],
        "splits": manifest["splits"],
    }


def code_dtype(vocab_size: int) -> DTypeLike:
    """The smallest of uint16 and int32 that numbers the codes."""
    return np.uint16 if vocab_size <= 2**16 else np.int32


def arrays_of(manifest: Manifest, shard: Manifest) -> dict[str, tuple[tuple[int, ...], DTypeLike]]:
    """Shape and dtype of a shard's files, by their key in the manifest."""
    each = (shard["num"], len(manifest["views"]), len(manifest["branches"]), sum(manifest["sizes"]))
    kept, dtype = (*each, manifest["top_k"]), np.dtype(manifest["dtype"])
    return {"file": (kept, dtype), "tail": (each, dtype), "codes": (kept, code_dtype(manifest["vocab_size"]))}


def map_entries(folder: Path, manifest: Manifest, shard: Manifest, name: str) -> NDArray[Any]:
    """One file of a shard, mapped."""
    return map_array(folder / shard[name], *arrays_of(manifest, shard)[name], "varkd teach")


def is_cache(folder: Path) -> bool:
    """Whether the folder is a teacher cache, be it finished or not."""
    return folder.is_dir() and CACHE.is_own(folder)


def read_cache_manifest(folder: Path) -> Manifest:
    """The manifest of a finished cache.

    Raises:
        VarkdError: there is none, or it is of another version.
    """
    if not is_cache(folder):
        raise VarkdError(f"{folder} is not a teacher cache: write one with `varkd teach`")
    if not (folder / MANIFEST).exists():
        raise VarkdError(f"{folder} is not complete: run the same `varkd teach` again, it goes on where it stopped")
    manifest = read_json(folder / MANIFEST)
    if manifest.get("version") != VERSION:
        raise VarkdError(f"{folder} is of version {manifest.get('version')}, this varkd reads {VERSION}: teach again")
    for name in _FIELDS:
        if name not in manifest:
            raise VarkdError(f"{folder / MANIFEST} is damaged (at '{name}'): run `varkd teach` again")
    return manifest


class TeacherCache:
    """A finished cache, of the codes named by `codes_hash`.

    Raises:
        VarkdError: not a cache, unfinished, damaged, or of other codes.
    """

    def __init__(self, folder: str | Path, codes_hash: str) -> None:
        self.folder = Path(folder)
        self.manifest = manifest = read_cache_manifest(self.folder)
        recorded = manifest["codes"]["hash"]
        if recorded != codes_hash:
            raise VarkdError(
                f"{folder} was made of other codes ({recorded[:12]}) than these ({codes_hash[:12]}): run "
                "`varkd teach` on these, or give the data= that it was made of"
            )
        self.vocab_size, self.num_classes = manifest["vocab_size"], manifest["num_classes"]
        self.top_k: int = manifest["top_k"]
        self.sizes: tuple[int, ...] = tuple(manifest["sizes"])
        self.guidance: float | None = manifest["guidance"]
        self.has_null: bool = "null" in manifest["branches"]
        self.num_views = len(manifest["views"])
        self.num = manifest["splits"]["train"]["num"]
        shards = manifest["splits"]["train"]["shards"]
        for shard in shards:
            for name in arrays_of(manifest, shard):
                map_entries(self.folder, manifest, shard, name)  # checked, and let go of
        self._start_S = np.array([shard["start"] for shard in shards], dtype=np.int64)
        self._opened = lru_cache(3 * _OPEN_SHARDS)(self._map)

    @property
    def teacher_hash(self) -> str:
        """Names the teacher that was asked (`weights_hash`)."""
        return self.manifest["teacher"]["hash"]

    @property
    def teacher_place(self) -> Path:
        """Where that teacher lies, or lay."""
        teacher = self.manifest["teacher"]
        return locate(teacher["path"], self.folder, teacher["given"])

    @property
    def hash(self) -> str:
        """Names what the cache says, wherever it lies."""
        return sha256_of(json.dumps(cache_identity(self.manifest), sort_keys=True).encode())

    def read(self, sequence_B: NDArray[np.int64], null_B: NDArray[np.bool_]) -> Entries:
        """The entries of sequences (`Batch.sequence_B`), under the null label where `null_B`.

        Raises:
            VarkdError: it has no such sequence, no null branch, or a code outside the codebook (a damaged shard).
        """
        if len(sequence_B) and not 0 <= sequence_B.min() <= sequence_B.max() < self.num * self.num_views:
            raise VarkdError(
                f"{self.folder} has {self.num * self.num_views} sequences, not number {sequence_B.max()}: "
                "give batches of the codes that it was made of"
            )
        if null_B.any() and not self.has_null:
            raise VarkdError(f"{self.folder} was made without the null branch (--no-null): set train.label_drop=0")
        image_B, view_B = np.divmod(sequence_B, self.num_views)
        shape, dtype = (len(sequence_B), sum(self.sizes)), np.dtype(self.manifest["dtype"])
        entries = Entries(
            np.empty((*shape, self.top_k), dtype), np.empty(shape, dtype), np.empty((*shape, self.top_k), np.int32)
        )
        for name, out_BX in zip(("file", "tail", "codes"), entries, strict=True):
            opened = partial(self._opened, name)
            gather_rows(out_BX, self._start_S, opened, image_B, view_B, null_B.astype(np.int64))
        largest = int(entries.code_BLK.max(initial=0))
        if largest >= self.vocab_size:
            raise VarkdError(f"{self.folder} holds code {largest} but the tokenizer has {self.vocab_size}: teach again")
        return entries

    def _map(self, name: str, shard: int) -> NDArray[Any]:
        entry = self.manifest["splits"]["train"]["shards"][shard]
        mapped = map_entries(self.folder, self.manifest, entry, name)
        check_content(self.folder / entry[name], self.manifest, "varkd teach")
        return mapped


class CacheWriter(ShardWriter):
    """The shards of a cache `planned` by `plan_cache`; shards that stand there already are kept."""

    own = CACHE

    def identity(self, manifest: Manifest) -> dict[str, Any]:
        return cache_identity(manifest)

    def map(self, split: str, shard: Manifest) -> None:
        del split
        for name in arrays_of(self.planned, shard):
            map_entries(self.folder, self.planned, shard, name)

    @contextmanager
    def open(self, shard: Manifest) -> Iterator[Append]:
        """Yield `append(file=, tail=, codes=)`, which takes the next images; the shard appears whole or not at all."""
        with ExitStack() as stack:
            files, dtypes = {}, {}
            for name, (shape, dtype) in arrays_of(self.planned, shard).items():
                temporary = stack.enter_context(atomic_file(self.folder / shard[name]))
                files[name], dtypes[name] = stack.enter_context(temporary.open("wb")), np.dtype(dtype)
                header = {"descr": np.lib.format.dtype_to_descr(dtypes[name]), "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(files[name], header)

            def append(**rows: NDArray[Any]) -> None:
                for name, array in rows.items():
                    files[name].write(np.ascontiguousarray(array, dtypes[name]).data)

            yield append
