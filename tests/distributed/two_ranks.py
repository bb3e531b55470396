"""What `test_two_ranks.py` starts under `torchrun`: several jobs in one process group, since importing torch is slow.

Usage: two_ranks.py jobs.json, a list of {"verb": "train" | "stop" | "encode" | "teach" | "sample", ...}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_runs import stop_after
from varkd.config import load_run
from varkd.run.data import encode
from varkd.run.teacher_samples import teach_samples
from varkd.run.teaching import teach
from varkd.run.training import train_run
from varkd.train.loop import Stopped
from varkd.world import World


def run(job: dict, world: World) -> None:
    if job["verb"] == "encode":
        encode("digits", "pixels", Path(job["out"]), shifts=1, shard_size=500, quiet=True)
        return
    if job["verb"] == "teach":
        teach(job["teacher"], job["data"], job["out"], top_k=4, shard_size=300, quiet=True)
        return
    if job["verb"] == "sample":
        teach_samples(job["teacher"], job["data"], job["out"], 150, shard_size=40, batch_size=16, quiet=True)
        return
    _, recipe, *overrides = job["command"]
    with pytest.MonkeyPatch.context() as patch:
        if job["verb"] == "stop" and world.rank == 1:  # the signal reaches one rank only
            stop_after(patch, 3)
        try:
            train_run(load_run(recipe, overrides), quiet=True)
            assert job["verb"] == "train"
        except Stopped as stopped:
            assert job["verb"] == "stop" and stopped.exit_code == 143, str(stopped)


if __name__ == "__main__":
    everyone = World.from_environment()
    for each in json.loads(Path(sys.argv[1]).read_text()):
        run(each, everyone)
        everyone.barrier()
    everyone.close()
