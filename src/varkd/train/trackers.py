"""Where a run can be watched besides `log.jsonl`: TensorBoard, Weights & Biases, Trackio, MLflow.

A tracker is named in `train.trackers`, imported when it starts, and told the same numbers as `log.jsonl`, under
`split/name`. A run has one id for all its processes (`trackers.json`), so a resumed run goes on in the tracker too.
What a killed process had already told is not told again, though the run makes those steps anew: `told` is, for each
split, the last step of any earlier process. TensorBoard takes steps back instead, and hears them again.

A tracker cannot stop a run that has begun: the first time it raises, one line says so, and it is off until the run is
started again.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from varkd.errors import VarkdError, missing_extra
from varkd.files import read_json, write_json
from varkd.progress import console

TrackerName = Literal["tensorboard", "wandb", "trackio", "mlflow"]
RECORD = "trackers.json"
_PROJECT = "varkd"


@dataclass(frozen=True)
class Told:
    """What a tracker hears of a run when it starts: `id` stays the same over resumes, `settings` are flat."""

    id: str
    name: str
    folder: Path
    settings: Mapping[str, Any]
    resume_step: int | None


class Tracker(ABC):
    """One way to watch a run. Its library is imported in `start`."""

    rewinds: ClassVar[bool] = False
    """Whether steps after `resume_step` disappear at `start`, so that they must be told again."""

    @abstractmethod
    def start(self, run: Told) -> None:
        """Begin a run, or go on with the one of this id."""

    @abstractmethod
    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    @abstractmethod
    def image(self, step: int, name: str, path: Path) -> None: ...

    @abstractmethod
    def close(self, failed: bool) -> None: ...


class TensorBoard(Tracker):
    """Event files in `tensorboard/` of the run folder."""

    rewinds = True

    def start(self, run: Told) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purged = 0 if run.resume_step is None else run.resume_step + 1
        self.writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=purged)
        if run.resume_step is None:
            lines = (f"    {name}: {value}" for name, value in run.settings.items())
            self.writer.add_text("settings", "\n".join(lines), 0)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, path: Path) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as picture:
            self.writer.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def close(self, failed: bool) -> None:
        del failed
        self.writer.close()


class WandB(Tracker):
    """Weights & Biases; with WANDB_MODE=offline into `wandb/` of the run folder, for `wandb sync`."""

    def start(self, run: Told) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        self.library = wandb
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            id=run.id,
            name=run.name,
            dir=os.environ.get("WANDB_DIR", str(run.folder)),
            config=dict(run.settings),
            resume="allow",
            reinit="create_new",  # a run that the caller has open is not ours
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def image(self, step: int, name: str, path: Path) -> None:
        self.run.log({name: self.library.Image(str(path))}, step=step)

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class Trackio(Tracker):
    """Trackio: on this machine, or where TRACKIO_SPACE_ID or TRACKIO_SERVER_URL says. It knows runs by name."""

    def start(self, run: Told) -> None:
        import trackio  # pyright: ignore[reportMissingImports]

        self.library = trackio
        self.run = trackio.init(
            _PROJECT, name=f"{run.name}-{run.id}", config=dict(run.settings), resume="allow", embed=False
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def image(self, step: int, name: str, path: Path) -> None:
        self.run.log({name: self.library.Image(str(path))}, step=step)

    def close(self, failed: bool) -> None:
        del failed
        self.run.finish()


class MLflow(Tracker):
    """MLflow, where MLFLOW_TRACKING_URI says. Parameters are those of the first start: MLflow does not change them."""

    def start(self, run: Told) -> None:
        from mlflow.entities import Metric, Param  # pyright: ignore[reportMissingImports]
        from mlflow.tracking import MlflowClient  # pyright: ignore[reportMissingImports]

        self.client, self.metric = MlflowClient(), Metric
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        known = self.client.get_experiment_by_name(experiment)
        place = self.client.create_experiment(experiment) if known is None else known.experiment_id
        found = self.client.search_runs([place], f"tags.varkd_run = '{run.id}'")
        if found:
            self.run_id = found[0].info.run_id
            self.client.set_terminated(self.run_id, "RUNNING")
            return
        self.run_id = self.client.create_run(place, run_name=run.name, tags={"varkd_run": run.id}).info.run_id
        settings = [Param(name, str(value)[:500]) for name, value in run.settings.items()]
        for begin in range(0, len(settings), 100):  # the most that a server takes at once
            self.client.log_batch(self.run_id, params=settings[begin : begin + 100])

    def write(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        self.client.log_batch(self.run_id, [self.metric(name, value, now, step) for name, value in values.items()])

    def image(self, step: int, name: str, path: Path) -> None:
        from PIL import Image

        with Image.open(path) as picture:
            self.client.log_image(self.run_id, picture.convert("RGB"), key=name, step=step)

    def close(self, failed: bool) -> None:
        self.client.set_terminated(self.run_id, "FAILED" if failed else "FINISHED")


_CLASSES: dict[TrackerName, type[Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
    "mlflow": MLflow,
}


def check_installed(names: tuple[TrackerName, ...]) -> None:
    """Raise `VarkdError` where a tracker's library is missing; TensorBoard, the default, is left out with a note."""
    for name in names:
        if name != "tensorboard" and sys.modules.get(name) is None and importlib.util.find_spec(name) is None:
            raise VarkdError(f"train.trackers: {missing_extra(ModuleNotFoundError(name=name))}")


