"""The folder of a teacher cache: layout, dtypes, what is refused, and that a stopped job leaves whole shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cached_teachers import CODES_HASH, cached, planned
from varkd.backbones.llamagen import LlamaGen
from varkd.data.teacher_cache import (
    CacheWriter,
    TeacherCache,
    code_dtype,
    is_cache,
    plan_cache,
    read_cache_manifest,
)
from varkd.errors import VarkdError
from varkd.files import read_json, write_json
from varkd.types import Batch
from varkd.world import World


@pytest.fixture
def cache(tmp_path: Path, teacher: LlamaGen, batch: Batch) -> Path:
    """Eight sequences of six codes in shards of three, four codes kept of twelve."""
    cached(teacher, batch.codes_BL, batch.label_B, tmp_path / "cache", top_k=4, dtype="float16")
    return tmp_path / "cache"


def test_what_is_read_is_what_the_teacher_says(cache: Path, teacher: LlamaGen, batch: Batch):
    """Any order, across shards, both branches; largest first, and the tail is the log of the rest."""
    reader = TeacherCache(cache, CODES_HASH)
    sequence_B, null_B = np.array([7, 0, 2, 3, 7]), np.array([False, True, False, True, True])
    logp_BLK, tail_BL, code_BLK = reader.read(sequence_B, null_B)
    assert (logp_BLK.dtype, tail_BL.dtype, code_BLK.dtype) == (np.float16, np.float16, np.int32)
    for row, (sequence, null) in enumerate(zip(sequence_B, null_B, strict=True)):
        one = batch.select(torch.tensor([sequence]))
        condition = one.condition.null(3) if null else one.condition
        p_LV = teacher.head(teacher(one.codes_BL, condition, teacher.plan(1)))[0].softmax(-1)
        best_LK = p_LV.topk(4)
        assert code_BLK[row].tolist() == best_LK.indices.tolist()
        np.testing.assert_allclose(logp_BLK[row], best_LK.values.log(), atol=4e-3)
        np.testing.assert_allclose(np.exp(tail_BL[row].astype(float)), 1 - best_LK.values.sum(1), rtol=4e-3)


def test_the_layout(cache: Path):
    names = sorted(path.name for path in cache.iterdir())
    kinds = ("codes", "logp", "tail")
    assert names == ["manifest.json", *(f"train-{shard:05d}-{kind}.npy" for shard in range(3) for kind in kinds)]
    shapes = {kind: np.load(cache / f"train-00002-{kind}.npy", mmap_mode="r") for kind in kinds}
    assert {kind: (each.shape, str(each.dtype)) for kind, each in shapes.items()} == {
        "codes": ((2, 1, 2, 6, 4), "uint16"), "logp": ((2, 1, 2, 6, 4), "float16"), "tail": ((2, 1, 2, 6), "float16"),
    }  # fmt: skip


def test_codes_take_the_bytes_that_they_need():
    assert code_dtype(256) == code_dtype(2**16) == np.uint16 and code_dtype(2**16 + 1) == np.int32


def test_a_vocabulary_of_more_than_16_bits(tmp_path: Path):
    """Written and read as int32."""
    manifest = plan_cache(
        teacher={"path": "t", "given": "t", "hash": "t" * 64}, codes={"path": "c", "given": "c", "hash": CODES_HASH},
        tokenizer_hash="k", vocab_size=100_000, num_classes=1, sizes=(1, 1), views=["identity", "flip"], num=1,
        top_k=2, dtype="float32", null=False, guidance=None, shard_size=5,
    )  # fmt: skip
    writer = CacheWriter(tmp_path / "cache", manifest, World())
    code = np.arange(8).reshape(1, 2, 1, 2, 2) + 99_992
    with writer.open(writer.todo()[0][1]) as append:
        append(file=np.zeros(code.shape, np.float32), tail=np.zeros((1, 2, 1, 2), np.float32), codes=code)
    writer.finish_with()
    read = TeacherCache(tmp_path / "cache", CODES_HASH).read(np.array([1, 0]), np.array([False, False]))
    assert read.code_BLK.tolist() == [[[99996, 99997], [99998, 99999]], [[99992, 99993], [99994, 99995]]]


def test_a_shard_appears_whole_or_not_at_all(tmp_path: Path, teacher: LlamaGen, batch: Batch):
    manifest = planned(teacher, 8)
    writer = CacheWriter(tmp_path / "cache", manifest, World())
    (_, first), *_ = writer.todo()
    with pytest.raises(KeyboardInterrupt), writer.open(first) as append:
        append(file=np.zeros((1, 1, 2, 6, 12), np.float32))
        raise KeyboardInterrupt
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["partial.json"]
    with pytest.raises(VarkdError, match="is not complete: run the same `varkd teach` again"):
        TeacherCache(tmp_path / "cache", CODES_HASH)
    with pytest.raises(VarkdError, match=r"train-00000-logp\.npy is missing"):
        writer.finish_with()
    assert is_cache(tmp_path / "cache")


def test_ranks_share_the_shards(tmp_path: Path, teacher: LlamaGen):
    manifest = planned(teacher, 8)
    mine = [[shard["start"] for _, shard in CacheWriter(tmp_path, manifest, World(rank, 2)).todo()] for rank in (0, 1)]
    assert mine == [[0, 6], [3]]


def test_damaged_shards(cache: Path):
    for name in ("logp", "tail", "codes"):
        path = cache / f"train-00001-{name}.npy"
        whole = path.read_bytes()
        for length in (len(whole) - 2, 40, 0):
            path.write_bytes(whole[:length])
            with pytest.raises(VarkdError, match=rf"{name}\.npy is truncated .* run `varkd teach` again"):
                TeacherCache(cache, CODES_HASH)
        path.unlink()
        with pytest.raises(VarkdError, match=rf"{name}\.npy is missing: run `varkd teach` again"):
            TeacherCache(cache, CODES_HASH)
        path.write_bytes(whole)
    codes = np.load(cache / "train-00001-codes.npy")
    np.save(cache / "train-00001-codes.npy", np.full_like(codes, 12))
    reader = TeacherCache(cache, CODES_HASH)
    reader.read(np.array([0]), np.array([False]))
    with pytest.raises(VarkdError, match=r"codes\.npy is not what was written .* run the same `varkd teach` again"):
        reader.read(np.array([3]), np.array([False]))
    manifest = read_json(cache / "manifest.json")
    del manifest["sha256"]
    write_json(cache / "manifest.json", manifest)
    reader = TeacherCache(cache, CODES_HASH)
    with pytest.raises(VarkdError, match="holds code 12 but the tokenizer has 12"):
        reader.read(np.array([3]), np.array([False]))


def test_manifests_that_are_refused(cache: Path, tmp_path: Path):
    manifest = read_json(cache / "manifest.json")

    def refused(match: str, **changes: object) -> None:
        write_json(cache / "manifest.json", {**manifest, **changes})
        with pytest.raises(VarkdError, match=match):
            read_cache_manifest(cache)

    refused("is of version 2, this varkd reads 1", version=2)
    refused("is not a teacher cache", format="varkd-codes")
    write_json(cache / "manifest.json", {key: value for key, value in manifest.items() if key != "sizes"})
    with pytest.raises(VarkdError, match=r"is damaged \(at 'sizes'\)"):
        read_cache_manifest(cache)
    with pytest.raises(VarkdError, match="is not a teacher cache"):
        read_cache_manifest(tmp_path / "nothing")
    write_json(cache / "manifest.json", manifest)
    with pytest.raises(VarkdError, match="made of other codes"):
        TeacherCache(cache, "d" * 64)


@pytest.mark.parametrize(
    ("change", "match"),
    [({"top_k": 3}, r"another top_k \(4, now 3\)"), ({"dtype": "float32"}, "another dtype"),
     ({"null": False}, "another branches"), ({"guidance": 2.0}, r"another guidance \(None, now 2.0\)"),
     ({"shard_size": 4}, "another splits")],
)  # fmt: skip
@pytest.mark.parametrize("part_done", [False, True])
def test_a_folder_of_another_job(cache: Path, teacher: LlamaGen, change: dict[str, Any], match: str, part_done: bool):
    same = {"top_k": 4, "dtype": "float16"}
    assert CacheWriter(cache, planned(teacher, 8, **same), World()).is_finished
    if part_done:
        (cache / "manifest.json").rename(cache / "partial.json")
    with pytest.raises(VarkdError, match=match):
        CacheWriter(cache, planned(teacher, 8, **{**same, **change}), World())


def test_the_hash_is_of_what_it_says(cache: Path, tmp_path: Path, teacher: LlamaGen, batch: Batch):
    one = TeacherCache(cache, CODES_HASH)
    moved = cache.rename(tmp_path / "moved")
    assert TeacherCache(moved, CODES_HASH).hash == one.hash
    other = cached(teacher, batch.codes_BL, batch.label_B, tmp_path / "other", top_k=5, dtype="float16")
    assert other.cache.hash != one.hash
    assert one.teacher_hash == "t" * 64
