"""What every source of prefixes has in common: what it may look at, and what it says of itself.

A context is `(batch, inputs) -> Context`, for a whole optimizer step. Every rule is row-local and every random number
belongs to a global row, so a context does not depend on how rows are spread over ranks. Gradients never flow through
sampling.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from varkd.backbones.protocol import Backbone
from varkd.distill.scores import code_logp
from varkd.distill.spaces import CodebookTables
from varkd.errors import VarkdError
from varkd.rollout import Sampler, evaluating
from varkd.types import Batch, Condition, Context, Part, Source
from varkd.world import Rng, World

if TYPE_CHECKING:
    from varkd.distill.method import Method
    from varkd.distill.teachers import CachedTeacher

Role = Literal["student", "teacher", "reference"]
State = dict[str, Tensor]
"""What a method remembers between steps; every entry is checkpointed. Keys under "rows/" are split over ranks."""


@dataclass(frozen=True)
class StepInputs:
    """Everything that one optimizer step reads besides its batch. Built once per step by `Distiller`.

    Attributes:
        method: the method at this step (`Method.at`: every schedule turned into a number).
        student, teacher: handed down, never changed here.
        state: what the method remembers from earlier steps.
        rng: the random numbers of this step.
        chunk_rows: rows (positions) per chunk of logits.
        codebook_tables: what `Method.prepare` made of the tokenizer's codebook.
        reference: the student as it was at the start of the run, for methods with `needs_reference`.
        cache: what a teacher said of the data, in the place of a live one.
        audit: whether to compute statistics that cost another pass of the heads; the loss is the same, bit by bit.
        compiled: whether the arithmetic of the loss goes through torch.compile.
    """

    method: Method
    student: Backbone
    teacher: Backbone | None
    state: Mapping[str, Tensor]
    rng: Rng
    world: World = field(default_factory=World)
    chunk_rows: int = 2048
    codebook_tables: CodebookTables = field(default_factory=dict)
    reference: Backbone | None = None
    audit: bool = False
    cache: CachedTeacher | None = None
    compiled: bool = False

    def model(self, name: Role) -> Backbone:
        if name == "student":
            return self.student
        if name == "reference":
            if self.reference is None:
                raise VarkdError("this method compares with the student at its start: give the distiller a reference")
            return self.reference
        if self.teacher is None:
            raise VarkdError("this method samples from a teacher: give teacher=RUN")
        return self.teacher

    @torch.no_grad()
    def logp(self, name: Role, part: Part) -> Tensor:
        """The log-probability (nats, float32 (B, L)) that a model gives to the codes of `part`."""
        model = self.model(name)
        with evaluating(model):
            hidden_BLD = model(part.codes_BL, part.condition, part.plan)
        return code_logp(model.head, hidden_BLD, part.codes_BL, self.chunk_rows)


@dataclass(frozen=True)
class Cost:
    """What it takes to make the prefixes of one row of the batch: passes without gradient, and sequences decoded.

    `rows` come of it. A guided decode counts twice; a reference is read like a student, for it has the student's size.
    """

    student_read: float = 0.0
    student_decode: float = 0.0
    teacher_read: float = 0.0
    teacher_decode: float = 0.0
    rows: float = 1.0

    @classmethod
    def decode(cls, by: Literal["student", "teacher"], sampler: Sampler, share: float = 1.0) -> Cost:
        """A share of a sequence, decoded by one model."""
        times = share * (2.0 if sampler.guidance != 1 else 1.0)
        return cls(student_decode=times) if by == "student" else cls(teacher_decode=times)

    def __add__(self, other: Cost) -> Cost:
        """Both for the same rows."""
        return replace(self, **{name: getattr(self, name) + getattr(other, name) for name in _MADE})

    def times(self, factor: float) -> Cost:
        """So often for the same rows."""
        return replace(self, **{name: factor * getattr(self, name) for name in _MADE})


_MADE = ("student_read", "student_decode", "teacher_read", "teacher_decode")


class Prefixes(ABC):
    """Base of all contexts; subclasses are frozen dataclasses, and most of them only differ in `__call__`."""

    @abstractmethod
    def __call__(self, batch: Batch, inputs: StepInputs) -> Context:
        """The prefixes of this rank's rows."""

    @property
    @abstractmethod
    def summary(self) -> str:
        """Which sequences they are, in words and with its settings."""

    @property
    def summaries(self) -> list[str]:
        """One line for each source inside."""
        return [self.summary]

    @property
    def cost(self) -> Cost:
        """What it takes to make them; schedules must be numbers (`Method.at`)."""
        return Cost()

    @property
    def inner(self) -> tuple[Prefixes, ...]:
        """Every source inside: itself, or those of a mixture."""
        return (self,)

    @property
    def runs_models(self) -> bool:
        """Whether a model is asked for anything while they are made: sharded ones are gathered for it."""
        return True

    @property
    def keeps_rows(self) -> bool:
        """Whether it remembers sequences by their row."""
        return False

    @property
    def needs_teacher(self) -> bool:
        return False

    @property
    def needs_reference(self) -> bool:
        """Whether it compares with the student as it was at the start of the run."""
        return False

    @property
    def splices(self) -> bool:
        """Whether it puts other codes into data sequences that still count as the target."""
        return False

    @property
    def sources(self) -> tuple[Source, ...]:
        """The sources of the parts that it makes."""
        return ("student",)

    @property
    def samplers(self) -> tuple[Sampler, ...]:
        """Every sampler inside: their plans are what the teacher must be able to honor."""
        return ()

    def no_reward(self, source: Source) -> str | None:
        """Why the codes of its parts of `source` cannot carry sampled rewards (`credit`); None where they can."""
        del source
        return "their codes were not sampled one by one under a known probability"

    def prepare(self, codebook_VE: Tensor) -> CodebookTables:
        """What it needs of the tokenizer, made once before training."""
        del codebook_VE
        return {}

    def update(self, context: Context, state: State, rng: Rng) -> State:
        """The state after the optimizer step that used `context`."""
        del context, rng
        return state