class Trackers:
    """The trackers of a run. On ranks other than the first there are none."""

    def __init__(self, names: tuple[TrackerName, ...], run: Told, told: Mapping[str, int]) -> None:
        self.told, self.running = told, {}
        for name in names:
            self._start(name, _CLASSES[name](), run)

    def write(self, split: str, step: int, values: Mapping[str, float]) -> None:
        named = {f"{split}/{name}": value for name, value in values.items()}
        self._tell(split, step, lambda tracker: tracker.write(step, named))

    def image(self, name: str, step: int, path: Path) -> None:
        self._tell(name, step, lambda tracker: tracker.image(step, name, path))

    def close(self, failed: bool) -> None:
        for name in list(self.running):
            self._guarded(name, lambda tracker: tracker.close(failed))
        self.running.clear()

    def _start(self, name: TrackerName, tracker: Tracker, run: Told) -> None:
        try:
            tracker.start(run)
        except ModuleNotFoundError as error:
            if name != "tensorboard":
                raise VarkdError(f"train.trackers: {missing_extra(error) or error}") from None
            console.print(
                "TensorBoard is not installed (pip install 'varkd[tensorboard]'): log.jsonl has the same numbers",
                markup=False,
            )
        except Exception as error:  # each library raises its own, and those of its network
            if run.resume_step is None:
                raise VarkdError(
                    f"{name} did not start ({_first_line(error)}): put that right, or leave it out of train.trackers"
                ) from error
            self._say_off(name, error)
        else:
            self.running[name] = tracker

    def _tell(self, split: str, step: int, tell: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self.running.items()):
            if tracker.rewinds or step > self.told.get(split, -1):
                self._guarded(name, tell)

    def _guarded(self, name: str, tell: Callable[[Tracker], None]) -> None:
        try:
            tell(self.running[name])
        except Exception as error:
            del self.running[name]
            self._say_off(name, error)

    def _say_off(self, name: str, error: Exception) -> None:
        console.print(
            f"warning: {name} failed ({_first_line(error)}) and is off until the next start; log.jsonl goes on",
            markup=False,
            soft_wrap=True,
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def run_record(folder: Path, names: tuple[TrackerName, ...], logged: Mapping[str, int]) -> tuple[str, dict[str, int]]:
    """The id of the run, and what trackers have been told of each split; `logged`: the last steps in `log.jsonl`.

    Both are kept in `trackers.json`, for `log.jsonl` forgets the steps after a checkpoint. Must run before it does.
    """
    path = folder / RECORD
    before = read_json(path) if path.is_file() else {"id": uuid.uuid4().hex[:12], "told": {}}
    drawn = [int(picture.stem.removeprefix("step-")) for picture in (folder / "samples").glob("step-*.png")]
    now = {**logged, **({"samples": max(drawn)} if drawn else {})}
    told = {split: max(now.get(split, -1), before["told"].get(split, -1)) for split in {**now, **before["told"]}}
    if path.is_file() or any(not _CLASSES[name].rewinds for name in names):
        write_json(path, {"id": before["id"], "told": told})
    return before["id"], told
