"""`varkd shrink` from a run to a student that trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import varkd
from tiny_runs import train
from varkd.cli import main

TEACHER = ("model.num_layers=2", "model.dim=32", "model.num_heads=2", "model.ffn_dim=32", "method=ce")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory, codes: Path) -> Path:
    return train(tmp_path_factory.mktemp("shrink") / "large", codes, *TEACHER)


def shrink(large: Path, codes: Path, out: Path, *options: object) -> int:
    return main(["shrink", str(large), "--data", str(codes), "--out", str(out), *map(str, options)])


def test_the_student_is_cut_out_and_trains(large: Path, codes: Path, tmp_path: Path, capsys):
    small = tmp_path / "small"
    assert shrink(large, codes, small, "--layers", 1, "--dim", 16, "--ffn", 8) == 0
    said = capsys.readouterr().out
    assert "num layers: 2 -> 1" in said and "num heads: 2 -> 1" in said and "before any training" in said
    model = varkd.load(small)
    assert (model.config.num_layers, model.config.dim, model.config.ffn_dim) == (1, 16, 8)
    assert model.tokenizer_hash == varkd.load(large).tokenizer_hash and model.class_names is not None
    record = json.loads((small / "shrink.json").read_text())
    assert set(record["blocks"]) == {"layers.0", "layers.1"} and len(record["channels"]) == 32
    run = train(tmp_path / "run", codes, "method=kd", f"teacher={large}", f"init={small}")
    assert varkd.load(run).config == model.config


def test_the_library_gives_what_the_command_writes(large: Path, codes: Path, tmp_path: Path):
    assert shrink(large, codes, tmp_path / "small", "--params", 0.3, "--num", 40) == 0
    written = varkd.load(tmp_path / "small").state_dict()
    made = varkd.shrink(varkd.load(large), varkd.CodeDataset(codes), params=0.3, num=40).state_dict()
    assert all(value.equal(written[name]) for name, value in made.items())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "give either a share"), (["--params", 0.5, "--layers", 1], "give either a share"),
        (["--layers", 3], "this model has 2"), (["--dim", 20], "take a multiple of 16"),
        (["--params", 0], "above 0 and at most 1"), (["--layers", 1, "--num", 0], "at least one sequence"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_leaves_nothing(large: Path, codes: Path, tmp_path: Path, options, words, capsys):
    capsys.readouterr()
    assert shrink(large, codes, tmp_path / "small", *options) == 2
    (line,) = [line for line in capsys.readouterr().err.strip().splitlines() if line.startswith("varkd: error")]
    assert words in line and not (tmp_path / "small").exists()


def test_it_does_not_write_over_anything(large: Path, codes: Path, tmp_path: Path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    assert shrink(large, codes, tmp_path, "--layers", 1) == 2
    assert "is not empty" in capsys.readouterr().err and (tmp_path / "thesis.txt").read_text() == "mine"


def test_codes_of_another_tokenizer_are_refused(large: Path, codes: Path):
    model = varkd.load(large)
    model.tokenizer_hash = "0" * 64
    with pytest.raises(varkd.VarkdError, match="give codes of the model's tokenizer"):
        varkd.shrink(model, varkd.CodeDataset(codes), layers=1)
