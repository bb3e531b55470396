"""A distillation method is a value: contexts, and terms over them. The configuration *is* the component."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from varkd.distill.contexts import Contexts, Data, State
from varkd.distill.divergences import Divergence
from varkd.distill.schedule import Scalar, check_range, resolve
from varkd.distill.selection import All, Confidence, Selection
from varkd.distill.spaces import Full, Products, Space
from varkd.errors import VarkdError
from varkd.types import Context, Source
from varkd.world import Rng


@dataclass(frozen=True)
class Term:
    """One summand of the loss: on the parts of the sources `on`, D over `space` at the positions of `selection`.

    `normaliser` is the denominator over the whole optimiser step and all ranks: `total` counts every position of those
    parts, `selected` the selection weights (which needs the scores of the whole step before the first gradient).
    """

    name: str
    divergence: Divergence
    on: tuple[Source, ...] = ("data", "student", "teacher")
    selection: Selection = All()
    space: Space = Full()
    weight: Scalar = 1.0
    normaliser: Literal["total", "selected"] = "total"

    def __post_init__(self) -> None:
        check_range(f"term '{self.name}'", "weight", self.weight, 0, float("inf"))
        self.selection.score_name(self.space)  # refuses a score that this space does not have

    @property
    def needs_teacher(self) -> bool:
        return self.divergence.needs_teacher or self.selection.score_name(self.space) is not None


@dataclass(frozen=True)
class Method:
    """What to train on and what to minimise. `methods.METHODS` holds the presets."""

    terms: tuple[Term, ...]
    contexts: Contexts = Data()

    def __post_init__(self) -> None:
        names = [term.name for term in self.terms]
        if not names or len(set(names)) != len(names):
            raise VarkdError(f"a method needs terms with different names, got {names}")

    @property
    def needs_teacher(self) -> bool:
        """Whether any part of the method looks at a teacher."""
        return any(term.needs_teacher for term in self.terms) or self.contexts.needs_teacher

    def at(self, progress: float) -> Method:
        """The method at a fraction of training: every schedule turned into its number."""
        return resolve(self, progress)

    def prepare(self, codebook_VE: Tensor) -> Products:
        """Everything that is made once before training (cluster maps)."""
        products: Products = {}
        for term in self.terms:
            products.update(term.space.prepare(codebook_VE))
        return products

    def update(self, state: State, context: Context, scores: dict[str, Tensor], rng: Rng) -> State:
        """The state after an optimiser step.

        Args:
            context: this rank's context of the step (fresh rollouts enter the replay buffer).
            scores: per term name, the step's confidence scores by generation rank, (rows of all ranks, L).
        """
        state = self.contexts.update(context, state, rng)
        for term in self.terms:
            if isinstance(term.selection, Confidence) and len(scores.get(term.name, ())):
                key = threshold_key(term)
                state = {**state, key: term.selection.updated_threshold(state.get(key), scores[term.name])}
        return state


def threshold_key(term: Term) -> str:
    """Where the state keeps the per-position threshold of a term."""
    return f"threshold/{term.name}"
