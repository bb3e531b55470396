"""Several sources in one batch, with a fixed number of rows each."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache
from typing import ClassVar, Literal

import torch
from torch import Tensor

from varkd.distill.bestof import BestOf
from varkd.distill.inputs import Cost, Prefixes, State, StepInputs
from varkd.distill.prefixes import (
    Completions,
    Data,
    MixedRollout,
    MixtureSampling,
    ParallelSampling,
    Rollout,
    ScheduledSampling,
    SpeculativeSampling,
)
from varkd.distill.replay import Replay
from varkd.distill.schedule import Schedule, bounds, check_range, value_of, words
from varkd.distill.spaces import CodebookTables
from varkd.errors import VarkdError
from varkd.rollout import Sampler
from varkd.types import Batch, Context, Part, Source
from varkd.world import Rng

Single = (
    Data
    | Rollout
    | MixtureSampling
    | SpeculativeSampling
    | MixedRollout
    | ScheduledSampling
    | ParallelSampling
    | Completions
    | Replay
    | BestOf
)


@dataclass(frozen=True)
class Share:
    """One source of a mixture and the fraction of the rows that it gets; "rest" is 1 minus the others."""

    contexts: Single
    fraction: Schedule | Literal["rest"]
    label: ClassVar[str] = "{contexts} {amount}"

    def __post_init__(self) -> None:
        if self.fraction != "rest":
            check_range("share", "fraction", self.fraction, 0, 1)

    @property
    def size(self) -> str:
        """The fraction in words."""
        return "the rest" if self.fraction == "rest" else words(self.fraction)

    @property
    def amount(self) -> str:
        """`size`, in brackets where it is more than a number."""
        return f"[{self.size}]" if " " in self.size else self.size

    @property
    def rows(self) -> str:
        """Which rows they are, in words."""
        if self.fraction == "rest":
            return "all other rows"
        first, last = bounds(self.fraction)
        return f"{100 * first:.4g} % of the rows" if first == last else f"a share of the rows, {self.size}"


@dataclass(frozen=True)
class Mixture(Prefixes):
    """Several sources in one batch, with a fixed number of rows each (no coin flips: constant cost, no rank skew).

    Fractions are relative to their sum. Rows are assigned so that every prefix of the batch holds the mixture to
    within one row per source.
    """

    shares: tuple[Share, ...]
    kind: Literal["mixture"] = "mixture"
    label: ClassVar[str] = "{shares}"

    def __post_init__(self) -> None:
        if sum(share.contexts.keeps_rows for share in self.shares) > 1:
            raise VarkdError("mixture: one replay at most, for its rings are kept by row")
        if sum(share.fraction == "rest" for share in self.shares) > 1:
            raise VarkdError("mixture: the rest can go to one share only")

    @property
    def summary(self) -> str:
        return "; ".join(self.summaries)

    @property
    def cost(self) -> Cost:
        shares, total = self.fractions(), sum(self.fractions())
        parts = [(share / total, each.contexts.cost) for share, each in zip(shares, self.shares, strict=True)]
        return Cost(
            **{item.name: sum(share * getattr(cost, item.name) for share, cost in parts) for item in fields(Cost)}
        )

    @property
    def summaries(self) -> list[str]:
        return [f"{share.rows}: {share.contexts.summary}" for share in self.shares]

    @property
    def inner(self) -> tuple[Prefixes, ...]:
        return tuple(share.contexts for share in self.shares)

    @property
    def splices(self) -> bool:
        return any(share.contexts.splices for share in self.shares)

    @property
    def needs_teacher(self) -> bool:
        return any(share.contexts.needs_teacher for share in self.shares)

    @property
    def needs_reference(self) -> bool:
        return any(share.contexts.needs_reference for share in self.shares)

    @property
    def sources(self) -> tuple[Source, ...]:
        return tuple(dict.fromkeys(source for share in self.shares for source in share.contexts.sources))

    @property
    def samplers(self) -> tuple[Sampler, ...]:
        return tuple(sampler for share in self.shares for sampler in share.contexts.samplers)

    def no_reward(self, source: Source) -> str | None:
        makers = [share.contexts for share in self.shares if source in share.contexts.sources]
        reasons = [reason for contexts in makers if (reason := contexts.no_reward(source))]
        return reasons[0] if reasons else None

    def prepare(self, codebook_VE: Tensor) -> CodebookTables:
        codebook_tables: CodebookTables = {}
        for share in self.shares:
            codebook_tables.update(share.contexts.prepare(codebook_VE))
        return codebook_tables

    def fractions(self) -> tuple[float, ...]:
        """The fraction of every share, as numbers."""
        fixed = [None if share.fraction == "rest" else value_of(share.fraction) for share in self.shares]
        rest = max(0.0, 1.0 - sum(fraction for fraction in fixed if fraction is not None))
        return tuple(rest if fraction is None else fraction for fraction in fixed)

    def __call__(self, batch: Batch, inputs: StepInputs) -> Context:
        owner_B = self._owner(batch.row_B)
        parts: list[Part] = []
        for index, share in enumerate(self.shares):
            rows = batch.select(owner_B == index)
            if len(rows):
                parts.extend(share.contexts(rows, inputs).parts)
        return Context(tuple(parts))

    def update(self, context: Context, state: State, rng: Rng) -> State:
        for index, share in enumerate(self.shares):
            # Each source learns of its own rows only: a ring must not take in what another source made.
            mine = [part.select(self._owner(part.row_B) == index) for part in context.parts]
            state = share.contexts.update(Context(tuple(mine)), state, rng)
        return state

    def _owner(self, row_B: Tensor) -> Tensor:
        """The index of the share that each global row belongs to in this step."""
        last_row = int(row_B.max()) if len(row_B) else -1
        return torch.tensor(composition(self.fractions(), last_row + 1), device=row_B.device, dtype=torch.long)[row_B]


Contexts = Single | Mixture


@lru_cache(maxsize=256)
def composition(fractions: tuple[float, ...], num_rows: int) -> tuple[int, ...]:
    """The source of each row: of those that are due, the one whose deadline comes first (Tijdeman 1980).

    With two sources that is the one furthest behind its quota; with more, that simpler rule can miss by over one row.
    """
    total = sum(fractions)
    if total <= 0:
        raise VarkdError("mixture: at least one fraction must be above 0")
    share = {source: fraction / total for source, fraction in enumerate(fractions) if fraction > 0}
    due = 1 / max(2 * len(share) - 2, 1)
    given, owners = dict.fromkeys(share, 0), []
    for row in range(num_rows):
        behind = {source: (row + 1) * part - given[source] for source, part in share.items()}
        waiting = [source for source in share if behind[source] >= due - 1e-9]
        owner = min(waiting, key=lambda source: ((1 - due - behind[source]) / share[source], source))
        given[owner] += 1
        owners.append(owner)
    return tuple(owners)
