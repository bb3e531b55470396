"""What the system refuses says nothing about a file, which may be good: nobody is told to delete it."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from mistakes import Refused, encode
from safetensors.torch import load_file, save_file

from tiny_runs import arguments, train
from varkd.cli import main
from varkd.containers import read_tensors
from varkd.data.codes import CodeDataset, map_shard
from varkd.errors import VarkdError
from varkd.files import read_errors, read_json

HARSH = ("delete", "remove", "damaged", "truncated", "download it again")


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EACCES, errno.EIO, errno.ESTALE, errno.ENOMEM])
def test_no_refusal_blames_the_file(tmp_path: Path, number: int):
    for error in (OSError(number, os.strerror(number)), ValueError(f"{os.strerror(number)} (os error {number})")):
        with pytest.raises(VarkdError) as caught, read_errors(tmp_path / "x", "is damaged: delete it"):
            raise error
        assert not any(word in str(caught.value) for word in HARSH) and "\n" not in str(caught.value)


@pytest.fixture
def few_files() -> Iterator[None]:
    """`ulimit -n` of a few more than are open."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(name) for name in os.listdir("/proc/self/fd"))  # noqa: PTH208
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 40, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_more_shards_than_open_files(tmp_path: Path, few_files: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("varkd.data.codes._OPEN_SHARDS", 16)
    assert main([str(part) for part in [*encode("digits", tmp_path / "codes"), "--shard-size", "10"]]) == 0
    codes = CodeDataset(tmp_path / "codes")
    assert len(codes.manifest["splits"]["train"]["shards"]) > 100
    index_N = np.arange(len(codes))
    whole = codes.codes(index_N, index_N * 0)
    assert torch.equal(whole[[3, 900, 5]], codes.codes(np.array([3, 900, 5]), np.zeros(3, int)))


def test_no_more_files_can_be_opened(tmp_path: Path, codes: Path, few_files: None):
    held = []
    with pytest.raises(OSError, match="Too many"):
        while True:
            held.append(os.open(os.devnull, os.O_RDONLY))
    readers = (read_json, read_tensors, lambda path: map_shard(path, (1,), np.uint16))
    try:
        for read, path in zip(readers, (codes / "manifest.json", codes / "x", codes / "train-00000.npy"), strict=True):
            with pytest.raises(VarkdError, match=r"too many open files|no such file") as caught:
                read(path)
            assert not any(word in str(caught.value) for word in HARSH)
    finally:
        for each in held:
            os.close(each)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_shard_that_may_not_be_read(tmp_path: Path, codes: Path, refused: Refused):
    own = Path(shutil.copytree(codes, tmp_path / "codes"))
    (own / "train-00000.npy").chmod(0)
    line = refused(arguments(tmp_path / "run", own), "no permission to read")
    assert not any(word in line for word in HARSH)


def test_a_shard_that_is_a_link_to_nothing(tmp_path: Path, codes: Path, refused: Refused):
    own = Path(shutil.copytree(codes, tmp_path / "codes"))
    (own / "train-00000.npy").unlink()
    (own / "train-00000.npy").symlink_to(tmp_path / "gone.npy")
    refused(arguments(tmp_path / "run", own), "a link to nothing", untouched=tmp_path)


@pytest.mark.parametrize("what", ["teacher", "init", "convert", "tokenizer"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(
    tmp_path: Path, teacher: Path, codes: Path, refused: Refused, what: str, value: float
):
    model = tmp_path / "model"
    assert main(["export", str(teacher), "--out", str(model)]) == 0
    state = load_file(model / "model.safetensors")
    state["output.weight"][0, 0] = value
    save_file(state, model / "model.safetensors")
    if what == "tokenizer":
        from varkd.tokenizers.store import save_tokenizer
        from varkd.tokenizers.vq import VQ, VQConfig

        tokenizer = VQ(VQConfig.small(8, 1, 17, 1))
        tokenizer.requires_grad_(False).state_dict()["quantize.embedding.weight"][0, 0] = value
        save_tokenizer(tokenizer, tmp_path / "tokenizer")
        refused(encode("digits", tmp_path / "codes", tmp_path / "tokenizer"), "not finite", "diverged")
    elif what == "convert":
        command = ["convert", model / "model.safetensors", "--out", tmp_path / "out", "--heads", "1", "--grid", "8"]
        refused(command, "not finite", "output.weight")
        assert not (tmp_path / "out").exists()
    else:
        command = arguments(tmp_path / "run", codes, "method=kd", f"teacher={teacher}", f"{what}={model}")
        refused(command, "not finite", "output.weight", "diverged")
        assert not (tmp_path / "run").exists()


def test_a_system_error_that_nobody_caught(
    tmp_path: Path, codes: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
):
    run = train(tmp_path / "run", codes, "train.updates=1")

    def fail(path: Path, *arguments: object, **options: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), "somewhere")

    monkeypatch.setattr(Path, "is_file", fail)
    refused(["sample", run, "--out", tmp_path / "out"], "Input/output error", "somewhere")
