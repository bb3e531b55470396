"""The codes folder: `manifest.json` and memory-mapped shards of uint16 codes (n, views, L).

Its layout stands in docs/architecture.md.
Opening reads the manifest, the labels and the shards' headers; codes are paged in as they are asked for, from at most
128 shards that are open at a time.
"""

from __future__ import annotations

import json
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from varkd.data.shards import MANIFEST, PARTIAL, check_content, gather_rows, map_array
from varkd.errors import VarkdError
from varkd.files import read_json, sha256_of
from varkd.folders import locate
from varkd.tokenizers.protocol import Tokenizer
from varkd.tokenizers.store import load_tokenizer

FORMAT, VERSION = "varkd-codes", 1
_OPEN_SHARDS = 128


map_shard = partial(map_array, verb="varkd encode")
"""Memory-map one array of a codes folder, see `map_array`."""


def sequence_length(manifest: dict[str, Any]) -> int:
    """L: codes of one image, by the manifest's grid, or by its scales where a multi-scale tokenizer wrote it."""
    height, width = manifest["grid"]
    return sum(side * side for side in manifest["scales"]) if "scales" in manifest else height * width


def codes_hash(manifest: dict[str, Any]) -> str:
    """Names the codes: which images, in which views, by which tokenizer, in which classes; not where they lie.

    Samples of a teacher (`varkd teach --samples`) are named by how they were made, too.
    """
    splits = {split: entry["num"] for split, entry in manifest["splits"].items()}
    parts = (
        manifest["tokenizer"]["hash"],
        manifest["source"]["fingerprints"],
        manifest["class_names"],
        manifest["views"],
        splits,
        *([samples_identity(manifest)] if "samples" in manifest else []),
    )
    return sha256_of(json.dumps(parts, sort_keys=True).encode())