def told(sampler: Sampler) -> str:
    """The settings of a sampler that are not the usual ones, in brackets; nothing where there are none."""
    usual = Sampler()
    changed = {item.name: getattr(sampler, item.name) for item in fields(sampler)}
    found = [
        f"{name} {value:g}" if type(value) is float else f"{name} {value}"
        for name, value in changed.items()
        if value != getattr(usual, name)
    ]
    return f" ({', '.join(found)})" if found else ""


def filtered(sampler: Sampler) -> str | None:
    """Why samples under `sampler` cannot carry sampled rewards: no weight stands in for codes that are never drawn.

    Temperature and guidance are fine, because every rollout stores the log-probability that each code was drawn with.
    """
    if sampler.top_k > 0 or sampler.top_p < 1 or sampler.temperature == 0:
        return "the sampler never draws some codes (top_k, top_p or temperature 0), so no weight can stand in for them"
    if sampler.parallel != "off":
        return "parallel rollouts draw codes from other distributions than the model's: use parallel=off"
    return None


def in_row_order(parts: list[Part]) -> Part:
    """One part from several of the same source and plan sizes, its rows sorted by global row."""
    if len(parts) == 1:
        return parts[0]
    return merge(parts).select(torch.argsort(torch.cat([part.row_B for part in parts])))


def merge(parts: list[Part]) -> Part:
    """Stack parts whose plans have the same step sizes. The source is that of the first."""
    first = parts[0]
    logp = [part.behavior_logp_BL for part in parts]
    accept = [part.accept_BL for part in parts]
    scales = [part.condition.guidance_B for part in parts]
    sequences = [part.sequence_B for part in parts]
    mixed = any(part.generated_BL is not None for part in parts)
    generated = [
        torch.ones_like(part.codes_BL, dtype=torch.bool) if part.generated_BL is None else part.generated_BL
        for part in parts
    ]
    return Part(
        source=first.source,
        codes_BL=torch.cat([part.codes_BL for part in parts]),
        supervision_BL=torch.cat([part.supervision_BL for part in parts]),
        condition=Condition(torch.cat([part.condition.label_B for part in parts]), _cat_if_all(scales)),
        plan=replace(first.plan, order_BL=torch.cat([part.plan.order_BL for part in parts])),
        row_B=torch.cat([part.row_B for part in parts]),
        weight_B=torch.cat([part.weight_B for part in parts]),
        age_B=torch.cat([part.age_B for part in parts]),
        behavior_logp_BL=_cat_if_all(logp),
        accept_BL=_cat_if_all(accept),
        generated_BL=torch.cat(generated) if mixed else None,
        sequence_B=_cat_if_all(sequences),
    )


def _cat_if_all(tensors: list[Tensor | None]) -> Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(present) if len(present) == len(tensors) else None
