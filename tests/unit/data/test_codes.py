"""Codes folders: reading what was written, and refusing what is damaged or foreign."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from varkd.data.codes import CodeDataset
from varkd.data.writer import CodeWriter, plan_manifest
from varkd.errors import VarkdError
from varkd.files import read_json, write_json
from varkd.world import World

CodesFolder = Callable[..., Path]


def test_reads_what_was_written(codes_folder: CodesFolder) -> None:
    codes = CodeDataset(codes_folder(), "train", tokenizer_hash="a" * 64)
    assert (len(codes), codes.num_views, codes.sequence_length, codes.vocab_size) == (23, 3, 6, 4096)
    assert codes.class_names == ("cat", "dog", "owl") and codes.num_classes == 3 and codes.image_shape == (1, 4, 6)
    assert codes.labels.tolist() == [n % 3 for n in range(23)]
    index, view = np.array([22, 0, 4, 5, 22, 11]), np.array([0, 2, 1, 0, 2, 1])
    codes_BL = codes.codes(index, view)
    assert codes_BL.dtype == torch.int64 and codes_BL.shape == (6, 6)
    assert codes_BL[:, 0].tolist() == index.tolist() and codes_BL[:, 1].tolist() == view.tolist()
    validation = CodeDataset(codes_folder(), "validation")
    assert (len(validation), validation.num_views) == (4, 1)


def test_shards_are_mapped_not_read(codes_folder: CodesFolder) -> None:
    codes = CodeDataset(codes_folder())
    assert len(codes.manifest["splits"]["train"]["shards"]) == 5
    assert all(isinstance(codes._shard(n), np.memmap) and not codes._shard(n).flags.writeable for n in range(5))


def test_another_tokenizer(codes_folder: CodesFolder) -> None:
    with pytest.raises(VarkdError, match=r"tokenizer aaaaaaaaaaaa, not bbbbbbbbbbbb: encode the images with"):
        CodeDataset(codes_folder(), tokenizer_hash="b" * 64)


def test_truncated_and_missing_shards(codes_folder: CodesFolder) -> None:
    folder = codes_folder()
    shard = folder / "train-00002.npy"
    whole = shard.read_bytes()
    for length in (len(whole) - 6, 60, 0):
        shard.write_bytes(whole[:length])
        with pytest.raises(VarkdError, match=r"train-00002\.npy is truncated .* run `varkd encode` again"):
            CodeDataset(folder)
    np.save(shard, np.zeros((5, 3, 7), np.uint16))
    with pytest.raises(VarkdError, match=r"holds uint16 \(5, 3, 7\), expected uint16 \(5, 3, 6\)"):
        CodeDataset(folder)
    np.save(shard, np.array([object()]), allow_pickle=True)  # must not be unpickled
    with pytest.raises(VarkdError, match="not a shard"):
        CodeDataset(folder)
    shard.unlink()
    with pytest.raises(VarkdError, match=r"train-00002\.npy is missing"):
        CodeDataset(folder)


def test_codes_outside_the_codebook(codes_folder: CodesFolder) -> None:
    codes = CodeDataset(codes_folder(vocab_size=20))
    codes.codes(np.array([19]), np.array([0]))
    with pytest.raises(VarkdError, match="holds code 20 but the tokenizer has 20"):
        codes.codes(np.array([19, 20]), np.array([0, 0]))


@pytest.mark.parametrize("label", [-1, 3])
def test_labels_outside_the_classes(codes_folder: CodesFolder, label: int) -> None:
    folder = codes_folder()
    np.save(folder / "train-00004-labels.npy", np.array([0, label, 0], dtype=np.int64))
    manifest = read_json(folder / "manifest.json")
    del manifest["sha256"]  # of a folder from before there were hashes
    write_json(folder / "manifest.json", manifest)
    with pytest.raises(VarkdError, match=f"label {label} but 3 classes"):
        CodeDataset(folder)


def test_manifests_that_are_refused(codes_folder: CodesFolder, tmp_path: Path) -> None:
    folder = codes_folder()
    manifest = read_json(folder / "manifest.json")

    def refused(match: str, **changes: object) -> None:
        write_json(folder / "manifest.json", {**manifest, **changes})
        with pytest.raises(VarkdError, match=match):
            CodeDataset(folder)

    refused("is of version 2, this varkd reads", version=2)
    refused("is not a manifest of codes", format="other")
    refused("has no split 'train'", splits={})
    refused(r"is damaged \(at 'hash'\)", tokenizer={})
    (folder / "manifest.json").write_text("[]")
    with pytest.raises(VarkdError, match="is not a manifest of codes"):
        CodeDataset(folder)
    (folder / "manifest.json").rename(folder / "partial.json")
    with pytest.raises(VarkdError, match="is not complete: run the same"):
        CodeDataset(folder)
    with pytest.raises(VarkdError, match="is not a codes folder"):
        CodeDataset(tmp_path / "missing")


def test_writer_keeps_whole_shards_and_repairs_others(codes_folder: CodesFolder) -> None:
    folder = codes_folder()
    planned = {key: value for key, value in read_json(folder / "manifest.json").items() if key != "reconstruction"}
    assert CodeWriter(folder, planned, World()).is_finished
    (folder / "train-00001-labels.npy").unlink()
    (folder / "validation-00000.npy").write_bytes(b"")
    writer = CodeWriter(folder, planned, World())
    assert [shard["file"] for _, shard in writer.todo()] == ["train-00001.npy", "validation-00000.npy"]
    with pytest.raises(VarkdError, match=r"train-00001\.npy is missing"):
        writer.finish({})
    second = CodeWriter(folder, planned, World(1, 2)).todo()
    assert [shard["file"] for _, shard in second] == ["train-00001.npy", "validation-00000.npy"]  # shards 1 and 5


@pytest.mark.parametrize(
    ("path", "value", "match"),
    [
        (("tokenizer", "hash"), "b" * 64, r"another tokenizer \(aaaaaaaaaaaa, now bbbbbbbbbbbb\)"),
        (("views",), ["identity", "flip"], "another views"),
        (("source", "fingerprints", "train"), "f2", "another source"),
        (("splits", "validation", "num"), 5, "another splits"),
    ],
)
@pytest.mark.parametrize("part_done", [False, True])
def test_folder_of_another_job(
    codes_folder: CodesFolder, path: tuple[str, ...], value: object, match: str, part_done: bool
) -> None:
    folder = codes_folder()
    planned = read_json(folder / "manifest.json")
    if part_done:
        (folder / "manifest.json").rename(folder / "partial.json")
    entry = planned
    for key in path[:-1]:
        entry = entry[key]
    entry[path[-1]] = value
    with pytest.raises(VarkdError, match=match):
        CodeWriter(folder, planned, World())


def test_tokenizers_that_do_not_fit_into_16_bits() -> None:
    def plan(vocab_size: int, shard_size: int = 1) -> None:
        plan_manifest(
            tokenizer={"vocab_size": vocab_size}, grid=(1, 1), image_shape=(1, 1, 1), class_names=("a",),
            views=("identity",), source={}, nums={"train": 1}, shard_size=shard_size,
        )  # fmt: skip

    plan(65536)
    with pytest.raises(VarkdError, match="at most 65536"):
        plan(65537)
    with pytest.raises(VarkdError, match="shard_size=0"):
        plan(16, shard_size=0)
