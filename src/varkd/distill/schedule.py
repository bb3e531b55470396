"""Numbers that change over training. `method.at(progress, state)` turns each one into a plain float before it is used.

`LinearSchedule` and `ExponentialSchedule` are functions of progress. Adaptive ones (`TaidTime`, `Plateau`) are moved by
what training reports; their memory is a tensor in the method's state, so a resumed run goes on bit by bit.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from fractions import Fraction
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor

from varkd.errors import VarkdError

V = TypeVar("V")


@dataclass(frozen=True)
class LinearSchedule:
    """Linear from `start` to `end` between the fractions `begin` and `until` of training; constant outside."""

    start: float
    end: float
    begin: float = 0.0
    until: float = 1.0
    kind: Literal["linear"] = "linear"

    def __post_init__(self) -> None:
        if not 0 <= self.begin <= self.until <= 1:
            raise VarkdError(f"linear: need 0 <= begin <= until <= 1, got {self.begin} and {self.until}")

    @property
    def summary(self) -> str:
        when = "" if (self.begin, self.until) == (0, 1) else f"{self.begin:.0%}-{self.until:.0%} of "
        return f"{words(self.start)} -> {words(self.end)} over {when}training"

    def at(self, progress: float) -> float:
        if progress >= self.until:
            return self.end
        if progress <= self.begin:
            return self.start
        share = (progress - self.begin) / (self.until - self.begin)
        return self.start + (self.end - self.start) * share


@dataclass(frozen=True)
class ExponentialSchedule:
    """From `start` towards `end` by base^(-progress): after all of training 1/base of the way is left (ImitKD)."""

    start: float
    end: float
    base: float = 200.0
    kind: Literal["exponential"] = "exponential"

    def __post_init__(self) -> None:
        if not self.base > 1:
            raise VarkdError(f"exponential: base must be above 1, got {self.base}")

    @property
    def summary(self) -> str:
        return f"{words(self.start)} -> {words(self.end)} by {self.base:g}^-progress"

    def at(self, progress: float) -> float:
        return self.end + (self.start - self.end) * self.base**-progress


class Adaptive(ABC):
    """Base of the numbers that training itself moves. `memory` is float64; its first entry is the number."""

    start: float
    end: float

    @property
    @abstractmethod
    def summary(self) -> str:
        """From where to where, and by what."""

    @property
    @abstractmethod
    def rule(self) -> str:
        """How training moves it, as a sentence."""

    def at(self, memory: Tensor | None) -> float:
        return self.start if memory is None else float(memory[0])

    def after_update(self, memory: Tensor | None, progress: float, loss: float) -> Tensor | None:
        """The memory after an optimizer step with this loss, `progress` of training being done."""
        del progress, loss
        return memory

    def after_validation(self, memory: Tensor | None, cross_entropy: float) -> Tensor | None:
        """The memory after a validation."""
        del cross_entropy
        return memory


@dataclass(frozen=True)
class TaidTime(Adaptive):
    """TAID's t, 2501.16937: how far the target stands between student and teacher; it only grows.

    With d = (L_before - L) / (L_before + 1e-15) and the moving average M = momentum M + (1 - momentum) d:
    t = min(end, max(start + (end - start) progress, t + alpha sigmoid(M) (1 - t))).
    """

    start: float = 0.4
    end: float = 1.0
    alpha: float = 5e-4
    momentum: float = 0.99
    kind: Literal["taid_time"] = "taid_time"

    @property
    def summary(self) -> str:
        return f"{words(self.start)} -> {words(self.end)}, adaptive: TAID time (alpha {words(self.alpha)})"

    @property
    def rule(self) -> str:
        return (
            f"TAID's t: it only grows, at least linearly, and faster while the loss falls "
            f"(alpha {words(self.alpha)}, momentum {words(self.momentum)})"
        )

    def after_update(self, memory: Tensor | None, progress: float, loss: float) -> Tensor:
        time, average, former = (self.start, 0.0, loss) if memory is None else memory.tolist()
        average = self.momentum * average + (1 - self.momentum) * (former - loss) / (former + 1e-15)
        sigmoid = 0.5 * (1 + math.tanh(average / 2))  # exp(-average) overflows after a loss of almost 0
        grown = time + self.alpha * sigmoid * (1 - time)
        time = min(self.end, max(self.start + (self.end - self.start) * progress, grown))
        return torch.tensor([time, average, loss], dtype=torch.float64)


@dataclass(frozen=True)
class Plateau(Adaptive):
    """DistiLLM's phi, 2402.03898: grows by `step` whenever validation is `tolerance` or more above its reference.

    The reference is the cross-entropy (nats per code) at the last growth, at first that of the start.
    """

    start: float = 0.0
    end: float = 1.0
    step: float = 0.1
    tolerance: float = 0.1
    kind: Literal["plateau"] = "plateau"

    @property
    def summary(self) -> str:
        moves = f"step {words(self.step)}, tolerance {words(self.tolerance)}"
        return f"{words(self.start)} -> {words(self.end)}, adaptive: plateau ({moves})"

    @property
    def rule(self) -> str:
        return (
            f"DistiLLM's phi: it grows by {words(self.step)} whenever validation is worse than its reference by a "
            f"tolerance {words(self.tolerance)} (nats per code) or more"
        )

    def after_validation(self, memory: Tensor | None, cross_entropy: float) -> Tensor:
        if memory is None:
            return torch.tensor([self.start, cross_entropy], dtype=torch.float64)
        value, reference = memory.tolist()
        if cross_entropy >= reference + self.tolerance:
            value, reference = min(self.end, value + self.step), cross_entropy
        return torch.tensor([value, reference], dtype=torch.float64)


SCHEDULES = (LinearSchedule, ExponentialSchedule, Adaptive)
Schedule = float | LinearSchedule | ExponentialSchedule | TaidTime | Plateau


def words(value: Schedule) -> str:
    """A number (halves to sixteenths as fractions, below 1) or the course of a schedule."""
    if isinstance(value, SCHEDULES):
        return value.summary
    part = Fraction(value).limit_denominator(10**6)
    return str(part) if 0 < value < 1 and part.denominator in (2, 4, 8, 16) else f"{value:g}"


def value_of(value: Schedule) -> float:
    """The float of a value that `resolve` has already fixed."""
    if isinstance(value, SCHEDULES):
        raise TypeError("this value still changes over training: call method.at(progress, state) first")
    return value


def bounds(value: Schedule) -> tuple[float, float]:
    """The smallest and the largest number that a value takes."""
    ends = (value.start, value.end) if isinstance(value, SCHEDULES) else (value,)
    return min(ends), max(ends)


def check_range(owner: str, name: str, value: Schedule, low: float, high: float) -> None:
    """Raise `VarkdError` unless every number that `value` takes lies in [low, high]."""
    smallest, largest = bounds(value)
    if not (low <= smallest and largest <= high):
        raise VarkdError(f"{owner}: {name} must lie in [{low:g}, {high:g}], got {value}")


def resolve(value: V, progress: float, state: Mapping[str, Tensor] | None = None) -> V:
    """`value` with every schedule inside it (nested dataclasses and tuples) replaced by its number.

    Args:
        progress: the fraction of training that is done.
        state: the method's state, where adaptive numbers keep their memory.
    """
    return cast(V, _resolve(value, progress, state or {}, ""))


def schedules(value: Any, where: str = "") -> Iterator[tuple[str, LinearSchedule | ExponentialSchedule | Adaptive]]:
    """Every number inside `value` that changes over training, with its path (which begins with a dot)."""
    if isinstance(value, SCHEDULES):
        yield where, value
    else:
        for name, item in _inner(value):
            yield from schedules(item, f"{where}.{name}")


def adaptives(value: Any) -> Iterator[tuple[str, Adaptive]]:
    """The adaptive numbers inside `value`, each with the key of its memory in the method's state."""
    return ((f"adaptive{where}", found) for where, found in schedules(value) if isinstance(found, Adaptive))


def _resolve(value: Any, progress: float, state: Mapping[str, Tensor], where: str) -> Any:
    if isinstance(value, Adaptive):
        return value.at(state.get(f"adaptive{where}"))
    if isinstance(value, LinearSchedule | ExponentialSchedule):
        return value.at(progress)
    inner = [(name, old, _resolve(old, progress, state, f"{where}.{name}")) for name, old in _inner(value)]
    if isinstance(value, tuple):
        return tuple(new for _, _, new in inner)
    changed = {name: new for name, old, new in inner if new is not old}
    return replace(value, **changed) if changed else value


def _inner(value: Any) -> list[tuple[str, Any]]:
    """The named parts of a tuple or of a dataclass."""
    if isinstance(value, tuple):
        return [(str(index), item) for index, item in enumerate(value)]
    if is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in fields(value)]
    return []
