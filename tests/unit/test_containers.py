"""Official files: every layout is unwrapped, nothing is ever executed, and what is wrong is said in one line."""

from __future__ import annotations

import argparse
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from varkd.containers import read_state
from varkd.errors import VarkdError

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
OTHER = {"a.weight": torch.zeros(2, 3), "b": torch.zeros(4)}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor] = STATE) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def saved(path: Path, content: Any, legacy: bool = False) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def refusal(path: Path, *arguments: Any) -> str:
    with pytest.raises(VarkdError) as caught:
        read_state(path, *arguments)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


LAYOUTS: dict[str, Any] = {
    "raw": STATE,
    "model": {"model": STATE, "optimizer": {"lr": 1e-4}, "steps": 7, "args": argparse.Namespace(gpt_model="GPT-B")},
    "module": {"module": STATE, "global_steps": 3},
    "state_dict": {"state_dict": STATE},
    "trainer.var_wo_ddp": {"epoch": 1, "iter": 2, "trainer": {"var_wo_ddp": STATE, "vae_local": OTHER}, "args": {}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_every_layout(tmp_path: Path, layout: str, legacy: bool):
    container = read_state(saved(tmp_path / "weights.pt", LAYOUTS[layout], legacy))
    assert container.layout == layout and same(container.state)
    assert container.state["b"].dtype == torch.bfloat16


def test_what_else_is_in_the_file_is_noted(tmp_path: Path):
    assert read_state(saved(tmp_path / "a.pt", LAYOUTS["raw"])).notes == []
    (note,) = read_state(saved(tmp_path / "b.pt", LAYOUTS["model"])).notes
    assert note == "not read: args, optimizer, steps"


def test_moving_averages_are_read_when_asked_for(tmp_path: Path):
    path = saved(tmp_path / "both.pt", {"model": STATE, "ema": OTHER})
    container = read_state(path)
    assert same(container.state) and any("--weights ema" in note for note in container.notes)
    assert same(read_state(path, "ema").state, OTHER)
    assert "--weights ema" in refusal(saved(tmp_path / "only.pt", {"ema": OTHER}))
    assert "no moving-average" in refusal(saved(tmp_path / "none.pt", {"model": STATE}), "ema")
    assert "no moving-average" in refusal(saved(tmp_path / "raw.pt", STATE), "ema")


def test_the_tokenizer_of_a_var_trainer(tmp_path: Path):
    path = saved(tmp_path / "ar-ckpt-best.pth", LAYOUTS["trainer.var_wo_ddp"])
    container = read_state(path, "tokenizer")
    assert container.layout == "trainer.vae_local" and same(container.state, OTHER)
    assert same(read_state(saved(tmp_path / "vq.pt", {"model": STATE}), "tokenizer").state)


def test_safetensors_whatever_the_name(tmp_path: Path):
    save_file(STATE, tmp_path / "a.safetensors")
    save_file(STATE, tmp_path / "a.bin")
    for path in tmp_path.iterdir():
        assert same(read_state(path).state), path
    assert "not a safetensors file" in refusal(saved(tmp_path / "b.safetensors", STATE))


def test_a_folder_of_fsdp(tmp_path: Path):
    assert "consolidated.pth" in refusal(tmp_path)
    saved(tmp_path / "consolidated.pth", STATE)
    assert same(read_state(tmp_path).state)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_go(tmp_path: Path, prefix: str):
    path = saved(tmp_path / "a.pt", {"model": {prefix + name: value for name, value in STATE.items()}})
    assert same(read_state(path).state)


def test_prefixes_that_are_names_stay(tmp_path: Path):
    state = {"module.a": torch.ones(1), "b": torch.ones(1)}
    assert same(read_state(saved(tmp_path / "a.pt", state)).state, state)
    compiled = {"layers.0._orig_mod.w": torch.ones(1), "b": torch.ones(1)}
    assert set(read_state(saved(tmp_path / "b.pt", compiled)).state) == {"layers.0.w", "b"}
    twice = {"layers.0._orig_mod.w": torch.ones(1), "layers.0.w": torch.ones(1)}
    assert "both with and without" in refusal(saved(tmp_path / "c.pt", twice))


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_code_is_never_executed(tmp_path: Path):
    trap = {"model": STATE, "optimizer": Trap(tmp_path / "ran")}
    for path in (saved(tmp_path / "zip.pt", trap), saved(tmp_path / "legacy.pt", trap, legacy=True)):
        assert "not a plain PyTorch file" in refusal(path)
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(trap, protocol=2))
    refusal(tmp_path / "raw.pt")
    assert not (tmp_path / "ran").exists()
    pickle.loads((tmp_path / "raw.pt").read_bytes())
    assert (tmp_path / "ran").exists(), "the trap is real"


@pytest.mark.parametrize(
    "value", [np.ones(3), Path("a"), slice(3), np.array([object()])], ids=["array", "path", "slice", "objects"]
)
def test_nothing_else_is_let_in(tmp_path: Path, value: Any):
    assert "refused" in refusal(saved(tmp_path / "a.pt", {"model": STATE, "loss": value}))
    assert argparse.Namespace not in torch.serialization.get_safe_globals(), "allowed while reading only"


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.int64, np.bool_, np.uint8, np.float16])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_numbers_of_numpy_beside_the_weights(tmp_path: Path, kind: type, legacy: bool):
    path = saved(tmp_path / "a.pt", {"model": STATE, "best": kind(1), "args": argparse.Namespace(x=kind(0))}, legacy)
    assert same(read_state(path).state)


