"""`varkd quantize`: the folder is smaller, and every verb reads it like the run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import varkd
from tiny_runs import SIZES, train
from varkd.backbones.quantized import round_weights_
from varkd.cli import main
from varkd.config import read_run

WIDE = (*(size for size in SIZES if "dim" not in size), "model.dim=64", "model.ffn_dim=64")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, codes: Path, teacher: Path) -> Path:
    return train(tmp_path_factory.mktemp("quantize") / "run", codes, *WIDE, "method=kd", f"teacher={teacher}")


def quantize(run: Path, out: Path, weights: str) -> Path:
    assert main(["quantize", str(run), "--out", str(out), "--weights", weights]) == 0
    return out


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
def test_every_verb_reads_the_folder(run: Path, weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = quantize(run, tmp_path / "elsewhere" / "small", weights)
    said = capsys.readouterr().out
    assert weights in said and "MiB" in said
    exact, small = varkd.load(run), varkd.load(out)
    assert small.head.weight.dtype == torch.bfloat16
    if weights != "bf16":
        round_weights_(exact, weights)  # type: ignore[arg-type]
    for name, value in exact.to(torch.bfloat16).state_dict().items():
        assert small.state_dict()[name].equal(value), name
    assert main(["evaluate", str(out)]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["name"] == f"run {weights}" and metrics["agreement"] is not None
    assert weights in metrics["protocol"]["weights"]
    assert main(["sample", str(out), "--out", str(tmp_path / "samples"), "--num", "10"]) == 0
    assert main(["evaluate", str(run)]) == 0
    assert main(["report", str(run), str(out), "--out", str(tmp_path / "report")]) == 0


def test_the_order_of_sizes(run: Path, tmp_path: Path):
    sizes = [
        (quantize(run, tmp_path / weights, weights) / "model.safetensors").stat().st_size
        for weights in ("bf16", "int8", "int4")
    ]
    exact = next((run / "checkpoints").glob("step-*/ema.safetensors")).stat().st_size
    assert exact > sizes[0] > sizes[1] > sizes[2]


def test_a_quantized_model_starts_and_teaches_a_run(run: Path, codes: Path, tmp_path: Path):
    small = quantize(run, tmp_path / "small", "int8")
    out = train(tmp_path / "next", codes, "method=kd", f"teacher={small}", f"init={small}", *WIDE)
    assert varkd.load(out).head.weight.dtype == torch.float32
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["split"] == "train"]
    assert losses[0] < 1e-3 < losses[-1]  # student and teacher begin as one; then Adam's first steps are large


def test_quantization_aware_training_is_of_the_weights_that_quantize_writes(run: Path, codes: Path, tmp_path: Path):
    """What validation reports during training is what the quantized folder has."""
    options = ("method=ce", f"init={run}", "train.quantize=int4", *WIDE)
    aware = train(tmp_path / "aware", codes, *options)
    plain = train(tmp_path / "plain", codes, *(option for option in options if "quantize" not in option))
    assert read_run(aware).train.quantize == "int4"
    last = json.loads((aware / "log.jsonl").read_text().splitlines()[-1])
    small = quantize(aware, tmp_path / "small", "int4")
    assert main(["evaluate", str(small)]) == 0
    assert json.loads((small / "metrics.json").read_text())["validation_ce"] == pytest.approx(last["ce"], rel=0.02)
    weights = [load_file(path / "checkpoints" / "step-00000006" / "student.safetensors") for path in (aware, plain)]
    assert any(not weights[0][name].equal(weights[1][name]) for name in weights[0])


def refused(capsys: pytest.CaptureFixture[str], *command: object) -> str:
    capsys.readouterr()
    assert main([str(part) for part in command]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    return said[0]


def test_what_cannot_be_quantized_is_refused(run: Path, codes: Path, tmp_path: Path, capsys):
    small = quantize(run, tmp_path / "small", "int8")
    before = sorted(tmp_path.rglob("*"))
    again = refused(capsys, "quantize", small, "--out", tmp_path / "again", "--weights", "int4")
    assert "is quantized already" in again
    assert "is not empty" in refused(capsys, "quantize", run, "--out", small, "--weights", "int4")
    assert "no model at" in refused(capsys, "quantize", tmp_path / "none", "--out", tmp_path / "x", "--weights", "int8")
    recipe = ("train", "digits-student", f"out={small}", f"data={codes}")
    assert "holds a finished model" in refused(capsys, *recipe)
    assert sorted(tmp_path.rglob("*")) == before


def test_without_torchao_there_is_one_line(run: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    said = refused(capsys, "quantize", run, "--out", tmp_path / "small", "--weights", "int8")
    assert "pip install 'varkd[quantize]'" in said
    assert not (tmp_path / "small").exists()


def test_integers_without_scales_are_one_line(run: Path, tmp_path: Path, capsys):
    small = quantize(run, tmp_path / "small", "int8")
    state = load_file(small / "model.safetensors")
    save_file(
        {name: value for name, value in state.items() if not name.endswith(":scale")}, small / "model.safetensors"
    )
    assert "quantize or copy it again" in refused(capsys, "sample", small, "--out", tmp_path / "s", "--num", "4")
