"""Processes that read and decode images ahead of whoever uses them (`varkd encode --workers`).

They are PyTorch's loading processes: forked, so that a list of a million files is there without being read again, and
gone when their parent is. Results come in the order of the items, as plain arrays through a pipe: containers often give
little shared memory.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch

from varkd.errors import VarkdError

Item = TypeVar("Item")
Result = TypeVar("Result")


def check_workers(workers: int) -> None:
    """Raise `VarkdError` unless so many processes can be started."""
    if workers < 0:
        raise VarkdError(f"workers={workers} must be 0 or more processes")
    if workers and "fork" not in multiprocessing.get_all_start_methods():
        raise VarkdError(f"workers={workers} needs a system that can fork (Linux, macOS): use workers=0")


def mapped(call: Callable[[Item], Result], items: Sequence[Item], workers: int) -> Iterator[Result]:
    """`map(call, items)`, computed ahead by `workers` processes (0: here, one after the other).

    Raises:
        VarkdError: what `call` raised, in the order of the items; or a process died.
    """
    if not workers or not len(items):
        yield from map(call, items)
        return
    loader = torch.utils.data.DataLoader(
        _Calls(call, items),
        batch_size=None,
        num_workers=min(workers, len(items)),
        collate_fn=_as_it_is,
        worker_init_fn=partial(_begin, parent=os.getpid()),
        multiprocessing_context="fork",
        generator=torch.Generator(),  # its seeds are not used, and the global generator is not moved
    )
    try:
        for result in loader:
            if isinstance(result, VarkdError):
                raise result
            yield result
    except RuntimeError as error:
        if "exited unexpectedly" not in str(error) and "is killed by signal" not in str(error):
            raise
        raise VarkdError(
            "a process that decodes images died (out of memory?): run the same command again, it goes on where it "
            f"stopped, with fewer workers than {workers} if it happens again"
        ) from error


class _Calls(torch.utils.data.Dataset[Any]):
    """Results by index. A user's mistake travels as a value: PyTorch would put a traceback into its one line."""

    def __init__(self, call: Callable[[Any], Any], items: Sequence[Any]) -> None:
        self.call, self.items = call, items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.call(self.items[index])
        except VarkdError as error:
            return error


def _as_it_is(result: Result) -> Result:
    return result


def _begin(number: int, parent: int) -> None:
    """End this process when its parent is gone: PyTorch's own watch waits for ever with results that nobody reads."""
    del number
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def _follow(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
