"""Whose prefixes, and how much does each sequence count: `(batch, scene) -> Context`, for a whole optimiser step.

Every rule is row-local and every random number belongs to a global row, so a context does not depend on how rows are
spread over ranks. Gradients never flow through sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import ClassVar, Literal

import torch
from torch import Tensor

from varkd.backbones.protocol import Backbone
from varkd.distill.schedule import Scalar, check_range, number
from varkd.distill.scores import code_logp
from varkd.errors import VarkdError
from varkd.rollout import Sampler, evaluating, rollout
from varkd.types import Batch, Condition, Context, Part
from varkd.world import Rng, World

State = dict[str, Tensor]
"""What a method remembers between steps; every entry is checkpointed. Keys under "rows/" are split over ranks."""


@dataclass(frozen=True)
class Scene:
    """What a context may look at: the models (handed down, never changed), the method's state, and chance."""

    student: Backbone
    teacher: Backbone | None
    state: Mapping[str, Tensor]
    rng: Rng
    world: World = field(default_factory=World)
    chunk_rows: int = 2048

    def model(self, name: Literal["student", "teacher"]) -> Backbone:
        if name == "student":
            return self.student
        if self.teacher is None:
            raise VarkdError("this method samples from a teacher: give teacher=RUN")
        return self.teacher


@dataclass(frozen=True)
class Data:
    """The images' own codes: teacher forcing."""

    kind: Literal["data"] = "data"
    needs_teacher: ClassVar[bool] = False
    rollouts: ClassVar[tuple[Rollout, ...]] = ()

    def __call__(self, batch: Batch, scene: Scene) -> Context:
        plan = scene.student.plan(len(batch), scene.rng, batch.row_B)
        return Context((Part.of("data", batch.codes_BL, Condition(batch.label_B), plan, batch.row_B),))

    def update(self, context: Context, state: State, rng: Rng) -> State:
        del context, rng
        return state


@dataclass(frozen=True)
class Rollout:
    """Sequences that the student (or the teacher) samples now, for the labels of the batch."""

    by: Literal["student", "teacher"] = "student"
    sampler: Sampler = Sampler()
    kind: Literal["rollout"] = "rollout"

    @property
    def needs_teacher(self) -> bool:
        return self.by == "teacher"

    @property
    def rollouts(self) -> tuple[Rollout, ...]:
        """Every rollout inside a context: its plans are what the teacher must be able to honour."""
        return (self,)

    def __call__(self, batch: Batch, scene: Scene) -> Context:
        condition = Condition(batch.label_B)
        plan = self.sampler.plan(scene.student, scene.rng, batch.row_B)
        uniform_BL = scene.rng.uniform(f"rollout/{self.by}", batch.row_B, plan.order_BL.shape[1])
        samples = rollout(scene.model(self.by), condition, plan, self.sampler, uniform_BL)
        part = Part.of(self.by, samples.codes_BL, condition, plan, batch.row_B)
        return Context((replace(part, behaviour_logp_BL=samples.logp_BL),))

    def update(self, context: Context, state: State, rng: Rng) -> State:
        del context, rng
        return state


