"""Recipes, settings and folders that make no sense: exit code 2, one line, nothing half-written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from mistakes import Refused, encode
from safetensors.torch import load_file, save_file

from tiny_runs import SIZES, arguments, train
from varkd.cli import main


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.update=3"], ["unknown key 'train.update'", "did you mean 'updates'?"]),
        (["modle.dim=3"], ["unknown key 'modle'", "did you mean 'model'?"]),
        (["method=vrkd"], ["unknown method 'vrkd'", "did you mean 'varkd'?"]),
        (["method=best_of_n", "method.terms.studnet.weight=1"], ["unknown key", "anchor", "student"]),
        (
            ["method=best_of_n", "method.terms.student.divergence=forward_kk"],
            ["forward_kk", "did you mean 'forward_kl'?"],
        ),
        (
            ["method=best_of_n", "method.terms.student.selection={kind: confidence, quantile: 1.5}"],
            ["quantile", "[0, 1]"],
        ),
        (
            ["method=best_of_n", "method.terms.student.selection={kind: confidence, quantile: -0.1}"],
            ["quantile", "[0, 1]"],
        ),
        (["method=best_of_n", "method.terms.student.selection={kind: confidence, quantile: .nan}"], ["quantile"]),
        (
            ["method=best_of_n", "method.terms.student.selection={kind: confidence, score: cluster_mass}"],
            ["cluster_mass", "clusters"],
        ),
        (["train.updates=many"], ["train.updates", "many"]),
        (["train.updates=0"], ["updates must be at least 1"]),
        (["train.updates=2.5"], ["train.updates", "2.5"]),
        (["train.precision=fp64"], ["train.precision", "fp64"]),
        (["train.micro_batches=3"], ["batch_size 8", "3 micro-batches"]),
        (["train.optim.lr=-1"], ["lr > 0"]),
        (["train.optim.lr=.nan"], ["lr"]),
        (["model.dim=15"], ["dim 15"]),
        (["model.num_heads=0"], ["num_heads"]),
        (["model.num_layers=0"], ["num_layers"]),
        (["model.dim=0"], ["dim"]),
        (["model.family=llamagan"], ["llamagan", "did you mean 'llamagen'?"]),
        (["device=tpu"], ["device=tpu"]),
        (["train.updates"], ["not key=value", "train.updates=500"]),
        (["train.updates=[1"], ["cannot read the value"]),
        (["train=3"], ["train"]),
        (["evaluation.sampler.temperature=-1"], ["temperature"]),
    ],
    ids=lambda value: " ".join(value[-1:]) if "=" in str(value) else "",
)
def test_settings_that_make_no_sense(
    tmp_path: Path, codes: Path, teacher: Path, refused: Refused, overrides: list[str], words: list[str]
):
    refused(arguments(tmp_path / "run", codes, f"teacher={teacher}", *overrides), *words, untouched=tmp_path)


def test_more_clusters_than_codes(tmp_path: Path, codes: Path, teacher: Path, refused: Refused):
    command = arguments(
        tmp_path / "run",
        codes,
        "method=best_of_n_clusters",
        f"teacher={teacher}",
        "method.terms.student.space.count=18",
    )
    refused(command, "18 clusters", "17 codes", untouched=tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("train: {updates: 3, lr: 1}", ["unknown key 'train.lr'"]),
        ("method: {preset: varkd, terms: {}}", ["terms"]),
        ("method: {preset: nothing}", ["unknown method 'nothing'"]),
        ("train: [1, 2]", ["train"]),
        ("train:", ["train"]),
        ("- 3", ["mapping"]),
        ("", ["mapping"]),
        ("a: [", ["not valid YAML"]),
        ("train: !!python/object/apply:os.system ['true']", ["not valid YAML"]),
    ],
)
def test_a_recipe_that_makes_no_sense(tmp_path: Path, codes: Path, refused: Refused, content: str, words: list[str]):
    (tmp_path / "recipe.yaml").write_text(content)
    recipe = str(tmp_path / "recipe.yaml")
    refused(["train", recipe, f"out={tmp_path / 'run'}", f"data={codes}", *SIZES], *words, untouched=tmp_path)


def test_an_unknown_recipe(tmp_path: Path, refused: Refused):
    refused(["train", "digit-teacher", f"out={tmp_path / 'run'}"], "did you mean 'digits-teacher'?", untouched=tmp_path)
    refused(["show", "nonsense"], "no recipe 'nonsense'", "digits-student")


def test_a_changed_recipe_is_refused_by_its_key(tmp_path: Path, codes: Path, refused: Refused):
    run = train(tmp_path / "run", codes, "train.updates=1")
    command = arguments(run, codes, "train.updates=1", "train.optim.lr=0.02", "seed=5")
    refused(command, "train.optim.lr: 0.01 -> 0.02", "seed: 0 -> 5", "--overwrite", untouched=run)
    (run / "mine.txt").write_text("notes")
    assert main([*command, "--overwrite"]) == 0
    assert (run / "mine.txt").read_text() == "notes", "only what varkd writes is replaced"
    assert [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()] == [0, 1, 1]
    assert "lr: 0.02" in (run / "run.yaml").read_text()


def test_a_foreign_folder_is_left_alone(tmp_path: Path, codes: Path, refused: Refused):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years")
    for more in ([], ["--overwrite"]):
        refused([*arguments(tmp_path / "run", codes), *more], "not empty", "another out=", untouched=tmp_path)


def test_a_folder_below_a_file(tmp_path: Path, codes: Path, refused: Refused):
    (tmp_path / "file").write_text("")
    refused(arguments(tmp_path / "file" / "run", codes), "cannot write", untouched=tmp_path)
    refused(arguments(tmp_path / "file", codes), "file", untouched=tmp_path)
    refused(encode("digits", tmp_path / "file" / "codes"), "cannot write", untouched=tmp_path)


def test_another_teacher_at_the_same_path(tmp_path: Path, codes: Path, teacher: Path, refused: Refused):
    model = Path(shutil.copytree(teacher, tmp_path / "teacher"))
    run = train(tmp_path / "run", codes, "method=kd", f"teacher={model}", "train.updates=1")
    (weights,) = model.glob("checkpoints/*/ema.safetensors")
    save_file({name: value + 1 for name, value in load_file(weights).items()}, weights)
    state = json.loads(weights.with_name("state.json").read_text())
    weights.with_name("state.json").write_text(json.dumps({**state, "sha256": {}}))  # it is whole, and another one
    command = arguments(run, codes, "method=kd", f"teacher={model}", "train.updates=1")
    refused(command, "begun with another teacher", untouched=run)
