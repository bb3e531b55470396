"""Kill -9 while other processes decode images: they end too, and the job goes on to the same bytes."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_kill_nine import contents, killed_again_and_again

from tiny_runs import process
from varkd.cli import main


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for number in range(300):
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (64, 64), dtype=np.uint8)).save(path)
    return tmp_path / "photos"


@pytest.mark.slow
def test_encode_with_workers(tmp_path: Path, photos: Path):
    options = ["--tokenizer", "pixels", "--image-size", "16", "--ten-crop", "1.5", "--shard-size", "20",
               "--batch-size", "10", "--device", "cpu"]  # fmt: skip
    assert main(["encode", str(photos), *options, "--out", str(tmp_path / "straight")]) == 0
    command = ["encode", str(photos), *options, "--workers", "2", "--out", str(tmp_path / "killed")]
    killed_again_and_again(command, tmp_path / "killed" / "partial.json", 3)
    left = {name: text for name, text in contents(tmp_path / "killed").items() if not name.endswith(".tmp")}
    assert left == contents(tmp_path / "straight")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks for children in /proc")
def test_workers_do_not_outlive_their_parent(tmp_path: Path, photos: Path):
    command = ["encode", str(photos), "--tokenizer", "pixels", "--image-size", "16", "--shifts", "6", "--flip"]
    running = process([*command, "--device", "cpu", "--workers", "2", "--out", str(tmp_path / "codes")])
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children")
    found: set[int] = set()
    while running.poll() is None and not ((tmp_path / "codes" / "partial.json").exists() and len(found) > 1):
        found = set(map(int, children.read_text().split()))
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    assert len(found) == 2
    until = time.monotonic() + 30
    while any(map(_is_alive, found)) and time.monotonic() < until:
        time.sleep(0.2)
    assert not any(map(_is_alive, found))


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "zombie" not in Path(f"/proc/{pid}/status").read_text()
