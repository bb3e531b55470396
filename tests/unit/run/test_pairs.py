"""Teachers and students of different families: allowed where both can honor the student's plans, refused otherwise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tiny_runs import arguments, train
from varkd.backbones.store import build, load_backbone, save_backbone
from varkd.cli import main
from varkd.run.data import Codes

SIZES = {"vocab_size": 17, "num_classes": 10, "grid": (8, 8), "num_layers": 2, "dim": 16, "num_heads": 2, "ffn_dim": 16}
SMALL = ("model.num_layers=2", "model.num_heads=2", "method=kd", "train.updates=1")


def exported(folder: Path, family: str, tokenizer_hash: str | None = None, **changes: object) -> Path:
    save_backbone(build(family, SIZES | changes), folder, tokenizer_hash)
    return folder


@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        ("randar", ["model.family=llamagen"]),
        ("arpg", ["model.family=llamagen"]),
        ("rar", ["model.family=llamagen"]),
        ("llamagen", ["model.family=arpg", "model.order=raster"]),
        ("llamagen", ["model.family=randar", "model.order=raster"]),
        ("llamagen", ["model.family=rar"]),
        ("rar", ["model.family=randar"]),
        ("randar", ["model.family=rar"]),
        ("randar", ["model.family=rar", "model.order=random"]),
        ("arpg", ["model.family=randar"]),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_pairs_whose_plans_agree(tmp_path: Path, codes: Path, teacher: str, student: list[str]):
    path = exported(tmp_path / "teacher", teacher, Codes(codes).tokenizer.hash)
    run = train(tmp_path / "run", codes, *SMALL, *student, f"teacher={path}")
    model, _ = load_backbone(run)
    assert model.family == student[0].split("=")[1]
    order = [setting.split("=")[1] for setting in student if "order" in setting]
    assert not order or json.loads((run / "config.json").read_text())["order"] == order[0]


@pytest.mark.parametrize(
    ("teacher", "student", "words"),
    [
        ("llamagen", ["model.family=randar"], "order"),
        ("llamagen", ["model.family=arpg"], "order"),
        ("llamagen", ["model.family=rar", "model.order=random"], "order"),
        ("rar", ["model.family=randar", "method=gkd", "method.contexts.shares.1.contexts.sampler.steps=8"], "one code"),
        ("randar", ["model.family=llamagen", "model.order=raster"], "order"),
    ],
    ids=str,
)
def test_pairs_whose_plans_disagree(
    tmp_path: Path, codes: Path, capsys: pytest.CaptureFixture[str], teacher: str, student: list[str], words: str
):
    path = exported(tmp_path / "teacher", teacher)
    assert main(arguments(tmp_path / "run", codes, *SMALL, *student, f"teacher={path}")) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error and not (tmp_path / "run").exists()


def test_parallel_rollouts_are_distilled_under_their_plans(tmp_path: Path, codes: Path):
    path = exported(tmp_path / "teacher", "arpg")
    steps = "method.contexts.shares.1.contexts.sampler.steps=8"
    train(tmp_path / "run", codes, *SMALL, "model.family=randar", "method=gkd", steps, f"teacher={path}")


def test_tokenizers_are_compared_by_hash(tmp_path: Path, codes: Path, capsys: pytest.CaptureFixture[str]):
    path = exported(tmp_path / "teacher", "randar", "f" * 64)
    assert main(arguments(tmp_path / "run", codes, *SMALL, f"teacher={path}")) == 2
    assert "tokenizer ffffffffffff" in capsys.readouterr().err
