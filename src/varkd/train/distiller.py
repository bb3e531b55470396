"""One optimizer step of any method: the paper's algorithm box, for the training loop and for loops of your own."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from varkd.backbones.protocol import Backbone
from varkd.distill.audit import Stats, StepStats
from varkd.distill.inputs import State, StepInputs
from varkd.distill.loss import denominators, distill_loss
from varkd.distill.method import Method
from varkd.distill.scores import affordable_rows
from varkd.distill.spaces import CodebookTables
from varkd.distill.teachers import CachedTeacher
from varkd.errors import VarkdError, did_you_mean
from varkd.methods import METHODS
from varkd.tokenizers.protocol import Tokenizer
from varkd.train.parallel import gathered
from varkd.types import Batch, Context
from varkd.world import Rng, World


@dataclass(frozen=True)
class _Pending:
    """The step between its loss and its `update`."""

    method: Method
    sequences: Context
    rng: Rng


class Distiller:
    """Everything that a distillation step needs besides the optimizer.

    It draws the sequences to train on, drops labels, counts denominators over the whole step, computes the loss, and
    keeps what the method remembers from step to step. `updates` is the length of training that schedules refer to.

    Args:
        method: a preset by name ("varkd", "gkd", ...) or a `Method` of your own.
        student: trained by your optimizer; may be sharded (`train.parallel.distribute`).
        teacher: a model, never changed, or a cache of its word on the data (`varkd.load_teacher_cache`), which serves
            methods that train on data alone. Needed by every method but the supervised ones.
        tokenizer: a tokenizer, or its codebook (V, E).
        label_drop: the probability of replacing a row's label by the null label (classifier-free guidance).
        chunk_rows: positions per chunk of logits, by default what takes about 256 MiB; the loss does not depend on it.
        precision: "bf16" computes under `torch.autocast`. With "fp32" an autocast of your own stays in force.
        reference: the student as it was at the start, for methods that compare with it. A frozen copy by default.
        codebook_tables: what `method.prepare` returns, if you already have it.
        compile: run the arithmetic of the loss through torch.compile, which takes a moment at the first step.

    Raises:
        VarkdError: an unknown preset, a missing teacher, or models that the method cannot train.
    """

    def __init__(
        self,
        method: str | Method,
        student: Backbone,
        teacher: Backbone | CachedTeacher | None = None,
        tokenizer: Tokenizer | Tensor | None = None,
        *,
        updates: int,
        seed: int = 0,
        label_drop: float = 0.1,
        chunk_rows: int | None = None,
        precision: Literal["fp32", "bf16"] = "fp32",
        world: World | None = None,
        reference: Backbone | None = None,
        codebook_tables: CodebookTables | None = None,
        compile: bool = False,
    ) -> None:
        if updates < 1 or not 0 <= label_drop <= 1:
            raise VarkdError(f"distiller: need updates >= 1 and label_drop in [0, 1], got {updates} and {label_drop}")
        self.method = _method(method)
        self.student = student
        self.teacher, self.cache = (None, teacher) if isinstance(teacher, CachedTeacher) else (teacher, None)
        self.updates, self.seed, self.label_drop = updates, seed, label_drop
        self.chunk_rows = chunk_rows or affordable_rows(student.vocab_size)
        self.precision, self.world, self.compile = precision, world or World(), compile
        if teacher is None and self.method.needs_teacher:
            raise VarkdError("this method needs a teacher: pass the model to distil from")
        self.method.check(student, self.teacher)
        if self.cache is not None:
            self.cache.check(self.method, student, label_drop)
        if reference is None and self.method.needs_reference:
            reference = copy.deepcopy(student).eval().requires_grad_(False)
        self.reference = reference
        self.codebook_tables = self._tables(tokenizer) if codebook_tables is None else codebook_tables
        self.state: State = {}
        self.step = 0
        self._has_dropout = any(isinstance(part, nn.Dropout) and part.p > 0 for part in student.modules())
        self._pending: _Pending | None = None

    @property
    def device(self) -> torch.device:
        return self.student.head.weight.device

    def __call__(self, batch: Batch, *, audit: bool = False) -> tuple[Tensor, StepStats]:
        """The loss of one step, a scalar with gradient, and its statistics: a mapping of names to floats."""
        ((loss, stats),) = self.micro_batches(batch, 1, audit=audit)
        return loss, stats.collect(self.world)

    def micro_batches(self, batch: Batch, count: int, *, audit: bool = False) -> Iterator[tuple[Tensor, Stats]]:
        """The losses of `count` parts of one step: call `backward` on each before asking for the next.

        Their sum, and the sum of their gradients, are those of the whole step. Merge the statistics and hand
        `stats.collect(world)` to `update`. With several ranks each loss carries the number of ranks as a factor,
        because gradients are averaged over ranks.
        """
        method, rng = self.method.at(min(self.step / self.updates, 1.0), self.state), Rng(self.seed, self.step)
        inputs = StepInputs(
            method,
            self.student,
            self.teacher,
            self.state,
            rng,
            self.world,
            self.chunk_rows,
            self.codebook_tables,
            self.reference,
            audit,
            self.cache,
            self.compile,
        )
        with self._autocast():
            sequences = self._sequences(batch, inputs)
            fed = self._drop_labels(sequences, rng)
            totals = denominators(inputs, fed)
        self._pending = _Pending(method, sequences, rng)
        self.student.train()
        for index, part in enumerate(fed.micro_batches(count)):
            if self._has_dropout:  # dropout draws from the global generator: seed it as a function of the step
                row = index * self.world.size + self.world.rank
                torch.manual_seed(rng.generator("dropout", row).initial_seed())
            with self._autocast():
                loss_and_stats = distill_loss(inputs, part, totals, gradient_scale=self.world.size)
            yield loss_and_stats

    def update(self, loss: Tensor | float, stats: StepStats) -> None:
        """Take note of a step after the optimizer's: replay buffer, thresholds, adaptive numbers.

        Args:
            loss: the loss of the whole step; with several ranks, summed over them.
            stats: what `__call__` returned with it.

        Raises:
            VarkdError: no step is pending.
        """
        if self._pending is None:
            raise VarkdError("update() follows a step: call the distiller on a batch first")
        pending, self._pending = self._pending, None
        value = float(loss.detach()) if isinstance(loss, Tensor) else loss
        self.state = pending.method.update(self.state, pending.sequences, stats.observed, pending.rng)
        self.step += 1
        self.state = self.method.adapt(self.state, self.step / self.updates, value)

    def validated(self, cross_entropy: float) -> None:
        """Report a validation (nats per code) to the method; `distillm` decides by it when to use student samples."""
        self.state = self.method.validated(self.state, cross_entropy)

    @property
    def adaptive_values(self) -> dict[str, float]:
        """The current value of every number that training itself moves, by its key in the state."""
        return {key: float(memory[0]) for key, memory in self.state.items() if key.startswith("adaptive")}

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs besides the models and the optimizer. Ranks hold their own rows of a buffer."""
        return {"step": torch.tensor(self.step), **{f"method/{key}": value for key, value in self.state.items()}}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a `state_dict`.

        Raises:
            VarkdError: it does not come from a distiller.
        """
        if "step" not in state:
            raise VarkdError("this is not the state of a Distiller: it has no 'step'")
        self.step = int(state["step"])
        entries = {key.removeprefix("method/"): value for key, value in state.items() if key.startswith("method/")}
        self.state = {key: value.to(self.device) for key, value in entries.items()}
        self._pending = None

    def _sequences(self, batch: Batch, inputs: StepInputs) -> Context:
        """What this rank trains on in this step. Sharded models are gathered for the time that they sample."""
        target = inputs.method.target
        if target.guided:  # with a range of guidance scales every row draws its own
            batch = replace(batch, guidance_B=target.guidance_B(batch.row_B, inputs.rng))
        sampling = inputs.method.contexts.runs_models
        with gathered(*(model for model in (self.student, self.teacher, self.reference) if sampling)):
            return inputs.method.contexts(batch, inputs)

    def _drop_labels(self, sequences: Context, rng: Rng) -> Context:
        if not self.label_drop:
            return sequences
        uniform = [rng.uniform("label-drop", part.row_B, 1).squeeze(1) for part in sequences.parts]
        return sequences.drop_labels(self.label_drop, self.student.null_label, uniform)

    def _tables(self, tokenizer: Tokenizer | Tensor | None) -> CodebookTables:
        if tokenizer is None:
            raise VarkdError("give the tokenizer of the codes, or its codebook")
        codebook_VE = tokenizer if isinstance(tokenizer, Tensor) else tokenizer.codebook_VE
        return {name: value.to(self.device) for name, value in self.method.prepare(codebook_VE).items()}

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)


def _method(method: str | Method) -> Method:
    if isinstance(method, Method):
        return method
    if method not in METHODS:
        raise VarkdError(f"unknown method '{method}': {did_you_mean(method, METHODS)}")
    return METHODS[method].method
