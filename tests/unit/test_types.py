"""Batches, plans, parts and contexts: selecting, splitting, label dropping, hashing."""

from __future__ import annotations

from dataclasses import fields, replace
from operator import gt, lt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from varkd.types import Condition, Context, Part, Plan, state_hash

RASTER = Plan(torch.arange(6).expand(5, -1), (1, 2, 3))


def part(num_rows: int = 5) -> Part:
    generator = torch.Generator().manual_seed(0)
    codes_BL = torch.randint(9, (num_rows, 6), generator=generator)
    condition = Condition(torch.arange(num_rows), torch.linspace(1, 2, num_rows))
    plan = Plan(torch.arange(6).expand(num_rows, -1), (1, 2, 3))
    found = Part.of("student", codes_BL, condition, plan, torch.arange(num_rows) + 10)
    return replace(found, behavior_logp_BL=torch.rand(num_rows, 6), weight_B=torch.rand(num_rows))


def test_a_fresh_part_supervises_itself():
    fresh = Part.of(
        "data", torch.ones(2, 6, dtype=torch.long), Condition(torch.zeros(2)), RASTER.select(slice(2)), torch.arange(2)
    )
    assert torch.equal(fresh.codes_BL, fresh.supervision_BL) and fresh.behavior_logp_BL is None
    assert fresh.weight_B.tolist() == [1, 1] and fresh.age_B.tolist() == [0, 0] and len(fresh) == 2


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_rank_is_the_inverse_of_order(seed: int):
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    plan = Plan(order.unsqueeze(0), (1, 2, 3))
    rank = plan.rank_BL[0]
    assert torch.equal(order[rank], torch.arange(6)) and torch.equal(rank[order], torch.arange(6))
    assert plan.step_BL[0][order].tolist() == [0, 1, 1, 2, 2, 2]


@st.composite
def plans_and_values(draw: st.DrawFn) -> tuple[Plan, torch.Tensor]:
    """Steps of any sizes, an order of its own for every row, a whole number at every position."""
    sizes, num_rows = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=6))), draw(st.integers(1, 4))
    orders = [draw(st.permutations(range(sum(sizes)))) for _ in range(num_rows)]
    values = st.lists(st.integers(-9, 9), min_size=sum(sizes), max_size=sum(sizes))
    return Plan(torch.tensor(orders), sizes), torch.tensor([draw(values) for _ in range(num_rows)])


@settings(max_examples=60, deadline=None)
@given(plans_and_values())
def test_before_and_after_add_up_other_steps(case: tuple[Plan, torch.Tensor]):
    plan, value_BL = case
    for row, order in enumerate(plan.order_BL.tolist()):
        step_of, done = {}, 0
        for step, size in enumerate(plan.sizes):
            step_of.update(dict.fromkeys(order[done : done + size], step))
            done += size
        for position, step in step_of.items():
            assert plan.step_BL[row, position] == step
            for found_BL, compare in ((plan.before(value_BL), lt), (plan.after(value_BL), gt)):
                expected = sum(int(value_BL[row, other]) for other, at in step_of.items() if compare(at, step))
                assert found_BL[row, position] == expected
    own_BL = value_BL.sum(1, keepdim=True) - plan.before(value_BL) - plan.after(value_BL)
    first_BL = own_BL.gather(1, plan.order_BL[:, : plan.sizes[0]])
    assert (first_BL == value_BL.gather(1, plan.order_BL[:, : plan.sizes[0]]).sum(1, keepdim=True)).all()


def test_before_and_after_keep_the_type_and_the_gradient():
    value_BL = torch.rand(5, 6, dtype=torch.float64, requires_grad=True)
    for found_BL in (RASTER.before(value_BL), RASTER.after(value_BL)):
        assert found_BL.dtype == torch.float64
        (gradient_BL,) = torch.autograd.grad(found_BL.sum(), value_BL)
        assert gradient_BL.tolist() in ([[5.0, 3, 3, 0, 0, 0]] * 5, [[0.0, 1, 1, 3, 3, 3]] * 5)


@pytest.mark.parametrize("sizes", [(1, 2), (6, 0), (7, -1), (3, 4)])
def test_sizes_must_partition_the_order(sizes):
    with pytest.raises(ValueError, match="partition"):
        Plan(torch.arange(6).unsqueeze(0), sizes)


@pytest.mark.parametrize("index", [torch.tensor([3, 1]), torch.tensor([True, False, True, False, False]), slice(1, 4)])
def test_selecting_rows_selects_every_field(index):
    whole, chosen = part(), part().select(index)
    rows = torch.arange(5)[index]
    assert len(chosen) == len(rows) and chosen.source == "student" and chosen.accept_BL is None
    for field in fields(Part):
        value, piece = getattr(whole, field.name), getattr(chosen, field.name)
        if isinstance(value, torch.Tensor) and field.name != "behavior_logp_BL" and field.name != "weight_B":
            assert torch.equal(piece, value[rows]), field.name
    assert torch.equal(chosen.condition.label_B, whole.condition.label_B[rows])
    assert chosen.condition.guidance_B is not None and len(chosen.condition.guidance_B) == len(rows)
    assert len(chosen.plan.order_BL) == len(rows) and chosen.plan.sizes == (1, 2, 3)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_micro_batches_hold_every_row_once_and_are_never_empty(count):
    context = Context((part(5), replace(part(3), source="data")))
    pieces = list(context.micro_batches(count))
    assert all(len(piece) for piece in pieces) and sum(len(piece) for piece in pieces) == len(context) == 8
    assert max(map(len, pieces)) - min(map(len, pieces)) <= 1
    assert len(pieces) == count  # as many for any rank with as many rows, whatever its parts
    for source, whole in (("student", context.parts[0]), ("data", context.parts[1])):
        rows = [p.row_B for piece in pieces for p in piece.parts if p.source == source]
        assert torch.equal(torch.cat(rows), whole.row_B)


def test_dropping_labels_changes_labels_alone():
    context = Context((part(5),))
    dropped = context.drop_labels(0.5, 99, [torch.tensor([0.0, 0.49, 0.5, 0.9, 0.2])])
    assert dropped.parts[0].condition.label_B.tolist() == [99, 99, 2, 3, 99]
    assert context.parts[0].condition.label_B.tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(dropped.parts[0].codes_BL, context.parts[0].codes_BL)
    assert torch.equal(dropped.parts[0].condition.guidance_B, context.parts[0].condition.guidance_B)
    assert context.drop_labels(0.0, 99, [torch.zeros(5)]).parts[0].condition.label_B.tolist() == [0, 1, 2, 3, 4]


def test_the_null_condition_keeps_its_scale():
    condition = Condition(torch.tensor([1, 2]), torch.tensor([1.5, 2.5]))
    null = condition.null(7)
    assert null.label_B.tolist() == [7, 7] and null.guidance_B is condition.guidance_B and len(null) == 2


def test_state_hash_sees_names_values_and_head():
    state = {"a": torch.arange(4.0), "b": torch.ones(2, dtype=torch.bfloat16)}
    reference = state_hash("head", state)
    assert reference == state_hash("head", dict(reversed(state.items()))) and len(reference) == 64
    changed = {**state, "a": torch.tensor([0.0, 1.0, 2.0, 3.0000002])}
    assert (
        len({reference, state_hash("x", state), state_hash("head", changed), state_hash("head", {"a": state["a"]})})
        == 4
    )
