"""The main job in small: from images to a report, and a second call that has nothing left to do."""

from __future__ import annotations

import json
import math
import os
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tiny_runs import SIZES
from varkd import demo as module
from varkd.backbones.store import weights_hash
from varkd.demo import demo
from varkd.evaluate.features import FitFeatures
from varkd.files import read_json
from varkd.run import evaluation
from varkd.run.models import load
from varkd.train.loop import Session

TINY = (
    *SIZES, "train.updates=4", "train.batch_size=8", "train.grid_every=0", "train.log_every=1", "train.dropout=0",
    "evaluation.num_samples=40", "evaluation.resamples=20", "device=cpu", "train.optim.warmup=0", "train.optim.lr=0.02",
)  # fmt: skip
NAMES = ["teacher", "ce", "kd", "gkd", "varkd", "best_of_n"]


def metrics_of(out: Path) -> dict[str, bytes]:
    return {name: (out / name / "metrics.json").read_bytes() for name in [*NAMES, "start"]}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, float]:
    """The demo's folder, its report, and the seconds that it took."""
    out = tmp_path_factory.mktemp("demo") / "out"
    begun = time.perf_counter()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "FitFeatures", partial(FitFeatures, updates=25))
        report = demo(out, overrides=TINY)
    return out, report, time.perf_counter() - begun


def test_the_results_hold_a_row_for_each_run(done: tuple[Path, Path, float]):
    out, report, seconds = done
    results = read_json(out / "results.json")
    assert 0 < results["seconds"] <= seconds and results["num_samples"] == 40
    assert [row["name"] for row in results["rows"]] == NAMES
    for row in results["rows"]:
        assert row["updates"] == 4 and row["seconds"] > 0
        assert math.isfinite(row["fd"]) and row["fd_low"] <= row["fd"] <= row["fd_high"]
        assert row["fd"] == read_json(out / row["name"] / "metrics.json")["metrics"]["fd"]["value"]
    assert len({row["fd"] for row in results["rows"]}) == 6
    page = report.read_text()
    assert (
        report.is_relative_to(out) and all(name in page for name in NAMES) and "http://" not in page.split("<body")[0]
    )


def test_the_methods_begin_alike(done: tuple[Path, Path, float]):
    """Same initial weights, teacher and number of updates; then they part."""
    out = done[0]
    records = [read_json(out / name / "environment.json") for name in NAMES[1:]]
    assert len({record["init_hash"] for record in records}) == len({record["teacher_hash"] for record in records}) == 1
    assert records[0]["init_hash"] == weights_hash(load(out / "start"))
    assert records[0]["teacher_hash"] == weights_hash(load(out / "teacher"))
    lines = {
        name: [json.loads(line) for line in (out / name / "log.jsonl").read_text().splitlines()] for name in NAMES[1:]
    }
    starts = {name: line[0]["ce"] for name, line in lines.items()}
    assert len(set(starts.values())) == 1 and all(line[0]["step"] == 0 for line in lines.values())
    assert (
        starts["ce"] == [json.loads(line) for line in (out / "start" / "log.jsonl").read_text().splitlines()][-1]["ce"]
    )
    assert {name: line[-1]["step"] for name, line in lines.items()} == dict.fromkeys(NAMES[1:], 4)
    weights = [load_file(next((out / name / "checkpoints").glob("*4/student.safetensors"))) for name in NAMES[1:]]
    heads = [state["output.weight"] for state in weights]
    assert all(not torch.equal(a, b) for i, a in enumerate(heads) for b in heads[:i])


def test_a_second_call_has_nothing_to_do(done: tuple[Path, Path, float], monkeypatch: pytest.MonkeyPatch):
    out, _, seconds = done
    before = metrics_of(out)

    def no_more(*arguments: object) -> None:
        raise AssertionError("it trained or evaluated again")

    monkeypatch.setattr(Session, "update", no_more)
    monkeypatch.setattr(module, "evaluate_run", no_more)
    monkeypatch.setattr(module, "write_report", lambda *_, **__: out / "report")  # it is drawn anew: some seconds
    begun = time.perf_counter()
    demo(out, overrides=TINY)
    assert time.perf_counter() - begun < seconds / 3
    assert metrics_of(out) == before
    assert [row["name"] for row in read_json(out / "results.json")["rows"]] == NAMES


def test_a_run_that_trained_on_is_evaluated_again(done: tuple[Path, Path, float], monkeypatch: pytest.MonkeyPatch):
    out = done[0]
    selected = out / "kd" / "checkpoints" / "selected.json"
    later = (out / "kd" / "metrics.json").stat().st_mtime + 5
    os.utime(selected, (later, later))
    again: list[str] = []
    monkeypatch.setattr(
        module, "evaluate_run", lambda folder: again.append(folder.name) or read_json(folder / "metrics.json")
    )
    monkeypatch.setattr(module, "write_report", lambda *_, **__: out / "report")
    demo(out, overrides=TINY)
    assert again == ["kd"]
