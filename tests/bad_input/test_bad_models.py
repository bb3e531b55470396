"""Damaged codes, tokenizers and models, or of another kind: exit code 2, one line, nothing half-written."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from mistakes import Refused
from safetensors.torch import load_file, save_file

from tiny_runs import arguments, train
from varkd.tokenizers.store import save_tokenizer
from varkd.tokenizers.vq import VQ, VQConfig


@pytest.fixture
def own_codes(tmp_path: Path, codes: Path) -> Path:
    """A copy of the codes to damage."""
    return Path(shutil.copytree(codes, tmp_path / "codes"))


def test_codes_of_another_tokenizer(tmp_path: Path, codes: Path, refused: Refused):
    other = vq(tmp_path / "tokenizer")
    refused(
        arguments(tmp_path / "run", codes, f"tokenizer={other}"),
        "holds codes of tokenizer",
        "encode",
        untouched=tmp_path,
    )


def test_a_tokenizer_that_was_changed(tmp_path: Path, own_codes: Path, refused: Refused):
    config = own_codes / "tokenizer" / "config.json"
    config.write_text(config.read_text().replace('"levels": 17', '"levels": 16'))
    assert '"levels": 16' in config.read_text()
    refused(arguments(tmp_path / "run", own_codes), "changed after it was saved", untouched=tmp_path)


@pytest.mark.parametrize("name", ["train-00000.npy", "train-00000-labels.npy", "validation-00000.npy"])
def test_a_truncated_shard(tmp_path: Path, own_codes: Path, refused: Refused, name: str):
    (own_codes / name).write_bytes((own_codes / name).read_bytes()[:-64])
    refused(arguments(tmp_path / "run", own_codes), name, "varkd encode", untouched=tmp_path)


def test_a_missing_shard(tmp_path: Path, own_codes: Path, refused: Refused):
    (own_codes / "train-00000.npy").unlink()
    refused(arguments(tmp_path / "run", own_codes), "is missing", "varkd encode", untouched=tmp_path)


def without_hashes(codes: Path) -> None:
    """As folders are that were written before there were hashes: what stands there is all that can be checked."""
    manifest = json.loads((codes / "manifest.json").read_text())
    del manifest["sha256"]
    (codes / "manifest.json").write_text(json.dumps(manifest))


def test_a_label_without_a_class_in_the_codes(tmp_path: Path, own_codes: Path, refused: Refused):
    label_N = np.load(own_codes / "train-00000-labels.npy")
    label_N[3] = 10
    np.save(own_codes / "train-00000-labels.npy", label_N)
    without_hashes(own_codes)
    refused(arguments(tmp_path / "run", own_codes), "label 10", "10 classes", untouched=tmp_path)


def test_a_code_outside_the_codebook(tmp_path: Path, own_codes: Path, refused: Refused):
    codes_NvL = np.load(own_codes / "train-00000.npy")
    codes_NvL[:] = 17
    np.save(own_codes / "train-00000.npy", codes_NvL)
    without_hashes(own_codes)
    refused(arguments(tmp_path / "run", own_codes), "code 17", "encode again", untouched=own_codes)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": "varkd-codes", "version": 9}',
                                     '{"format": "varkd-codes", "version": 1}'])  # fmt: skip
def test_a_damaged_manifest(tmp_path: Path, own_codes: Path, refused: Refused, content: str):
    (own_codes / "manifest.json").write_text(content)
    refused(arguments(tmp_path / "run", own_codes), str(own_codes), untouched=tmp_path)


def test_data_that_is_nothing(tmp_path: Path, refused: Refused):
    refused(arguments(tmp_path / "run", tmp_path / "none"), "not a codes folder", "varkd encode", untouched=tmp_path)
    refused(["train", "digits-student", f"out={tmp_path / 'run'}"], "give data=", untouched=tmp_path)
    refused(["train", "digits-student", f"data={tmp_path}"], "give out=", untouched=tmp_path)


def vq(folder: Path, vocab_size: int = 32, size: int = 8) -> Path:
    """An untrained tokenizer of gray images: as many codes as are asked for."""
    torch.manual_seed(0)
    save_tokenizer(VQ(VQConfig.small(size, 1, vocab_size, 4)), folder)
    return folder


def exported(folder: Path, **changes: object) -> Path:
    """An exported model for the digit codes, apart from `changes` in its sizes."""
    from varkd.backbones.store import build, save_backbone

    sizes = {
        "vocab_size": 17,
        "num_classes": 10,
        "grid": (8, 8),
        "num_layers": 1,
        "dim": 16,
        "num_heads": 1,
        "ffn_dim": 16,
    }
    save_backbone(build("llamagen", sizes | changes), folder)
    return folder


@pytest.mark.parametrize("role", ["teacher", "init"])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": 32}, ["32 codes", "17"]),
        ({"num_classes": 7}, ["7 classes", "10"]),
        ({"grid": (4, 4)}, ["16", "64"]),
    ],
    ids=["codes", "classes", "grid"],
)
def test_a_model_of_other_data(
    tmp_path: Path, codes: Path, refused: Refused, role: str, changes: dict, words: list[str]
):
    model = exported(tmp_path / "model", **changes)
    command = arguments(tmp_path / "run", codes, "method=kd" if role == "teacher" else "method=ce", f"{role}={model}")
    refused(command, *words, untouched=tmp_path)


@pytest.mark.parametrize("role", ["teacher", "init"])
def test_a_model_of_another_tokenizer(tmp_path: Path, codes: Path, teacher: Path, refused: Refused, role: str):
    model = Path(shutil.copytree(teacher, tmp_path / "model"))
    info = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**info, "tokenizer_hash": "f" * 64}))
    refused(arguments(tmp_path / "run", codes, f"{role}={model}"), "ffffffffffff", "tokenizer", untouched=tmp_path)


def test_weights_that_do_not_fit_their_config(tmp_path: Path, codes: Path, refused: Refused):
    model = exported(tmp_path / "model")
    state = load_file(model / "model.safetensors")
    save_file({**state, "norm.weight": torch.ones(5)}, model / "model.safetensors")
    refused(arguments(tmp_path / "run", codes, f"init={model}"), "norm.weight", "(5,)", untouched=tmp_path)
    state.pop("norm.weight")
    save_file(state, model / "model.safetensors")
    refused(arguments(tmp_path / "run", codes, f"init={model}"), "norm.weight", "missing", untouched=tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_teacher(tmp_path: Path, codes: Path, teacher: Path, refused: Refused, keep: int):
    model = Path(shutil.copytree(teacher, tmp_path / "model"))
    (weights,) = model.glob("checkpoints/*/ema.safetensors")
    weights.write_bytes(weights.read_bytes()[:keep])
    refused(arguments(tmp_path / "run", codes, "method=kd", f"teacher={model}"), str(weights), untouched=tmp_path)


@pytest.mark.parametrize("content", ["", "[1]", '{"family": "llamagan"}', '{"family": "llamagen", "width": 3}', "{}"])
def test_a_damaged_config_of_a_model(tmp_path: Path, codes: Path, refused: Refused, content: str):
    model = exported(tmp_path / "model")
    (model / "config.json").write_text(content)
    refused(arguments(tmp_path / "run", codes, f"init={model}"), untouched=tmp_path)


def test_a_teacher_that_is_not_there(tmp_path: Path, codes: Path, refused: Refused):
    refused(arguments(tmp_path / "run", codes, "method=kd"), "needs a teacher", "teacher=RUN", untouched=tmp_path)
    refused(arguments(tmp_path / "run", codes, "teacher=none"), "no model at none", untouched=tmp_path)
    (tmp_path / "empty").mkdir()
    refused(arguments(tmp_path / "run", codes, f"teacher={tmp_path / 'empty'}"), "config.json", untouched=tmp_path)


def test_a_teacher_that_is_not_trained_yet(tmp_path: Path, codes: Path, teacher: Path, refused: Refused):
    model = Path(shutil.copytree(teacher, tmp_path / "model"))
    shutil.rmtree(model / "checkpoints")
    refused(arguments(tmp_path / "run", codes, f"teacher={model}"), "train it first", untouched=tmp_path)


def test_a_mistake_can_be_put_right_by_the_next_command(tmp_path: Path, codes: Path, teacher: Path, refused: Refused):
    """A refused command has claimed no folder."""
    refused(arguments(tmp_path / "run", codes, "method=kd", "teacher=typo"), untouched=tmp_path)
    train(tmp_path / "run", codes, "method=kd", f"teacher={teacher}", "train.updates=1")


def test_a_mistake_does_not_cost_the_run_that_it_would_replace(tmp_path: Path, codes: Path, refused: Refused):
    train(tmp_path / "run", codes, "train.updates=1")
    refused([*arguments(tmp_path / "run", codes, "method=kd", "teacher=typo"), "--overwrite"], untouched=tmp_path)


def test_code_in_a_pickle_does_not_run(tmp_path: Path, refused: Refused):
    class Hostile:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    for name, write in (("zip.pt", torch.save), ("raw.pt", _raw_pickle)):
        write({"model": Hostile()}, tmp_path / name)
        command = ["tokenizer", "import", tmp_path / name, "--out", tmp_path / "tokenizer"]
        refused(command, name, "not a plain PyTorch file", untouched=tmp_path)
    assert not (tmp_path / "ran").exists()
    with (tmp_path / "raw.pt").open("rb") as file:
        pickle.load(file)  # the trap is real
    assert (tmp_path / "ran").exists()


def _raw_pickle(value: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(value, protocol=2))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"text"])
def test_a_file_that_is_no_tokenizer(tmp_path: Path, refused: Refused, content: bytes):
    (tmp_path / "a.pt").write_bytes(content)
    refused(["tokenizer", "import", tmp_path / "a.pt", "--out", tmp_path / "t"], "a.pt", untouched=tmp_path)
    torch.save({"model": {"some.weight": torch.zeros(2)}}, tmp_path / "b.pt")
    refused(["tokenizer", "import", tmp_path / "b.pt", "--out", tmp_path / "t"], "b.pt", untouched=tmp_path)
    refused(["tokenizer", "import", tmp_path / "c.pt", "--out", tmp_path / "t"], "no such file", untouched=tmp_path)
