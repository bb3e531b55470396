"""Trackers hear what `log.jsonl` holds, each step once over kills and resumes, and cannot stop a run.

The libraries are fakes here that record what they are told, apart from the tests at the end, which need the real ones.
"""

from __future__ import annotations

import json
import os
import sqlite3
import struct
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tiny_runs import arguments
from varkd.cli import main
from varkd.errors import VarkdError
from varkd.train.log import Log
from varkd.train.trackers import TrackerName
from varkd.world import World

NAMES: tuple[TrackerName, ...] = ("wandb", "trackio", "mlflow")
SETTINGS = {"train.optim.lr": 0.001, "method.terms.kd.weight": 1.0, "init": None}


@dataclass
class Heard:
    """What the fake libraries were told: runs by id, and per run the (name, step) of every number and picture."""

    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    points: list[tuple[str, str, int]] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    fails_at: int | None = None

    def begin(self, run: str, settings: dict[str, Any]) -> None:
        self.settings.setdefault(run, settings)

    def take(self, run: str, values: dict[str, Any], step: int) -> None:
        if step == self.fails_at:
            raise ConnectionError("no route to host\nand a long story")
        self.points += [(run, name, step) for name in values]


class FakeRun:
    def __init__(self, heard: Heard, id: str) -> None:
        self.heard, self.id = heard, id

    def log(self, values: dict[str, Any], step: int) -> None:
        self.heard.take(self.id, values, step)

    def finish(self, exit_code: int = 0) -> None:
        self.heard.ended.append(f"{self.id} {exit_code}")


class FakeMLflow:
    def __init__(self, heard: Heard) -> None:
        self.heard = heard

    def get_experiment_by_name(self, name: str) -> None:
        assert name == "varkd"

    def create_experiment(self, name: str) -> str:
        return f"place of {name}"

    def search_runs(self, places: list[str], filter_string: str) -> list[Any]:
        return [run(id) for id in self.heard.settings if filter_string == f"tags.varkd_run = '{id}'"]

    def create_run(self, place: str, run_name: str, tags: dict[str, str]) -> Any:
        self.heard.begin(tags["varkd_run"], {})
        return run(tags["varkd_run"])

    def log_batch(self, id: str, metrics: Any = (), params: Any = ()) -> None:
        self.heard.settings[id].update({each.key: each.value for each in params})
        for each in metrics:
            self.heard.take(id, {each.key: each.value}, each.step)

    def log_image(self, id: str, image: Image.Image, key: str, step: int) -> None:
        assert image.size == (4, 4)
        self.heard.take(id, {key: image}, step)

    def set_terminated(self, id: str, status: str) -> None:
        self.heard.ended.append(f"{id} {status}")


def run(id: str) -> Any:
    return SimpleNamespace(info=SimpleNamespace(run_id=id))


def module(name: str, **members: Any) -> ModuleType:
    made = ModuleType(name)
    made.__dict__.update(members)
    return made


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> dict[str, Heard]:
    all_heard = {name: Heard() for name in NAMES}

    def wandb_init(*, id: str, config: dict[str, Any], resume: str, **others: Any) -> FakeRun:
        assert resume == "allow" and others["project"] == "varkd"
        all_heard["wandb"].begin(id, config)
        return FakeRun(all_heard["wandb"], id)

    def trackio_init(project: str, *, name: str, config: dict[str, Any], resume: str, embed: bool) -> FakeRun:
        assert (project, resume, embed) == ("varkd", "allow", False)
        all_heard["trackio"].begin(name, config)
        return FakeRun(all_heard["trackio"], name)

    metric = lambda key, value, timestamp, step: SimpleNamespace(key=key, value=value, step=step)
    param = lambda key, value: SimpleNamespace(key=key, value=value)
    for made in (
        module("wandb", init=wandb_init, Image=str),
        module("trackio", init=trackio_init, Image=str),
        module("mlflow"),
        module("mlflow.entities", Metric=metric, Param=param),
        module("mlflow.tracking", MlflowClient=lambda: FakeMLflow(all_heard["mlflow"])),
    ):
        monkeypatch.setitem(sys.modules, made.__name__, made)
    for name in ("WANDB_PROJECT", "WANDB_DIR", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    return all_heard


def picture(folder: Path, step: int) -> Path:
    path = folder / "samples" / f"step-{step:08d}.png"
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(path)
    return path


def session(folder: Path, steps: range, resume: int | None, names: tuple[TrackerName, ...] = NAMES) -> Log:
    """A process that trains `steps`, validates at even ones and draws at every third; it is not closed."""
    log = Log(folder, World(), resume, names, name="student", settings=SETTINGS)
    for step in steps:
        log.write("train", step, {"loss": 1 / (step + 1), "terms/kd": 0.5})
        if step % 2 == 0:
            log.write("validation", step, {"ce": 2.0})
        if step % 3 == 0:
            log.image("samples", step, picture(folder, step))
    return log


def expected(last: int) -> set[tuple[str, int]]:
    steps = range(1, last + 1)
    return (
        {(name, step) for step in steps for name in ("train/loss", "train/terms/kd")}
        | {("validation/ce", step) for step in steps if step % 2 == 0}
        | {("samples", step) for step in steps if step % 3 == 0}
    )


def test_a_killed_run_goes_on_in_every_tracker_and_no_step_comes_twice(tmp_path: Path, heard: dict[str, Heard]):
    session(tmp_path, range(1, 8), None)
    session(tmp_path, range(5, 6), 4)  # killed before it is where the first one was
    session(tmp_path, range(5, 11), 4).close()
    run_id = json.loads((tmp_path / "trackers.json").read_text())["id"]
    for name, told in heard.items():
        assert list(told.settings) == [run_id if name != "trackio" else f"student-{run_id}"], "one run"
        points = [(what, step) for _, what, step in told.points]
        assert len(points) == len(set(points)) and set(points) == expected(10), name
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["split"] == "train"] == list(range(1, 11))


