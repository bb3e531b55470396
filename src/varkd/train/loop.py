"""The training loop: one for teachers and students, for every method and backbone."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NoReturn, Protocol

import torch

from varkd.backbones.protocol import Backbone
from varkd.distill.audit import Stats, guard_rails
from varkd.distill.loss import LossInputs, denominators, distill_loss
from varkd.distill.method import Method
from varkd.distill.prefixes import Data
from varkd.distill.scene import Scene, State
from varkd.distill.schedule import check_range
from varkd.distill.spaces import CodebookTables
from varkd.distill.target import Guided
from varkd.errors import VarkdError
from varkd.files import write_json
from varkd.progress import Bar, bar, console
from varkd.train.checkpoint import Checkpoints, Progress
from varkd.train.log import Log
from varkd.train.optim import Ema, OptimizerConfig
from varkd.train.parallel import clip_gradients, frozen_tensors, full_tensors, gathered
from varkd.types import Batch, Context
from varkd.world import Rng, World


@dataclass(frozen=True)
class TrainConfig:
    """How long, how much at once, and how often to look. Counts are optimizer updates and sequences."""

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
    chunk_rows: int = 2048
    replicas: int = 1
    tensorboard: bool = True
    optim: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        check_range("train", "label_drop", self.label_drop, 0, 1)
        check_range("train", "dropout", self.dropout, 0, 1)
        positive = ("updates", "batch_size", "micro_batches", "validate_every", "checkpoint_every", "keep", "log_every",
                    "chunk_rows", "replicas")  # fmt: skip
        for name in positive:
            if getattr(self, name) < 1:
                raise VarkdError(f"train: {name} must be at least 1, got {getattr(self, name)}")
        if self.batch_size % self.micro_batches:
            raise VarkdError(f"train: batch_size {self.batch_size} must divide into {self.micro_batches} micro-batches")


class Batches(Protocol):
    """A loader whose batches are a function of the step."""

    def batch(self, step: int) -> Batch: ...


@dataclass
class Job:
    """The objects of one run. `student` may be sharded; the callbacks receive a plain copy with the EMA weights.

    `reference` is the student as it was at the start, where the method compares with it. It never changes and is a
    function of the run's settings, so no checkpoint holds it.
    """

    student: Backbone
    teacher: Backbone | None
    method: Method
    codebook_tables: CodebookTables
    batches: Batches
    train: TrainConfig
    seed: int
    folder: Path
    world: World
    device: torch.device
    plain_copy: Callable[[], Backbone]
    validate: Callable[[Backbone], dict[str, float]]
    draw_grid: Callable[[Backbone, Path], None] | None = None
    label: str = "train"
    quiet: bool = False
    reference: Backbone | None = None


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
        self.state: State = {}
        self.progress = Progress()
        self.checkpoints = Checkpoints(job.folder, job.world, job.train.keep, job.train.select)
        latest = self.checkpoints.latest()
        if latest is not None:
            rows_per_rank = job.train.batch_size // job.world.size
            rows = range(job.world.rank * rows_per_rank, (job.world.rank + 1) * rows_per_rank)
            self.state, self.progress = self.checkpoints.load(latest, job.student, self.ema, self.optimizer, rows)
        self.saved_step = latest
        self.log = Log(job.folder, job.world, self.progress.step, job.train.tensorboard)
        self.window_begun, self.window_step = time.perf_counter(), self.progress.step

    def update(self) -> dict[str, float]:
        """One optimizer step; the paper's algorithm box."""
        job, settings, step = self.job, self.job.train, self.progress.step
        method, rng = job.method.at(step / settings.updates, self.state), Rng(job.seed, step)
        batch = self._scaled(method, _to(job.batches.batch(step), job.device), rng)
        scene = Scene(
            job.student, job.teacher, self.state, rng, job.world, settings.chunk_rows, job.codebook_tables,
            job.reference,
        )  # fmt: skip
        inputs = LossInputs(
            method, job.student, job.teacher, self.state, job.codebook_tables, rng, settings.chunk_rows,
            audit=self._is_logged(step + 1),
        )  # fmt: skip

        with self._autocast():
            sampling = not isinstance(method.contexts, Data)
            with gathered(*(model for model in (job.student, job.teacher, job.reference) if sampling)):
                context = method.contexts(batch, scene)
            fed = self._drop_labels(context, rng)
            totals = denominators(inputs, fed, job.world)
        stats, loss = Stats(), torch.zeros((), dtype=torch.float64)
        job.student.train()
        for index, micro in enumerate(fed.micro_batches(settings.micro_batches)):
            if settings.dropout:  # dropout has no generator of its own: seed the global one, as a function of the step
                torch.manual_seed(rng.generator("dropout", index * job.world.size + job.world.rank).initial_seed())
            with self._autocast():
                part_loss, part_stats = distill_loss(inputs, micro, totals, gradient_scale=job.world.size)
            part_loss.backward()
            loss += part_loss.detach().double().cpu() / job.world.size
            stats.merge(part_stats)

        loss = float(job.world.sum(loss))
        norm = clip_gradients(job.student, settings.optim.clip)
        self._check_finite(loss, norm, stats)
        lr = settings.optim.lr_at(step, settings.updates)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(step)
        self.state = method.update(self.state, context, stats.gathered(job.world), rng)
        self.state = job.method.adapt(self.state, (step + 1) / settings.updates, loss)
        self.progress.step += 1
        adapted = {key: float(memory[0]) for key, memory in self.state.items() if key.startswith("adaptive")}
        return {"loss": loss, "grad_norm": norm, "lr": lr, **stats.means(job.world), **adapted}

    def _scaled(self, method: Method, batch: Batch, rng: Rng) -> Batch:
        """With a range of guidance scales: every row draws its own."""
        if not isinstance(method.target, Guided):
            return batch
        return replace(batch, guidance_B=method.target.guidance_B(batch.row_B, rng))

    def _drop_labels(self, context: Context, rng: Rng) -> Context:
        rate = self.job.train.label_drop
        if not rate:
            return context
        uniform = [rng.uniform("label-drop", part.row_B, 1).squeeze(1) for part in context.parts]
        return context.drop_labels(rate, self.job.student.null_label, uniform)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.job.device.type, torch.bfloat16, enabled=self.job.train.precision == "bf16")

    def _check_finite(self, loss: float, norm: float, stats: Stats) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        terms = ", ".join(f"{name} {value:.4g}" for name, value in stats.means(self.job.world).items() if "/" in name)
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
            self.checkpoints.save(self.job.student, self.ema, self.optimizer, self.state, self.progress)
            self.saved_step = step

    def _validate(self) -> None:
        values = self.job.validate(self.evaluation_model())
        self.log.write("validation", self.progress.step, values)
        self.state = self.job.method.validated(self.state, values["ce"])
        if not math.isfinite(values["ce"]):
            self._fail(f"the validation loss is not finite after update {self.progress.step}")
        best = self.progress.best_value
        if self.job.train.select == "best" and self.progress.step and (best is None or values["ce"] < best):
            self.progress.best_step, self.progress.best_value = self.progress.step, values["ce"]

    def _draw_grid(self) -> None:
        model = self.evaluation_model()
        if self.job.world.is_main and self.job.draw_grid is not None:
            self.job.draw_grid(model, self.job.folder / "samples" / f"step-{self.progress.step:08d}.png")
        self.job.world.barrier()

    def evaluation_model(self) -> Backbone:
        """A plain (unsharded) copy of the student with the averaged weights, in eval mode. Every rank must call it."""
        weights = {**frozen_tensors(self.job.student), **full_tensors(self.ema.average)}
        model = self.job.plain_copy()
        model.load_state_dict(weights)
        return model.eval()

    def close(self, state: Literal["done", "stopped", "failed"]) -> None:
        """Flush the log and write `status.json`."""
        self.log.close()
        if self.job.world.is_main:
            status = {"state": state, "step": self.progress.step, "updates": self.job.train.updates,
                      "seconds": self.progress.seconds}  # fmt: skip
            write_json(self.job.folder / "status.json", status)


def _to(batch: Batch, device: torch.device) -> Batch:
    guidance_B = None if batch.guidance_B is None else batch.guidance_B.to(device)
    return Batch(batch.codes_BL.to(device), batch.label_B.to(device), batch.row_B.to(device), guidance_B)


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
