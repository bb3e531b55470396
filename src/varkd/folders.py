"""Whose folder is it, and where is it? What every verb must know of the folders that a user names.

One guard stands before everything that writes into a folder, or replaces one.

A folder may be written into where it is new, empty, or known as the verb's own by its marker file; it may be replaced
where it holds nothing besides what this very verb writes. Anything else is somebody's work.

A file records a path as seen from its own folder, so that a moved project still finds its parts; whether what stands
there is what was meant is for a hash to decide, never for a path.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, TextIO

from varkd.errors import VarkdError

LOCK = ".lock"
_TEMPORARY = re.compile(r"\.(?P<name>.+?)\.((?P<place>[0-9a-f]{8})-(?P<pid>\d+)-)?[0-9a-f]{8}\.tmp(?P<old>\.old)?")
"""What a process that was killed (while it wrote, `files.atomic_*`) may have left behind."""
_LONGEST = 40  # characters of a name that a temporary one repeats
_swept: set[tuple[int, Path]] = set()


@dataclass(frozen=True)
class Own:
    """What a verb writes into a folder of its own.

    Args:
        what: in words, for messages ("samples").
        markers: files of which one stands in every such folder.
        knows: whether a marker's text is this verb's.
        names: patterns of everything else that may stand in such a folder.
    """

    what: str
    markers: tuple[str, ...]
    knows: Callable[[str], bool]
    names: tuple[str, ...] = ("*",)

    def check(self, folder: Path, option: str = "--out") -> None:
        """Refuse a folder that is neither new nor empty nor this verb's own.

        Raises:
            VarkdError: a file, a folder of something else, the working directory, or one that cannot be listed.
        """
        try:
            self._check(folder, option)
        except OSError as error:
            raise VarkdError(f"cannot look into {folder} ({error.strerror}): choose another {option}") from error

    def check_replaceable(self, folder: Path, option: str = "--out") -> None:
        """`check`, for a folder that will be replaced as a whole: a place where somebody stands cannot be."""
        self.check(folder, option)
        found = folder.resolve()
        if found == Path.cwd() or found.is_mount():
            raise VarkdError(f"{folder} is the working directory or a mounted disk: choose a folder below it")

    def _check(self, folder: Path, option: str) -> None:
        if not folder.exists():
            return
        if not folder.is_dir():
            raise VarkdError(f"{folder} is a file: choose another {option}")
        found = contents(folder)
        if found and not self.is_own(folder):
            raise VarkdError(f"{folder} holds other things than {self.what} ({found[0]}): choose another {option}")
        for name in found:
            if name not in self.markers and not any(fnmatch(name, pattern) for pattern in self.names):
                raise VarkdError(f"{folder} holds {name}, which is no part of {self.what}: choose another {option}")

    def is_own(self, folder: Path) -> bool:
        """Whether a marker in the folder says that this verb wrote it."""
        for path in (folder / marker for marker in self.markers):
            try:
                if path.is_file() and self.knows(path.read_text(encoding="utf-8")):
                    return True
            except UnicodeDecodeError:
                continue
        return False


def contents(folder: Path) -> list[str]:
    """The names in a folder, sorted, apart from what a killed process may have left behind."""
    return sorted(path.name for path in folder.iterdir() if path.name != LOCK and not _TEMPORARY.fullmatch(path.name))


def temporary_name(path: Path) -> Path:
    """A hidden name beside `path` that says who writes there; long names are cut, for systems have a limit."""
    return path.with_name(f".{path.name[:_LONGEST]}.{_here()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")


def sweep(folder: Path, *, again: bool = True) -> None:
    """Remove what processes of this machine that are no more left half-written in a folder.

    Args:
        again: also where this process has swept before.
    """
    key = (os.getpid(), folder)
    if key in _swept and not again:
        return
    _swept.add(key)
    with suppress(OSError):  # it is no part of the work: what cannot be swept stays
        for path in folder.iterdir():
            found = _TEMPORARY.fullmatch(path.name)
            if found and found["place"] == _here() and not _runs(int(found["pid"])):
                _sweep_one(path, found)


def _sweep_one(path: Path, found: re.Match[str]) -> None:
    """A folder that was moved out of the way for one that never came goes back; all else goes."""
    if found["old"] and len(found["name"]) < _LONGEST and not path.with_name(found["name"]).exists():
        path.rename(path.with_name(found["name"]))
    elif path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@cache
def _here() -> str:
    """Where a process number means what it means now: this machine since it booted, this container."""
    told = [platform.node()]
    with suppress(OSError):
        told.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        told.append(os.readlink("/proc/self/ns/pid"))  # noqa: PTH115 - it is no path
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:8]


def _runs(pid: int) -> bool:
    """Whether a process of this machine still runs; one that is dead but not yet buried does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (OSError, IndexError):
        return True


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder while the block runs; the folder is made where there is none.

    The system drops the lock of a process that died, so none is ever stale. `.lock` says who holds it, and where a file
    system knows no locks, what it says decides: a process that no longer runs on this machine holds nothing.

    Raises:
        VarkdError: another process works in the folder.
    """
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _refuse_holder(file, folder)
        except OSError:  # a file system without locks
            if _is_alive(_holder(file)):
                _refuse_holder(file, folder)
        if path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino:
            break
        file.close()  # its holder has just ended and removed it
    try:
        file.truncate(0)
        json.dump({"host": platform.node(), "pid": os.getpid(), "begun": _begun(os.getpid())}, file)
        file.flush()
        yield
    finally:
        with suppress(OSError):  # the lock goes with the process, whatever its file says
            path.unlink(missing_ok=True)
        with suppress(OSError):
            file.close()


def _holder(file: TextIO) -> dict[str, Any]:
    file.seek(0)
    try:
        found = json.loads(file.read() or "{}")
    except json.JSONDecodeError:  # it is being written
        return {}
    return found if isinstance(found, dict) else {}


def _refuse_holder(file: TextIO, folder: Path) -> NoReturn:
    holder = _holder(file)
    file.close()
    raise VarkdError(
        f"process {holder.get('pid', '?')} on {holder.get('host', '?')} is at work in {folder}: wait for "
        "it, stop it, or choose another folder"
    )


def _is_alive(holder: dict[str, Any]) -> bool:
    """Whether the process still runs; one on another machine is taken to."""
    if not holder:
        return False
    return holder.get("host") != platform.node() or _begun(holder.get("pid", -1)) == holder.get("begun")


def _begun(pid: int) -> str | None:
    """When a process of this machine began (ticks since boot), which tells it from a later one of the same number."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def expand(text: str) -> str:
    """`~` and `~user` as shells read them, which leave `out=~/run` alone; unknown users stay as they are."""
    return os.path.expanduser(text)  # noqa: PTH111 - Path.expanduser raises for unknown users


def relative(path: str | Path, folder: Path) -> str:
    """How a file in `folder` records `path`."""
    return Path(os.path.relpath(Path(path).resolve(), folder.resolve())).as_posix()


def locate(recorded: str | Path, folder: Path, *given: str | Path | None) -> Path:
    """Where a path leads that a file in `folder` records.

    Seen from there (the project was moved), else as it was `given` (the folder was moved alone), else as it stands.
    """
    seen_from_there = Path(os.path.normpath(folder.resolve() / recorded))
    places = (seen_from_there, *(Path(place) for place in given if place), Path(recorded))
    return next((place for place in places if place.exists()), seen_from_there)


def json_with(*keys: str, **values: Any) -> Callable[[str], bool]:
    """Whether a text is a JSON object with these keys, and with one of these values each."""

    def knows(text: str) -> bool:
        try:
            found = json.loads(text)
        except json.JSONDecodeError:
            return False
        return (
            isinstance(found, dict)
            and all(key in found for key in keys)
            and all(found.get(key) in allowed for key, allowed in values.items())
        )

    return knows
