"""Two ranks make the cache that one makes, and train from it as one does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_two_ranks import assert_same_run, torchrun

from tiny_runs import arguments, train
from varkd.run.teaching import teach


@pytest.mark.slow
def test_two_ranks_teach_and_train_like_one(tmp_path: Path, codes: Path, teacher: Path):
    teach(teacher, codes, tmp_path / "one", top_k=4, shard_size=300, quiet=True)
    settings = ("method=kd", "train.micro_batches=2")
    train(tmp_path / "one-run", codes, *settings, f"teacher={tmp_path / 'one'}")
    command = arguments(tmp_path / "two-run", codes, *settings, f"teacher={tmp_path / 'two'}")
    jobs = [
        {"verb": "teach", "teacher": str(teacher), "data": str(codes), "out": str(tmp_path / "two")},
        {"verb": "train", "command": command},
    ]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    done = torchrun(str(Path(__file__).with_name("two_ranks.py")), str(tmp_path / "jobs.json"))
    assert done.returncode == 0, done.stderr[-6000:]
    first, second = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert first == second and len(first) == 1 + 3 * 6
    assert_same_run(tmp_path / "one-run", tmp_path / "two-run")
