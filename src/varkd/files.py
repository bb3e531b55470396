"""Writing so that nothing is ever half-written, and reading so that nothing is ever executed."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tokenize import TokenError
from typing import Any

from varkd.errors import VarkdError
from varkd.folders import Own, sweep, temporary_name


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it into place when the block succeeds, else remove it.

    A link stays a link: what it points to is written.

    Raises:
        VarkdError: the disk is full or the folder cannot be written.
    """
    path = path.resolve()
    temporary = temporary_name(path)
    try:
        with write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            sweep(path.parent, again=False)
            yield temporary
            _flush_to_disk(temporary)
            temporary.replace(path)
    finally:
        with suppress(OSError):  # where it could not be written it need not go
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path, own: Own) -> Iterator[Path]:
    """`atomic_file` for a whole folder: it appears complete under its name, or not at all.

    An old one is replaced where it is `own`; a link stays, and what it points to is replaced.

    Raises:
        VarkdError: what stands there is not `own`, is the working directory, or cannot be written.
    """
    own.check_replaceable(path)
    path = path.resolve()
    temporary = temporary_name(path)
    try:
        with write_errors(path):
            temporary.mkdir(parents=True)
            sweep(path.parent)
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    _flush_to_disk(file)
            _put_in_place(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put_in_place(temporary: Path, path: Path) -> None:
    """Give a finished folder its name. An old one is there until the new one is, also where the system refuses."""
    if not path.exists():
        temporary.rename(path)
        return
    if _exchange(temporary, path):
        return  # the old one now has the temporary name, and goes with it
    old = path.with_name(f"{temporary.name}.old")
    path.rename(old)
    try:
        temporary.rename(path)
    except BaseException:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step, where the system can (Linux, most file systems); whether it did."""
    try:
        swap = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    at_working_directory, exchange = -100, 2
    return swap(at_working_directory, os.fsencode(first), at_working_directory, os.fsencode(second), exchange) == 0


def remove_folder(path: Path) -> None:
    """Remove a folder in one step for whoever looks: a process killed here leaves nothing that passes for its part."""
    gone = temporary_name(path)
    try:
        path.rename(gone)
    except FileNotFoundError:
        return
    except OSError:
        gone = path
    shutil.rmtree(gone, ignore_errors=True)


_NO_PLACE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG,
             errno.ELOOP, errno.EBUSY)  # fmt: skip
_BROKEN = (errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ENOENT)


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write `path` into one line each."""
    try:
        yield
    except VarkdError:
        raise
    except Exception as error:  # safetensors has an exception of its own, with the system's number in its text
        number = _system_number(error)
        line = None if number is None else _write_advice(path, number)
        if line is None:
            raise
        raise VarkdError(line) from error


def _write_advice(path: Path, number: int) -> str | None:
    """The line for an error of the system while `path` is written; None for one that says nothing about a disk."""
    if number in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full while writing {path}: free some space and run again"
    if number in (errno.EMFILE, errno.ENFILE):
        return f"too many open files while writing {path}: raise the limit (`ulimit -n 65536`) and run again"
    if number == errno.EFBIG:
        return f"{path} would be larger than files may be here: raise the limit (`ulimit -f unlimited`) and run again"
    if number in _NO_PLACE:
        return f"cannot write {path} ({os.strerror(number)}): choose another folder"
    if number in _BROKEN:
        return f"cannot write {path} ({os.strerror(number)}): check the disk and run again"
    return None


def check_writable(folder: Path, advice: str) -> None:
    """Raise `VarkdError` with advice unless a file can be made in `folder`: before the work that shall end up there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise VarkdError(f"cannot write into {folder} ({error.strerror}): {advice}") from error


NPY_ERRORS: tuple[type[Exception], ...] = (SyntaxError, TokenError, TypeError, OverflowError, MemoryError)
"""What numpy raises besides ValueError where the header of an .npy file, a Python literal, is damaged."""


@contextmanager
def read_errors(
    path: Path, damaged: str = "is damaged: repair it", decoding: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Turn what the system or a decoder says while `path` is read into one line with the right advice.

    What the system refuses (permissions, too many open files, a dying disk) says nothing about the file, which may be
    good: only bytes that were read and make no sense are called damaged.

    Args:
        damaged: what follows the path where its bytes make no sense, and what to do.
        decoding: what a decoder raises besides OSError without a number, ValueError and EOFError.
    """
    try:
        yield
    except VarkdError:
        raise
    except (OSError, ValueError, EOFError, *decoding) as error:
        number = _system_number(error)
        if number is None:
            what, _, advice = damaged.partition(": ")
            reason = " ".join(str(error).split())[:120].rstrip(".") or type(error).__name__
            raise VarkdError(f"{path} {what} ({reason}): {advice}") from error
        raise VarkdError(_system_advice(path, number)) from error


def _system_number(error: Exception) -> int | None:
    """The operating system's number of an error, which some libraries keep in the text only."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    told = re.search(r"\(os error (\d+)\)", str(error))
    return int(told[1]) if told else None


def _system_advice(path: Path, number: int) -> str:
    if number in (errno.EMFILE, errno.ENFILE):
        return f"too many open files while reading {path}: raise the limit (`ulimit -n 65536`) and run again"
    if number in (errno.EACCES, errno.EPERM):
        return f"no permission to read {path}: change its permissions, or run as its owner"
    if number == errno.ENOENT:
        return f"{path} is a link to nothing: mend the link" if path.is_symlink() else f"no such file: {path}"
    if number in (errno.EISDIR, errno.ENOTDIR):
        return f"cannot read {path} ({os.strerror(number)}): check the path"
    return f"cannot read {path} ({os.strerror(number)}): the file may be good; check the disk and run again"


def refusal(error: OSError) -> str:
    """The line for a refusal of the system that no place nearer to it has put into words."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full: free some space and run the same command again"
    about = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return f"the system refuses ({about}): put it right and run again"


def _flush_to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON (no NaN) to `path` atomically."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        VarkdError: there is no such file, it cannot be read, or it is not valid JSON.
    """
    with read_errors(path, "is not valid JSON: it may be truncated"):
        return json.loads(path.read_text(encoding="utf-8"))


def cache_folder() -> Path:
    """`varkd` in the user's cache: `$XDG_CACHE_HOME`, or `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "varkd"


def file_hash(path: Path) -> str:
    """The hex SHA-256 of a file."""
    with read_errors(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of(*chunks: bytes | memoryview) -> str:
    """The hex SHA-256 of the chunks in order."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()
