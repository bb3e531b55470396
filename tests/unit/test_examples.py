"""The scripts of examples/ run as their first lines say, on a tiny demo."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from test_readme import TINY

from varkd.demo import demo

FOLDER = Path(__file__).parents[2] / "examples"
COMMANDS = {
    "custom_loop.py": ("demo", "my-student", "--updates", "2", "--batch-size", "8"),
    "own_method.py": ("demo", "--updates", "2"),
    "compare_samples.py": ("demo/codes", "grid.png", "demo/teacher", "demo/varkd"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    demo(folder / "demo", overrides=TINY)
    return folder


def test_every_example_is_run_here():
    assert {path.name for path in FOLDER.glob("*.py")} == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_an_example_runs(name: str, place: Path):
    done = subprocess.run([sys.executable, FOLDER / name, *COMMANDS[name]], cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    made = {"custom_loop.py": "my-student/model.safetensors", "compare_samples.py": "grid.png"}
    assert name not in made or (place / made[name]).is_file()
