"""Contexts: who gets which rows, what is sampled when, and how much each sequence counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reference import step_inputs
from varkd.backbones.protocol import Backbone
from varkd.backbones.store import build
from varkd.distill import prefixes as module
from varkd.distill.credit import FutureReturn, Importance, NoCredit, PrefixDiscrepancy, Reward
from varkd.distill.divergences import CrossEntropy
from varkd.distill.inputs import Prefixes, State, StepInputs, merge
from varkd.distill.method import Method, Term
from varkd.distill.mixture import Mixture, Share, composition
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
from varkd.distill.schedule import LinearSchedule, Plateau, resolve
from varkd.distill.scores import code_logp
from varkd.errors import VarkdError
from varkd.rollout import Sampler
from varkd.types import Batch, Condition, Context, Part
from varkd.world import Rng


def inputs(student: Backbone, teacher: Backbone | None = None, step: int = 0, state: State | None = None) -> StepInputs:
    return step_inputs(student, teacher, state or {}, Rng(0, step), chunk_rows=5)


def same_part(one: Part, other: Part) -> bool:
    fields = ("codes_BL", "supervision_BL", "row_B", "weight_B", "age_B")
    tensors = all(torch.equal(getattr(one, name), getattr(other, name)) for name in fields)
    return tensors and torch.equal(one.condition.label_B, other.condition.label_B) and one.source == other.source


# ---- composition and mixtures


@settings(max_examples=200, deadline=None)
@given(fractions=st.lists(st.floats(0, 1), min_size=1, max_size=6).filter(lambda f: sum(f) > 1e-3))
def test_every_prefix_holds_its_quota_within_one_row(fractions: list[float]):
    owners = composition(tuple(fractions), 80)
    total, counts = sum(fractions), [0] * len(fractions)
    for row, owner in enumerate(owners):
        counts[owner] += 1
        for source, fraction in enumerate(fractions):
            assert abs(counts[source] - (row + 1) * fraction / total) < 1
            assert fraction > 0 or counts[source] == 0


def test_four_sources_that_the_greedy_rule_gets_wrong():
    fractions = (6, 0.11852857931561467, 6, 0.5338567274761061)
    counts, total = [0.0] * 4, sum(fractions)
    for row, owner in enumerate(composition(fractions, 200)):
        counts[owner] += 1
        assert max(abs(c - (row + 1) * f / total) for c, f in zip(counts, fractions, strict=True)) <= 1 - 1 / 6 + 1e-6


def test_an_empty_mixture_is_refused():
    with pytest.raises(VarkdError, match="at least one fraction"):
        composition((0.0, 0.0), 4)
    with pytest.raises(VarkdError, match="fraction must lie in"):
        Share(Data(), 1.5)


def test_without_student_rows_nothing_is_sampled(student, batch, monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("rollout was called")

    monkeypatch.setattr(module, "rollout", refuse)
    mixture = Mixture((Share(Data(), 1.0), Share(Rollout(), 0.0)))
    (part,) = mixture(batch, inputs(student)).parts
    assert part.source == "data" and torch.equal(part.codes_BL, batch.codes_BL)


def test_without_data_rows_the_codes_are_never_read(student, batch):
    mixture = Mixture((Share(Data(), 0.0), Share(Rollout(), 1.0)))
    garbage = replace(batch, codes_BL=torch.full_like(batch.codes_BL, 10**9))
    (part,) = mixture(garbage, inputs(student)).parts
    assert part.source == "student" and same_part(part, mixture(batch, inputs(student)).parts[0])
    assert part.codes_BL.max() < student.vocab_size


def test_a_mixture_deals_every_row_to_one_source(student, teacher, batch):
    mixture = Mixture((Share(Data(), 0.5), Share(Rollout(), 0.25), Share(Rollout("teacher"), 0.25)))
    parts = mixture(batch, inputs(student, teacher)).parts
    assert {part.source: len(part) for part in parts} == {"data": 4, "student": 2, "teacher": 2}
    rows = torch.cat([part.row_B for part in parts])
    assert torch.equal(rows.sort().values, batch.row_B)
    for part in parts:
        assert torch.equal(part.condition.label_B, batch.label_B[part.row_B])
        alone = {"data": Data(), "student": Rollout(), "teacher": Rollout("teacher")}[part.source]
        whole = alone(batch, inputs(student, teacher)).parts[0]
        assert same_part(part, whole.select(part.row_B))


# ---- rollouts


@pytest.mark.parametrize("by", ["student", "teacher"])
def test_rollouts_belong_to_rows_and_not_to_batches(student, teacher, batch, by):
    whole = Rollout(by)(batch, inputs(student, teacher)).parts[0]
    assert whole.source == by and whole.behavior_logp_BL is not None and (whole.age_B == 0).all()
    for rows in (torch.tensor([5]), torch.tensor([7, 0, 3]), torch.arange(4, 8)):
        part = Rollout(by)(batch.select(rows), inputs(student, teacher)).parts[0]
        assert torch.equal(part.codes_BL, whole.codes_BL[rows])
    later = Rollout(by)(batch, inputs(student, teacher, step=1)).parts[0]
    assert not torch.equal(later.codes_BL, whole.codes_BL)


def test_rollouts_carry_the_log_probability_of_their_codes(student, batch):
    part = Rollout()(batch, inputs(student)).parts[0]
    logp = student.head(student(part.codes_BL, part.condition, part.plan)).log_softmax(-1)
    expected = logp.gather(2, part.codes_BL.unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(part.behavior_logp_BL, expected.float(), rtol=1e-4, atol=1e-5)


def test_student_and_teacher_draw_different_numbers(student, batch):
    both = step_inputs(student, student, {}, Rng(0, 0))
    assert not torch.equal(Rollout()(batch, both).parts[0].codes_BL, Rollout("teacher")(batch, both).parts[0].codes_BL)


def test_a_missing_teacher_is_named(student, batch):
    for contexts in (Rollout("teacher"), MixtureSampling()):
        with pytest.raises(VarkdError, match="teacher=RUN"):
            contexts(batch, inputs(student))
    assert Rollout("teacher").needs_teacher and not Rollout().needs_teacher
    assert Mixture((Share(Data(), 1.0), Share(Replay(Rollout("teacher")), 0.1))).needs_teacher
    assert MixtureSampling().needs_teacher


# ---- replay


def run_replay(contexts: Prefixes, student: Backbone, batch: Batch, steps: int) -> list[Context]:
    state: State = {}
    found = []
    for step in range(steps):
        context = contexts(batch, inputs(student, step=step, state=state))
        state = contexts.update(context, state, Rng(0, step))
        found.append(context)
    return found


def test_replay_refreshes_on_time_and_reuses_in_between(student, batch):
    replay = Replay(every=4, capacity=2, max_age=20)
    born: dict[tuple[int, int], Tensor] = {}
    reused_from = set()
    for step, context in enumerate(run_replay(replay, student, batch, 17)):
        (part,) = context.parts
        assert part.source == "student" and torch.equal(part.row_B, batch.row_B)
        fresh = Rollout()(batch, inputs(student, step=step)).parts[0]
        for row, age in enumerate(part.age_B.tolist()):
            if step % 4 == 0:
                assert age == 0 and torch.equal(part.codes_BL[row], fresh.codes_BL[row])
                born[row, step] = part.codes_BL[row]
            else:
                newest = step // 4 * 4
                assert step - age in {newest, newest - 4} & set(range(step))  # a ring of two: the last two refreshes
                assert torch.equal(part.codes_BL[row], born[row, step - age])
                reused_from.add((newest - (step - age)) // 4)
        assert torch.equal(part.condition.label_B, batch.label_B)
    assert reused_from == {0, 1}  # both entries of the ring are drawn


def test_replayed_sequences_keep_their_log_probabilities(student, batch):
    contexts = run_replay(Replay(every=4), student, batch, 3)
    first, later = contexts[0].parts[0], contexts[2].parts[0]
    assert torch.equal(first.codes_BL, later.codes_BL) and (later.age_B == 2).all()
    assert torch.equal(first.behavior_logp_BL, later.behavior_logp_BL)


def test_replay_keeps_the_labels_of_its_sequences(student, batch):
    replay, state = Replay(every=10), {}
    context = replay(batch, inputs(student, step=0))
    state = replay.update(context, state, Rng(0, 0))
    other = replace(batch, label_B=(batch.label_B + 1) % 3)
    part = replay(other, inputs(student, step=1, state=state)).parts[0]
    assert torch.equal(part.condition.label_B, batch.label_B)


def test_replay_never_serves_sequences_beyond_max_age(student, batch):
    ages = [c.parts[0].age_B.tolist() for c in run_replay(Replay(every=100, capacity=3, max_age=2), student, batch, 12)]
    assert max(max(row) for row in ages) == 2
    assert ages[1] == [1] * 8 and ages[2] == [2] * 8 and ages[3] == [0] * 8  # too old: sampled afresh, off schedule


def test_replay_of_a_part_of_the_rows_is_the_same(student, batch):
    replay = Replay(every=3, capacity=2, max_age=4)
    whole = run_replay(replay, student, batch, 10)
    for rows in (torch.arange(4), torch.arange(4, 8), torch.tensor([1, 6])):
        for context, piece in zip(whole, run_replay(replay, student, batch.select(rows), 10), strict=True):
            assert same_part(piece.parts[0], context.parts[0].select(rows))


def test_rows_that_join_between_refreshes_are_sampled_afresh(student, batch):
    mixture = Mixture((Share(Data(), LinearSchedule(1.0, 0.2)), Share(Replay(every=50), LinearSchedule(0.0, 0.8))))
    state: State = {}
    owned: set[int] = set()
    born_at: dict[int, int] = {}
    for step in range(12):
        contexts = resolve(mixture, step / 12)
        context = contexts(batch, inputs(student, step=step, state=state))
        state = contexts.update(context, state, Rng(0, step))
        for part in context.parts:
            if part.source == "student":
                for row, age, codes in zip(part.row_B.tolist(), part.age_B.tolist(), part.codes_BL, strict=True):
                    born_at.setdefault(row, step)
                    assert step - age == born_at[row]  # its own ring, never a neighbor's
                    fresh = Rollout()(batch, inputs(student, step=born_at[row])).parts[0]
                    assert torch.equal(codes, fresh.codes_BL[row])
                    owned.add(row)
    assert len(owned) >= 6 and len(set(born_at.values())) >= 4


def test_replay_can_keep_teacher_samples(student, teacher, batch):
    replay = Replay(Rollout("teacher"), every=4)
    state: State = {}
    first = replay(batch, inputs(student, teacher, 0, state)).parts[0]
    state = replay.update(Context((first,)), state, Rng(0, 0))
    later = replay(batch, inputs(student, teacher, 1, state)).parts[0]
    assert later.source == "teacher" and (later.age_B == 1).all() and torch.equal(later.codes_BL, first.codes_BL)


def test_replay_beside_fresh_rollouts_still_remembers_its_rows(student, batch):
    mixture = Mixture((Share(Rollout(), 0.5), Share(Replay(every=10), 0.5)))
    contexts = run_replay(mixture, student, batch, 3)
    assert contexts[2].parts[1].age_B.tolist() == [2] * 4


# ---- replay of sequences that were sampled in an order of their own


@pytest.fixture(params=[("rar", None), ("randar", None), ("randar", 3), ("arpg", 4)], ids=lambda p: f"{p[0]} {p[1]}")
def any_order(request: pytest.FixtureRequest) -> tuple[Backbone, Rollout]:
    """A backbone that draws an order per row, and a rollout in so many steps (None: one code a step)."""
    family, steps = request.param
    sizes = {"vocab_size": 12, "num_classes": 3, "grid": (2, 3), "num_layers": 2, "dim": 16, "num_heads": 2}
    model = build(family, {**sizes, "ffn_dim": 24, "order": "random"}).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4, generator=generator)
    return model, Rollout(sampler=Sampler(steps=steps))


def test_replayed_sequences_keep_the_plan_they_were_sampled_with(any_order, batch):
    model, rollout = any_order
    replay = Replay(rollout, every=4, capacity=2)
    born: dict[int, Part] = {}
    reused_from = set()
    for step, context in enumerate(run_replay(replay, model, batch, 12)):
        (part,) = context.parts
        if step % 4 == 0:
            born[step] = part
        for row, age in enumerate(part.age_B.tolist()):
            first = born[step - age]
            assert torch.equal(part.codes_BL[row], first.codes_BL[row])
            assert torch.equal(part.plan.order_BL[row], first.plan.order_BL[row])
            assert part.plan.sizes == first.plan.sizes
            reused_from.add(age // 4)
    orders = {tuple(row) for part in born.values() for row in part.plan.order_BL.tolist()}
    assert reused_from == {0, 1} and len(orders) > 16  # both entries of the ring; 24 draws of 720 orders


@torch.no_grad()
def test_the_plan_of_a_replayed_part_gives_the_log_probabilities_it_was_drawn_with(any_order, batch):
    """The model has not changed, so under the right plan it says again what it said when it sampled."""
    model, rollout = any_order
    fresh, _, later = (context.parts[0] for context in run_replay(Replay(rollout, every=4), model, batch, 3))
    assert (later.age_B == 2).all()

    def logp(part: Part) -> Tensor:
        return code_logp(model.head, model(part.codes_BL, part.condition, part.plan), part.codes_BL, 100)

    torch.testing.assert_close(logp(later).float(), later.behavior_logp_BL, rtol=1e-5, atol=1e-5)
    other = replace(later, plan=model.plan(8, Rng(5), batch.row_B, rollout.sampler.steps))
    assert (logp(other) - logp(fresh)).abs().max() > 0.01  # another order would have been noticed


def test_rows_sampled_afresh_among_replayed_ones_keep_their_own_orders(any_order, batch):
    model, rollout = any_order
    replay, state = Replay(rollout, every=10), {}
    old = replay(batch.select(torch.tensor([1, 4, 6])), inputs(model, step=0))
    state = replay.update(old, state, Rng(0, 0))
    part = replay(batch, inputs(model, step=1, state=state)).parts[0]
    fresh = rollout(batch, inputs(model, step=1)).parts[0]
    assert part.row_B.tolist() == list(range(8)) and part.age_B.tolist() == [0, 1, 0, 0, 1, 0, 1, 0]
    expected_BL = fresh.plan.order_BL.clone()
    expected_BL[[1, 4, 6]] = old.parts[0].plan.order_BL
    assert torch.equal(part.plan.order_BL, expected_BL) and part.plan.sizes == fresh.plan.sizes


@pytest.mark.parametrize(
    "values", [{"every": 0}, {"capacity": 0}, {"max_age": -1}, {"fresh": 1.5}, {"fresh": LinearSchedule(0.5, -0.1)}]
)
def test_replay_refuses_nonsense(values: dict):
    with pytest.raises(VarkdError, match="replay"):
        Replay(**values)


# ---- replay that draws for each row whether to sample anew


def test_fresh_sequences_are_drawn_row_by_row(student, batch):
    """A brute-force ring per row: what was sampled when, newest last, at most three and none too old."""
    replay = Replay(fresh=0.4, capacity=3, max_age=5)
    rings: list[list[int]] = [[] for _ in range(8)]
    drawn, picked_from, forced = 0, set(), set()
    made = [Rollout()(batch, inputs(student, step=step)).parts[0] for step in range(30)]
    for step, context in enumerate(run_replay(replay, student, batch, 30)):
        (part,) = context.parts
        coin_B = Rng(0, step).uniform("replay-fresh", batch.row_B, 1).squeeze(1) < 0.4
        for row, age in enumerate(part.age_B.tolist()):
            young = [born for born in rings[row] if step - born <= 5]
            assert (age == 0) == (bool(coin_B[row]) or not young)
            assert torch.equal(part.codes_BL[row], made[step - age].codes_BL[row])
            if age == 0:
                rings[row] = [*rings[row], step][-3:]
                drawn += bool(coin_B[row])
                forced |= set() if coin_B[row] else {step}
            else:
                picked_from.add(young.index(step - age))
    assert picked_from == {0, 1, 2} and 0.3 < drawn / 240 < 0.5
    assert 0 in forced and len(forced) > 1  # empty rings at first, and one that had grown too old later


def test_fresh_always_and_fresh_never(student, batch):
    always = [context.parts[0] for context in run_replay(Replay(fresh=1.0), student, batch, 4)]
    for step, part in enumerate(always):
        assert same_part(part, Rollout()(batch, inputs(student, step=step)).parts[0])
    never = [context.parts[0] for context in run_replay(Replay(fresh=0.0, max_age=10**6), student, batch, 4)]
    assert all(torch.equal(part.codes_BL, never[0].codes_BL) for part in never)
    assert [part.age_B.unique().tolist() for part in never] == [[0], [1], [2], [3]]


def test_fresh_follows_a_schedule_and_a_part_of_the_rows_is_the_same(student, batch):
    replay = Replay(fresh=LinearSchedule(1.0, 0.0), capacity=2)
    state: State = {}
    shares = []
    for step in range(10):
        contexts = resolve(replay, step / 10)
        (part,) = contexts(batch, inputs(student, step=step, state=state)).parts
        some = torch.tensor([1, 6])
        assert same_part(
            contexts(batch.select(some), inputs(student, step=step, state=state)).parts[0], part.select(some)
        )
        state = contexts.update(Context((part,)), state, Rng(0, step))
        shares.append(float((part.age_B == 0).double().mean()))
    assert shares[0] == 1 and shares[-1] < 0.5 and sum(shares[:5]) > sum(shares[5:])


# ---- replay of what other contexts make


@pytest.mark.parametrize(
    "inner",
    [MixedRollout(0.3, 0.7), MixtureSampling(alpha=0.4), SpeculativeSampling(top_p=0.5), Rollout("teacher")],
    ids=lambda contexts: contexts.kind,
)
def test_replay_keeps_what_any_sampling_context_makes(student, teacher, batch, inner):
    replay, state = Replay(inner, every=3, capacity=2), {}
    made = {step: inner(batch, inputs(student, teacher, step)).parts[0] for step in (0, 3, 6)}
    ages = set()
    for step in range(9):
        (part,) = replay(batch, inputs(student, teacher, step, state)).parts
        state = replay.update(Context((part,)), state, Rng(0, step))
        assert part.source == inner.sources[0] and part.behavior_logp_BL is not None
        for row, age in enumerate(part.age_B.tolist()):
            ages.add(age)
            assert torch.equal(part.codes_BL[row], made[step - age].codes_BL[row])
            assert torch.equal(part.behavior_logp_BL[row], made[step - age].behavior_logp_BL[row])
        if step % 3 == 0:
            assert (part.accept_BL is None) == (made[step].accept_BL is None)
    assert ages == {0, 1, 2, 4, 5}  # from the second refresh on, the ring holds two
    described = (replay.sources, replay.samplers, replay.needs_teacher, replay.splices)
    assert described == (inner.sources, inner.samplers, inner.needs_teacher, False)


def test_replay_keeps_the_guidance_scale_that_a_row_was_sampled_with(student, batch):
    """Scales differ between steps: a replayed sequence must come back with its own."""
    replay, state, born = Replay(every=2, capacity=2), {}, {}
    for step in range(6):
        guidance_B = torch.arange(8.0) + 10 * step
        scaled = replace(batch, guidance_B=guidance_B)
        (part,) = replay(scaled, inputs(student, step=step, state=state)).parts
        state = replay.update(Context((part,)), state, Rng(0, step))
        if step % 2 == 0:
            born[step] = guidance_B
        expected = [born[step - age][row].item() for row, age in enumerate(part.age_B.tolist())]
        assert part.condition.guidance_B is not None and part.condition.guidance_B.tolist() == expected
    assert state["rows/replay_scale"].shape == (8, 2)
    assert "rows/replay_scale" not in replay.update(replay(batch, inputs(student)), {}, Rng(0, 0))


def test_rows_that_join_keep_the_scales_of_the_others(student, batch):
    replay, state = Replay(every=10), {}
    scaled = replace(batch, guidance_B=torch.arange(8.0))
    old = replay(scaled.select(torch.tensor([1, 4, 6])), inputs(student))
    state = replay.update(old, state, Rng(0, 0))
    later = replace(scaled, guidance_B=torch.arange(8.0) + 100)
    mixed = replay(later, inputs(student, step=1, state=state))
    assert mixed.parts[0].condition.guidance_B.tolist() == [100, 1, 102, 103, 4, 105, 6, 107]
    state = replay.update(mixed, state, Rng(0, 1))
    again = replay(later, inputs(student, step=2, state=state)).parts[0]
    assert again.condition.guidance_B.tolist() == [100, 1, 102, 103, 4, 105, 6, 107]
    assert again.age_B.tolist() == [1, 2, 1, 1, 2, 1, 2, 1]


# ---- contexts inside others


@pytest.mark.parametrize("other", [ScheduledSampling(0.5), ParallelSampling(0.5, with_data=True), Rollout(),
                                   Rollout(sampler=Sampler(temperature=0.5)), MixtureSampling(), Data()],
                         ids=lambda contexts: contexts.kind)  # fmt: skip
def test_a_ring_takes_in_nothing_that_another_source_made(student, teacher, batch, other):
    """Rows change their owner, and what a neighbor sampled for a row is not what the replay would have sampled."""
    mixture = Mixture((Share(other, LinearSchedule(0.8, 0.2)), Share(Replay(every=3, capacity=2), "rest")))
    state: State = {}
    owned: dict[int, set[int]] = {}
    made = [Rollout()(batch, inputs(student, step=step)).parts[0] for step in range(12)]
    for step in range(12):
        contexts = resolve(mixture, step / 12)
        context = contexts(batch, inputs(student, teacher, step, state))
        state = contexts.update(context, state, Rng(0, step))
        part = context.parts[-1]
        fresh = part.row_B[part.age_B == 0].tolist()
        for row in fresh:
            owned.setdefault(row, set()).add(step)
        assert state["rows/replay_row"].tolist() == sorted(owned)
        for row, born_C, codes_CL in zip(
            sorted(owned), state["rows/replay_born"].tolist(), state["rows/replay_codes"], strict=True
        ):
            for born, codes_L in zip(born_C, codes_CL, strict=True):
                if born >= 0:
                    assert born in owned[row] and torch.equal(codes_L, made[born].codes_BL[row])
    assert len(owned) >= 6


def test_the_rest_is_what_the_others_leave():
    shares = Mixture((Share(Data(), "rest"), Share(Rollout(), 0.25), Share(MixtureSampling(), 0.25)))
    assert shares.fractions() == (0.5, 0.25, 0.25)
    assert Mixture((Share(Data(), 0.75), Share(Rollout(), 0.75), Share(MixtureSampling(), "rest"))).fractions()[2] == 0
    moving = Mixture((Share(Data(), "rest"), Share(Rollout(), LinearSchedule(0.0, 1.0))))
    assert [resolve(moving, done).fractions() for done in (0.0, 0.25, 1.0)] == [(1, 0), (0.75, 0.25), (0, 1)]
    adaptive = Mixture((Share(Data(), "rest"), Share(Rollout(), Plateau())))
    state = {"adaptive.shares.1.fraction": torch.tensor([0.375, 1.0], dtype=torch.float64)}
    assert resolve(adaptive, 0.5, state).fractions() == (0.625, 0.375)


def test_the_rest_gets_its_rows(student, batch):
    mixture = Mixture((Share(Data(), "rest"), Share(Rollout(), 0.25)))
    assert [(part.source, len(part)) for part in mixture(batch, inputs(student)).parts] == [("data", 6), ("student", 2)]


def test_mixtures_refuse_what_they_cannot_keep_apart():
    with pytest.raises(VarkdError, match="one replay at most"):
        Mixture((Share(Replay(), 0.5), Share(Replay(MixtureSampling()), 0.5)))
    with pytest.raises(VarkdError, match="the rest can go to one share only"):
        Mixture((Share(Data(), "rest"), Share(Rollout(), "rest")))


def test_nested_contexts_speak_for_what_is_inside():
    cold, warm = Sampler(temperature=0.5), Sampler(guidance=2.0)
    mixture = Mixture(
        (
            Share(Data(), 0.25),
            Share(Replay(MixtureSampling(cold)), 0.25),
            Share(Completions(sampler=warm), 0.25),
            Share(ScheduledSampling(sampler=cold), 0.25),
        )
    )
    assert mixture.sources == ("data", "student", "teacher") and mixture.samplers == (cold, warm, cold)
    assert mixture.needs_teacher and mixture.splices
    codebook_VE = torch.rand(5, 2)
    assert torch.equal(mixture.prepare(codebook_VE)["codebook"], codebook_VE)
    plain = Mixture((Share(Data(), 0.5), Share(Rollout(sampler=warm), 0.5)))
    assert not plain.needs_teacher and not plain.splices and plain.prepare(codebook_VE) == {}


# ---- sampled rewards: where they can be had

OFTEN = "the sampler never draws some codes"
ONE_BY_ONE = "were not sampled one by one under a known probability"
PREFIX = "their first codes come from the data"
NO_REWARDS = [
    (Data(), "data", ONE_BY_ONE),
    *(
        (Rollout(sampler=sampler), "student", OFTEN)
        for sampler in (Sampler(top_k=5), Sampler(top_p=0.9), Sampler(temperature=0))
    ),
    (Rollout("teacher", Sampler(top_p=0.9)), "teacher", OFTEN),
    (MixtureSampling(Sampler(top_k=5)), "student", OFTEN),
    (SpeculativeSampling(Sampler(top_p=0.9)), "student", OFTEN),
    (MixedRollout(0.0, 1.0), "student", PREFIX),
    (ScheduledSampling(), "student", ONE_BY_ONE),
    (ParallelSampling(), "student", ONE_BY_ONE),
    (Completions(), "teacher", ONE_BY_ONE),
    (Replay(MixedRollout(0.0, 1.0)), "student", PREFIX),
    (Replay(Rollout(sampler=Sampler(top_k=2))), "student", OFTEN),
    (Mixture((Share(Rollout(), 0.5), Share(MixedRollout(0.0, 1.0), 0.5))), "student", PREFIX),
    (Mixture((Share(Data(), 0.5), Share(Replay(MixedRollout(0.0, 1.0)), 0.5))), "student", PREFIX),
]
CREDITS = [Importance(), Reward(), FutureReturn(), PrefixDiscrepancy()]


@pytest.mark.parametrize(("contexts", "source", "reason"), NO_REWARDS)
@pytest.mark.parametrize("credit", CREDITS, ids=lambda credit: credit.kind)
def test_sampled_rewards_are_refused_with_their_reason(contexts, source, reason, credit):
    term = Term("pg", CrossEntropy(), on=(source,), credit=credit)
    with pytest.raises(VarkdError, match=rf"term 'pg': sampled rewards \({credit.kind}\).* on {source}.*{reason}"):
        Method((term,), contexts)
    Method((replace(term, credit=NoCredit()),), contexts)  # without rewards there is nothing against it


HONEST = [Sampler(), Sampler(temperature=0.7), Sampler(temperature=2.0), Sampler(guidance=1.5)]


@pytest.mark.parametrize("sampler", HONEST)
@pytest.mark.parametrize(
    "make",
    [
        lambda sampler: Rollout(sampler=sampler),
        lambda sampler: Rollout("teacher", sampler),
        MixtureSampling,
        SpeculativeSampling,
        lambda sampler: Replay(Rollout(sampler=sampler)),
        lambda sampler: Replay(MixtureSampling(sampler)),
        lambda sampler: Mixture((Share(Data(), 0.5), Share(Rollout(sampler=sampler), 0.5))),
    ],
)
def test_rewards_are_accepted_where_log_probabilities_are_stored(student, teacher, batch, make, sampler):
    """And they are indeed stored, finite, for the very part that the term is on."""
    contexts = make(sampler)
    source = contexts.sources[-1]
    Method((Term("pg", CrossEntropy(), on=(source,), credit=Reward()),), contexts)
    part = contexts(batch, inputs(student, teacher)).parts[-1]
    assert part.source == source and part.behavior_logp_BL is not None
    assert part.behavior_logp_BL.isfinite().all() and (part.behavior_logp_BL < 0).all()


def test_rewards_on_other_sources_are_no_matter():
    """MiniLLM: rewards on student sequences, plain cross-entropy on data."""
    mixture = Mixture((Share(Data(), 0.5), Share(MixtureSampling(), 0.5)))
    Method(
        (Term("pg", CrossEntropy(), on=("student",), credit=Reward()), Term("ce", CrossEntropy(), on=("data",))),
        mixture,
    )
    with pytest.raises(VarkdError, match="on data sequences"):
        Method((Term("pg", CrossEntropy(), credit=Reward()),), mixture)


def test_sampling_leaves_no_graph_and_the_models_in_their_mode(student, teacher, batch):
    student.train()
    part = MixtureSampling(Sampler(top_k=3))(batch, inputs(student, teacher)).parts[0]
    assert student.training and not teacher.training
    assert part.behavior_logp_BL is not None and not part.behavior_logp_BL.requires_grad


def test_merge_keeps_optional_fields_only_if_all_parts_have_them(student, batch):
    data, sampled = Data()(batch, inputs(student)).parts[0], Rollout()(batch, inputs(student)).parts[0]
    assert merge([data, sampled]).behavior_logp_BL is None
    both = merge([sampled, sampled])
    assert both.behavior_logp_BL is not None and len(both) == 16
    scaled = replace(data, condition=Condition(data.condition.label_B, torch.ones(8)))
    assert merge([scaled, scaled]).condition.guidance_B is not None
