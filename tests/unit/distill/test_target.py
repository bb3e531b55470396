"""What the teacher says: temperatures, truncation and guidance by hand, and which losses a truncated teacher allows."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from varkd.backbones.protocol import GuidanceKind
from varkd.distill import loss as loss_module
from varkd.distill.credit import Credit, FutureReturn, Importance, PrefixDiscrepancy, Reward
from varkd.distill.divergences import (
    JSD,
    TAID,
    AdaptiveKL,
    CrossEntropy,
    Decoupled,
    Divergence,
    ForwardKL,
    Ranking,
    ReverseKL,
    SequenceSkew,
    SkewKL,
    SkewReverseKL,
    TeacherArgmax,
    ToDi,
    TotalVariation,
)
from varkd.distill.inputs import StepInputs
from varkd.distill.loss import distill_loss
from varkd.distill.method import Method, Term
from varkd.distill.prefixes import Data, Rollout
from varkd.distill.schedule import LinearSchedule
from varkd.distill.spaces import Clusters, Full, Space, TopK
from varkd.distill.target import Guided, Plain, Target, Temperature, Truncated
from varkd.errors import VarkdError
from varkd.rollout import Sampler, guidance_per_step
from varkd.types import Condition, Context, Part, Plan
from varkd.world import Rng

KINDS = get_args(GuidanceKind)


def logits(seed: int = 0, rows: int = 5, size: int = 9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    conditional, null = 2 * torch.randn(2, rows, size, generator=generator, dtype=torch.float64)
    return conditional, null


def on_null(whole: Part, rows: slice) -> Part:
    """Some rows with their label dropped."""
    label_B = whole.condition.label_B.clone()
    label_B[rows] = 3
    return replace(whole, condition=replace(whole.condition, label_B=label_B))


# ---- plain, temperature, truncated


def test_plain_is_the_teacher_itself():
    conditional, null = logits()
    assert torch.equal(Plain()(conditional, null, torch.ones(5)), conditional)


@pytest.mark.parametrize("temperature", [0.5, 0.8, 1.0, 3.0])
def test_a_temperature_raises_probabilities_to_a_power(temperature: float):
    conditional, _ = logits()
    target = Temperature(temperature)(conditional, None, None).softmax(1)
    power = conditional.softmax(1) ** (1 / temperature)
    torch.testing.assert_close(target, power / power.sum(1, keepdim=True))
    narrow = Temperature(temperature)(conditional.bfloat16(), None, None)
    assert narrow.dtype == torch.float32  # bfloat16 is not divided in bfloat16
    assert torch.equal(narrow, conditional.bfloat16().float() / temperature)


@pytest.mark.parametrize("value", [0.0, -1.0, LinearSchedule(1.0, 0.0)])
def test_a_temperature_of_zero_is_refused(value):
    with pytest.raises(VarkdError, match="temperature must lie in"):
        Temperature(value)


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.95), (0, 0.5), (3, 1.0), (4, 0.6), (1, 1.0), (0, 0.01), (0, 1.0)])
def test_truncation_by_plain_loops(top_k: int, top_p: float):
    conditional, _ = logits(1)
    target = Truncated(top_k, top_p)(conditional, None, None)
    for row in range(len(conditional)):
        p = conditional[row].softmax(0)
        ranked = sorted(range(9), key=lambda v: -float(p[v]))[: top_k or 9]
        mass, kept = float(p[ranked].sum()), []
        for code in ranked:
            if float(p[kept].sum()) / mass <= top_p:  # what stands above it holds at most top_p
                kept.append(code)
        assert sorted(kept) == (~torch.isneginf(target[row])).nonzero().squeeze(1).tolist()
        expected = torch.zeros(9, dtype=torch.float64)
        expected[kept] = p[kept] / p[kept].sum()
        torch.testing.assert_close(target[row].softmax(0), expected)
    assert Truncated(top_k, top_p)(conditional.bfloat16(), None, None).dtype == torch.float32


@pytest.mark.parametrize("values", [{"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}])
def test_a_truncation_out_of_range_is_refused(values: dict[str, Any]):
    with pytest.raises(VarkdError, match="truncated: need"):
        Truncated(**values)


# ---- guided


def test_guidance_by_hand():
    conditional, null = logits(2)
    scale_N = torch.tensor([0.0, 1.0, 1.5, 3.0, 7.5])
    target = Guided()(conditional, null, scale_N)
    for row, scale in enumerate(scale_N.tolist()):
        for code in range(9):
            u, k = float(null[row, code]), float(conditional[row, code])
            assert float(target[row, code]) == pytest.approx(u + scale * (k - u))
    # As distributions: proportional to null (cond / null)^s.
    power = null.softmax(1) * (conditional.softmax(1) / null.softmax(1)) ** scale_N.unsqueeze(1)
    torch.testing.assert_close(target.softmax(1), power / power.sum(1, keepdim=True))
    assert Guided()(conditional.bfloat16(), null.bfloat16(), scale_N).dtype == torch.float32


def test_guidance_needs_the_null_branch():
    conditional, null = logits()
    for values in ((None, torch.ones(5)), (null, None)):
        with pytest.raises(ValueError, match="null branch"):
            Guided()(conditional, *values)


@pytest.mark.parametrize("values", [{"scale": -0.5}, {"scale": 2.0, "highest": 1.5}])
def test_a_guidance_range_upside_down_is_refused(values: dict[str, float]):
    with pytest.raises(VarkdError, match="guided: need"):
        Guided(**values)


def plans() -> dict[str, Plan]:
    generator = torch.Generator().manual_seed(4)
    shuffled = torch.stack([torch.randperm(8, generator=generator) for _ in range(3)])
    return {
        "raster": Plan(torch.arange(6).expand(3, -1), (1,) * 6),
        "next scale": Plan(torch.arange(14).expand(3, -1), (1, 4, 9)),
        "parallel random": Plan(shuffled, (1, 3, 2, 2)),
    }


def part_under(plan: Plan, guidance_B: Tensor | None = None) -> Part:
    rows, length = plan.order_BL.shape
    codes_BL, condition = torch.zeros(rows, length, dtype=torch.long), Condition(torch.zeros(rows), guidance_B)
    return Part.of("data", codes_BL, condition, plan, torch.arange(rows))


@pytest.mark.parametrize("name", ["raster", "next scale", "parallel random"])
@pytest.mark.parametrize("schedule", ["family", *KINDS])
@pytest.mark.parametrize("guidance_B", [None, torch.tensor([1.5, 4.0, 2.25])], ids=["one scale", "a scale per row"])
def test_the_scale_of_a_position_is_that_of_its_step(name: str, schedule, guidance_B: Tensor | None):
    plan = plans()[name]
    guided = Guided(3.0, None if guidance_B is None else 5.0, schedule, start=1.25, power=2.0)
    for family in KINDS if schedule == "family" else ("constant",):
        found_BL = guided.scale_BL(part_under(plan, guidance_B), SimpleNamespace(guidance=family))  # type: ignore[arg-type]
        assert found_BL.shape == plan.order_BL.shape and found_BL.dtype == torch.float32
        for row in range(3):
            largest = 3.0 if guidance_B is None else float(guidance_B[row])
            kind = family if schedule == "family" else schedule
            how = Sampler(guidance=largest, guidance_schedule=kind, guidance_start=1.25, guidance_power=2.0)
            scale_S = guidance_per_step(how, plan, "constant")
            walk = iter(plan.order_BL[row].tolist())
            for step, size in enumerate(plan.sizes):
                assert {float(found_BL[row, next(walk)]) for _ in range(size)} == {float(scale_S[step])}


def test_scales_by_hand():
    """VAR's ramp over its scales, and RandAR's over the codes decoded before."""
    var = Guided(3.0, schedule="scales").scale_BL(
        part_under(plans()["next scale"]), SimpleNamespace(guidance="constant")
    )  # type: ignore[arg-type]
    assert var[0].tolist() == [1.0] + [2.0] * 4 + [3.0] * 9
    plan = plans()["parallel random"]
    before = Guided(5.0, schedule="decoded_before").scale_BL(part_under(plan), SimpleNamespace(guidance="constant"))  # type: ignore[arg-type]
    by_rank = before.gather(1, plan.order_BL)
    expected = torch.tensor([1.0, *[1 + 4 / 8] * 3, *[1 + 4 * 4 / 8] * 2, *[1 + 4 * 6 / 8] * 2])
    torch.testing.assert_close(by_rank, expected.expand(3, -1))


def test_a_range_of_scales_is_drawn_for_each_row():
    row_B = torch.arange(400)
    guided = Guided(1.5, 4.0)
    guidance_B = guided.guidance_B(row_B, Rng(0, 7))
    assert guidance_B is not None and guidance_B.shape == (400,) and guidance_B.dtype == torch.float32
    assert (guidance_B >= 1.5).all() and (guidance_B <= 4.0).all() and abs(float(guidance_B.mean()) - 2.75) < 0.15
    assert torch.equal(guidance_B[100:200], guided.guidance_B(row_B[100:200], Rng(0, 7)))  # type: ignore[arg-type]
    assert not torch.equal(guidance_B, guided.guidance_B(row_B, Rng(0, 8)))  # type: ignore[arg-type]
    assert Guided(1.5).guidance_B(row_B, Rng(0, 7)) is None


# ---- in the loss, on whole models


@pytest.fixture
def data(batch, student) -> Part:
    return Part.of("data", batch.codes_BL, batch.condition, student.plan(8), batch.row_B)


def inputs_of(method: Method, student, teacher) -> StepInputs:
    return StepInputs(
        method, student, teacher, {}, Rng(0), chunk_rows=7, codebook_tables=method.prepare(torch.randn(12, 3))
    )


def branch(model, whole: Part, condition: Condition) -> Tensor:
    return model.head(model(whole.codes_BL, condition, whole.plan)).detach()


@pytest.mark.parametrize("guidance_B", [None, torch.linspace(1.5, 4.0, 8)], ids=["one scale", "a scale per row"])
def test_the_guided_loss_is_the_divergence_from_the_guided_teacher(student, teacher, data, guidance_B):
    data = replace(data, condition=replace(data.condition, guidance_B=guidance_B))
    target = Guided(2.5, None if guidance_B is None else 4.0, schedule="decoded_after")
    method = Method((Term("kd", ForwardKL()),), target=target)
    value, _ = distill_loss(inputs_of(method, student, teacher), Context((data,)), {"kd": 1.0})
    k_BLV = branch(teacher, data, data.condition)
    u_BLV = branch(teacher, data, data.condition.null(teacher.null_label))
    largest_B = torch.full((8,), 2.5) if guidance_B is None else guidance_B
    scale_BL = 1 + (largest_B.unsqueeze(1) - 1) * torch.arange(1, 7) / 6
    lp = (u_BLV + scale_BL.unsqueeze(2) * (k_BLV - u_BLV)).log_softmax(-1)
    lq = branch(student, data, data.condition).log_softmax(-1)
    torch.testing.assert_close(value.detach(), (lp.exp() * (lp - lq)).sum(), rtol=1e-6, atol=1e-7)


def test_a_row_on_the_null_label_is_taught_the_null_branch_exactly(student, teacher, data):
    dropped = on_null(data, slice(2, 5))
    rows = loss_module._teacher_rows(
        inputs_of(Method((Term("kd", ForwardKL()),), target=Guided(7.5)), student, teacher), dropped
    )
    assert rows is not None and rows.null_ND is not None
    target_BLV = rows.logits(slice(None)).view(8, 6, 12)
    null_BLV = teacher.head(rows.null_ND).view(8, 6, 12)
    assert torch.equal(target_BLV[2:5], null_BLV[2:5])
    torch.testing.assert_close(null_BLV, branch(teacher, data, data.condition.null(teacher.null_label)))
    for others in (slice(0, 2), slice(5, 8)):
        assert ((target_BLV - null_BLV)[others].abs().amax((1, 2)) > 0.1).all()


@pytest.mark.parametrize("target", [Plain(), Temperature(0.5), Truncated(top_k=4, top_p=0.8)], ids=repr)
def test_a_target_of_one_branch_never_runs_the_null_branch(student, teacher, data, target: Target):
    seen: list[int] = []
    handle = teacher.register_forward_pre_hook(lambda _module, arguments: seen.append(len(arguments[0])))
    method = Method((Term("kd", ForwardKL()),), target=target)
    value, _ = distill_loss(inputs_of(method, student, teacher), Context((data,)), {"kd": 1.0})
    handle.remove()
    assert seen == [8]
    lp = target(branch(teacher, data, data.condition), None, None).log_softmax(-1)
    lq = branch(student, data, data.condition).log_softmax(-1)
    kept = ~torch.isneginf(lp)
    torch.testing.assert_close(value.detach(), (lp.exp()[kept] * (lp - lq)[kept]).sum())


# ---- which losses a truncated teacher allows

REFUSED = [
    ReverseKL(),
    AdaptiveKL(),
    ToDi(),
    SkewReverseKL(0.0),
    SkewReverseKL(LinearSchedule(0.0, 0.2)),
    JSD(1.0, "ends"),
]
ALLOWED = [
    ForwardKL(), JSD(0.5), JSD(0.3, "ends"), JSD(1.0), TotalVariation(), SkewKL(0.1), SkewKL(0.0), SkewReverseKL(0.1),
    SkewReverseKL(SequenceSkew(), detached=True), TAID(0.6), Ranking(3), TeacherArgmax(), CrossEntropy(),
    Decoupled("target"), Decoupled("rest"), Decoupled("rest", "argmax"),
]  # fmt: skip


@pytest.mark.parametrize("divergence", REFUSED, ids=repr)
def test_what_is_infinite_under_a_truncated_teacher_is_refused_with_the_reason(divergence: Divergence):
    term = Term("kd", divergence)
    with pytest.raises(
        VarkdError, match=rf"term 'kd': {divergence.kind} is infinite wherever a truncated target"
    ) as error:
        Method((Term("ce", CrossEntropy()), term), target=Truncated())
    assert "use forward_kl, jsd or total_variation, or plain" in str(error.value)
    for target in (Plain(), Temperature(0.5), Guided()):
        Method((term,), target=target)


@pytest.mark.parametrize("credit", [Reward(), FutureReturn(), PrefixDiscrepancy()], ids=repr)
def test_sampled_rewards_under_a_truncated_teacher_are_refused_with_the_reason(credit: Credit):
    term = Term("pg", CrossEntropy(), credit=credit)
    with pytest.raises(VarkdError, match="term 'pg': sampled rewards are infinite wherever a truncated target"):
        Method((term,), Rollout(), target=Truncated())
    Method((term,), Rollout())
    Method((Term("pg", ForwardKL(), credit=Importance()),), Rollout(), target=Truncated())  # reads the student alone


@pytest.mark.parametrize(
    "space",
    [Full(), Clusters(4, 0.3), TopK(3), TopK(3, "student"), TopK(3, tail=False), TopK(2, "student", tail=False)],
    ids=repr,
)
@pytest.mark.parametrize("divergence", ALLOWED, ids=repr)
def test_the_others_stay_finite_under_the_narrowest_teacher(
    student, teacher, data, divergence: Divergence, space: Space
):
    """One code is all that it leaves: value and gradient are finite in every space."""
    method = Method((Term("kd", divergence, space=space),), Data(), target=Truncated(top_k=1, top_p=1.0))
    reads_code = isinstance(divergence, CrossEntropy) or (isinstance(divergence, Decoupled) and divergence.of == "code")
    inputs = inputs_of(method, student, teacher)
    needless = isinstance(divergence, CrossEntropy) and isinstance(space, TopK) and space.of == "teacher"
    if needless or (reads_code and isinstance(space, TopK) and not space.tail):  # no teacher runs, or no place
        with pytest.raises(VarkdError, match=r"space\.of=student" if needless else r"space\.tail=true"):
            distill_loss(inputs, Context((data,)), {"kd": 1.0})
        return
    value, _ = distill_loss(inputs, Context((data,)), {"kd": 1.0})
    assert value.isfinite()
    value.backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in student.parameters())
