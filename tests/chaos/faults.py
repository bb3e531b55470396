"""Faults at the n-th moment at which a command writes: a kill, a refusal of the system, a file that may not grow.

The moments are Python's own audit events (opening for writing, renaming, making and removing names), so nothing of
varkd is replaced and no write goes unseen but those inside safetensors, which are found by the limit on file sizes. A
command runs in a fork of this process, in which everything is imported already.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_NAMES = ("os.rename", "os.mkdir", "os.link")
_REMOVALS = ("os.remove", "os.rmdir")
_WRITES = os.O_WRONLY | os.O_RDWR


@dataclass(frozen=True)
class Fault:
    """What happens at the moment `at` (from 0; None never): an error number, "kill", or "cut" (no file may grow)."""

    at: int | None = None
    what: int | Literal["kill", "cut"] = "kill"


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code (negative: the signal), standard error, and how many moments there were."""

    code: int
    stderr: str
    moments: int
    seconds: float


class _Injector:
    def __init__(self, fault: Fault, below: Path, counted: int) -> None:
        self.fault, self.below, self.counted, self.moments = fault, str(below), counted, 0

    def __call__(self, event: str, arguments: tuple[object, ...]) -> None:
        if event == "open":
            path, flags = arguments[0], arguments[2]
            if not isinstance(flags, int) or not flags & _WRITES:
                return
        elif event in _NAMES or (event in _REMOVALS and self.fault.what == "kill"):
            path = arguments[0]
        else:
            return
        if not isinstance(path, (str, os.PathLike)) or not os.path.abspath(path).startswith(self.below):  # noqa: PTH100
            return
        at, self.moments = self.moments, self.moments + 1
        os.pwrite(self.counted, str(self.moments).encode(), 0)
        if at == self.fault.at:
            self._strike(str(path))

    def _strike(self, path: str) -> None:
        if self.fault.what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.fault.what == "cut":
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))
        else:
            raise OSError(self.fault.what, os.strerror(self.fault.what), path)


def run(
    call: Callable[[Sequence[str]], int],
    command: Sequence[str],
    folder: Path,
    fault: Fault = Fault(),
    after: float | None = None,
) -> Ended:
    """Run a command in a fork, in `folder`, below which the fault strikes; kill it `after` seconds, if told to."""
    read, write = os.pipe()
    counted = os.memfd_create("moments")
    begun = time.monotonic()
    child = os.fork()
    if child == 0:
        _work(call, command, folder, fault, write, counted)
    os.close(write)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    told = b""
    while part := os.read(read, 65536):
        told += part
    os.close(read)
    _, status = os.waitpid(child, 0)
    moments = int(os.pread(counted, 20, 0) or b"0")
    os.close(counted)
    return Ended(os.waitstatus_to_exitcode(status), told.decode(), moments, time.monotonic() - begun)


def _work(
    call: Callable[[Sequence[str]], int], command: Sequence[str], folder: Path, fault: Fault, errors: int, counted: int
) -> None:
    code = 99
    try:
        os.dup2(errors, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        os.chdir(folder)
        sys.addaudithook(_Injector(fault, folder, counted))
        code = call(command)
        sys.stderr.flush()
    except BaseException:
        import traceback

        traceback.print_exc(file=sys.stderr)
        sys.stderr.flush()
    finally:
        os._exit(code)
