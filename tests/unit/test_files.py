"""Nothing is half-written, and the operating system's refusals are one line."""

from __future__ import annotations

import errno
import math
from functools import partial
from pathlib import Path

import pytest

from varkd.errors import VarkdError, did_you_mean
from varkd.files import atomic_file, atomic_folder, read_json, sha256_of, write_json, write_text
from varkd.folders import Own

OWN = Own("a test", ("mark",), lambda text: True)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path):
    write_text(tmp_path / "deep" / "a.txt", "old")
    with pytest.raises(RuntimeError), atomic_file(tmp_path / "deep" / "a.txt") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert names(tmp_path / "deep") == ["a.txt"]
    assert (tmp_path / "deep" / "a.txt").read_text() == "old"


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path):
    for content in ("one", "two"):
        with atomic_folder(tmp_path / "folder", OWN) as temporary:
            (temporary / "mark").touch()
            (temporary / content).write_text(content)
            (temporary / "inner").mkdir()
            (temporary / "inner" / content).write_text(content)
    assert names(tmp_path) == ["folder"]
    assert names(tmp_path / "folder") == ["inner", "mark", "two"]


def test_a_folder_that_fails_keeps_the_old_one(tmp_path: Path):
    with atomic_folder(tmp_path / "folder", OWN) as temporary:
        (temporary / "mark").touch()
        (temporary / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "folder", OWN) as temporary:
        (temporary / "a").write_text("new")
        raise KeyboardInterrupt
    assert names(tmp_path) == ["folder"] and (tmp_path / "folder" / "a").read_text() == "old"


@pytest.mark.parametrize(
    ("number", "said"),
    [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "the disk is full"), (errno.EACCES, "cannot write"),
     (errno.EROFS, "cannot write")],
)  # fmt: skip
@pytest.mark.parametrize("manager", [atomic_file, partial(atomic_folder, own=OWN)], ids=["file", "folder"])
def test_refusals_are_one_line(tmp_path: Path, number: int, said: str, manager):
    with pytest.raises(VarkdError, match=said) as caught, manager(tmp_path / "x"):
        raise OSError(number, "refused")
    assert "\n" not in str(caught.value) and str(tmp_path / "x") in str(caught.value)
    assert names(tmp_path) == []


def test_other_system_errors_pass(tmp_path: Path):
    with pytest.raises(BrokenPipeError, match="broken"), atomic_file(tmp_path / "x"):
        raise OSError(errno.EPIPE, "broken")


@pytest.mark.parametrize("manager", [atomic_file, partial(atomic_folder, own=OWN)], ids=["file", "folder"])
def test_below_a_regular_file(tmp_path: Path, manager):
    (tmp_path / "file").touch()
    with pytest.raises(VarkdError, match="cannot write"), manager(tmp_path / "file" / "x"):
        pass


def test_json_is_strict(tmp_path: Path):
    write_json(tmp_path / "a.json", {"a": [1, None]})
    assert read_json(tmp_path / "a.json") == {"a": [1, None]}
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"a": math.nan})
    assert read_json(tmp_path / "a.json") == {"a": [1, None]}
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"\xff\xfe\x00"])
def test_json_that_is_broken_is_one_line(tmp_path: Path, content: bytes):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(VarkdError, match=r"a\.json is not valid JSON"):
        read_json(tmp_path / "a.json")
    with pytest.raises(VarkdError, match="no such file"):
        read_json(tmp_path / "b.json")


def test_the_hash_is_of_the_concatenation():
    assert sha256_of(b"ab", b"c") == sha256_of(b"abc")
    assert sha256_of(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_hints():
    assert did_you_mean("vrkd", ["varkd", "kd", "ce"]) == "did you mean 'varkd'?"
    assert did_you_mean("zzzz", ["b", "a"]) == "known: a, b"