def test_steps_told_before_a_process_without_trackers_are_not_forgotten(tmp_path: Path, heard: dict[str, Heard]):
    session(tmp_path, range(1, 8), None, ("wandb",))
    session(tmp_path, range(5, 6), 4, ())
    session(tmp_path, range(5, 9), 4, ("wandb",)).close()
    points = [(what, step) for _, what, step in heard["wandb"].points]
    assert len(points) == len(set(points)) and set(points) == expected(8)


def test_settings_and_how_it_ended(tmp_path: Path, heard: dict[str, Heard]):
    session(tmp_path, range(1, 3), None).close(failed=True)
    (wandb_run,), (mlflow_run,) = heard["wandb"].settings, heard["mlflow"].settings
    assert heard["wandb"].settings[wandb_run] == SETTINGS
    assert heard["mlflow"].settings[mlflow_run] == {name: str(value) for name, value in SETTINGS.items()}
    assert heard["wandb"].ended == [f"{wandb_run} 1"] and heard["mlflow"].ended == [f"{mlflow_run} FAILED"]


@pytest.mark.parametrize("name", NAMES)
def test_a_tracker_that_raises_is_off_and_the_others_go_on(
    name: TrackerName, tmp_path: Path, heard: dict[str, Heard], capsys: pytest.CaptureFixture[str]
):
    heard[name].fails_at = 3
    session(tmp_path, range(1, 7), None).close()
    said = capsys.readouterr().err.splitlines()
    assert said == [f"warning: {name} failed (no route to host) and is off until the next start; log.jsonl goes on"]
    assert max(step for _, _, step in heard[name].points) == 2
    for other in set(NAMES) - {name}:
        assert {(what, step) for _, what, step in heard[other].points} == expected(6)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 6 + 3