@dataclass(frozen=True)
class Replay:
    """Student sequences that are sampled every `every` steps and reused in between, at most `max_age` steps old.

    Each row of the batch keeps a ring of its last `capacity` sequences (with their labels and the step they were
    sampled at) and, between refreshes, draws one of those young enough. A row that has none is sampled afresh.
    """

    rollout: Rollout = Rollout()
    every: int = 4
    capacity: int = 4
    max_age: int = 20
    kind: Literal["replay"] = "replay"

    def __post_init__(self) -> None:
        if self.every < 1 or self.capacity < 1 or self.max_age < 0:
            raise VarkdError("replay: need every >= 1, capacity >= 1 and max_age >= 0")

    @property
    def needs_teacher(self) -> bool:
        return self.rollout.needs_teacher

    @property
    def rollouts(self) -> tuple[Rollout, ...]:
        return (self.rollout,)

    def __call__(self, batch: Batch, scene: Scene) -> Context:
        step, state = scene.rng.step, scene.state
        stale_B = torch.ones(len(batch), dtype=torch.bool, device=batch.row_B.device)
        if step % self.every and "rows/replay_born" in state:
            # A mixture that changes over training brings in rows that have no ring yet.
            known_B = torch.isin(batch.row_B, state["rows/replay_row"])
            age_BC = step - state["rows/replay_born"][self._slots(batch.row_B[known_B], state)]
            stale_B[known_B] = ~self._usable(age_BC).any(1)
        parts = []
        if stale_B.any():
            parts.append(self.rollout(batch.select(stale_B), scene).parts[0])
        if not stale_B.all():
            parts.append(self._reuse(batch.select(~stale_B), scene))
        return Context((_in_row_order(parts),))

    def _usable(self, age_BC: Tensor) -> Tensor:
        return (age_BC >= 0) & (age_BC <= self.max_age)

    def _slots(self, row_B: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        return torch.searchsorted(state["rows/replay_row"], row_B)

    def _reuse(self, batch: Batch, scene: Scene) -> Part:
        state, slot_B = scene.state, self._slots(batch.row_B, scene.state)
        age_BC = scene.rng.step - state["rows/replay_born"][slot_B]
        uniform_B = scene.rng.uniform("replay", batch.row_B, 1).squeeze(1)
        usable_BC = self._usable(age_BC)
        nth_B = (uniform_B * usable_BC.sum(1)).long()
        pick_B = ((usable_BC.cumsum(1) > nth_B.unsqueeze(1)) & usable_BC).int().argmax(1)
        codes_BL, logp_BL = (state[f"rows/replay_{name}"][slot_B, pick_B] for name in ("codes", "logp"))
        condition = Condition(state["rows/replay_label"][slot_B, pick_B])
        order_BL = state["rows/replay_order"][slot_B, pick_B]  # the very order in which the codes were sampled
        plan = self.rollout.sampler.plan(scene.student, scene.rng, batch.row_B, order_BL)
        part = Part.of(self.rollout.by, codes_BL, condition, plan, batch.row_B)
        return replace(part, behaviour_logp_BL=logp_BL, age_B=age_BC.gather(1, pick_B.unsqueeze(1)).squeeze(1))

    def update(self, context: Context, state: State, rng: Rng) -> State:
        """Push the fresh sequences (age 0) of `context` into the rings of their rows."""
        fresh = [part.select(part.age_B == 0) for part in context.parts if part.source == self.rollout.by]
        # A rank may get its first student rows later than another one, but all of them keep (empty) rings.
        part = merge(fresh) if fresh else context.parts[0].select(slice(0, 0))
        state = self._with_rows(state, part)
        if not len(part):
            return state
        slot_B = self._slots(part.row_B, state)
        place_B = state["rows/replay_born"][slot_B].argmin(1)  # the oldest entry, or an empty one (-1e9)
        assert part.behaviour_logp_BL is not None
        values = {
            "codes": part.codes_BL, "logp": part.behaviour_logp_BL, "label": part.condition.label_B,
            "born": torch.full_like(part.row_B, rng.step), "order": part.plan.order_BL,
        }  # fmt: skip
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
        grown = {**state, "rows/replay_row": row[order]}
        for name, blank in empty.items():
            old = state.get(f"rows/replay_{name}", blank[:0])
            grown[f"rows/replay_{name}"] = torch.cat([old, blank])[order]
        return grown


@dataclass(frozen=True)
class Share:
    """One source of a mixture and the fraction of the rows that it gets."""

    contexts: Data | Rollout | Replay
    fraction: Scalar

    def __post_init__(self) -> None:
        check_range("share", "fraction", self.fraction, 0, 1)


@dataclass(frozen=True)
class Mixture:
    """Several sources in one batch, with a fixed number of rows each (no coin flips: constant cost, no rank skew).

    Fractions are relative to their sum. Rows are dealt out so that every prefix of the batch holds the mixture to
    within one row per source.
    """

    shares: tuple[Share, ...]
    kind: Literal["mixture"] = "mixture"

    @property
    def needs_teacher(self) -> bool:
        return any(share.contexts.needs_teacher for share in self.shares)

    @property
    def rollouts(self) -> tuple[Rollout, ...]:
        return tuple(rollout for share in self.shares for rollout in share.contexts.rollouts)

    def __call__(self, batch: Batch, scene: Scene) -> Context:
        fractions = tuple(number(share.fraction) for share in self.shares)
        last_row = int(batch.row_B.max()) if len(batch) else -1
        owner = torch.tensor(composition(fractions, last_row + 1), device=batch.row_B.device)[batch.row_B]
        parts: list[Part] = []
        for index, share in enumerate(self.shares):
            rows = batch.select(owner == index)
            if len(rows):
                parts.extend(share.contexts(rows, scene).parts)
        return Context(tuple(parts))

    def update(self, context: Context, state: State, rng: Rng) -> State:
        for share in self.shares:
            state = share.contexts.update(context, state, rng)
        return state


@dataclass(frozen=True)
class Reweighted:
    """Sequence weights on student contexts by how plausible the teacher finds them.

    w(x) = clip(B softmax(kappa r(x)), 1/clip, clip) with r(x) the mean over positions of log p - log q, renormalised to
    mean 1. kappa = 0 is uniform; the number of codes L would be self-normalised importance weighting, which collapses
    on one sequence. So kappa is lowered, by bisection, until the effective sample size (sum w)^2 / sum w^2 is at least
    `ess_floor` of the batch. `shuffle=True` is the control: the same weights on the wrong sequences.
    An independent reading of "student samples with a reweighted distillation signal" (arXiv 2606.06078).
    """

    contexts: Mixture | Rollout | Replay
    kappa: float = 4.0
    clip: float = 4.0
    ess_floor: float = 0.5
    shuffle: bool = False
    kind: Literal["reweighted"] = "reweighted"
    needs_teacher: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_range("reweighted", "ess_floor", self.ess_floor, 0, 1)
        if self.kappa < 0 or self.clip < 1:
            raise VarkdError(f"reweighted: need kappa >= 0 and clip >= 1, got {self.kappa} and {self.clip}")

    @property
    def rollouts(self) -> tuple[Rollout, ...]:
        return self.contexts.rollouts

    def __call__(self, batch: Batch, scene: Scene) -> Context:
        context = self.contexts(batch, scene)
        student = [part for part in context.parts if part.source == "student"]
        none = batch.codes_BL.new_zeros(0)
        ratio_B = torch.cat([none.float(), *(log_ratio(part, scene) for part in student)])
        row_B = torch.cat([none, *(part.row_B for part in student)])
        # Every rank takes part in both gathers, also one that holds no student row in this step.
        weight_of_row = self._weights(scene.world.gather_varied(ratio_B), scene.world.gather_varied(row_B), scene.rng)
        weighed = [replace(p, weight_B=weight_of_row(p.row_B)) if p.source == "student" else p for p in context.parts]
        return Context(tuple(weighed))

    def update(self, context: Context, state: State, rng: Rng) -> State:
        return self.contexts.update(context, state, rng)

    def _weights(self, ratio_B: Tensor, row_B: Tensor, rng: Rng) -> Callable[[Tensor], Tensor]:
        """A function from global rows to their weights, from the whole step's log ratios."""
        order = torch.argsort(row_B)
        row_B, ratio_B = row_B[order], ratio_B[order]  # so that the shuffle does not depend on the number of ranks
        weight_B = sequence_weights(ratio_B, self.kappa, self.clip, self.ess_floor) if len(ratio_B) else ratio_B
        if self.shuffle:
            shuffled = torch.randperm(len(weight_B), generator=rng.generator("shuffle-weights"))
            weight_B = weight_B[shuffled.to(weight_B.device)]
        return lambda rows: weight_B[torch.searchsorted(row_B, rows)]


Contexts = Data | Rollout | Replay | Mixture | Reweighted


@torch.no_grad()
def log_ratio(part: Part, scene: Scene) -> Tensor:
    """r(x) = mean over positions of log p(code) - log q(code), in nats, float32 (B,)."""
    logp = []
    for model in (scene.model("teacher"), scene.student):
        with evaluating(model):
            hidden_BLD = model(part.codes_BL, part.condition, part.plan)
        logp.append(code_logp(model.head, hidden_BLD, part.codes_BL, scene.chunk_rows))
    return (logp[0] - logp[1]).mean(1)


def sequence_weights(ratio_B: Tensor, kappa: float, clip: float, ess_floor: float) -> Tensor:
    """The weights of `Reweighted`: mean exactly 1, effective sample size at least `ess_floor` * B."""

    def weights(strength: float) -> Tensor:
        clipped = ((strength * ratio_B).softmax(0) * len(ratio_B)).clamp(1 / clip, clip)
        return clipped / clipped.mean()

    strong = weights(kappa)
    if effective_share(strong) >= ess_floor:
        return strong
    low, high = 0.0, kappa
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if effective_share(weights(middle)) >= ess_floor else (low, middle)
    return weights(low)


def effective_share(weight_B: Tensor) -> float:
    """Effective sample size over the number of samples: (sum w)^2 / (B sum w^2)."""
    return float(weight_B.sum().square() / weight_B.square().sum() / len(weight_B))


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


def _in_row_order(parts: list[Part]) -> Part:
    """One part from several of the same source and plan sizes, its rows sorted by global row."""
    if len(parts) == 1:
        return parts[0]
    return merge(parts).select(torch.argsort(torch.cat([part.row_B for part in parts])))


def merge(parts: list[Part]) -> Part:
    """Stack parts whose plans have the same step sizes. The source is that of the first."""
    first = parts[0]
    logp = [part.behaviour_logp_BL for part in parts]
    accept = [part.accept_BL for part in parts]
    scales = [part.condition.scale_B for part in parts]
    return Part(
        source=first.source,
        codes_BL=torch.cat([part.codes_BL for part in parts]),
        supervision_BL=torch.cat([part.supervision_BL for part in parts]),
        condition=Condition(torch.cat([part.condition.label_B for part in parts]), _cat_if_all(scales)),
        plan=replace(first.plan, order_BL=torch.cat([part.plan.order_BL for part in parts])),
        row_B=torch.cat([part.row_B for part in parts]),
        weight_B=torch.cat([part.weight_B for part in parts]),
        age_B=torch.cat([part.age_B for part in parts]),
        behaviour_logp_BL=_cat_if_all(logp),
        accept_BL=_cat_if_all(accept),
    )


def _cat_if_all(tensors: list[Tensor | None]) -> Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(present) if len(present) == len(tensors) else None
