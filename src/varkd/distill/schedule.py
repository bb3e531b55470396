"""Numbers that change over training. `method.at(progress)` turns each one into a plain float before it is used."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal, TypeVar, cast

from varkd.errors import VarkdError

V = TypeVar("V")


@dataclass(frozen=True)
class Ramp:
    """Linear from `start` to `end` between the fractions `begin` and `until` of training; constant outside."""

    start: float
    end: float
    begin: float = 0.0
    until: float = 1.0
    kind: Literal["ramp"] = "ramp"

    def __post_init__(self) -> None:
        if not 0 <= self.begin <= self.until <= 1:
            raise VarkdError(f"ramp: need 0 <= begin <= until <= 1, got {self.begin} and {self.until}")

    def at(self, progress: float) -> float:
        if progress >= self.until:
            return self.end
        if progress <= self.begin:
            return self.start
        share = (progress - self.begin) / (self.until - self.begin)
        return self.start + (self.end - self.start) * share


@dataclass(frozen=True)
class Decay:
    """From `start` towards `end` by base^(-progress): after all of training 1/base of the way is left (ImitKD)."""

    start: float
    end: float
    base: float = 200.0
    kind: Literal["decay"] = "decay"

    def __post_init__(self) -> None:
        if not self.base > 1:
            raise VarkdError(f"decay: base must be above 1, got {self.base}")

    def at(self, progress: float) -> float:
        return self.end + (self.start - self.end) * self.base**-progress


SCHEDULES = (Ramp, Decay)
Scalar = float | Ramp | Decay


def number(value: Scalar) -> float:
    """The float of a value that `resolve` has already fixed."""
    if isinstance(value, SCHEDULES):
        raise TypeError("this value still changes over training: call method.at(progress) first")
    return value


def bounds(value: Scalar) -> tuple[float, float]:
    """The smallest and the largest number that a value takes."""
    ends = (value.start, value.end) if isinstance(value, SCHEDULES) else (value,)
    return min(ends), max(ends)


def check_range(owner: str, name: str, value: Scalar, low: float, high: float) -> None:
    """Raise `VarkdError` unless every number that `value` takes lies in [low, high]."""
    smallest, largest = bounds(value)
    if not (low <= smallest and largest <= high):
        raise VarkdError(f"{owner}: {name} must lie in [{low:g}, {high:g}], got {value}")


def resolve(value: V, progress: float) -> V:
    """`value` with every schedule inside it (nested dataclasses and tuples) replaced by its number at `progress`."""
    return cast(V, _resolve(value, progress))


def _resolve(value: Any, progress: float) -> Any:
    if isinstance(value, SCHEDULES):
        return value.at(progress)
    if isinstance(value, tuple):
        return tuple(_resolve(item, progress) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        inner = {field.name: getattr(value, field.name) for field in fields(value)}
        changed = {name: new for name, old in inner.items() if (new := _resolve(old, progress)) is not old}
        return replace(value, **changed) if changed else value
    return value