def samples_identity(manifest: dict[str, Any]) -> dict[str, Any]:
    """What a teacher's samples are, by name; "none" for the codes of images."""
    made = manifest.get("samples")
    if made is None:
        return dict.fromkeys(("teacher", "real codes", "sampler", "labels", "seed"), "none")
    return {
        "teacher": made["teacher"]["hash"],
        "real codes": made["codes"]["hash"],
        "sampler": ", ".join(f"{name} {value}" for name, value in made["sampler"].items()),
        "labels": made["labels"],
        "seed": made["seed"],
    }


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished codes folder.

    Raises:
        VarkdError: there is none, or it is of another format or version.
    """
    if (folder / PARTIAL).exists() and not (folder / MANIFEST).exists():
        raise VarkdError(f"{folder} is not complete: run the same `varkd encode` again, it goes on where it stopped")
    if not (folder / MANIFEST).exists():
        raise VarkdError(f"{folder} is not a codes folder (no {MANIFEST}): write one with `varkd encode`")
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise VarkdError(f"{folder / MANIFEST} is not a manifest of codes: write the folder with `varkd encode`")
    if manifest.get("version") != VERSION:
        raise VarkdError(
            f"{folder} is of version {manifest.get('version')}, this varkd reads {VERSION}: encode the images again"
        )
    for name in ("tokenizer", "image_shape", "grid", "class_names", "views", "source", "splits"):
        if name not in manifest:
            raise VarkdError(f"{folder / MANIFEST} is damaged (at '{name}'): run `varkd encode` again")
    return manifest


def open_tokenizer(folder: Path, manifest: dict[str, Any]) -> Tokenizer:
    """The tokenizer that a codes folder names.

    Raises:
        VarkdError: it is missing, or another one stands at its path.
    """
    recorded = manifest["tokenizer"]
    return check_tokenizer(load_tokenizer(locate(recorded["path"], folder, recorded.get("given"))), folder, manifest)


def check_tokenizer(tokenizer: Tokenizer, folder: Path, manifest: dict[str, Any]) -> Tokenizer:
    """`tokenizer`, if it is the one that wrote the codes in `folder`.

    Raises:
        VarkdError: it is another one.
    """
    recorded = manifest["tokenizer"]["hash"]
    if tokenizer.hash != recorded:
        raise VarkdError(
            f"{folder} holds codes of tokenizer {recorded[:12]}, but this one is {tokenizer.hash[:12]}: "
            "encode the images again with it"
        )
    return tokenizer


class CodeDataset:
    """One split of a codes folder; with `tokenizer_hash`, only if the codes are of that tokenizer.

    `manifest` stands in for one that is not written yet (while encoding).

    Raises:
        VarkdError: not a codes folder, unfinished, of another version or tokenizer, damaged, or with labels that have
            no class name.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str = "train",
        tokenizer_hash: str | None = None,
        *,
        manifest: dict[str, Any] | None = None,
    ) -> None:
        self.folder, self.split = Path(folder), split
        self.manifest = read_manifest(self.folder) if manifest is None else manifest
        try:
            self._check(tokenizer_hash)
            self._open()
        except VarkdError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise VarkdError(f"{self.folder / MANIFEST} is damaged (at {error}): run `varkd encode` again") from error
        low, high = int(self.labels.min(initial=0)), int(self.labels.max(initial=0))
        if low < 0 or high >= self.num_classes:
            label = low if low < 0 else high
            raise VarkdError(f"{folder} has label {label} but {self.num_classes} classes: encode it again")

    def _check(self, tokenizer_hash: str | None) -> None:
        recorded = self.manifest["tokenizer"]["hash"]
        if tokenizer_hash is not None and recorded != tokenizer_hash:
            raise VarkdError(
                f"{self.folder} holds codes of tokenizer {recorded[:12]}, not {tokenizer_hash[:12]}: encode the "
                "images with this tokenizer, or name the tokenizer of these codes"
            )
        if self.split not in self.manifest["splits"]:
            raise VarkdError(f"{self.folder} has no split '{self.split}' (it has {', '.join(self.manifest['splits'])})")

    def _open(self) -> None:
        manifest = self.manifest
        entry = manifest["splits"][self.split]
        self.class_names: tuple[str, ...] = tuple(manifest["class_names"])
        self.image_shape: tuple[int, int, int] = tuple(manifest["image_shape"])
        self.tokenizer_hash: str = manifest["tokenizer"]["hash"]
        self.vocab_size = int(manifest["tokenizer"]["vocab_size"])
        self.sequence_length: int = sequence_length(manifest)
        self.num_views = len(manifest["views"]) if self.split == "train" else 1
        self._shard = lru_cache(_OPEN_SHARDS)(self._map)
        labels: list[NDArray[np.int64]] = []
        for shard in entry["shards"]:
            map_shard(self.folder / shard["file"], self._shape_of(shard), np.uint16)  # checked, and let go of
            labels.append(np.array(map_shard(self.folder / shard["labels"], self._shape_of(shard)[:1], np.int64)))
            check_content(self.folder / shard["labels"], manifest, "varkd encode")
        self._start_S = np.array([shard["start"] for shard in entry["shards"]], dtype=np.int64)
        self.labels = np.concatenate(labels)
        if len(self.labels) != entry["num"]:
            raise VarkdError(
                f"{self.folder}: {self.split} shards hold {len(self.labels)} images, not {entry['num']}: encode again"
            )

    def _shape_of(self, shard: dict[str, Any]) -> tuple[int, int, int]:
        return shard["num"], self.num_views, self.sequence_length

    def _map(self, number: int) -> NDArray[np.uint16]:
        """A shard, mapped. Each takes an open file, of which a system gives about a thousand: the last used stay."""
        shard = self.manifest["splits"][self.split]["shards"][number]
        mapped = map_shard(self.folder / shard["file"], self._shape_of(shard), np.uint16)
        check_content(self.folder / shard["file"], self.manifest, "varkd encode")
        return mapped

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the codes, checked by its hash.

        Raises:
            VarkdError: it is missing, or it is not the one that wrote the codes.
        """
        return open_tokenizer(self.folder, self.manifest)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.labels)

    def codes(self, index: NDArray[np.int64], view: NDArray[np.int64]) -> Tensor:
        """The codes of images `index` (B,) in views `view` (B,): int64 (B, L).

        Raises:
            VarkdError: a code lies outside the codebook (the shard is damaged).
        """
        codes_BL = np.empty((len(index), self.sequence_length), dtype=np.int64)
        gather_rows(codes_BL, self._start_S, self._shard, index, view)
        # Checked as codes are read, not when the folder is opened: that would page in all of it.
        largest = int(codes_BL.max(initial=0))
        if largest >= self.vocab_size:
            raise VarkdError(
                f"{self.folder} holds code {largest} but the tokenizer has {self.vocab_size}: encode again"
            )
        return torch.from_numpy(codes_BL)
