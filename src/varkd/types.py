"""The values that flow through varkd, and the shape legend that every file uses.

    B  sequences (images) in a batch          N  rows: positions of several sequences, flattened
    L  positions (codes) of one sequence      K  outcomes that a divergence compares (codes, clusters, ...)
    D  width of a backbone                    S  decoding steps of a plan; sum(sizes) == L
    V  codes in the tokenizer's codebook      n  positions of one decoding step
    E  width of a codebook vector             H W C  height, width, channels

A suffix names the axes in order: `hidden_BLD`, `codes_BL`, `label_B`. Code and label tensors are int64.
No torch.nn and no I/O here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor

Source = Literal["data", "student", "teacher"]


@dataclass(frozen=True)
class Batch:
    """Rows that the loader hands to the contexts of one optimizer step.

    `row_B` is each row's index in the step's *global* batch (all ranks, all micro-batches). Every random draw of a row
    is seeded by it, which is why the split over ranks and micro-batches changes no number. `sequence_B` names the
    training sequence, image * views + view, by which a teacher cache finds it; None for codes of other origin.
    """

    codes_BL: Tensor
    label_B: Tensor
    row_B: Tensor
    guidance_B: Tensor | None = None
    sequence_B: Tensor | None = None

    def __len__(self) -> int:
        return len(self.label_B)

    @property
    def condition(self) -> Condition:
        """The labels, and the guidance scales where the step draws some (`Guided.guidance_B`)."""
        return Condition(self.label_B, self.guidance_B)

    def to(self, device: torch.device | str) -> Batch:
        """The same rows on `device`."""
        return self._each(lambda value: value.to(device))

    def select(self, index: Tensor) -> Batch:
        """The rows of a bool mask or an index tensor."""
        return self._each(lambda value: value[index])

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: change(value) for name, value in values.items() if value is not None})


@dataclass(frozen=True)
class Condition:
    """What a sequence is conditioned on: the class, and (for a scale-conditioned student) a guidance scale."""

    label_B: Tensor
    guidance_B: Tensor | None = None

    def __len__(self) -> int:
        return len(self.label_B)

    def null(self, null_label: int) -> Condition:
        """The same rows with the label dropped (the unconditional branch)."""
        return replace(self, label_B=torch.full_like(self.label_B, null_label))

    def select(self, index: Tensor | slice) -> Condition:
        return Condition(self.label_B[index], None if self.guidance_B is None else self.guidance_B[index])


@dataclass(frozen=True)
class Plan:
    """Which positions are predicted in which step: `order_BL[b, j]` is the raster position generated j-th.

    `sizes` partitions the order into steps. Raster: arange, (1, 1, ...); next scale: arange, (1, 4, 9, ...);
    random order: a permutation per row, n positions per step.
    """

    order_BL: Tensor
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if sum(self.sizes) != self.order_BL.shape[1] or min(self.sizes) < 1:
            raise ValueError(f"step sizes {self.sizes} do not partition {self.order_BL.shape[1]} positions")

    @property
    def rank_BL(self) -> Tensor:
        """The inverse permutation: `rank_BL[b, i]` says when raster position i is generated."""
        return torch.argsort(self.order_BL, dim=1)

    @property
    def step_BL(self) -> Tensor:
        """The decoding step of every raster position."""
        step_of_rank = torch.repeat_interleave(torch.arange(len(self.sizes)), torch.tensor(self.sizes))
        return step_of_rank.to(self.order_BL.device)[self.rank_BL]

    def select(self, index: Tensor | slice) -> Plan:
        return Plan(self.order_BL[index], self.sizes)

    def before(self, value_BL: Tensor) -> Tensor:
        """For every position the sum of `value_BL` over strictly earlier steps: what its prefix has gathered.

        Positions of one step (a scale, a parallel set) do not see each other, so they share one sum.
        """
        step_BL = self.step_BL
        sums_BS = value_BL.new_zeros(len(value_BL), len(self.sizes)).scatter_add(1, step_BL, value_BL)
        return (sums_BS.cumsum(1) - sums_BS).gather(1, step_BL)

    def after(self, value_BL: Tensor) -> Tensor:
        """For every position the sum of `value_BL` over strictly later steps: what it can still influence."""
        step_BL = self.step_BL
        sums_BS = value_BL.new_zeros(len(value_BL), len(self.sizes)).scatter_add(1, step_BL, value_BL)
        return (sums_BS.sum(1, keepdim=True) - sums_BS.cumsum(1)).gather(1, step_BL)


@dataclass(frozen=True)
class Part:
    """Sequences of one source inside a context, with everything that a loss needs to know of them.

    `codes_BL` is the prefix that the models see, `supervision_BL` the target code of each position (they differ in
    scheduled sampling). `weight_B` weighs whole sequences (mean 1 over the optimizer step), `age_B` counts optimizer
    steps since a sequence was sampled, `behavior_logp_BL` is the log-probability under which each code was drawn,
    `accept_BL` says which of the student's proposals a verifier accepted. `generated_BL` marks what was sampled where a
    sequence continues one of the data (mixed rollouts); None where the whole sequence has one source. `sequence_B`
    is that of `Batch` on the data's own sequences.
    """

    source: Source
    codes_BL: Tensor
    supervision_BL: Tensor
    condition: Condition
    plan: Plan
    row_B: Tensor
    weight_B: Tensor
    age_B: Tensor
    behavior_logp_BL: Tensor | None = None
    accept_BL: Tensor | None = None
    generated_BL: Tensor | None = None
    sequence_B: Tensor | None = None

    @classmethod
    def of(cls, source: Source, codes_BL: Tensor, condition: Condition, plan: Plan, row_B: Tensor) -> Part:
        """A fresh part: supervised by its own codes, unit weights, age 0."""
        weight_B = torch.ones(len(row_B), device=codes_BL.device)
        return cls(source, codes_BL, codes_BL, condition, plan, row_B, weight_B, torch.zeros_like(row_B))

    def __len__(self) -> int:
        return len(self.row_B)

    def select(self, index: Tensor | slice) -> Part:
        """The rows of a mask, an index tensor or a slice."""

        def pick(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value[index]
            return value.select(index) if isinstance(value, Condition | Plan) else value

        return Part(**{field.name: pick(getattr(self, field.name)) for field in fields(self)})


@dataclass(frozen=True)
class Context:
    """The prefixes of one optimizer step: parts of one or several sources."""

    parts: tuple[Part, ...]

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def micro_batches(self, count: int) -> Iterator[Context]:
        """Cut the rows, part after part, into `count` contexts of nearly equal size (empty ones are left out).

        How many come out depends on the number of rows only, not on the parts: ranks that hold other shares of a
        mixture still make equally many passes through a sharded model.
        """
        starts = list(accumulate((len(part) for part in self.parts), initial=0))
        for index in range(count):
            begin, end = _bounds(len(self), count, index)
            chunks = [
                part.select(slice(max(begin - start, 0), max(end - start, 0)))
                for part, start in zip(self.parts, starts, strict=False)
            ]
            if end > begin:
                yield Context(tuple(chunk for chunk in chunks if len(chunk)))

    def drop_labels(self, rate: float, null_label: int, uniform_of: Sequence[Tensor]) -> Context:
        """Replace the label of each row whose uniform number is below `rate` by the null label.

        It acts after rollouts, so a null-label row keeps the prefix that was sampled with its class.
        """
        parts = []
        for part, uniform_B in zip(self.parts, uniform_of, strict=True):
            label_B = torch.where(uniform_B < rate, null_label, part.condition.label_B)
            parts.append(replace(part, condition=replace(part.condition, label_B=label_B)))
        return Context(tuple(parts))


def state_hash(head: str, state: Mapping[str, Tensor]) -> str:
    """SHA-256 over a description and the named tensors' bytes: names a tokenizer or a teacher in run records."""
    digest = hashlib.sha256(head.encode())
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _bounds(length: int, count: int, index: int) -> tuple[int, int]:
    return length * index // count, length * (index + 1) // count