def test_lightnings_prefix(tmp_path: Path):
    inner = {f"model.{name}": value for name, value in STATE.items()}
    content = {"epoch": 3, "pytorch-lightning_version": "2.4.0", "state_dict": inner}
    assert same(read_state(saved(tmp_path / "a.ckpt", content)).state)
    content["state_dict"] = inner | {"criterion.weight": torch.ones(1), "fid.mean": torch.ones(1)}
    container = read_state(saved(tmp_path / "b.ckpt", content))
    assert same(container.state) and any("criterion.weight" in note for note in container.notes)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards and their index, as transformers and diffusers save large models."""
    names = {name: f"model-{index + 1:05}-of-00002.safetensors" for index, name in enumerate(STATE)}
    for name, file in names.items():
        save_file({name: STATE[name]}, tmp_path / file)
    index = {"metadata": {"total_size": 32}, "weight_map": names}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


@pytest.mark.parametrize("given", ["", "model.safetensors.index.json", "model-00002-of-00002.safetensors"])
def test_safetensors_shards(shards: Path, given: str):
    assert same(read_state(shards / given).state)


def test_shards_that_are_not_all_there(shards: Path):
    (shards / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(VarkdError, match=r"names model-00001-of-00002\.safetensors, which is not there"):
        read_state(shards)
    (shards / "model.safetensors.index.json").unlink()
    assert "one of several shards" in refusal(shards / "model-00002-of-00002.safetensors")


@pytest.mark.parametrize("content", ["[]", '{"weight_map": 3}', '{"weight_map": {"a": "../../etc/passwd"}}', "{"])
def test_what_is_no_index(shards: Path, content: str):
    (shards / "model.safetensors.index.json").write_text(content)
    refusal(shards / "model.safetensors.index.json")


@pytest.mark.parametrize("content", [{}, {"model": {}}, {"model": 3}, {"model": {"a": "text"}}, [1, 2], None,
                                     {"weights": {"a": torch.ones(1)}}, {1: torch.ones(1)},
                                     {"a": torch.ones(2, device="meta")}, {"a": torch.ones(2, 2).to_sparse()}],
                         ids=repr)  # fmt: skip
def test_files_without_tensors(tmp_path: Path, content: Any):
    assert "holds no" in refusal(saved(tmp_path / "a.pt", content))


def test_what_is_no_weight_file(tmp_path: Path):
    assert "no such file" in refusal(tmp_path / "nowhere.pt")
    wrong = {
        "lfs.safetensors": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n", "Git-LFS"),
        "page.pt": (b"<!DOCTYPE html>\n<html></html>", "web page"),
        "page.bin": (b"\n <html><body>404</body></html>", "web page"),
        "empty.pth": (b"", "empty"),
        "text.pt": (b"hello", "not a plain PyTorch file"),
        "text.safetensors": (b"hello", "not a safetensors file"),
    }
    for name, (content, words) in wrong.items():
        (tmp_path / name).write_bytes(content)
        assert words in refusal(tmp_path / name)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated_files(tmp_path: Path, kind: str):
    whole = tmp_path / "whole"
    if kind == "safetensors":
        save_file(STATE, whole)
    else:
        saved(whole, STATE, legacy=kind == "legacy")
    content, path = whole.read_bytes(), tmp_path / ("a.safetensors" if kind == "safetensors" else "a.pt")
    for keep in [*range(1, len(content), max(1, len(content) // 23)), len(content) - 1]:
        path.write_bytes(content[:keep])
        refusal(path)
