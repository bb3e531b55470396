"""Writing a codes folder, shard by shard, so that a stopped job goes on where it stopped (`data.shards`)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from varkd.data.codes import FORMAT, VERSION, map_shard, samples_identity, sequence_length
from varkd.data.shards import MANIFEST, PARTIAL, Manifest, ShardWriter, cut, save_array
from varkd.errors import VarkdError
from varkd.files import read_json, write_json
from varkd.folders import Own, json_with

CODES = Own("codes", (MANIFEST, PARTIAL), json_with(format=(FORMAT,)))


def plan_manifest(
    *,
    tokenizer: Manifest,
    grid: tuple[int, int],
    scales: tuple[int, ...] | None = None,
    image_shape: tuple[int, int, int],
    class_names: tuple[str, ...],
    views: tuple[str, ...],
    source: Manifest,
    nums: dict[str, int],
    shard_size: int,
    class_map: list[int] | None = None,
) -> Manifest:
    """The manifest of a folder that is still to be written; `nums` gives each split's number of images.

    Raises:
        VarkdError: codes of this tokenizer do not fit into 16 bits, or the shard size is not positive.
    """
    if tokenizer["vocab_size"] > 2**16:
        raise VarkdError(f"the tokenizer has {tokenizer['vocab_size']} codes, but shards hold at most 65536 (16 bits)")
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
            "num": size,
        }
        for shard, (start, size) in enumerate(cut(num, shard_size))
    ]


class CodeWriter(ShardWriter):
    """The shards of `planned` (see `plan_manifest`) under `folder`; shards that stand there already are kept.

    Raises:
        VarkdError: the folder holds codes of another tokenizer, source, views or shard size, or other things.
    """

    own = CODES

    def write(self, split: str, shard: Manifest, codes_NvL: NDArray[np.uint16], label_N: NDArray[np.int64]) -> None:
        """Write one shard; it counts as complete once its codes stand, so they go last."""
        shape = (shard["num"], self._num_views(split), self._length)
        if codes_NvL.shape != shape or codes_NvL.dtype != np.uint16:
            raise ValueError(f"shard {shard['file']} takes uint16 {shape}, not {codes_NvL.dtype} {codes_NvL.shape}")
        self._save(shard["labels"], label_N.astype(np.int64))
        self._save(shard["file"], codes_NvL)

    def finish(self, reconstruction: Manifest) -> Manifest:
        """Write the manifest (one rank calls this, when all have written their shards) and return it.

        Raises:
            VarkdError: shards are missing.
        """
        return self.finish_with(reconstruction=reconstruction)

    def note(self, **values: Any) -> None:
        """Change what a finished manifest says besides what the codes are."""
        write_json(self.folder / MANIFEST, {**read_json(self.folder / MANIFEST), **values})

    def identity(self, manifest: Manifest) -> dict[str, Any]:
        return {
            "format": manifest["version"],
            "tokenizer": manifest["tokenizer"]["hash"][:12],
            "source": "/".join(manifest["source"]["fingerprints"].values()),
            "views": ",".join(manifest["views"]),
            **{
                name: str(value)[:12] if name in ("teacher", "real codes") else value
                for name, value in samples_identity(manifest).items()
            },
            "shard size": manifest["splits"]["train"]["shards"][0]["num"],
            "splits": manifest["splits"],
        }

    def map(self, split: str, shard: Manifest) -> None:
        map_shard(self.folder / shard["file"], (shard["num"], self._num_views(split), self._length), np.uint16)
        map_shard(self.folder / shard["labels"], (shard["num"],), np.int64)

    def _num_views(self, split: str) -> int:
        return len(self.planned["views"]) if split == "train" else 1

    @property
    def _length(self) -> int:
        return sequence_length(self.planned)

    def _save(self, name: str, array: NDArray[Any]) -> None:
        save_array(self.folder / name, array)
