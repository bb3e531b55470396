"""A cached teacher against the live one: equal where it keeps every code, within the tail bound where it does not."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import varkd
from cached_teachers import cached, named
from varkd.backbones.llamagen import LlamaGen
from varkd.backbones.store import build
from varkd.distill.divergences import JSD, ForwardKL, TargetRows, TotalVariation
from varkd.distill.method import Method, Term
from varkd.distill.mixture import Mixture, Share
from varkd.distill.prefixes import Data, Rollout
from varkd.distill.target import Guided, Plain, Target, Temperature, Truncated
from varkd.distill.teachers import CachedRows, CachedTeacher, one_plan
from varkd.methods import METHODS
from varkd.types import Batch

TABLES = torch.randn(12, 4, generator=torch.Generator().manual_seed(3))
ON_DATA = ("kd", "kd_ce", "kd_reverse", "akl", "todi", "taid", "atkd")
KD = METHODS["kd"].method


def with_target(target: Target) -> Method:
    return replace(KD, target=target)


def step(
    method: str | Method, teacher: LlamaGen | CachedTeacher, student: LlamaGen, batch: Batch, label_drop: float = 0.5
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Loss, gradient of the head and statistics of one step in which about half of the labels are dropped."""
    distiller = varkd.Distiller(method, student, teacher, TABLES, updates=2, label_drop=label_drop)
    loss, stats = distiller(named(batch), audit=True)
    (gradient,) = torch.autograd.grad(loss, [student.head.weight])
    return loss.detach(), gradient, dict(stats)


@pytest.mark.parametrize("name", ON_DATA)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float16", 5e-3)])
def test_all_codes_are_the_live_teacher(
    name: str, dtype: str, tolerance: float, tmp_path: Path, student: LlamaGen, teacher: LlamaGen, batch: Batch
):
    """In float64 but for what was stored; `taid` mixes its target from the logits of both."""
    cache = cached(teacher, batch.codes_BL, batch.label_B, tmp_path, dtype=dtype)
    loss, gradient, stats = step(name, teacher, student, batch)
    found, found_gradient, found_stats = step(name, cache, student, batch)
    torch.testing.assert_close(found, loss, rtol=tolerance, atol=tolerance * 1e-1)
    torch.testing.assert_close(found_gradient, gradient, rtol=tolerance, atol=tolerance * 0.1)
    assert found_stats == pytest.approx(stats, rel=tolerance, abs=tolerance)
    assert loss > 0 and (found != loss if dtype == "float16" else True)


