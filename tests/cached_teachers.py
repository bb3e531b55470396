"""A teacher cache of toy sequences, written through the writer that `varkd teach` uses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from varkd.backbones.protocol import Backbone
from varkd.data.teacher_cache import CacheWriter, TeacherCache, plan_cache
from varkd.distill.target import Guided, Plain
from varkd.distill.teachers import CachedTeacher
from varkd.run.teaching import Asked, raster_plan
from varkd.types import Batch
from varkd.world import World

CODES_HASH = "c" * 64


def planned(model: Backbone, num: int, **options: Any) -> dict[str, Any]:
    """The manifest of a cache of `num` images in one view."""
    given = {"top_k": model.vocab_size, "dtype": "float32", "null": True, "guidance": None, "shard_size": 3, **options}
    return plan_cache(
        teacher={"path": "teacher", "given": "teacher", "hash": "t" * 64},
        codes={"path": "codes", "given": "codes", "hash": CODES_HASH}, tokenizer_hash="k" * 64,
        vocab_size=model.vocab_size, num_classes=model.num_classes, sizes=raster_plan(model).sizes,
        views=["identity"], num=num, **given,
    )  # fmt: skip


def cached(model: Backbone, codes_BL: Tensor, label_B: Tensor, folder: Path, **options: Any) -> CachedTeacher:
    """What `model` says of these sequences."""
    manifest = planned(model, len(codes_BL), **options)
    writer, guidance = CacheWriter(folder, manifest, World()), manifest["guidance"]
    ask = Asked(model, Plain() if guidance is None else Guided(guidance), raster_plan(model), manifest["top_k"])
    for _, shard in writer.todo():
        rows = slice(shard["start"], shard["start"] + shard["num"])
        made = [ask(codes_BL[rows], label_B[rows], branch == "null") for branch in manifest["branches"]]
        with writer.open(shard) as append:
            fields = zip(("file", "tail", "codes"), zip(*made, strict=True), strict=True)
            append(**{name: np.stack(arrays, axis=1)[:, None] for name, arrays in fields})
    writer.finish_with()
    return CachedTeacher(TeacherCache(folder, CODES_HASH))


def named(batch: Batch) -> Batch:
    """The batch as a loader hands it over: row i is training sequence i."""
    return Batch(batch.codes_BL, batch.label_B, batch.row_B, sequence_B=torch.arange(len(batch)))
