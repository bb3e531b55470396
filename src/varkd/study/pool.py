"""Where the tasks of a study run: a pool of processes on this machine, or a Ray cluster.

A task is a function of plain values that leaves its result on disk, so it does not matter where it runs, and a task
that was killed is simply run again. Tasks wait for the tasks that they need; one that fails takes only those down that
need it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, Protocol

from varkd.errors import VarkdError
from varkd.progress import bar


@dataclass(frozen=True)
class Task:
    """A piece of work with a name of its own. `weight` is its share of the progress bar, about its seconds."""

    name: str
    call: Callable[..., Any]
    arguments: tuple[Any, ...]
    needs: tuple[str, ...] = ()
    weight: float = 1.0


class Pool(Protocol):
    """Something that runs functions elsewhere."""

    workers: int

    def submit(self, call: Callable[..., Any], *arguments: Any) -> Future[Any]: ...

    def close(self) -> None: ...


class Inline:
    """This process, one task after the other (`workers=0`): for debugging."""

    workers = 1

    def submit(self, call: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(call(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future

    def close(self) -> None:
        pass


class Processes:
    """Processes of this machine: one per GPU where there are some, else one single-threaded one per core."""

    def __init__(self, workers: int | None, device: str) -> None:
        gpus = [] if device == "cpu" else visible_gpus()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.workers = workers or len(gpus) or cores
        threads = max(1, cores // self.workers) if gpus else 1
        context = multiprocessing.get_context("spawn")
        turns: Any = context.Queue()
        for index in range(self.workers):
            turns.put(gpus[index % len(gpus)] if gpus else None)
        self._pool = ProcessPoolExecutor(self.workers, context, _begin, (turns, threads, os.getpid()))

    def submit(self, call: Callable[..., Any], *arguments: Any) -> Future[Any]:
        return self._pool.submit(call, *arguments)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


class Ray:
    """A Ray cluster (`pip install varkd[ray]`). DIR must be a folder that every machine of it sees.

    Every task asks for one CPU, and for one GPU where the cluster has some.
    """

    def __init__(self, address: str | None, workers: int | None, device: str) -> None:
        try:
            import ray  # type: ignore[import-not-found]
        except ImportError:
            raise VarkdError("executor=ray needs Ray: pip install 'varkd[ray]'") from None
        self._ray = ray
        own = {} if address else {"num_cpus": workers, "include_dashboard": False}
        ray.init(address=address, ignore_reinit_error=True, log_to_driver=False, **own)
        found = ray.cluster_resources()
        gpus = 0 if device == "cpu" else int(found.get("GPU", 0))
        self.workers = gpus or int(found.get("CPU", 1))
        self._remote = ray.remote(_alone).options(num_cpus=1, num_gpus=1 if gpus else 0, max_retries=1)

    def submit(self, call: Callable[..., Any], *arguments: Any) -> Future[Any]:
        return self._remote.remote(call, *arguments).future()

    def close(self) -> None:
        self._ray.shutdown()


def open_pool(executor: str, workers: int | None, device: str, address: str | None) -> Pool:
    """The pool that a study asks for."""
    if executor == "ray":
        return Ray(address, workers, device)
    return Inline() if workers == 0 else Processes(workers, device)


def execute(tasks: Sequence[Task], pool: Pool, label: str, quiet: bool = False) -> dict[str, str]:
    """Run all tasks, each after those that it needs. Returns the failures: task name -> one line.

    Raises:
        BaseException: whatever a task raised that is no `VarkdError` (a bug); the running tasks are waited for.
    """
    waiting = {task.name: task for task in tasks}
    running: dict[Future[Any], Task] = {}
    done: set[str] = set()
    failed: dict[str, str] = {}
    total, moved = sum(task.weight for task in tasks), 0.0
    with bar(label, round(total), quiet) as progress:
        progress.update(0)  # the clock of the ETA starts here: tasks have unequal weights
        while waiting or running:
            _drop_hopeless(waiting, failed)
            for task in [task for task in waiting.values() if done.issuperset(task.needs)]:
                if len(running) < 2 * pool.workers:  # a short queue, so that a stop has little to undo
                    running[pool.submit(task.call, *task.arguments)] = waiting.pop(task.name)
            if not running:
                break
            finished, _ = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
            for future in finished:
                task = running.pop(future)
                error = _cause(future.exception())
                moved += task.weight
                if error is None:
                    done.add(task.name)
                elif isinstance(error, VarkdError):
                    failed[task.name] = str(error)
                elif isinstance(error, BrokenProcessPool):
                    raise VarkdError(
                        "a worker process died (out of memory?): run the same command again to resume, "
                        "with a smaller workers= if it happens again"
                    ) from error
                else:
                    raise error
                progress.update(round(moved), task.name if error is None else f"{task.name} failed")
    return failed


def _cause(error: BaseException | None) -> BaseException | None:
    """What the task itself raised: Ray wraps it into an error whose text is the remote traceback."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, VarkdError) else error


def _drop_hopeless(waiting: dict[str, Task], failed: dict[str, str]) -> None:
    """Give up on tasks that need a failed one, and on those that need them."""
    changed = True
    while changed:
        changed = False
        for task in list(waiting.values()):
            broken = next((need for need in task.needs if need in failed), None)
            if broken is not None:
                failed[waiting.pop(task.name).name] = f"not run, for {broken} failed"
                changed = True


def visible_gpus() -> list[str]:
    """The names that CUDA_VISIBLE_DEVICES may have, one per GPU."""
    if "torch" not in sys.modules and "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name and name != "-1"]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def _begin(turns: Any, threads: int, parent: int) -> None:
    """Prepare a worker: its GPU, its threads; Ctrl-C is the parent's business, and it does not outlive the parent."""
    gpu = turns.get()
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _threads(threads)
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def _threads(count: int) -> None:
    os.environ["OMP_NUM_THREADS"] = str(count)
    import torch

    torch.set_num_threads(count)


def _follow(parent: int) -> None:
    """End this process when its parent is gone: checkpoints are atomic, so nothing is lost that a resume needs."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _alone(call: Callable[..., Any], *arguments: Any) -> Any:
    _threads(1)
    return call(*arguments)
