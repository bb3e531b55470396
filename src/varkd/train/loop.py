"""The training loop: one for teachers and students, for every method and backbone."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, Protocol

import torch

from varkd.backbones.protocol import Backbone
from varkd.backbones.quantized import Bits, round_weights_, rounded_weights
from varkd.distill.audit import Stats, StepStats, guard_rails
from varkd.distill.schedule import check_range
from varkd.errors import VarkdError
from varkd.files import write_json
from varkd.progress import Bar, bar, console
from varkd.train.checkpoint import Checkpoints, Progress
from varkd.train.distiller import Distiller
from varkd.train.log import Log
from varkd.train.optim import Ema, OptimizerConfig
from varkd.train.parallel import clip_gradients, frozen_tensors, full_tensors
from varkd.train.trackers import TrackerName
from varkd.types import Batch
from varkd.world import World


@dataclass(frozen=True)
class TrainConfig:
    """How long, how much at once, and how often to look. Counts are optimizer updates and sequences.

    `chunk_rows` positions have their logits in memory at once; None takes about 256 MiB of them. With `quantize` the
    student is trained, sampled and validated with the weights that it will have after `varkd quantize`. `compile` runs
    the loss, and the transformer blocks of all models when they read whole sequences, through torch.compile; decoding
    has its own way (`varkd.graphs`).
    """

    updates: int = 1000
    batch_size: int = 64
    micro_batches: int = 1
    label_drop: float = 0.1
    dropout: float = 0.0
    precision: Literal["fp32", "bf16"] = "fp32"
    validate_every: int = 200
    checkpoint_every: int = 200
    keep: int = 2
    select: Literal["last", "best"] = "last"
    log_every: int = 10
    grid_every: int = 0
    chunk_rows: int | None = None
    replicas: int = 1
    quantize: Bits | None = None
    compile: bool = False
    trackers: tuple[TrackerName, ...] = ("tensorboard",)
    optim: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        check_range("train", "label_drop", self.label_drop, 0, 1)
        check_range("train", "dropout", self.dropout, 0, 1)
        positive = (
            "updates",
            "batch_size",
            "micro_batches",
            "validate_every",
            "checkpoint_every",
            "keep",
            "log_every",
            "chunk_rows",
            "replicas",
        )
        for name in positive:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise VarkdError(f"train: {name} must be at least 1, got {getattr(self, name)}")
        if len(set(self.trackers)) < len(self.trackers):
            raise VarkdError(f"train: trackers names one twice: {', '.join(self.trackers)}")
        if self.batch_size % self.micro_batches:
            raise VarkdError(f"train: batch_size {self.batch_size} must divide into {self.micro_batches} micro-batches")


class Batches(Protocol):
    """A loader whose batches are a function of the step."""

    def batch(self, step: int) -> Batch: ...


@dataclass
class Job:
    """The objects of one run. The student may be sharded; the callbacks receive a plain copy with the EMA weights.

    `settings` (flat) is what trackers show of the run.
    """

    distiller: Distiller
    batches: Batches
    train: TrainConfig
    folder: Path
    plain_copy: Callable[[], Backbone]
    validate: Callable[[Backbone], dict[str, float]]
    draw_grid: Callable[[Backbone, Path], None] | None = None
    label: str = "train"
    quiet: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def student(self) -> Backbone:
        return self.distiller.student

    @property
    def world(self) -> World:
        return self.distiller.world


class Diverged(VarkdError):
    """A loss or gradient that is not finite: the settings are at fault, not the machine."""


class Stopped(Exception):
    """SIGTERM or Ctrl-C: the run saved a checkpoint and can be resumed by the same command."""

    def __init__(self, step: int, updates: int, signal_number: int) -> None:
        super().__init__(f"stopped at update {step} of {updates}; run the same command again to resume")
        self.exit_code = 128 + signal_number


def train(job: Job) -> Progress:
    """Train until `job.train.updates`, resuming from the newest checkpoint of the run folder.

    Raises:
        Diverged: a loss or gradient that is not finite (the last good checkpoint stays).
        VarkdError: a disk that is full.
        Stopped: a signal arrived; a checkpoint was saved.
    """
    session = Session(job)
    settings = job.train
    with bar(job.label, settings.updates, job.quiet or not job.world.is_main) as progress_bar, _signals() as received:
        session.validate_at_start()
        while session.progress.step < settings.updates:
            begun = time.perf_counter()
            values = session.update()
            session.progress.seconds += time.perf_counter() - begun
            session.report(values, progress_bar)
            stop = job.world.sum(torch.tensor(float(received.number)))
            session.look_around(stop=bool(stop))
            if stop and session.progress.step < settings.updates:
                session.close("stopped")
                raise Stopped(session.progress.step, settings.updates, received.number or signal.SIGTERM)
    session.close("done")
    return session.progress


class Session:
    """A run in progress: the objects of the job, the optimizer and everything that a checkpoint holds."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.optimizer = job.train.optim.build(job.student)
        self.ema = Ema(job.student, job.train.optim.ema)
        self.progress = Progress()
        self.checkpoints = Checkpoints(job.folder, job.world, job.train.keep, job.train.select)
        latest = self.checkpoints.latest()
        if latest is not None:
            rows_per_rank = job.train.batch_size // job.world.size
            rows = range(job.world.rank * rows_per_rank, (job.world.rank + 1) * rows_per_rank)
            loaded = self.checkpoints.load(latest, job.student, self.ema, self.optimizer, rows)
            job.distiller.state, self.progress = loaded
            job.distiller.step = self.progress.step
        self.saved_step = latest
        told = {"name": job.label, "settings": job.settings}
        self.log = Log(job.folder, job.world, latest, job.train.trackers, **told)
        self.window_begun, self.window_step = time.perf_counter(), self.progress.step

    def update(self) -> dict[str, float]:
        """One optimizer step."""
        job, settings, step = self.job, self.job.train, self.progress.step
        distiller, world = job.distiller, job.world
        batch = job.batches.batch(step).to(distiller.device)
        stats, part_losses = Stats(), []
        audit = self._is_logged(step + 1)
        with rounded_weights(job.student, settings.quantize):
            for part_loss, part_stats in distiller.micro_batches(batch, settings.micro_batches, audit=audit):
                part_loss.backward()
                part_losses.append(part_loss.detach().double())
                stats.merge(part_stats)
        summed = world.sum(torch.stack(part_losses).sum() / world.size)
        # One wait for the device: after this line the losses, the norm and the statistics are there.
        loss, norm = torch.stack([summed, clip_gradients(job.student, settings.optim.clip).double()]).tolist()
        collected = stats.collect(world)
        self._check_finite(loss, norm, collected)
        lr = settings.optim.lr_at(step, settings.updates)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(step)
        distiller.update(loss, collected)
        self.progress.step += 1
        return {"loss": loss, "grad_norm": norm, "lr": lr, **collected, **distiller.adaptive_values}

    def _check_finite(self, loss: float, norm: float, stats: StepStats) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        terms = ", ".join(f"{name} {value:.4g}" for name, value in stats.items() if "/" in name)
        step = self.progress.step + 1
        self._fail(f"the loss is not finite at update {step} (loss {loss:g}, gradient norm {norm:g}; {terms})")

    def _fail(self, what: str) -> NoReturn:
        kept = f"update {self.saved_step}" if self.saved_step else "none yet"
        self.close("failed")
        raise Diverged(f"{what}; last good checkpoint: {kept}. Lower train.optim.lr or raise train.optim.warmup")

    def report(self, values: dict[str, float], progress_bar: Bar) -> None:
        """Log this update when it is due, and move the bar."""
        step, settings = self.progress.step, self.job.train
        progress_bar.update(step, f"loss {values['loss']:.4f}")
        if self._is_logged(step):
            elapsed = max(time.perf_counter() - self.window_begun, 1e-9)
            speed = (step - self.window_step) * settings.batch_size / elapsed
            timing = {"seconds": self.progress.seconds, "sequences_per_second": speed}
            self.log.write("train", step, {**values, **timing})
            self._warn(values)
            self.window_begun, self.window_step = time.perf_counter(), step

    def _is_logged(self, step: int) -> bool:
        return step % self.job.train.log_every == 0 or step == self.job.train.updates

    def _warn(self, values: dict[str, float]) -> None:
        """Say what is out of bounds: each rule at most once a run."""
        step = self.progress.step
        for rule, text in guard_rails(values, warm=step > self.job.train.optim.warmup).items():
            if self.log.warn(step, rule, text) and not self.job.quiet:
                console.print(f"warning at update {step}: {text}", markup=False)

    def validate_at_start(self) -> None:
        """Step 0 is logged too: curves begin at the shared initialization."""
        if self.progress.step == 0:
            self._validate()

    def look_around(self, stop: bool) -> None:
        """Validation, sample grid and checkpoint, where they are due after the update just made."""
        step, settings = self.progress.step, self.job.train
        last = step == settings.updates
        if last or step % settings.validate_every == 0:
            self._validate()
        if self.job.draw_grid is not None and settings.grid_every and (last or step % settings.grid_every == 0):
            self._draw_grid()
        if stop or last or step % settings.checkpoint_every == 0 or self.progress.best_step == step:
            self.checkpoints.save(self.job.student, self.ema, self.optimizer, self.job.distiller.state, self.progress)
            self.saved_step = step

    def _validate(self) -> None:
        values = self.job.validate(self.evaluation_model())
        self.log.write("validation", self.progress.step, values)
        self.job.distiller.validated(values["ce"])
        if not math.isfinite(values["ce"]):
            self._fail(f"the validation loss is not finite after update {self.progress.step}")
        best = self.progress.best_value
        if self.job.train.select == "best" and self.progress.step and (best is None or values["ce"] < best):
            self.progress.best_step, self.progress.best_value = self.progress.step, values["ce"]

    def _draw_grid(self) -> None:
        model = self.evaluation_model()
        if self.job.world.is_main and self.job.draw_grid is not None:
            path = self.job.folder / "samples" / f"step-{self.progress.step:08d}.png"
            self.job.draw_grid(model, path)
            self.log.image("samples", self.progress.step, path)
        self.job.world.barrier()

    def evaluation_model(self) -> Backbone:
        """A plain (unsharded) copy of the student with the averaged weights, in eval mode. Every rank must call it."""
        weights = {**frozen_tensors(self.job.student), **full_tensors(self.ema.average)}
        model = self.job.plain_copy()
        model.load_state_dict(weights)
        if self.job.train.quantize is not None:
            round_weights_(model, self.job.train.quantize)
        return model.eval()

    def close(self, state: Literal["done", "stopped", "failed"]) -> None:
        """Flush the log and write `status.json`."""
        self.log.close(failed=state == "failed")
        if self.job.world.is_main:
            status = {
                "state": state,
                "step": self.progress.step,
                "updates": self.job.train.updates,
                "seconds": self.progress.seconds,
            }
            write_json(self.job.folder / "status.json", status)


class _Received:
    number = 0


@contextmanager
def _signals() -> Iterator[_Received]:
    """Note SIGTERM and SIGINT instead of dying, so that the loop can save first. A second one kills as usual."""
    received = _Received()
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    former = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def note(number: int, frame: object) -> None:
        del frame
        received.number = number
        for each, handler in former.items():
            signal.signal(each, handler)

    for number in former:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
