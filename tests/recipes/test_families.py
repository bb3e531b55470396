"""Every family goes the whole way: a teacher, a student's start, VarKD on student samples; and it can be resumed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny_runs import FROM_THE_START, arguments, assert_same_state, checkpoint, log, stop_after, train
from varkd.backbones.store import FAMILIES, load_backbone
from varkd.cli import main

QUICK = ("train.updates=2", "train.validate_every=2", "train.checkpoint_every=2", "model.num_layers=2")
ANY_ORDER = ("model.family=rar", "model.order=random", "model.num_layers=2", "model.num_heads=2")


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_family_teaches_and_is_taught(family: str, tmp_path: Path, codes: Path, request: pytest.FixtureRequest):
    data = request.getfixturevalue("scale_codes") if family == "var" else codes
    quick = (f"model.family={family}", *QUICK)
    teacher = train(tmp_path / "teacher", data, *quick, "model.dim=32", "model.num_heads=2", "seed=1")
    start = train(tmp_path / "start", data, *quick)
    student = train(tmp_path / "varkd", data, *quick, *FROM_THE_START, f"teacher={teacher}", f"init={start}")
    lines = [line for line in log(student) if line["split"] == "train"]
    assert [line["age/student"] for line in lines] == [0, 1]  # sampled in the first update, replayed in the second
    for line in lines:
        assert line["terms/student"] > 0 and all(math.isfinite(value) for value in line.values() if value != "train")
    assert load_backbone(student)[0].family == family
    assert json.loads((student / "status.json").read_text())["state"] == "done"
    before, after = checkpoint(start, 2), checkpoint(student, 2)
    assert any(not torch.equal(before[name], after[name]) for name in before if name.startswith("student/"))


@pytest.fixture(scope="module")
def any_order_teacher(tmp_path_factory: pytest.TempPathFactory, codes: Path) -> Path:
    settings = ("train.updates=10", "train.checkpoint_every=10", "train.optim.lr=0.03", "seed=1")
    return train(tmp_path_factory.mktemp("any-order") / "teacher", codes, *ANY_ORDER, *settings)


def test_stored_orders_survive_a_stop(
    tmp_path: Path, codes: Path, any_order_teacher: Path, monkeypatch: pytest.MonkeyPatch
):
    """Stopped between two refreshes, where codes and their orders come from the checkpoint alone."""
    settings = (*ANY_ORDER, *FROM_THE_START, f"teacher={any_order_teacher}")
    whole = train(tmp_path / "whole", codes, *settings)
    order = checkpoint(whole, 3)["method/rows/replay_order"]  # (rows, capacity, codes); updates 1 and 3 sampled
    assert torch.equal(order.sort(-1).values, torch.arange(64).expand_as(order))
    assert len({tuple(row) for row in order.flatten(0, 1).tolist()}) == 8  # an order of its own for every sample

    for name in ("resumed", "spoilt"):
        command = arguments(tmp_path / name, codes, *settings)
        with monkeypatch.context() as patch:
            stop_after(patch, 3)
            assert main(command) == 128 + 15
        if name == "spoilt":
            path = tmp_path / name / "checkpoints" / "step-00000003" / "method.safetensors"
            state = load_file(path)
            save_file({**state, "rows/replay_order": state["rows/replay_order"].flip(-1).contiguous()}, path)
            counters = json.loads(path.with_name("state.json").read_text())
            path.with_name("state.json").write_text(json.dumps({**counters, "sha256": {}}))
        assert main(command) == 0
    assert_same_state(tmp_path / "resumed", whole, 6)
    assert log(tmp_path / "resumed") == log(whole)
    first, other = log(whole), log(tmp_path / "spoilt")
    assert first[:3] == other[:3] and first[3:] != other[3:]  # the stored orders are what the models read
