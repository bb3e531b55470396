"""What every divergence is: a function of two rows of log-probabilities, with a word about what it needs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from varkd.distill.skew import SequenceSkew
from varkd.errors import VarkdError


@dataclass(frozen=True)
class TargetRows:
    """What a divergence may know of its rows beside the two distributions: the target code of each (in the space's own
    numbering; None in a space that has left some out) and a skew that differs between sequences (`SequenceSkew`)."""

    code_N: Tensor | None
    alpha_N: Tensor | None = None

    @property
    def target_N(self) -> Tensor:
        """The target code of each row.

        Raises:
            VarkdError: the space has left some of them out.
        """
        if self.code_N is None:
            raise VarkdError(
                "top_k without its tail has no place for every target code: set space.tail=true, or take "
                "a divergence that does not read the code"
            )
        return self.code_N


class DivergenceRule(ABC):
    """Base of all divergences: what most of them have in common; subclasses change what differs."""

    needs_teacher: ClassVar[bool] = True

    @property
    @abstractmethod
    def summary(self) -> str:
        """What it is, in words and with its settings."""

    @property
    def needs_support(self) -> bool:
        """Whether it is infinite where the teacher excludes a code."""
        return False

    @property
    def skew(self) -> SequenceSkew | None:
        """Its skew, where that differs between sequences."""
        return None


@dataclass(frozen=True)
class Own(DivergenceRule):
    """Any callable `(student_NK, teacher_NK, rows) -> value_N` as a divergence: what `Term` makes of a user's function.

    Both inputs are log-probabilities. It is taken to need the teacher, and support wherever the student has mass,
    unless the callable says otherwise by attributes of those names.
    """

    function: Callable[[Tensor, Tensor, TargetRows], Tensor]
    kind: Literal["own"] = "own"

    @property
    def needs_teacher(self) -> bool:  # type: ignore[override]
        return getattr(self.function, "needs_teacher", True)

    @property
    def needs_support(self) -> bool:
        return getattr(self.function, "needs_support", True)

    @property
    def summary(self) -> str:
        return f"{getattr(self.function, '__name__', type(self.function).__name__)}, a function of your own"

    def __call__(self, student_NK: Tensor, teacher_NK: Tensor, rows: TargetRows) -> Tensor:
        return self.function(student_NK, teacher_NK, rows)
