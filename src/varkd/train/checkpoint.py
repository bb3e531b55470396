"""Checkpoints of a run: safetensors and JSON in one folder per step, written atomically; nothing is ever unpickled.

A checkpoint holds what a bit-exact resume needs: student, EMA, optimizer, the method's state (replay buffer with ages,
thresholds) and the counters. Random numbers, data order and learning rate are functions of (seed, step). The teacher
is never saved; its hash is.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from varkd.backbones.protocol import Backbone
from varkd.backbones.store import check_hash, checkpoint_path
from varkd.containers import read_tensors
from varkd.distill.inputs import State
from varkd.errors import VarkdError
from varkd.files import atomic_folder, file_hash, read_json, remove_folder, write_json
from varkd.folders import Own, json_with, sweep
from varkd.train.optim import Ema
from varkd.train.parallel import (
    frozen_tensors,
    full_tensors,
    like,
    load_model_state,
    load_optimizer_state,
    model_state,
    optimizer_state,
)
from varkd.world import World

CHECKPOINT = Own("a checkpoint", ("state.json",), json_with("step"), ("*.safetensors",))


@dataclass
class Progress:
    """The counters of a run. `step` updates are done; `best_step` had the lowest validation loss `best_value`."""

    step: int = 0
    seconds: float = 0.0
    best_step: int = 0
    best_value: float | None = None


class Checkpoints:
    """The `checkpoints/` folder of a run: the newest `keep` steps and the best one.

    `selected.json` names the checkpoint that `varkd.load(run)` reads: the last or the best.
    """

    def __init__(self, folder: Path, world: World, keep: int, select: str) -> None:
        self.folder = folder / "checkpoints"
        self.world, self.keep, self.select = world, keep, select

    def save(
        self, model: Backbone, ema: Ema, optimizer: torch.optim.Optimizer, state: State, progress: Progress
    ) -> None:
        """Write the checkpoint of `progress.step`. Every rank must call it; the first one writes."""
        tensors = {
            "student": model_state(model),
            "ema": {**frozen_tensors(model), **full_tensors(ema.average)},
            "optimizer": optimizer_state(model, optimizer),
            "method": {name: value.cpu().contiguous() for name, value in _gather_state(state, self.world).items()},
        }
        error: VarkdError | None = None
        if self.world.is_main:
            try:
                self._write(tensors, progress)
            except VarkdError as caught:
                error = caught
        failed = self.world.sum(torch.tensor(float(error is not None)))
        if error is not None or failed:
            raise error or VarkdError("the first rank could not write the checkpoint; see its message")

    def _write(self, tensors: dict[str, dict[str, Tensor]], progress: Progress) -> None:
        for unfinished in self.folder.glob(".step-*"):  # of a process that was killed while it wrote
            shutil.rmtree(unfinished, ignore_errors=True)
        with atomic_folder(self.path(progress.step), CHECKPOINT) as temporary:
            for name, values in tensors.items():
                contiguous = {key: value.contiguous() for key, value in values.items()}
                save_file(contiguous, temporary / f"{name}.safetensors")
            hashes = {path.name: file_hash(path) for path in sorted(temporary.glob("*.safetensors"))}
            write_json(temporary / "state.json", {**vars(progress), "sha256": hashes})
        self._tidy(progress)

    def _tidy(self, progress: Progress) -> None:
        """Name the checkpoint that is read by default, and let go of those that are too old."""
        chosen = self._select(progress)
        for old in self.steps()[: -self.keep]:
            if old not in (progress.best_step, chosen):
                remove_folder(self.path(old))

    def _select(self, progress: Progress) -> int:
        """Name the checkpoint that is read by default; returns its step."""
        chosen = progress.best_step if self.select == "best" and progress.best_value is not None else progress.step
        path, named = self.folder / "selected.json", {"checkpoint": self.path(chosen).name, "weights": "ema"}
        if not path.is_file() or read_json(path) != named:
            write_json(path, named)
        return chosen

    def load(
        self, step: int, model: Backbone, ema: Ema, optimizer: torch.optim.Optimizer, rows: range
    ) -> tuple[State, Progress]:
        """Restore models and optimizer in place; returns this rank's part of the method's state, and the counters."""
        folder = self.path(step)
        self.check(step)
        load_model_state(model, load_tensors(folder / "student.safetensors"))
        average = load_tensors(folder / "ema.safetensors")
        ema.load({name: like(average[name], pattern) for name, pattern in ema.average.items()})
        load_optimizer_state(model, optimizer, load_tensors(folder / "optimizer.safetensors"))
        device = model.head.weight.device
        method = {name: value.to(device) for name, value in load_tensors(folder / "method.safetensors").items()}
        counters = {name: value for name, value in read_json(folder / "state.json").items() if name != "sha256"}
        return _own_rows(method, rows), self._without_lost(Progress(**counters))

    def check(self, step: int) -> None:
        """Raise `VarkdError` unless every file of a checkpoint is what was written."""
        for name in ("student", "ema", "optimizer", "method"):
            check_hash(self.path(step) / f"{name}.safetensors")

    def _without_lost(self, progress: Progress) -> Progress:
        """Checkpoints may have been moved away: forget a best one that is gone, and select one that is there."""
        if progress.best_value is not None and not self.path(progress.best_step).is_dir():
            progress.best_step, progress.best_value = 0, None
        if self.world.is_main:  # a killed process may have got no further than the checkpoint itself
            self._tidy(progress)
            sweep(self.folder)
        return progress

    def path(self, step: int) -> Path:
        return checkpoint_path(self.folder.parent, step)

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, ascending."""
        found = self.folder.glob("step-*") if self.folder.is_dir() else []
        return sorted(int(path.name.removeprefix("step-")) for path in found if (path / "state.json").is_file())

    def latest(self) -> int | None:
        steps = self.steps()
        return steps[-1] if steps else None


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a file of a checkpoint.

    Raises:
        VarkdError: it is missing, truncated, not a safetensors file, or cannot be read.
    """
    return read_tensors(path, f"move {path.parent} away to go on from the checkpoint before it")


def _gather_state(state: State, world: World) -> State:
    """The method's state of all ranks: entries under "rows/" are concatenated in rank order, others are the same."""
    return {
        name: world.gather_varied(value) if name.startswith("rows/") else value for name, value in sorted(state.items())
    }


def _own_rows(state: dict[str, Any], rows: range) -> State:
    row = state.get("rows/replay_row")
    if row is None:
        return state
    mine = (row >= rows.start) & (row < rows.stop)
    return {name: value[mine] if name.startswith("rows/") else value for name, value in state.items()}
