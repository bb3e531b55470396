"""What somebody needs who wants the same numbers: versions, machine, commit, command."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from varkd.version import VERSION
from varkd.world import World


def environment(world: World) -> dict[str, Any]:
    """The record that goes into `environment.json`."""
    machine = {"system": platform.platform(), "threads": torch.get_num_threads(), "ranks": world.size}
    return {"versions": versions(), "git": _git_hash(), "machine": machine, "command": sys.argv}


def versions() -> dict[str, str]:
    """Python, varkd and the libraries that numbers depend on."""
    libraries = {name: version(name) for name in ("torch", "numpy")}
    return {"python": platform.python_version(), "varkd": VERSION, **libraries}


def _git_hash() -> str | None:
    """The commit of the varkd checkout in use, or None when varkd was installed from a wheel."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