@pytest.mark.parametrize("target", [Temperature(0.7), Truncated(5, 1.0), Truncated(4, 0.6)])
def test_targets_of_a_cache_of_all_codes(
    target: Target, tmp_path: Path, student: LlamaGen, teacher: LlamaGen, batch: Batch
):
    cache = cached(teacher, batch.codes_BL, batch.label_B, tmp_path)
    live, found = (step(with_target(target), each, student, batch)[0] for each in (teacher, cache))
    torch.testing.assert_close(found, live, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("target", [Truncated(5, 1.0), Truncated(4, 0.6)])
def test_a_target_among_the_kept_codes_is_exact(
    target: Target, tmp_path: Path, student: LlamaGen, teacher: LlamaGen, batch: Batch
):
    cache = cached(teacher, batch.codes_BL, batch.label_B, tmp_path, top_k=5)
    live, found = (step(with_target(target), each, student, batch)[0] for each in (teacher, cache))
    torch.testing.assert_close(found, live, rtol=1e-5, atol=1e-6)


def test_a_guided_cache_is_the_guided_teacher(tmp_path: Path, student: LlamaGen, teacher: LlamaGen, batch: Batch):
    """Dropped labels included, for which the target is the null branch."""
    cache = cached(teacher, batch.codes_BL, batch.label_B, tmp_path, guidance=1.5)
    for name in ("kd_guided", with_target(Guided(1.5))):
        live, found = (step(name, each, student, batch) for each in (teacher, cache))
        torch.testing.assert_close(found[0], live[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[1], live[1], rtol=1e-5, atol=1e-6)
    plain = step(with_target(Plain()), teacher, student, batch)[0]
    assert abs(plain - live[0]) > 1e-2, "guidance matters here"


def test_dropped_labels_read_the_null_branch(tmp_path: Path, student: LlamaGen, teacher: LlamaGen, batch: Batch):
    cache = cached(teacher, batch.codes_BL, batch.label_B, tmp_path)
    always, never = (step("kd", cache, student, batch, drop)[0] for drop in (1.0, 0.0))
    torch.testing.assert_close(always, step("kd", teacher, student, batch, 1.0)[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(never, step("kd", teacher, student, batch, 0.0)[0], rtol=1e-6, atol=1e-7)
    assert abs(always - never) > 1e-3


def test_var_from_a_cache(tmp_path: Path):
    """Maps, coarse to fine: one scale a step."""
    sizes = {"vocab_size": 12, "num_classes": 3, "num_layers": 1, "dim": 16, "num_heads": 2, "scales": (1, 2),
             "code_dim": 4}  # fmt: skip
    models = [build("var", sizes, seed=seed) for seed in (1, 2)]
    for model in models:
        torch.nn.init.normal_(model.head.weight, std=0.3, generator=torch.Generator().manual_seed(5))
    student, teacher = models[0], models[1].eval().requires_grad_(False)
    draw = torch.Generator().manual_seed(0)
    batch = Batch(torch.randint(12, (4, 5), generator=draw), torch.tensor([0, 1, 2, 0]), torch.arange(4))
    cache = cached(teacher, batch.codes_BL, batch.label_B, tmp_path)
    assert cache.cache.sizes == (1, 4)
    losses = [varkd.Distiller("kd", student, each, TABLES, updates=1)(named(batch))[0] for each in (teacher, cache)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    assert losses[0] > 0


# ---- the tail


def smoothed(p_V: Tensor, top_k: int) -> tuple[CachedRows, Tensor]:
    """One row of a cache, and which codes it does not tell apart."""
    logp, code = p_V.log().topk(top_k)
    rest = torch.ones(len(p_V), dtype=torch.bool).scatter(0, code, False)
    tail = p_V[rest].sum().log()
    return CachedRows(Plain(), len(p_V), logp[None], tail[None], code[None].int()), rest


@given(seed=st.integers(0, 10**6), vocab=st.integers(2, 40), sharpness=st.floats(0.1, 8.0), data=st.data())
def test_the_tail_bound(seed: int, vocab: int, sharpness: float, data: st.DataObject):
    """The identity and all bounds of the module's docstring, on random distributions."""
    top_k = data.draw(st.integers(1, vocab - 1))
    draw = torch.Generator().manual_seed(seed)
    p, q = (sharpness * torch.randn(vocab, generator=draw, dtype=torch.float64) for _ in range(2))
    p, q = p.softmax(0), q.softmax(0)
    rows, rest = smoothed(p, top_k)
    cached_p = rows.logits(slice(None)).exp()[0]
    tail = float(p[rest].sum())
    assert float(cached_p.sum()) == pytest.approx(1) and torch.equal(cached_p[rest].unique(), cached_p[rest][:1])
    torch.testing.assert_close(cached_p[~rest], p[~rest])
    about = TargetRows(torch.zeros(1, dtype=torch.long))
    loss = {
        kind: [float(rule(q.log()[None], each.log()[None], about)) for each in (p, cached_p)]
        for kind, rule in {"fkl": ForwardKL(), "tv": TotalVariation(), "jsd": JSD(0.5)}.items()
    }
    p_tail, q_tail = p[rest] / tail, q[rest] / q[rest].sum()
    uniform = torch.full_like(p_tail, 1 / len(p_tail))
    kl = lambda first, second: float((first * (first / second).log()).sum())
    moved = loss["fkl"][0] - loss["fkl"][1]
    assert moved == pytest.approx(tail * (kl(p_tail, q_tail) - kl(uniform, q_tail)), abs=1e-9)
    assert abs(moved) <= tail * float(-q_tail.log().min()) + 1e-9
    assert abs(loss["tv"][0] - loss["tv"][1]) <= tail + 1e-9
    # The gradient of forward KL with respect to the student's logits is q - p.
    assert float(((q - p) - (q - cached_p)).abs().sum()) <= 2 * tail + 1e-9
    assert abs(loss["jsd"][0] - loss["jsd"][1]) <= tail / 2 * (1 + math.log1p(1 / tail)) + 1e-9


def test_a_smaller_cache_moves_the_loss_less_than_the_bound(
    tmp_path: Path, student: LlamaGen, teacher: LlamaGen, batch: Batch
):
    """The whole way, through storage and chunks: the mean over positions of tau log(q(T) / min q) over the tail T."""
    live = step("kd", teacher, student, batch, 0.0)
    q_BLV = student.head(student(batch.codes_BL, batch.condition, student.plan(len(batch)))).softmax(-1).detach()
    p_BLV = teacher.head(teacher(batch.codes_BL, batch.condition, teacher.plan(len(batch)))).softmax(-1)
    errors = []
    for top_k in (1, 3, 6, 11):
        cache = cached(teacher, batch.codes_BL, batch.label_B, tmp_path / str(top_k), top_k=top_k)
        found = step("kd", cache, student, batch, 0.0)
        kept_BLK = p_BLV.topk(top_k).indices
        tau_BL = p_BLV.scatter(-1, kept_BLK, 0.0).sum(-1)
        most_BL = tau_BL * (q_BLV.scatter(-1, kept_BLK, 0.0).sum(-1) / q_BLV.scatter(-1, kept_BLK, 2.0).amin(-1)).log()
        errors.append(float((found[0] - live[0]).abs()))
        assert errors[-1] <= float(most_BL.mean()) + 1e-6
    assert errors[0] > 1e-3 and errors[2] > 1e-5
    # With one code left in the tail, spreading its mass over it is exact: the next best cache has no error.
    assert errors[3] < 1e-6


def test_excluded_codes_stay_excluded():
    logp = torch.tensor([[0.5, 0.5, 0.0]]).log()
    nothing = torch.tensor([-torch.inf])
    rows = CachedRows(Plain(), 3, logp, nothing, torch.tensor([[2, 0, 1]]))
    assert rows.logits(slice(None)).exp().tolist() == [[0.5, 0.0, 0.5]]
    rows = CachedRows(Plain(), 4, logp[:, :2], nothing, torch.tensor([[2, 0]]))
    assert rows.logits(torch.tensor([0])).exp().tolist() == [[0.5, 0.0, 0.5, 0.0]]


# ---- what it cannot answer


NEEDS_NO_TEACHER = {"ce", "scheduled_sampling", "scheduled_sampling_parallel"}
WHAT = {"miniplm": "chosen once", "kd_guided": "teach --guidance 1.5", "seqkd": "sequences that the teacher samples",
        "varkd": "mixed rollouts", "gkd": "sequences that the student samples", "minillm": "drawn from the teacher",
        "tiekd": "data and all rounds are trained on", "best_of_n": "the one with the largest log p - log r",
        "seqinter": "continuations by the teacher", "distillm": "draws one at most"}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_every_preset_trains_or_says_what_it_lacks(
    name: str, tmp_path: Path, student: LlamaGen, teacher: LlamaGen, batch: Batch
):
    cache = cached(teacher, batch.codes_BL, batch.label_B, tmp_path)
    if name in (*ON_DATA, *NEEDS_NO_TEACHER):
        distiller = varkd.Distiller(name, student, cache, TABLES, updates=1)
        loss, _ = distiller(named(batch))
        assert torch.isfinite(loss) and loss > 0
        return
    with pytest.raises(varkd.VarkdError) as refused:
        varkd.Distiller(name, student, cache, TABLES, updates=1)
    text = str(refused.value)
    assert "\n" not in text and WHAT.get(name, "live teacher") in text
    assert name == "kd_guided" or "give a live teacher" in text


def refused(match: str, method: str | Method, cache: CachedTeacher, student: Any, **options: Any) -> None:
    with pytest.raises(varkd.VarkdError, match=match):
        varkd.Distiller(method, student, cache, TABLES, **{"updates": 1, **options})


def test_targets_that_it_does_not_hold(tmp_path: Path, student: LlamaGen, teacher: LlamaGen, batch: Batch):
    small = cached(teacher, batch.codes_BL, batch.label_B, tmp_path / "small", top_k=5)
    for target in (Truncated(6, 1.0), Truncated(0, 0.9)):
        refused("5 likeliest codes apart.*top_k=5 or less", with_target(target), small, student)
    refused("give a live teacher", with_target(Guided(1.5, schedule="constant")), small, student)
    guided = cached(teacher, batch.codes_BL, batch.label_B, tmp_path / "guided", guidance=1.5)
    refused("scale 1.5 .* but the target is the teacher's own.*without --guidance", "kd", guided, student)
    refused(r"but the target is .* scale 2 .*teach --guidance 2`", with_target(Guided(2.0)), guided, student)


def test_a_cache_without_the_null_branch(tmp_path: Path, student: LlamaGen, teacher: LlamaGen, batch: Batch):
    cache = cached(teacher, batch.codes_BL, batch.label_B, tmp_path, null=False)
    refused("set train.label_drop=0", "kd", cache, student)
    found, live = (step("kd", each, student, batch, 0.0)[0] for each in (cache, teacher))
    torch.testing.assert_close(found, live, rtol=1e-6, atol=1e-7)


def test_students_that_do_not_fit(tmp_path: Path, teacher: LlamaGen, batch: Batch, make_model: Any):
    cache = cached(teacher, batch.codes_BL, batch.label_B, tmp_path)
    refused("12 codes, the student has 13", "kd", cache, make_model(1, vocab_size=13))
    refused("6 codes an image, the student has 8", "kd", cache, make_model(1, grid=(2, 4)))
    sizes = {"vocab_size": 12, "num_classes": 3, "grid": (2, 3), "num_layers": 2, "dim": 16, "num_heads": 2}
    for family in ("arpg", "randar", "rar"):
        refused("set model.order=raster", "kd", cache, build(family, {**sizes, "order": "random"}))
        varkd.Distiller("kd", build(family, {**sizes, "order": "raster"}), cache, TABLES, updates=1)
        varkd.Distiller("ce", build(family, {**sizes, "order": "random"}), cache, TABLES, updates=1)


def test_two_codes_in_random_order_are_no_plan():
    sizes = {"vocab_size": 12, "num_classes": 3, "grid": (1, 2), "num_layers": 2, "dim": 16, "num_heads": 2}
    assert one_plan(build("randar", {**sizes, "order": "random"})) is None
    plan = one_plan(build("randar", {**sizes, "order": "raster"}))
    assert plan is not None and plan.order_BL.tolist() == [[0, 1]]


def test_rows_of_unknown_origin(tmp_path: Path, student: LlamaGen, teacher: LlamaGen, batch: Batch):
    cache = cached(teacher, batch.codes_BL, batch.label_B, tmp_path)
    distiller = varkd.Distiller("kd", student, cache, TABLES, updates=1)
    with pytest.raises(varkd.VarkdError, match=r"which training sequences .* varkd\.DataLoader"):
        distiller(batch)
    with pytest.raises(varkd.VarkdError, match="has 8 sequences, not number 9"):
        distiller(replace(named(batch), sequence_B=torch.arange(2, 10)))


def test_a_mixture_is_named_by_the_share_that_is_not_data(
    tmp_path: Path, student: LlamaGen, teacher: LlamaGen, batch: Batch
):
    cache = cached(teacher, batch.codes_BL, batch.label_B, tmp_path)
    twice = Method((Term("kd", ForwardKL()),), Mixture((Share(Data(), 0.5), Share(Data(), 0.5))))
    torch.testing.assert_close(
        step(twice, cache, student, batch)[0], step(twice, teacher, student, batch)[0], rtol=1e-6, atol=1e-7
    )
    refused("student samples now", Method((Term("kd", ForwardKL()),),
            Mixture((Share(Data(), 0.5), Share(Rollout(), 0.5)))), cache, student)  # fmt: skip
