"""The decode loop: greedy, cached, filtered, guided and restarted; its codes follow the model's distribution."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from varkd.backbones.protocol import Backbone
from varkd.backbones.store import build
from varkd.errors import VarkdError
from varkd.rollout import (
    JointDecoding,
    Sampler,
    apply_cfg,
    draw,
    evaluating,
    filter_logits,
    guidance_per_step,
    log_probabilities,
    rollout,
    sample_inverse_cdf,
)
from varkd.types import Condition, Plan
from varkd.world import Rng

ALMOST_ONE = 1 - 2**-24  # the largest float32 below 1
CONDITION = Condition(torch.tensor([0, 1, 2, 1]))


def uniform(num_rows: int = 4, length: int = 6, seed: int = 0) -> Tensor:
    return Rng(seed).uniform("rollout", torch.arange(num_rows), length)


def full_logits(model: Backbone, codes_BL: Tensor, condition: Condition) -> Tensor:
    with torch.no_grad():
        return model.head(model(codes_BL, condition, model.plan(len(codes_BL))))


def naive_decode(model: Backbone, condition: Condition, sampler: Sampler, uniform_BL: Tensor) -> Tensor:
    """One full forward pass per code and branch, and a hand-written inverse CDF."""
    codes_BL = torch.zeros_like(uniform_BL, dtype=torch.long)
    guidance = guidance_per_step(sampler, model.plan(1), model.guidance).tolist()
    for position in range(codes_BL.shape[1]):
        conditional = full_logits(model, codes_BL, condition)[:, position]
        null = full_logits(model, codes_BL, condition.null(model.null_label))[:, position]
        logits_BV = null + guidance[position] * (conditional - null)
        for row, logits in enumerate(logits_BV):
            if sampler.temperature == 0:
                codes_BL[row, position] = int(logits.argmax())
                continue
            filtered = filter_logits(logits / sampler.temperature, sampler.top_k, sampler.top_p)
            cumulative, target = 0.0, float(uniform_BL[row, position])
            for code, probability in enumerate(filtered.softmax(0).tolist()):
                cumulative += probability
                if probability > 0 and cumulative > target:
                    codes_BL[row, position] = code
                    break
    return codes_BL


SAMPLERS = [
    Sampler(),
    Sampler(temperature=0),
    Sampler(temperature=0.5),
    Sampler(top_k=3),
    Sampler(top_p=0.7),
    Sampler(temperature=1.5, top_k=5, top_p=0.8),
    Sampler(guidance=2.5),
    Sampler(temperature=0, guidance=3.0, guidance_interval=1),
    Sampler(guidance=1.75, guidance_interval=0, top_k=4),
]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_decoding_equals_the_naive_loop(student, sampler):
    codes_BL = rollout(student, CONDITION, student.plan(4), sampler, uniform()).codes_BL
    assert torch.equal(codes_BL, naive_decode(student, CONDITION, sampler, uniform()))


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_a_batch_may_be_split_anywhere(student, sampler):
    whole = rollout(student, CONDITION, student.plan(4), sampler, uniform())
    for rows in (torch.tensor([2]), torch.tensor([3, 1]), torch.arange(2)):
        part = rollout(student, CONDITION.select(rows), student.plan(len(rows)), sampler, uniform()[rows])
        assert torch.equal(part.codes_BL, whole.codes_BL[rows])
        torch.testing.assert_close(part.logp_BL, whole.logp_BL[rows])


@pytest.mark.parametrize("sampler", [Sampler(), Sampler(temperature=0.7, top_k=5), Sampler(top_p=0.6)], ids=str)
def test_log_probabilities_equal_a_teacher_forced_recompute(student, sampler):
    samples = rollout(student, CONDITION, student.plan(4), sampler, uniform())
    logits = full_logits(student, samples.codes_BL, CONDITION) / sampler.temperature
    logp_BLV = filter_logits(logits, sampler.top_k, sampler.top_p).log_softmax(-1)
    expected = logp_BLV.gather(2, samples.codes_BL.unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(samples.logp_BL, expected.float(), rtol=1e-5, atol=1e-5)
    assert samples.logp_BL.isfinite().all() and (samples.logp_BL <= 0).all()


def test_samples_follow_the_exact_joint_distribution(make_model):
    model, count = make_model(5, 3, (1, 3), scale=0.3), 6000
    plan, condition = model.plan(count), Condition(torch.full((count,), 2))
    codes_BL = rollout(model, condition, plan, Sampler(), Rng(0).uniform("x", torch.arange(count), 3)).codes_BL
    every_BL = torch.tensor(list(product(range(3), repeat=3)))
    logp = full_logits(model, every_BL, Condition(torch.full((27,), 2))).log_softmax(-1)
    probability = logp.gather(2, every_BL.unsqueeze(2)).squeeze(2).sum(1).exp()
    observed = torch.bincount(codes_BL @ torch.tensor([9, 3, 1]), minlength=27)
    expected = count * probability
    assert expected.min() > 1
    chi_square = float(((observed - expected) ** 2 / expected).sum())
    assert chi_square < 54.05  # 99.9 % quantile with 26 degrees of freedom
    other = count * torch.full((27,), 1 / 27)
    assert float(((observed - other) ** 2 / other).sum()) > 200  # the statistic has power


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    size=st.integers(2, 300),
    scale=st.floats(0.01, 50),
    top_k=st.integers(0, 10),
    top_p=st.floats(0.01, 1),
    nucleus=st.sampled_from(["descending", "ascending"]),
)
def test_filtered_codes_are_never_drawn(seed: int, size: int, scale: float, top_k: int, top_p: float, nucleus):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(5, 7, size, generator=generator)
    kept = filter_logits(logits, top_k, top_p, nucleus).isfinite()
    assert kept.any(-1).all()
    uniforms = torch.rand(5, 7, generator=generator)
    uniforms[0], uniforms[1] = 0.0, ALMOST_ONE
    codes, logp = draw(logits, Sampler(top_k=top_k, top_p=top_p), uniforms, nucleus)
    assert (codes < size).all() and kept.gather(-1, codes.unsqueeze(-1)).all() and logp.isfinite().all()
    if top_k:
        assert (kept.sum(-1) <= top_k).all()


def test_drawing_walks_the_cumulative_distribution():
    logits = torch.tensor([0.1, 0.2, 0.0, 0.7]).log().expand(1, 6, 4)
    uniforms = torch.tensor([[0.0, 0.09, 0.11, 0.29, 0.31, ALMOST_ONE]])
    codes, logp = draw(logits, Sampler(), uniforms)
    assert codes.tolist() == [[0, 0, 1, 1, 3, 3]]
    torch.testing.assert_close(logp, torch.tensor([[0.1, 0.1, 0.2, 0.2, 0.7, 0.7]]).log())


def test_impossible_codes_at_both_ends_are_never_drawn():
    logits = torch.tensor([-torch.inf, 0.0, 0.0, -torch.inf]).expand(1, 2, 4)
    assert draw(logits, Sampler(), torch.tensor([[0.0, ALMOST_ONE]]))[0].tolist() == [[1, 2]]


def test_filters_by_hand():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    kept = lambda **how: filter_logits(logits, **how).isfinite().tolist()[0]
    assert kept() == [True] * 4
    assert kept(top_k=2) == [True, True, False, False] and kept(top_k=9) == [True] * 4
    assert kept(top_p=0.65) == [True, True, False, False]  # 0.4 does not reach 0.65, 0.4 + 0.3 does
    assert kept(top_p=0.01) == [True, False, False, False]
    tied = torch.tensor([[2.0, 1.0, 1.0, 0.0]])
    assert filter_logits(tied, top_k=2).isfinite().tolist() == [[True, True, True, False]]


# ---- guidance


def count_head_rows(model: Backbone, sampler: Sampler) -> list[int]:
    rows: list[int] = []

    def note(_: Any, inputs: tuple[Tensor, ...]) -> None:
        rows.append(len(inputs[0]))

    handle = model.head.register_forward_pre_hook(note)
    rollout(model, CONDITION, model.plan(4), sampler, uniform())
    handle.remove()
    return rows


def test_guidance_one_runs_a_single_branch(student):
    assert count_head_rows(student, Sampler(guidance=1.0)) == [4] * 6
    assert count_head_rows(student, Sampler(guidance=1.5)) == [8] * 6


def test_guidance_formula_and_schedule():
    stacked = torch.tensor([[1.0, 2.0], [0.5, -1.0]])
    assert apply_cfg(stacked, 3.0).tolist() == [[0.5 + 3 * 0.5, -1 + 3 * 3.0]]
    assert torch.equal(apply_cfg(stacked, 1.0), stacked[:1])
    plan = Plan(torch.arange(6).unsqueeze(0), (1,) * 6)
    schedule = lambda **how: guidance_per_step(Sampler(**how), plan, "constant").tolist()
    assert schedule(guidance=2.0) == [2] * 6
    assert schedule(guidance=2.0, guidance_interval=0) == [2, 2, 1, 1, 1, 1]  # the first `interval` + 2 codes
    assert schedule(guidance=2.0, guidance_interval=3) == [2, 2, 2, 2, 2, 1]
    assert schedule(guidance=1.0) == [1] * 6 and schedule(guidance=0.5) == [1] * 6


PARALLEL = Plan(torch.arange(8).unsqueeze(0), (1, 3, 4))


@pytest.mark.parametrize(
    ("kind", "how", "expected"),
    [
        ("scales", {"guidance": 2.5}, [1.0, 1.75, 2.5]),
        ("scales", {"guidance": 1.0}, [1.0, 1.0, 1.0]),
        ("decoded_before", {"guidance": 5.0}, [1.0, 1.5, 3.0]),
        ("decoded_before", {"guidance": 5.0, "guidance_start": 3.0}, [3.0, 3.25, 4.0]),
        ("decoded_before", {"guidance": 1.0, "guidance_start": 3.0}, [1.0, 1.0, 1.0]),
        ("decoded_after", {"guidance": 5.0}, [1.5, 3.0, 5.0]),
        ("decoded_after", {"guidance": 0.0}, [0.875, 0.5, 0.0]),
        ("power_cosine", {"guidance": 3.0}, [1.0, 1 + (1 - math.cos(math.pi / 8)), 2.0]),
        ("power_cosine", {"guidance": 3.0, "guidance_power": 2.0}, [1.0, 1 + (1 - math.cos(math.pi / 64)),
                                                                  1 + (1 - math.cos(math.pi / 4))]),
        ("power_cosine", {"guidance": 3.0, "guidance_power": 0.0}, [3.0, 3.0, 3.0]),
        ("power_cosine", {"guidance": 0.0}, [1.0, 1.0, 1.0]),
    ],
)  # fmt: skip
def test_guidance_schedules_by_hand(kind, how, expected):
    own = guidance_per_step(Sampler(**how), PARALLEL, kind)
    named = guidance_per_step(Sampler(**how, guidance_schedule=kind), PARALLEL, "constant")
    assert torch.equal(own, named)
    torch.testing.assert_close(own, torch.tensor(expected))


def test_the_two_nucleus_rules_differ_where_they_should():
    """Masses 0.5, 0.25, 0.25 and p = 0.5: "descending" keeps the code at which the mass above is not yet over p."""
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log()
    kept = lambda rule: filter_logits(logits, 0, 0.5, rule).isfinite().sum().item()
    assert kept("descending") == 2 and kept("ascending") == 1
    one = torch.zeros(1, 4)
    assert filter_logits(one, 0, 1e-6, "ascending").isfinite().sum() == 1  # the likeliest code always stays


# ---- prefixes, modes, refusals


@pytest.mark.parametrize("sampler", [Sampler(), Sampler(temperature=0), Sampler(guidance=2.0)], ids=str)
@pytest.mark.parametrize("kept", [1, 3, 5])
def test_restarting_from_a_prefix(student, batch, sampler, kept):
    prefix_BL, kept_BL = batch.codes_BL[:4], (torch.arange(6) < kept).expand(4, -1)
    samples = rollout(student, CONDITION, student.plan(4), sampler, uniform(), prefix_BL, kept_BL)
    assert torch.equal(samples.codes_BL[:, :kept], prefix_BL[:, :kept])
    assert (samples.logp_BL[:, :kept] == 0).all()
    own = rollout(student, CONDITION, student.plan(4), sampler, uniform())
    again = rollout(student, CONDITION, student.plan(4), sampler, uniform(), own.codes_BL, kept_BL)
    assert torch.equal(again.codes_BL, own.codes_BL)  # its own prefix continues as before
    torch.testing.assert_close(again.logp_BL[:, kept:], own.logp_BL[:, kept:])
    garbage_BL = prefix_BL.clone()
    garbage_BL[:, kept:] = 10**6  # codes that are not kept are not looked at
    again = rollout(student, CONDITION, student.plan(4), sampler, uniform(), garbage_BL, kept_BL)
    assert torch.equal(again.codes_BL, samples.codes_BL)


def test_codes_are_kept_wherever_they_stand(student, batch):
    """Every row keeps other positions, none of them a prefix: the model sees kept and sampled codes alike."""
    kept_BL = torch.rand(4, 6, generator=torch.Generator().manual_seed(3)) < 0.5
    samples = rollout(student, CONDITION, student.plan(4), Sampler(), uniform(), batch.codes_BL[:4], kept_BL)
    assert torch.equal(samples.codes_BL[kept_BL], batch.codes_BL[:4][kept_BL])
    logits = student.head(student(samples.codes_BL, CONDITION, student.plan(4)))
    drawn, logp = sample_inverse_cdf(log_probabilities(logits, Sampler()), uniform())
    assert torch.equal(samples.codes_BL[~kept_BL], drawn[~kept_BL])
    torch.testing.assert_close(samples.logp_BL, torch.where(kept_BL, 0.0, logp))


def test_kept_codes_of_parallel_steps(batch):
    """Two codes a step in an order per row: a step of which one code is kept, and two leading steps kept as a whole."""
    sizes = {"vocab_size": 12, "num_classes": 3, "grid": (2, 3), "num_layers": 2, "dim": 16, "num_heads": 2,
             "ffn_dim": 24, "order": "random"}  # fmt: skip
    model = build("randar", sizes).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4, generator=generator)
    plan = Plan(model.plan(4, Rng(3), torch.arange(4)).order_BL, (2, 1, 2, 1))
    kept_by_rank = torch.tensor([1, 1, 1, 0, 1, 0], dtype=torch.bool).expand(4, -1)
    kept_BL = kept_by_rank.gather(1, plan.rank_BL)
    garbage_BL = batch.codes_BL[:4].masked_fill(~kept_BL, 10**6)
    samples = rollout(model, CONDITION, plan, Sampler(), uniform(), garbage_BL, kept_BL)
    assert torch.equal(samples.codes_BL[kept_BL], batch.codes_BL[:4][kept_BL])
    with torch.no_grad():
        logp_BLV = model.head(model(samples.codes_BL, CONDITION, plan)).log_softmax(-1)
    drawn_BL, logp_BL = sample_inverse_cdf(
        logp_BLV.float(), uniform().gather(1, plan.rank_BL)
    )  # uniform numbers go by rank
    assert torch.equal(samples.codes_BL[~kept_BL], drawn_BL[~kept_BL])
    torch.testing.assert_close(samples.logp_BL, torch.where(kept_BL, 0.0, logp_BL))


# ---- two models in lock-step


@pytest.mark.parametrize("sampler", [Sampler(), Sampler(temperature=0.7, top_k=5), Sampler(guidance=2.0)], ids=str)
def test_a_companion_sees_the_codes_that_the_rule_chose(student, teacher, sampler):
    """At every step the rule gets both models' filtered laws given all codes so far, and its own two numbers."""
    seen: list[tuple[Tensor, ...]] = []

    def rule(own_BnV: Tensor, other_BnV: Tensor, uniform_Bn: Tensor, spare_Bn: Tensor):
        seen.append((own_BnV, other_BnV, uniform_Bn, spare_Bn))
        codes_Bn = (own_BnV + other_BnV).argmax(-1)
        return codes_Bn, torch.full_like(uniform_Bn, -float(len(seen))), uniform_Bn < 0.5

    joint = JointDecoding(teacher, rule, uniform(seed=1))
    samples = rollout(student, CONDITION, student.plan(4), sampler, uniform(), joint=joint)
    assert torch.equal(torch.cat([each[2] for each in seen], dim=1), uniform())
    assert torch.equal(torch.cat([each[3] for each in seen], dim=1), uniform(seed=1))
    for place, model in enumerate((student, teacher)):
        logits = full_logits(model, samples.codes_BL, CONDITION)
        if sampler.guidance != 1:
            null = full_logits(model, samples.codes_BL, CONDITION.null(model.null_label))
            logits = null + sampler.guidance * (logits - null)
        expected = filter_logits(logits / sampler.temperature, sampler.top_k).log_softmax(-1).float()
        torch.testing.assert_close(torch.cat([each[place] for each in seen], dim=1), expected, rtol=1e-5, atol=1e-5)
    both = torch.cat([each[0] + each[1] for each in seen], dim=1)
    assert torch.equal(samples.codes_BL, both.argmax(-1))
    assert samples.logp_BL.tolist() == [[-1, -2, -3, -4, -5, -6]] * 4
    assert samples.accept_BL is not None and torch.equal(samples.accept_BL, uniform() < 0.5)