def test_a_tracker_that_does_not_start_stops_a_new_run_but_not_a_resumed_one(
    tmp_path: Path, heard: dict[str, Heard], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def refuse(**asked: Any) -> None:
        raise RuntimeError("api_key not configured.\nSee the docs")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    with pytest.raises(VarkdError, match=r"wandb did not start \(api_key not configured\): .* train.trackers"):
        session(tmp_path, range(1), None, ("wandb",))
    session(tmp_path, range(5, 7), 4, ("wandb",)).close()
    assert "wandb failed (api_key not configured) and is off" in capsys.readouterr().err
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [5, 6, 6]


def test_only_the_first_rank_speaks(tmp_path: Path, heard: dict[str, Heard]):
    log = Log(tmp_path, World(rank=1, size=2), None, NAMES, settings=SETTINGS)
    log.write("train", 1, {"loss": 1.0})
    log.image("samples", 3, picture(tmp_path, 3))
    log.close()
    assert all(not told.settings and not told.points for told in heard.values())
    assert not (tmp_path / "trackers.json").exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_library_is_one_line_before_anything_is_written(
    name: str, tmp_path: Path, codes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, name, None)
    assert main([*arguments(tmp_path / "run", codes), f"train.trackers=[{name}]"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"varkd: error: train.trackers: this needs {name}, which is not installed: pip install 'varkd[{name}]'"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", ["[neptune]", "wandb", "[wandb,wandb]"])
def test_a_wrong_list_is_one_line(value: str, tmp_path: Path, codes: Path, capsys: pytest.CaptureFixture[str]):
    assert main([*arguments(tmp_path / "run", codes), f"train.trackers={value}"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "trackers" in said[0], said


def test_a_run_started_anew_is_another_run(tmp_path: Path, codes: Path, heard: dict[str, Heard]):
    command = [*arguments(tmp_path / "run", codes), "train.trackers=[wandb]", "train.grid_every=3"]
    assert main(command) == 0
    first = list(heard["wandb"].points)
    assert {what for _, what, _ in first} >= {"train/loss", "train/lr", "validation/ce", "samples"}
    assert main([*command, "train.updates=8"]) == 0, "a run that grows goes on"
    assert len(heard["wandb"].settings) == 1 and len(set(heard["wandb"].points)) == len(heard["wandb"].points)
    assert main([*command, "--overwrite"]) == 0
    runs = list(heard["wandb"].settings)
    assert len(runs) == 2 and [point[1:] for point in heard["wandb"].points if point[0] == runs[1]] == [
        point[1:] for point in first
    ]
    assert heard["wandb"].settings[runs[0]]["train.optim.warmup"] == 2


def test_tensorboard_takes_steps_back_and_hears_them_again(tmp_path: Path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    session(tmp_path, range(1, 8), None, ("tensorboard",)).close()
    session(tmp_path, range(5, 10), 4, ("tensorboard",)).close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 10))
    assert [event.step for event in events.Scalars("validation/ce")] == [2, 4, 6, 8]
    assert [event.step for event in events.Images("samples")] == [3, 6, 9]
    assert not (tmp_path / "trackers.json").exists(), "it needs no record"


# The real libraries, without a network.


def in_two_processes(folder: Path, name: TrackerName, **environment: str) -> None:
    """A process that ends without a word after step 7, and one that goes on after step 4."""
    for steps, resume in (("1, 8", None), ("5, 11", 4)):
        code = (
            "import os, sys; from pathlib import Path; from test_trackers import session; "
            f"session(Path(sys.argv[1]), range({steps}), {resume}, ('{name}',)).close()"
        )
        paths = os.pathsep.join([*sys.path, str(Path(__file__).parent)])
        subprocess.run(
            [sys.executable, "-c", code, str(folder)],
            env={**os.environ, "PYTHONPATH": paths, **environment},
            cwd=folder,
            check=True,
            timeout=120,
        )


def assert_each_once(points: list[tuple[str, int]]) -> None:
    assert len(points) == len(set(points)) and set(points) == expected(10)


def test_real_mlflow(tmp_path: Path):
    tracking = pytest.importorskip("mlflow.tracking")
    pytest.importorskip("sqlalchemy")
    place = f"sqlite:///{tmp_path}/mlflow.db"
    in_two_processes(tmp_path, "mlflow", MLFLOW_TRACKING_URI=place)
    client = tracking.MlflowClient(place)
    (found,) = client.search_runs([client.get_experiment_by_name("varkd").experiment_id])
    assert found.info.status == "FINISHED" and found.data.params["train.optim.lr"] == "0.001"
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(step, 1 / (step + 1)) for step in range(1, 11)]
    assert [point.step for point in client.get_metric_history(found.info.run_id, "validation/ce")] == [2, 4, 6, 8, 10]
    pictures = [path.path for path in client.list_artifacts(found.info.run_id, "images")]
    assert sum(path.endswith(".png") for path in pictures) == 3


def test_real_trackio(tmp_path: Path):
    pytest.importorskip("trackio")
    in_two_processes(tmp_path, "trackio", TRACKIO_DIR=str(tmp_path / "trackio"), HF_HUB_OFFLINE="1")
    (base,) = (tmp_path / "trackio").glob("varkd*.db")
    with sqlite3.connect(base) as connection:
        rows = connection.execute("select run_name, step, metrics from metrics").fetchall()
    assert len({name for name, _, _ in rows}) == 1
    assert_each_once([(key, step) for _, step, text in rows for key in json.loads(text)])


def test_real_wandb_offline(tmp_path: Path):
    pytest.importorskip("wandb")
    in_two_processes(tmp_path, "wandb", WANDB_MODE="offline", WANDB_SILENT="true")
    run_id = json.loads((tmp_path / "trackers.json").read_text())["id"]
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2 and all(path.name == f"run-{run_id}.wandb" for path in files), "two pieces of one run"
    assert_each_once([point for path in files for point in wandb_history(path)])


def wandb_history(path: Path) -> list[tuple[str, int]]:
    """(name, step) of all that an offline file holds: records in blocks of 32 KiB, as in the logs of LevelDB."""
    wandb_internal_pb2 = pytest.importorskip("wandb.proto.wandb_internal_pb2")

    data, at, text, found = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        text, at = text + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(text)
            text = b""
            names = {item.key or item.nested_key[0] for item in record.history.item}  # a picture has many items
            found += [(name, record.history.step.num) for name in names if not name.startswith("_")]
    return found
