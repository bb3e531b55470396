"""Two ranks judge as one does: every number, interval and warning."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import adm_inputs as inputs
from varkd import metrics


@pytest.mark.slow
def test_two_ranks_judge_as_one(tmp_path: Path):
    paths = {name: str(tmp_path / name) for name in ("samples.npz", "reference.npz", "inception.pth")}
    np.savez(paths["samples.npz"], inputs.images(5, 0, 13, 24))
    np.savez_compressed(paths["reference.npz"], inputs.images(5, 20, 9, 24))
    torch.save({name: torch.from_numpy(value) for name, value in inputs.weights(1).items()}, paths["inception.pth"])
    job = tmp_path / "job.json"
    job.write_text(json.dumps({name.split(".")[0]: path for name, path in paths.items()}))
    program = str(Path(__file__).with_name("adm_ranks.py"))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        program,
        str(job),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2))
    assert first == second
    one = metrics.adm(paths["samples.npz"], paths["reference.npz"], paths["inception.pth"], resamples=5)
    alone = json.loads(json.dumps(one.to_json()))
    for name in ("fid", "sfid", "is"):
        assert first[name] == pytest.approx(alone[name], rel=1e-6), "the batches differ, and with them the last digits"
    for name in ("precision", "recall"):
        assert first[name] == pytest.approx(alone[name], abs=0.12), "one point of 9"
    assert first["protocol"] == alone["protocol"] and first["warnings"] == alone["warnings"]
