"""Numbers that training moves by itself: by hand, one way only, and under the key that `at` reads."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from varkd.distill.credit import PrefixDiscrepancy
from varkd.distill.divergences import JSD, TAID, CrossEntropy, ForwardKL
from varkd.distill.inputs import State
from varkd.distill.method import Method, Term
from varkd.distill.mixture import Mixture, Share
from varkd.distill.prefixes import Data, MixtureSampling, ParallelSampling, Rollout
from varkd.distill.replay import Replay
from varkd.distill.schedule import (
    Adaptive,
    ExponentialSchedule,
    LinearSchedule,
    Plateau,
    TaidTime,
    adaptives,
    bounds,
    resolve,
    value_of,
)
from varkd.errors import VarkdError
from varkd.methods import METHODS

# ---- TAID's time


def taid_by_hand(losses: list[float], updates: int, time: TaidTime) -> list[float]:
    """t after every update, in plain numbers: 2501.16937 and its released code."""
    found, t, average, former = [], time.start, 0.0, losses[0]
    for step, loss in enumerate(losses):
        change = (former - loss) / (former + 1e-15)
        average = time.momentum * average + (1 - time.momentum) * change
        adaptive = t + time.alpha * (1 / (1 + math.exp(-average))) * (1 - t)
        linear = time.start + (time.end - time.start) * (step + 1) / updates
        t, former = min(time.end, max(linear, adaptive)), loss
        found.append(t)
    return found


def taid_memories(losses: list[float], updates: int, time: TaidTime) -> list[torch.Tensor]:
    memory, found = None, []
    for step, loss in enumerate(losses):
        memory = time.after_update(memory, (step + 1) / updates, loss)
        found.append(memory)
    return found


def test_two_steps_of_taid_by_hand():
    time = TaidTime(start=0.4, end=1.0, alpha=0.1, momentum=0.9)
    first = time.after_update(None, 0.01, 2.0)  # nothing to compare with: sigmoid(0) = 1/2
    assert first.dtype == torch.float64
    assert first.tolist() == pytest.approx([0.4 + 0.1 * 0.5 * 0.6, 0.0, 2.0])
    second = time.after_update(first, 0.02, 1.5)  # the loss fell by a quarter
    average = 0.9 * 0.0 + 0.1 * 0.25
    assert second.tolist() == pytest.approx([0.43 + 0.1 / (1 + math.exp(-average)) * 0.57, average, 1.5])
    assert time.at(None) == 0.4 and time.at(second) == float(second[0])
    behind = time.after_update(second, 0.9, 1.5)  # the straight line is the least
    assert float(behind[0]) == pytest.approx(0.4 + 0.6 * 0.9)
    assert float(time.after_update(behind, 1.0, 1.5)[0]) == 1.0


losses = st.lists(st.floats(0.05, 20), min_size=1, max_size=40)  # no change that exp cannot take
shares = st.floats(0, 1)


@settings(max_examples=60)
@given(losses=losses, start=shares, alpha=shares, momentum=st.floats(0, 0.999), spare=st.integers(0, 9))
def test_taid_follows_its_formula_and_only_grows(losses, start, alpha, momentum, spare):
    time, updates = TaidTime(start=start, alpha=alpha, momentum=momentum), len(losses) + spare
    found = [float(memory[0]) for memory in taid_memories(losses, updates, time)]
    assert found == pytest.approx(taid_by_hand(losses, updates, time), rel=1e-9)
    assert all(start <= one <= other <= 1 for one, other in zip([start, *found], found, strict=False))


def test_taid_does_not_mind_a_loss_of_nothing():
    """A student that starts as a copy of its teacher: a relative change of a billion, or of more than exp can take."""
    values = [float(memory[0]) for memory in taid_memories([0.0, 0.0, 1e-9, 2.0, 0.0], 100, TaidTime())]
    assert all(math.isfinite(value) and 0.4 <= value <= 1 for value in values) and values == sorted(values)


def test_taid_grows_faster_while_the_student_learns():
    time = TaidTime(alpha=0.01, momentum=0.5)
    learning, stuck = (
        [float(m[0]) for m in taid_memories(losses, 10**6, time)]
        for losses in ([2.0 * 0.7**step for step in range(20)], [2.0] * 20)
    )
    assert learning[-1] > stuck[-1] > 0.4


# ---- DistiLLM's phi


def test_plateau_by_hand():
    """It grows whenever validation is 0.1 or more above what it was at the last growth, and only then."""
    phi, memory, found = Plateau(), None, []
    for cross_entropy in (5.0, 4.0, 5.09, 5.11, 5.2, 5.22, 4.0, 5.4, 5.6):
        memory = phi.after_validation(memory, cross_entropy)
        found.append((round(float(memory[0]), 9), float(memory[1])))
    assert found == [(0.0, 5.0), (0.0, 5.0), (0.0, 5.0), (0.1, 5.11), (0.1, 5.11), (0.2, 5.22), (0.2, 5.22),
                     (0.3, 5.4), (0.4, 5.6)]  # fmt: skip
    assert memory is not None and memory.dtype == torch.float64 and phi.at(memory) == float(memory[0])
    exact = Plateau(tolerance=0.5).after_validation(torch.tensor([0.0, 1.0]).double(), 1.5)
    assert exact.tolist() == [0.1, 1.5]  # "or more"


@settings(max_examples=60)
@given(values=st.lists(st.floats(0, 20), min_size=1, max_size=30), step=st.floats(0.01, 0.5), end=st.floats(0.1, 1))
def test_plateau_counts_the_times_that_validation_got_worse(values, step, end):
    phi, memory, reference, growths = Plateau(0.0, end, step), None, values[0], 0
    for value in values:
        former, memory = memory, phi.after_validation(memory, value)
        if former is not None and value >= reference + phi.tolerance:
            reference, growths = value, growths + 1
        assert phi.at(memory) == pytest.approx(min(end, growths * step))
        assert former is None or memory[0] >= former[0]


def test_what_moves_one_does_not_move_the_other():
    phi, time = Plateau(), TaidTime()
    assert phi.after_update(None, 0.5, 1.0) is None and time.after_validation(None, 1.0) is None
    memory = torch.tensor([0.5, 1.0])
    assert phi.after_update(memory, 0.5, 9.0) is memory and time.after_validation(memory, 9.0) is memory


# ---- where memories are kept

DEEP = Method(
    terms=(
        Term("a", TAID(TaidTime(start=0.2)), weight=Plateau(0.25, 0.75)),
        Term("b", JSD(LinearSchedule(0.0, 1.0)), weight=0.5),
        Term("c", CrossEntropy(), on=("student",), credit=PrefixDiscrepancy(gamma=Plateau(0.1, 0.9))),
    ),
    contexts=Mixture(
        (
            Share(Data(), "rest"),
            Share(MixtureSampling(alpha=Plateau(0.0, 0.5, step=0.2)), 0.25),
            Share(Replay(fresh=TaidTime(start=0.3)), Plateau()),
        )
    ),
)
KEYS = {
    "adaptive.terms.0.divergence.time": 0.2,
    "adaptive.terms.0.weight": 0.25,
    "adaptive.terms.2.credit.gamma": 0.1,
    "adaptive.contexts.shares.1.contexts.alpha": 0.0,
    "adaptive.contexts.shares.2.contexts.fresh": 0.3,
    "adaptive.contexts.shares.2.fraction": 0.0,
}


def values_of(method: Method) -> dict[str, float]:
    """The numbers at the places of `KEYS`, read by hand."""
    mixture = method.contexts
    term = method.terms
    return dict(zip(KEYS, (
        term[0].divergence.time, term[0].weight, term[2].credit.gamma,  # type: ignore[union-attr]
        mixture.shares[1].contexts.alpha, mixture.shares[2].contexts.fresh, mixture.shares[2].fraction,  # type: ignore[union-attr]
    ), strict=True))  # type: ignore[arg-type]  # fmt: skip


def test_every_adaptive_number_has_a_key_of_its_own():
    found = dict(adaptives(DEEP))
    assert {key: value.start for key, value in found.items()} == KEYS
    assert values_of(DEEP.at(0.5)) == KEYS  # without a memory: where it starts
    assert dict(adaptives(DEEP.at(0.5))) == {}


@pytest.mark.parametrize("key", KEYS)
def test_a_memory_is_read_where_its_key_says(key: str):
    memory = torch.tensor([0.4375, 1.0, 1.0], dtype=torch.float64)
    assert values_of(DEEP.at(0.5, {key: memory})) == {**KEYS, key: 0.4375}


def test_what_adapt_writes_at_reads():
    state: State = {}
    state = DEEP.validated(state, 3.0)
    for step in range(5):
        state = DEEP.adapt(state, (step + 1) / 50, 2.0 - 0.2 * step)
    state = DEEP.validated(state, 3.5)
    assert set(state) == set(KEYS)
    read = values_of(DEEP.at(0.1, state))
    assert read == {key: float(memory[0]) for key, memory in state.items()}
    assert all(read[key] > KEYS[key] for key in KEYS)  # each of them has moved, by a loss or by a validation


def test_adapting_leaves_other_state_alone():
    other: State = {"threshold/a": torch.rand(6), "rows/replay_row": torch.arange(3), "skew/b": torch.rand(1)}
    before = {key: value.clone() for key, value in other.items()}
    for move in (lambda s: DEEP.adapt(s, 0.5, 1.0), lambda s: DEEP.validated(s, 1.0)):
        moved = move(other)
        assert set(other) == set(before)  # a new dictionary
        assert all(moved[key] is other[key] and torch.equal(other[key], before[key]) for key in before)
    assert DEEP.adapt({}, 0.5, 1.0).keys() == {key for key in KEYS if key.endswith(("time", "fresh"))}
    assert DEEP.validated({}, 1.0).keys() == {key for key in KEYS if not key.endswith(("time", "fresh"))}
    plain = METHODS["gkd"].method
    assert plain.adapt(other, 0.5, 1.0) == other and plain.validated(other, 1.0) == other


@pytest.mark.parametrize("name", METHODS)
def test_presets_have_the_adaptive_numbers_of_their_papers(name: str):
    expected = {"taid": ["adaptive.terms.0.divergence.time"], "distillm": ["adaptive.contexts.shares.1.fraction"]}
    assert [key for key, _ in adaptives(METHODS[name].method)] == expected.get(name, [])


def test_resolving_a_bare_number_and_a_tuple():
    assert resolve(LinearSchedule(0.0, 2.0), 0.25) == 0.5 and resolve(3.5, 0.25) == 3.5
    assert resolve((ExponentialSchedule(1.0, 0.0, 4.0), "x", (LinearSchedule(0.0, 1.0),)), 0.5) == (0.5, "x", (0.5,))
    memory = torch.tensor([0.75])
    assert resolve(TaidTime(), 0.0, {"adaptive": memory}) == 0.75
    assert [key for key, _ in adaptives((1, (Plateau(),)))] == ["adaptive.1.0"]
    assert resolve((1, (Plateau(),)), 0.0, {"adaptive.1.0": memory}) == (1, (0.75,))


def test_a_value_without_schedules_is_itself():
    method = Method((Term("kd", ForwardKL()),), ParallelSampling(0.5))
    assert method.at(0.5, {"adaptive": torch.tensor([1.0])}) == method


@pytest.mark.parametrize("adaptive", [TaidTime(), Plateau()])
def test_an_adaptive_number_must_be_resolved_before_use(adaptive: TaidTime | Plateau):
    assert isinstance(adaptive, Adaptive) and bounds(replace(adaptive, start=0.2, end=0.9)) == (0.2, 0.9)
    with pytest.raises(TypeError, match=r"method\.at"):
        value_of(adaptive)
    with pytest.raises(VarkdError, match="alpha must lie in"):
        MixtureSampling(alpha=replace(adaptive, end=1.5))
    assert Mixture((Share(Rollout(), adaptive), Share(Data(), "rest"))).shares[0].fraction is adaptive
