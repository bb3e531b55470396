"""Student sequences that are sampled now and then, and reused in between: a ring of them for every row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from varkd.distill.bestof import BestOf
from varkd.distill.inputs import Cost, Prefixes, State, StepInputs, in_row_order, merge
from varkd.distill.prefixes import MixedRollout, MixtureSampling, Rollout, SpeculativeSampling
from varkd.distill.schedule import Schedule, check_range, value_of, words
from varkd.errors import VarkdError
from varkd.rollout import Sampler
from varkd.types import Batch, Condition, Context, Part, Source
from varkd.world import Rng


@dataclass(frozen=True)
class Replay(Prefixes):
    """Student sequences that are sampled every `every` steps and reused in between, at most `max_age` steps old.

    Each row of the batch keeps a ring of its last `capacity` sequences (with their labels and the step they were
    sampled at) and, between refreshes, draws one of those young enough. A row that has none is sampled afresh.
    With `fresh`, each row is instead sampled anew with that probability in every step (DistiLLM lets it fall to 0).
    """

    rollout: Rollout | MixedRollout | MixtureSampling | SpeculativeSampling | BestOf = Rollout()
    every: int = 4
    fresh: Schedule | None = None
    capacity: int = 4
    max_age: int = 20
    kind: Literal["replay"] = "replay"
    label: ClassVar[str] = "{rollout}, replayed"

    def __post_init__(self) -> None:
        if self.every < 1 or self.capacity < 1 or self.max_age < 0:
            raise VarkdError("replay: need every >= 1, capacity >= 1 and max_age >= 0")
        if self.fresh is not None:
            check_range("replay", "fresh", self.fresh, 0, 1)

    @property
    def shown(self) -> tuple[str, ...]:
        """The settings that tell it apart."""
        return ("every" if self.fresh is None else "fresh", "max_age")

    @property
    def summary(self) -> str:
        often = f"every {self.every} steps" if self.fresh is None else f"at a rate of {words(self.fresh)}"
        return (
            f"{self.rollout.summary}; each row keeps its last {self.capacity} and draws one at most {self.max_age} "
            f"steps old, or samples anew {often}"
        )

    @property
    def cost(self) -> Cost:
        return self.rollout.cost.times(1 / self.every if self.fresh is None else value_of(self.fresh))

    @property
    def keeps_rows(self) -> bool:
        return True

    @property
    def needs_teacher(self) -> bool:
        return self.rollout.needs_teacher

    @property
    def needs_reference(self) -> bool:
        return self.rollout.needs_reference

    @property
    def sources(self) -> tuple[Source, ...]:
        return self.rollout.sources

    @property
    def samplers(self) -> tuple[Sampler, ...]:
        return self.rollout.samplers

    def no_reward(self, source: Source) -> str | None:
        return self.rollout.no_reward(source)

    def __call__(self, batch: Batch, inputs: StepInputs) -> Context:
        step, state = inputs.rng.step, inputs.state
        stale_B = self._due(batch, inputs.rng)
        if "rows/replay_born" in state:
            # A mixture that changes over training brings in rows that have no ring yet.
            known_B = torch.isin(batch.row_B, state["rows/replay_row"])
            age_BC = step - state["rows/replay_born"][self._slots(batch.row_B[known_B], state)]
            stale_B[known_B] |= ~self._usable(age_BC).any(1)
            stale_B[~known_B] = True
        else:
            stale_B[:] = True
        parts = []
        if stale_B.any():
            parts.append(self.rollout(batch.select(stale_B), inputs).parts[0])
        if not stale_B.all():
            parts.append(self._reuse(batch.select(~stale_B), inputs))
        return Context((in_row_order(parts),))

    def _due(self, batch: Batch, rng: Rng) -> Tensor:
        """The rows to be sampled anew whatever their rings hold, bool (B,)."""
        if self.fresh is None:
            return torch.full_like(batch.row_B, rng.step % self.every == 0, dtype=torch.bool)
        return rng.uniform("replay-fresh", batch.row_B, 1).squeeze(1) < value_of(self.fresh)

    def _usable(self, age_BC: Tensor) -> Tensor:
        return (age_BC >= 0) & (age_BC <= self.max_age)

    def _slots(self, row_B: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        return torch.searchsorted(state["rows/replay_row"], row_B)

    def _reuse(self, batch: Batch, inputs: StepInputs) -> Part:
        state, slot_B = inputs.state, self._slots(batch.row_B, inputs.state)
        age_BC = inputs.rng.step - state["rows/replay_born"][slot_B]
        uniform_B = inputs.rng.uniform("replay", batch.row_B, 1).squeeze(1)
        usable_BC = self._usable(age_BC)
        nth_B = (uniform_B * usable_BC.sum(1)).long()
        pick_B = ((usable_BC.cumsum(1) > nth_B.unsqueeze(1)) & usable_BC).int().argmax(1)
        codes_BL, logp_BL = (state[f"rows/replay_{name}"][slot_B, pick_B] for name in ("codes", "logp"))
        scales = state.get("rows/replay_scale")
        guidance_B = None if scales is None else scales[slot_B, pick_B]
        condition = Condition(state["rows/replay_label"][slot_B, pick_B], guidance_B)
        order_BL = state["rows/replay_order"][slot_B, pick_B]  # the very order in which the codes were sampled
        plan = self.rollout.sampler.plan(inputs.student, inputs.rng, batch.row_B, order_BL)
        part = Part.of(self.sources[0], codes_BL, condition, plan, batch.row_B)
        return replace(part, behavior_logp_BL=logp_BL, age_B=age_BC.gather(1, pick_B.unsqueeze(1)).squeeze(1))

    def update(self, context: Context, state: State, rng: Rng) -> State:
        """Push the fresh sequences (age 0) of `context` into the rings of their rows."""
        fresh = [part.select(part.age_B == 0) for part in context.parts if len(part) and part.source in self.sources]
        # A rank may get its first student rows later than another one, but all of them keep (empty) rings.
        part = merge(fresh) if fresh else context.parts[0].select(slice(0, 0))
        state = self._with_rows(state, part)
        if not len(part):
            return state
        slot_B = self._slots(part.row_B, state)
        place_B = state["rows/replay_born"][slot_B].argmin(1)  # the oldest entry, or an empty one (-1e9)
        assert part.behavior_logp_BL is not None
        values = {
            "codes": part.codes_BL,
            "logp": part.behavior_logp_BL,
            "label": part.condition.label_B,
            "born": torch.full_like(part.row_B, rng.step),
            "order": part.plan.order_BL,
        }
        if part.condition.guidance_B is not None:
            values["scale"] = part.condition.guidance_B
        updated = dict(state)
        for name, value in values.items():
            updated[f"rows/replay_{name}"] = state[f"rows/replay_{name}"].index_put((slot_B, place_B), value)
        return updated

    def _with_rows(self, state: State, part: Part) -> State:
        """Make room for rows that have no ring yet, keeping the rings sorted by row."""
        known = state.get("rows/replay_row", part.row_B.new_empty(0))
        new_B = part.row_B[~torch.isin(part.row_B, known)]
        if not len(new_B) and "rows/replay_row" in state:
            return state
        row = torch.cat([known, new_B])
        order = torch.argsort(row)
        length, shape = part.codes_BL.shape[1], (len(new_B), self.capacity)
        empty = {
            "codes": part.codes_BL.new_zeros(*shape, length),
            "order": part.codes_BL.new_zeros(*shape, length),
            "logp": torch.zeros(*shape, length, device=row.device),
            "label": part.row_B.new_zeros(shape),
            "born": part.row_B.new_full(shape, -(10**9)),
        }
        if part.condition.guidance_B is not None:
            empty["scale"] = torch.zeros(shape, device=row.device)
        grown = {**state, "rows/replay_row": row[order]}
        for name, blank in empty.items():
            old = state.get(f"rows/replay_{name}", blank[:0])
            grown[f"rows/replay_{name}"] = torch.cat([old, blank])[order]
        return grown
