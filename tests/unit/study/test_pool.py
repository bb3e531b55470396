"""Tasks run after what they need, and a failure takes down only what needs it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from varkd.errors import VarkdError
from varkd.files import read_json, write_text
from varkd.study import pool
from varkd.study.pool import Inline, Processes, Ray, Task, execute, open_pool


def write(path: str, needed: tuple[str, ...] = ()) -> None:
    assert all(Path(need).is_file() for need in needed)
    Path(path).write_text(str(os.getpid()))


def fail(text: str) -> None:
    raise VarkdError(text)


def stumble() -> None:
    raise ZeroDivisionError("a bug")


def test_order(tmp_path: Path):
    """Given backwards, run forwards."""
    a, b, c = (str(tmp_path / name) for name in "abc")
    tasks = [Task("c", write, (c, (a, b)), ("a", "b")), Task("b", write, (b, (a,)), ("a",)), Task("a", write, (a,))]
    assert execute(tasks, Inline(), "test", quiet=True) == {}
    assert all(Path(path).is_file() for path in (a, b, c))


def test_a_failure_takes_down_what_needs_it(tmp_path: Path):
    other = str(tmp_path / "other")
    tasks = [Task("last", write, (other,), ("middle",)), Task("middle", write, (other,), ("first",)),
             Task("first", fail, ("no such thing",)), Task("other", write, (other,))]  # fmt: skip
    failures = execute(tasks, Inline(), "test", quiet=True)
    assert failures == {"first": "no such thing", "middle": "not run, for first failed",
                        "last": "not run, for middle failed"}  # fmt: skip
    assert Path(other).is_file()


def test_a_bug_is_not_swallowed():
    with pytest.raises(ZeroDivisionError):
        execute([Task("bug", stumble, ())], Inline(), "test", quiet=True)


def test_what_is_needed_and_not_there_never_runs(tmp_path: Path):
    assert execute([Task("a", write, (str(tmp_path / "a"),), ("missing",))], Inline(), "test", quiet=True) == {}
    assert not (tmp_path / "a").exists()


def test_processes_are_others_and_single_threaded(tmp_path: Path):
    workers = Processes(2, "cpu")
    try:
        tasks = [Task(name, write, (str(tmp_path / name),)) for name in "ab"]
        tasks += [Task("bad", fail, ("one line",)), Task("threads", threads, (str(tmp_path / "threads"),))]
        assert execute(tasks, workers, "test", quiet=True) == {"bad": "one line"}
    finally:
        workers.close()
    assert (tmp_path / "threads").read_text() == "1"
    assert str(os.getpid()) not in {(tmp_path / name).read_text() for name in "ab"}


def threads(path: str) -> None:
    import torch

    Path(path).write_text(str(torch.get_num_threads()))


def sleep(path: str) -> None:
    Path(path).write_text(str(os.getpid()))
    time.sleep(60)


def test_workers_do_not_outlive_their_parent(tmp_path: Path):
    code = (f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
            "if __name__ == '__main__':\n"
            "    from test_pool import sleep\n"
            "    from varkd.study.pool import Processes\n"
            "    workers = Processes(1, 'cpu')\n"
            f"    workers.submit(sleep, {str(tmp_path / 'pid')!r}).result()\n")  # fmt: skip
    (tmp_path / "parent.py").write_text(code)
    parent = subprocess.Popen([sys.executable, str(tmp_path / "parent.py")])
    try:
        pid = int(_wait_for(lambda: (tmp_path / "pid").read_text() if (tmp_path / "pid").is_file() else ""))
    finally:
        parent.kill()
        parent.wait()
    _wait_for(lambda: "gone" if not _alive(pid) else "")


def _wait_for(look, seconds: float = 30.0) -> str:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if found := look():
            return found
        time.sleep(0.1)
    raise AssertionError("it never happened")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return not Path(f"/proc/{pid}/status").is_file() or "zombie" not in Path(f"/proc/{pid}/status").read_text()


def test_ray_where_it_is_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(VarkdError, match=r"pip install 'varkd\[ray\]'"):
        open_pool("ray", 2, "cpu", None)


def test_ray_on_a_local_cluster(tmp_path: Path):
    """Its workers import functions by name, so these are the library's."""
    pytest.importorskip("ray")
    workers = Ray(None, 1, "cpu")
    try:
        tasks = [Task("a", write_text, (tmp_path / "a", "done")), Task("bad", read_json, (tmp_path / "none",)),
                 Task("after", write_text, (tmp_path / "after", "done"), ("a",))]  # fmt: skip
        failures = execute(tasks, workers, "test", quiet=True)
    finally:
        workers.close()
    assert failures == {"bad": f"no such file: {tmp_path / 'none'}"}
    assert (tmp_path / "a").read_text() == (tmp_path / "after").read_text() == "done"


def test_a_dead_worker_is_one_line():
    workers = Processes(1, "cpu")
    try:
        with pytest.raises(VarkdError, match="a worker process died"):
            execute([Task("dies", os._exit, (1,))], workers, "test", quiet=True)
    finally:
        workers.close()


def test_gpus_take_turns(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pool, "visible_gpus", lambda: ["0", "1", "2"])
    workers = Processes(None, "auto")
    workers.close()
    assert workers.workers == 3
