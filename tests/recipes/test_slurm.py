"""The Slurm scripts: shell that parses, and, with stand-ins for Slurm and torchrun, the command lines they end in."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from varkd.cli import main
from varkd.config import load_run

SCRIPTS = sorted((Path(__file__).parents[2] / "recipes" / "slurm").glob("*.sbatch"))
BASH = shutil.which("bash")
pytestmark = pytest.mark.skipif(BASH is None, reason="no bash")


def slurm(folder: Path, torchrun: str) -> dict[str, str]:
    """Programs with Slurm's names that do the least, and write down what they were called with."""
    programs = {
        "scontrol": f'if [ "$1" = show ]; then echo node-a; echo node-b; else echo "$@" > {folder}/asked; fi',
        "srun": 'shift; exec "$@"',
        "torchrun": f'printf "%q " "$@" > {folder}/started; {torchrun}',
        "scancel": f'kill -TERM "$(cat {folder}/pid)"',
    }
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_NNODES": "2",
            "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_GPUS_ON_NODE": "4"}  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_they_end_in_a_command_that_parses(script: Path, tmp_path: Path):
    assert subprocess.run([str(BASH), "-n", str(script)], check=False).returncode == 0
    environment = slurm(tmp_path, "exit 0")
    assert subprocess.run([str(BASH), str(script)], env=environment, check=False, timeout=60).returncode == 0
    words = shlex.split((tmp_path / "started").read_text())
    told, command = words[: words.index("-m")], words[words.index("-m") + 2 :]
    assert told[:4] == ["--nnodes", "2", "--nproc-per-node", "4"] and "node-a:29500" in told
    if command[0] == "train":
        run = load_run(command[1], command[2:])
        assert run.out and run.data and run.train.batch_size % 8 == 0
    else:
        out = tmp_path / "codes"
        command = [*command[: command.index("--out")], "--out", str(out), "--workers", "1"]
        assert main(command) == 0 and (out / "manifest.json").is_file()


def test_a_job_that_is_stopped_is_put_into_the_queue_again(tmp_path: Path):
    """The signal reaches the job, whose own exit code is the script's, and Slurm is asked for another turn."""
    body = f"echo $$ > {tmp_path}/pid; trap 'exit 143' TERM; while true; do sleep 0.1; done"
    script = next(path for path in SCRIPTS if path.stem == "train")
    running = subprocess.Popen([str(BASH), str(script)], env=slurm(tmp_path, body))
    until = time.monotonic() + 30
    while not (tmp_path / "pid").exists() and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.3)
    running.send_signal(signal.SIGTERM)
    assert running.wait(timeout=30) == 143
    assert (tmp_path / "asked").read_text().split() == ["requeue", "7"]
