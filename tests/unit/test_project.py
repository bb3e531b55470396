"""The project around the code: the help is quick, the repository small, and the versions agree."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from varkd.version import VERSION

ROOT = Path(__file__).parents[2]
LARGEST_FILE = 2 * 1024 * 1024
HELP_SECONDS = 2.0
HEAVY = ("torch", "numpy", "datasets", "sklearn", "matplotlib", "pydantic", "tensorboard")


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom varkd.cli import main\ntry:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        f"print('HEAVY', *[name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = run(code, "--help")
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower()
    assert done.stderr.splitlines()[-1].split() == ["HEAVY"]


def test_help_answers_at_once():
    """The best of three, so that a busy machine does not fail it."""
    seconds = []
    for _ in range(3):
        begun = time.perf_counter()
        done = run("import sys; from varkd.cli import main; sys.exit(main())", "--help")
        seconds.append(time.perf_counter() - begun)
        assert done.returncode == 0, done.stderr
    assert min(seconds) < HELP_SECONDS


def tracked_files() -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    return [ROOT / name for name in listing.split("\0") if name and (ROOT / name).is_file()]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout: there is no list of tracked files")
def test_no_tracked_file_is_large():
    files = tracked_files()
    assert ROOT / "pyproject.toml" in files
    assert [path.name for path in files if path.stat().st_size > LARGEST_FILE] == []


def test_versions_agree():
    citation = re.search(r"^version: *(\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    changelog = re.search(r"^## \[[^\]]+\](?: - (\d\S*))?", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert citation is not None and citation[1] == VERSION
    assert changelog is not None and VERSION in changelog[0], "the newest section names the version"


def test_torch_is_pinned_within_the_supported_range():
    """The Makefile installs this very line first, by itself."""
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch==")]
    assert len(pins) == 1
    major, minor = (int(part) for part in pins[0].removeprefix("torch==").split(".")[:2])
    assert (2, 11) <= (major, minor) <= (2, 15)


def test_scripts_can_run():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    subprocess.run(["bash", "-n", ".ci/run"], cwd=ROOT, check=True)
    planned = subprocess.run(
        ["make", "-n", "demo", "test", "lint"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "varkd demo" in planned.stdout and "pytest" in planned.stdout and "lint-imports" in planned.stdout
