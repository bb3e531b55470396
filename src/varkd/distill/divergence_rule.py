"""What every divergence is: a function of two rows of log-probabilities, with a word about what it needs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
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
    """Base of all divergences: what most of them have in common; subclasses change what differs.

    `__call__` is the definition, which autograd can differentiate. The loss asks for `gradient`, the same derivative
    written out, which spares it a graph over (N, K): a test holds the two together.
    """

    needs_teacher: ClassVar[bool] = True

    @abstractmethod
    def __call__(self, student_NK: Tensor, teacher_NK: Tensor, rows: TargetRows) -> Tensor:
        """The divergence of each row in nats, (N,), of log-probabilities over K outcomes."""

    def gradient(self, student_NK: Tensor, teacher_NK: Tensor, rows: TargetRows) -> Tensor:
        """The derivative of each row's value with respect to `student_NK`, (N, K), its entries taken as independent.

        Outcomes of probability 0 get 0. By default autograd, on these rows alone.
        """
        with torch.enable_grad():
            leaf_NK = student_NK.detach().requires_grad_()
            value_N = self(leaf_NK, teacher_NK, rows)
            return torch.autograd.grad(value_N.sum(), leaf_NK)[0]

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
    unless the callable says otherwise by attributes of those names. Its gradient is autograd's.
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