def test_kept_codes_count_as_accepted(student, teacher, batch):
    def refuse(own_BnV: Tensor, other_BnV: Tensor, uniform_Bn: Tensor, spare_Bn: Tensor):
        del other_BnV, spare_Bn
        return *sample_inverse_cdf(own_BnV, uniform_Bn), torch.zeros_like(uniform_Bn, dtype=torch.bool)

    kept_BL = torch.tensor([[1, 1, 0, 0, 1, 0]]).bool().expand(4, -1)
    samples = rollout(student, CONDITION, student.plan(4), Sampler(), uniform(), batch.codes_BL[:4], kept_BL,
                      JointDecoding(teacher, refuse, uniform(seed=1)))  # fmt: skip
    assert samples.accept_BL is not None and torch.equal(samples.accept_BL, kept_BL)
    alone = rollout(student, CONDITION, student.plan(4), Sampler(), uniform(), batch.codes_BL[:4], kept_BL)
    assert torch.equal(samples.codes_BL, alone.codes_BL) and torch.equal(samples.logp_BL, alone.logp_BL)
    assert alone.accept_BL is None


def test_keeping_everything_needs_no_model(batch):
    plan = Plan(torch.arange(6).expand(4, -1), (1,) * 6)
    samples = rollout(None, CONDITION, plan, Sampler(), uniform(), batch.codes_BL[:4], torch.ones(4, 6).bool())  # type: ignore[arg-type]
    assert torch.equal(samples.codes_BL, batch.codes_BL[:4]) and (samples.logp_BL == 0).all()


def test_mode_and_gradients(make_model):
    model = make_model(1).train()
    samples = rollout(model, CONDITION, model.plan(4), Sampler(), uniform())
    assert model.training and not samples.logp_BL.requires_grad
    with pytest.raises(RuntimeError, match="inside"), evaluating(model):
        assert not model.training
        raise RuntimeError("inside")
    assert model.training


def test_greedy_codes_are_certain(student):
    samples = rollout(student, CONDITION, student.plan(4), Sampler(temperature=0), uniform())
    assert (samples.logp_BL == 0).all()


@pytest.mark.parametrize(
    "values", [{"steps": 0}, {"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}, {"guidance": -1.0}]
)
def test_nonsense_is_refused(values):
    with pytest.raises(VarkdError, match="sampler"):
        Sampler(**values)
