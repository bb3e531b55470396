"""The rows of the paper's table: commands that parse, models of the published sizes, and honest needs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from varkd.backbones import zoo
from varkd.backbones.store import build
from varkd.cli import parser
from varkd.config import load_run
from varkd.errors import VarkdError
from varkd.run.reproduce import KD_UPDATES, ROWS, SECOND_UPDATES, Places, commands, describe, missing, needs, reproduce


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return Places(tmp_path / "imagenet", tmp_path / "downloads", tmp_path / "out", methods=("gkd_prefix", "varkd"))


@pytest.mark.parametrize("name", ROWS)
def test_a_row_trains_the_published_student(name: str, places: Places):
    """At the paper's batch, learning rate and updates (section 4.1), beside a larger teacher."""
    row = ROWS[name]
    known, run = zoo.entry(row.student), load_run(row.recipe)
    sizes = {key: value for key, value in vars(run.model).items() if value is not None and key != "family"}
    with torch.device("meta"):
        model = build(run.model.family, {**known.config, **sizes})
    assert sum(parameter.numel() for parameter in model.parameters()) == known.params
    assert (run.train.batch_size, run.train.optim.lr, run.train.updates) == (256, 5e-5, KD_UPDATES)
    assert run.train.optim.lr_at(0, KD_UPDATES) == run.train.optim.lr_at(KD_UPDATES - 1, KD_UPDATES) == 5e-5
    assert zoo.entry(row.teacher).resolution == known.resolution and zoo.entry(row.teacher).params > known.params
    assert run.train.label_drop == 0.1 and run.train.dropout == 0  # varkd distills without dropout


@pytest.mark.parametrize("name", ROWS)
def test_every_command_parses_and_the_second_stage_starts_from_kd(name: str, places: Places):
    made = commands(name, places)
    for command in made:
        words = command[command.index("varkd") + 1 :]
        parser().parse_args(words)
    trains = [command for command in made if "train" in command]
    kd = next(word for word in trains[0] if word.startswith("out=")).removeprefix("out=")
    assert "method=kd" in trains[0] and "train.select=best" in trains[0]
    for command, method in zip(trains[1:], places.methods, strict=True):
        assert {f"init={kd}", f"method={method}", f"train.updates={SECOND_UPDATES}"} <= set(command)
        settings = [word for word in command if "=" in word]
        load_run(ROWS[name].recipe, settings)


def test_what_is_missing_is_said_and_nothing_starts(places: Places, tmp_path: Path):
    absent = missing("llamagen-b-from-l", places)
    text = describe("llamagen-b-from-l", places)
    for file in ("vq_ds16_c2i.pt", "c2i_B_384.pt", "c2i_L_384.pt", str(places.images)):
        assert any(file in line for line in absent) and f"# missing: {tmp_path}" in text
    with pytest.raises(VarkdError, match="cannot start"):
        reproduce("llamagen-b-from-l", places)
    assert list(tmp_path.iterdir()) == []


def test_needs_grow_with_the_teacher_and_shrink_with_gpus(places: Places):
    """LlamaGen-B: 20 bytes a parameter for weights, gradients, AdamW and average, 4 for the whole models."""
    need = needs("llamagen-b-from-l", replace(places, gpus=1))
    assert need["gpu"] == pytest.approx((24 * 110_888_448 + 4 * 342_910_976) / 1e9)
    assert needs("llamagen-b-from-xl", places)["gpu"] > needs("llamagen-b-from-l", places)["gpu"] < need["gpu"]


def test_an_unknown_row_is_refused(places: Places):
    with pytest.raises(VarkdError, match="llamagen-b-from-l"):
        commands("llamagen-b-from-lx", places)
