"""Two ranks make the cache, or the samples, that one makes, and train from them as one does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_two_ranks import assert_same_run, torchrun

from tiny_runs import arguments, train
from varkd.run.teacher_samples import teach_samples
from varkd.run.teaching import teach


@pytest.mark.slow
def test_two_ranks_teach_and_train_like_one(tmp_path: Path, codes: Path, teacher: Path):
    teach(teacher, codes, tmp_path / "one", top_k=4, shard_size=300, quiet=True)
    settings = ("method=kd", "train.micro_batches=2")
    train(tmp_path / "one-run", codes, *settings, f"teacher={tmp_path / 'one'}")
    command = arguments(tmp_path / "two-run", codes, *settings, f"teacher={tmp_path / 'two'}")
    teach_samples(teacher, codes, tmp_path / "one-drawn", 150, shard_size=40, batch_size=16, quiet=True)
    jobs = [
        {"verb": "sample", "teacher": str(teacher), "data": str(codes), "out": str(tmp_path / "two-drawn")},
        {"verb": "teach", "teacher": str(teacher), "data": str(codes), "out": str(tmp_path / "two")},
        {"verb": "train", "command": command},
    ]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    done = torchrun(str(Path(__file__).with_name("two_ranks.py")), str(tmp_path / "jobs.json"))
    assert done.returncode == 0, done.stderr[-6000:]
    first, second = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert first == second and len(first) == 1 + 3 * 6
    assert_same_run(tmp_path / "one-run", tmp_path / "two-run")
    drawn = [
        {path.name: path.read_bytes() for path in (tmp_path / f"{name}-drawn").iterdir()} for name in ("one", "two")
    ]
    assert drawn[0] == drawn[1] and len(drawn[0]) == 1 + 2 * (4 + 5)
