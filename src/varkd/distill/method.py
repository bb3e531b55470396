"""A distillation method is a value: contexts, a target, and terms. The configuration *is* the component."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from varkd.backbones.protocol import Backbone
from varkd.distill.credit import Credit, NoCredit
from varkd.distill.divergence_rule import DivergenceRule, Own
from varkd.distill.divergences import Divergence
from varkd.distill.filtering import AllImages, DifferenceSampling
from varkd.distill.inputs import State
from varkd.distill.mixture import Contexts
from varkd.distill.prefixes import Data
from varkd.distill.schedule import Schedule, adaptives, check_range, resolve
from varkd.distill.scores import Remembers, Score
from varkd.distill.selection import All, Selection
from varkd.distill.skew import SequenceSkew
from varkd.distill.spaces import Clusters, CodebookTables, Full, Space
from varkd.distill.target import Plain, Target
from varkd.errors import VarkdError
from varkd.types import Context, Part, Source
from varkd.world import Rng

COSTS = ("student_train", "student_read", "student_decode", "teacher_read", "teacher_decode")
"""What an update asks for, in units of the batch: passes with and without gradient, and sequences decoded."""


@dataclass(frozen=True)
class Term:
    """One summand of the loss: on the parts of the sources `on`, D over `space` at the positions of `selection`.

    `credit` multiplies D at each position by a sampled reward (policy gradients).
    `normalizer` is the denominator over the whole optimizer step and all ranks: `total` counts every position of those
    parts, `selected` the selection weights (which needs the scores of the whole step before the first gradient).
    The divergence may also be any callable (student_NK, teacher_NK, rows) -> value_N of log-probabilities.
    With `generated_only` the codes that a mixed rollout keeps from the data neither count nor weigh (eq. 7).
    """

    name: str
    divergence: Divergence
    on: tuple[Source, ...] = ("data", "student", "teacher")
    selection: Selection = All()
    space: Space = Full()
    weight: Schedule = 1.0
    normalizer: Literal["total", "selected"] = "total"
    credit: Credit = NoCredit()
    generated_only: bool = False

    def __post_init__(self) -> None:
        check_range(f"term '{self.name}'", "weight", self.weight, 0, float("inf"))
        if not isinstance(self.divergence, DivergenceRule):
            object.__setattr__(self, "divergence", Own(self.divergence))
        self.selection.reads(self.space)  # refuses a score that this space does not have

    def positions_BL(self, part: Part) -> Tensor:
        """Bool (B, L): where the term may count on `part`."""
        everywhere = torch.full_like(part.codes_BL, part.source in self.on, dtype=torch.bool)
        if self.generated_only and part.generated_BL is not None:
            return everywhere & part.generated_BL
        return everywhere

    @property
    def reads(self) -> tuple[Score, ...]:
        """Every score that the term reads at its positions."""
        skew = self.skew.reads if self.skew else ()
        return (*self.selection.reads(self.space), *self.credit.reads, *skew)

    @property
    def reads_student(self) -> bool:
        return any(score.reads_student for score in self.reads)

    @property
    def needs_teacher(self) -> bool:
        return self.divergence.needs_teacher or any(score.reads_teacher for score in self.reads)

    @property
    def skew(self) -> SequenceSkew | None:
        """The skew that differs between sequences, where the divergence has one."""
        return self.divergence.skew

    @property
    def rewarded(self) -> bool:
        """Whether its credit is a reward by the teacher."""
        return self.credit.sampled and any(score.reads_teacher for score in self.credit.reads)

    @property
    def memories(self) -> dict[str, Remembers]:
        """The parts that remember something between steps, by the key of their entry in the state."""
        parts: tuple[Remembers | None, ...] = (self.selection.remembers, self.skew)
        return {self.key(part): part for part in parts if part is not None}

    def threshold(self, state: Mapping[str, Tensor]) -> Tensor | None:
        """What the selection remembers of former steps; None where it keeps nothing, or nothing yet."""
        part = self.selection.remembers
        return None if part is None else state.get(self.key(part))

    def key(self, part: Remembers) -> str:
        """Where the state keeps what a part of this term remembers."""
        return f"{part.memory}/{self.name}"


@dataclass(frozen=True)
class Method:
    """What to train on and what to minimize. `methods.METHODS` holds the presets.

    Raises:
        VarkdError: parts that do not go together, with the reason.
    """

    terms: tuple[Term, ...]
    contexts: Contexts = Data()
    target: Target = Plain()
    images: AllImages | DifferenceSampling = AllImages()

    def __post_init__(self) -> None:
        names = [term.name for term in self.terms]
        if not names or len(set(names)) != len(names):
            raise VarkdError(f"a method needs terms with different names, got {names}")
        for term in self.terms:
            self._check_rewards(term)
            self._check_support(term)

    def _check_rewards(self, term: Term) -> None:
        for source in self.contexts.sources if term.credit.sampled else ():
            reason = self.contexts.no_reward(source) if source in term.on else None
            if reason:
                raise VarkdError(
                    f"term '{term.name}': sampled rewards ({term.credit.kind}) cannot be had on {source} "
                    f"sequences here: {reason}"
                )

    def _check_support(self, term: Term) -> None:
        if self.target.excludes and (term.divergence.needs_support or term.rewarded):
            what = "sampled rewards are" if term.rewarded else f"{term.divergence.kind} is"
            raise VarkdError(
                f"term '{term.name}': {what} infinite wherever a truncated target excludes a code that "
                "the student does not: use forward_kl, jsd or total_variation, or plain"
            )

    @property
    def needs_teacher(self) -> bool:
        """Whether any part of the method looks at a teacher."""
        parts = (*self.terms, self.contexts, self.images)
        return any(part.needs_teacher for part in parts)

    @property
    def needs_reference(self) -> bool:
        """Whether prefixes are compared with the student as it was at the start of the run."""
        return self.contexts.needs_reference

    @property
    def cluster_keys(self) -> tuple[str, ...]:
        """Where the products keep the cluster map of every space that has one."""
        return tuple(dict.fromkeys(term.space.clusters.key for term in self.terms if term.space.clusters))

    @property
    def clusters(self) -> Clusters:
        """The clusters of its first term that has some, else the default ones."""
        return next((term.space.clusters for term in self.terms if term.space.clusters), Clusters())

    @property
    def cost(self) -> dict[str, float]:
        """By the names of `COSTS`, one update of a method whose schedules are numbers. A guided row counts twice."""
        made = self.contexts.cost
        passes = made.rows * (2 if self.target.guided else 1)
        whole_step_first = [term for term in self.terms if term.normalizer == "selected"]
        teacher = any(term.needs_teacher for term in self.terms) + sum(t.needs_teacher for t in whole_step_first)
        student = sum(term.reads_student for term in whole_step_first)
        return {
            "student_train": made.rows,
            "student_read": made.student_read + student * made.rows,
            "student_decode": made.student_decode,
            "teacher_read": made.teacher_read + teacher * passes,
            "teacher_decode": made.teacher_decode,
        }

    def check(self, student: Backbone, teacher: Backbone | None) -> None:
        """Raise `VarkdError` with the reason when these models cannot be trained by this method."""
        if self.contexts.splices and student.residual_codes:
            raise VarkdError(
                f"this method exchanges single codes of data sequences, but later codes of a {student.family} "
                "image encode what the earlier ones left over, so they would have to be quantized again: use a method "
                "with data, rollout or replay contexts"
            )
        if self.target.guided and teacher is not None and teacher.guidance_conditioned:
            raise VarkdError("this teacher already takes the guidance scale as an input: use target plain")
        if self.target.per_row_guidance and not student.guidance_conditioned:
            raise VarkdError(
                "a range of guidance scales needs a student that is told the scale: "
                "set model.guidance_conditioned=true, or target.highest=null"
            )

    def at(self, progress: float, state: Mapping[str, Tensor] | None = None) -> Method:
        """The method at a fraction of training: every schedule and adaptive value turned into its number."""
        return resolve(self, progress, state)

    def prepare(self, codebook_VE: Tensor) -> CodebookTables:
        """Everything that is made once before training (cluster maps, nearest codes, a copy of the codebook)."""
        codebook_tables = self.contexts.prepare(codebook_VE)
        for term in self.terms:
            codebook_tables.update(term.space.prepare(codebook_VE))
            codebook_tables.update(term.selection.prepare(codebook_VE))
        return codebook_tables

    def update(self, state: State, context: Context, observed: Mapping[str, Tensor], rng: Rng) -> State:
        """The state after an optimizer step.

        Args:
            context: this rank's context of the step (fresh rollouts enter the replay buffer).
            observed: by key of the state, what the parts observed in this step on all ranks (`Remembers.observed`).
        """
        state = dict(self.contexts.update(context, state, rng))
        for term in self.terms:
            for key, part in term.memories.items():
                if key in observed and len(observed[key]):
                    state[key] = part.updated(state.get(key), observed[key])
        return state

    def adapt(self, state: State, progress: float, loss: float) -> State:
        """Move the adaptive numbers after an update with this loss. `self` is the method before `at`."""
        moved = {key: value.after_update(state.get(key), progress, loss) for key, value in adaptives(self)}
        return {**state, **{key: memory for key, memory in moved.items() if memory is not None}}

    def validated(self, state: State, cross_entropy: float) -> State:
        """Move the adaptive numbers after a validation (nats per code). `self` is the method before `at`."""
        moved = {key: value.after_validation(state.get(key), cross_entropy) for key, value in adaptives(self)}
        return {**state, **{key: memory for key, memory in moved.items() if memory is not None}}
