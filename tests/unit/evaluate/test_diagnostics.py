"""Every quantity against sums and loops in float64, the identities between them, and orders that are not raster."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from varkd.backbones.llamagen import LlamaGen
from varkd.backbones.protocol import Backbone
from varkd.backbones.store import build
from varkd.distill.prefixes import leading
from varkd.distill.spaces import Clusters, cluster_members
from varkd.evaluate.diagnostics import (
    QUANTITIES,
    SLACK,
    CodeSpace,
    Pair,
    Sequences,
    by_rank,
    completed,
    mass_count,
    measure,
    sampled,
)
from varkd.evaluate.intervals import centered_bootstrap, mean_curve
from varkd.rollout import Sampler
from varkd.types import Batch, Condition, Plan
from varkd.world import Rng

CPU = torch.device("cpu")
VOCAB = 12
Models = Callable[..., LlamaGen]


def code_space(seed: int = 0, vocab_size: int = VOCAB, clusters: int = 4) -> CodeSpace:
    """Three-dimensional codes at random places, in float64."""
    codebook_VE = torch.randn(vocab_size, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = CodeSpace.of(codebook_VE, Clusters(count=clusters), CPU)
    return replace(found, codebook_VE=codebook_VE)


def sequences(model: Backbone, num: int = 5, seed: int = 3, plan: Plan | None = None) -> Sequences:
    codes_BL = torch.randint(
        model.vocab_size, (num, model.sequence_length), generator=torch.Generator().manual_seed(seed)
    )
    label_B = torch.arange(num) % model.num_classes
    return Sequences(codes_BL, Condition(label_B), plan or model.plan(num, Rng(1), torch.arange(num)))


@torch.no_grad()
def logp(model: Backbone, data: Sequences) -> Tensor:
    return model.head(model(data.codes_BL, data.condition, data.plan)).log_softmax(-1)


def by_loops(q: list[float], p: list[float], code: int, space: CodeSpace) -> dict[str, float]:
    """Every quantity of one row, in plain Python."""
    assert space.codebook_VE is not None and space.neighbor_Vk is not None
    codes, cluster, vectors = range(len(p)), space.cluster_V.tolist(), space.codebook_VE
    squared = [[float((vectors[v] - vectors[u]).square().sum()) for u in codes] for v in codes]
    best_p, best_q = max(codes, key=lambda v: p[v]), max(codes, key=lambda v: q[v])
    entropy = -sum(p[v] * math.log(p[v]) for v in codes)
    sd = math.sqrt(sum(p[v] * (-math.log(p[v]) - entropy) ** 2 for v in codes))
    mass = [sum(p[v] for v in codes if cluster[v] == k) for k in range(max(cluster) + 1)]
    mix = [(p[v] + q[v]) / 2 for v in codes]
    kl = lambda a, b: sum(a[v] * math.log(a[v] / b[v]) for v in codes)
    mean = lambda a: sum(a[v] * vectors[v] for v in codes)
    expected = lambda a, b: sum(a[v] * b[u] * squared[v][u] for v in codes for u in codes)

    def count(masses: list[float]) -> int:
        total = 0.0
        for number, part in enumerate(sorted(masses, reverse=True), 1):
            total += part
            if total >= 0.9:
                return number
        return len(masses)

    lantern = 0.0
    for v in codes:
        extra = 0.0
        for u in space.neighbor_Vk[v].tolist():
            if extra + p[u] > SLACK:
                break
            extra += p[u]
        lantern += min(q[v], p[v] + extra)
    return {
        "ce": -math.log(q[code]), "ce_teacher": -math.log(p[code]), "typicality": (-math.log(p[code]) - entropy) / sd,
        "teacher_entropy": entropy, "student_entropy": -sum(q[v] * math.log(q[v]) for v in codes),
        "forward_kl": kl(p, q), "reverse_kl": kl(q, p), "jsd": 0.5 * kl(p, mix) + 0.5 * kl(q, mix),
        "total_variation": 0.5 * sum(abs(p[v] - q[v]) for v in codes),
        "acceptance": sum(min(p[v], q[v]) for v in codes), "acceptance_neighbors": lantern,
        "top1": float(best_p == best_q), "top5": float(best_q in sorted(codes, key=lambda v: -p[v])[:5]),
        "top1_cluster": float(cluster[best_p] == cluster[best_q]),
        "embedding_distance": expected(p, q), "embedding_self": expected(p, p),
        "mean_gap": float((mean(p) - mean(q)).square().sum()),
        "n90": count(p), "n90_clusters": count(mass), "perplexity": math.exp(entropy), "max_prob": p[best_p],
        "cluster_mass": max(mass), "near_mass": sum(p[v] for v in codes if squared[best_p][v] <= space.radius**2),
        "correct": float(best_p == code), "correct_cluster": float(mass.index(max(mass)) == cluster[code]),
    }  # fmt: skip


def test_every_quantity_is_the_loop(make_model: Models):
    student, teacher, space = make_model(3), make_model(4, scale=0.6), code_space()
    data = sequences(student)
    found = measure(student, teacher, data, space, batch_size=2, chunk_rows=5)
    assert set(found) == set(QUANTITIES)
    q_BLV, p_BLV = logp(student, data).exp(), logp(teacher, data).exp()
    for b in range(len(data)):
        for place in range(data.codes_BL.shape[1]):
            code = int(data.codes_BL[b, place])
            expected = by_loops(q_BLV[b, place].tolist(), p_BLV[b, place].tolist(), code, space)
            got = {name: float(value_BL[b, place]) for name, value_BL in found.items()}
            assert got == pytest.approx(expected, abs=1e-5), (b, place)


def test_identities(make_model: Models):
    student, teacher, space = make_model(3), make_model(4), code_space()
    found = measure(student, teacher, sequences(student), space)
    near = lambda a, b: torch.testing.assert_close(a.double(), b.double(), rtol=1e-9, atol=1e-9)
    near(found["acceptance"], 1 - found["total_variation"])
    assert (found["acceptance_neighbors"] >= found["acceptance"] - 1e-12).all()
    # E|v - u|^2 is the mean of both models' own distances plus the gap between their means.
    swapped = measure(teacher, student, sequences(student), space)
    own = (found["embedding_self"] + swapped["embedding_self"]) / 2
    near(found["embedding_distance"], own + found["mean_gap"])
    near(found["jsd"], swapped["jsd"])
    assert (found["n90_clusters"] <= 4).all() and (found["cluster_mass"] >= found["max_prob"] - 1e-9).all()


def test_equal_models_are_apart_by_nothing(make_model: Models):
    model, space = make_model(3), code_space()
    data = sequences(model)
    found = measure(model, model, data, space)
    for name in ("forward_kl", "reverse_kl", "jsd", "total_variation", "mean_gap"):
        assert float(found[name].abs().max()) < 1e-12, name
    for name in ("acceptance", "top1", "top5", "top1_cluster"):
        assert float(found[name].min()) > 1 - 1e-12, name
    assert torch.equal(sampled(model, data, Sampler(), 5).codes_BL, sampled(model, data, Sampler(), 5).codes_BL)


def test_typicality_is_0_on_average_over_the_teachers_law():
    """Enumerated: sum_v p(v) z(v) = 0 and sum_v p(v) z(v)^2 = 1."""
    p_NV = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(1), dtype=torch.float64).log_softmax(1)
    pair = Pair(p_NV.expand(VOCAB, -1), p_NV.expand(VOCAB, -1), torch.arange(VOCAB), code_space())
    z_V, p_V = QUANTITIES["typicality"](pair).double(), p_NV[0].exp()
    assert float(p_V @ z_V) == pytest.approx(0, abs=1e-6) and float(p_V @ z_V.square()) == pytest.approx(1, abs=1e-6)


def test_typicality_of_a_teacher_without_doubt_is_0():
    certain_NV = torch.tensor([[0.0, -torch.inf, -torch.inf]], dtype=torch.float64)
    space = CodeSpace(torch.zeros(3, dtype=torch.long))
    assert float(QUANTITIES["typicality"](Pair(certain_NV, certain_NV, torch.tensor([0]), space))) == 0


@pytest.mark.parametrize(("probabilities", "expected"), [
    ([0.9, 0.1], 1), ([0.5, 0.4, 0.1], 2), ([0.1] * 10, 9), ([1.0, 0.0], 1), ([0.3, 0.3, 0.29, 0.11], 4)])  # fmt: skip
def test_how_many_hold_nine_tenths(probabilities: list[float], expected: int):
    assert mass_count(torch.tensor([probabilities])).tolist() == [expected]


def test_neighbors_and_radius():
    codebook_VE = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    space = CodeSpace.of(codebook_VE, Clusters(count=2), CPU)
    assert space.neighbor_Vk is not None and space.neighbor_Vk.tolist() == [[1, 2], [0, 2], [1, 0], [2, 1]]
    assert space.radius == pytest.approx((3 + 2 + 3 + 6) / 4)
    assert space.members_KM is not None and torch.equal(space.members_KM, cluster_members(space.cluster_V))


def test_what_is_not_known_is_refused(make_model: Models):
    model = make_model(1)
    with pytest.raises(ValueError, match="CodeSpace"):
        measure(model, model, sequences(model), CodeSpace(torch.zeros(VOCAB, dtype=torch.long)), ["mean_gap"])


# ---- orders


def family(name: str, seed: int, **sizes: Any) -> Backbone:
    common = {"vocab_size": VOCAB, "num_classes": 3, "num_layers": 2, "dim": 16, "num_heads": 2, "ffn_dim": 24}
    model = build(name, {**common, **sizes}).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4, generator=generator)
    return model.eval()


@pytest.mark.parametrize("steps", [None, 3])
def test_random_orders_are_compared_under_the_students_plan(steps: int | None):
    student, teacher = (family("randar", seed, grid=(2, 3)) for seed in (1, 2))
    plan = student.plan(5, Rng(0), torch.arange(5), steps)
    assert not torch.equal(plan.order_BL[0], plan.order_BL[1])
    data = sequences(student, plan=plan)
    found = measure(student, teacher, data, code_space(), ["forward_kl"], batch_size=2)
    q, p = logp(student, data), logp(teacher, data)
    expected_BL = (p.exp() * (p - q)).sum(-1)
    torch.testing.assert_close(found["forward_kl"], expected_BL)
    ranked = by_rank(found, plan)["forward_kl"]
    for b in range(5):
        for rank in range(6):
            assert ranked[b, rank] == found["forward_kl"][b, plan.order_BL[b, rank]]


def test_scales():
    sizes = {"scales": (1, 2), "code_dim": 4}
    student, teacher = (family("var", seed, **sizes) for seed in (1, 2))
    data = sequences(student)
    assert data.plan.sizes == (1, 4)
    found = measure(student, teacher, data, code_space(), ["forward_kl", "acceptance"])
    q, p = logp(student, data), logp(teacher, data)
    torch.testing.assert_close(found["forward_kl"], (p.exp() * (p - q)).sum(-1))
    assert sampled(teacher, data, Sampler(), 0).codes_BL.shape == (5, 5)


# ---- completions


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_a_completion_keeps_its_prefix(share: float):
    teacher = family("randar", 2, grid=(2, 4))
    data = sequences(teacher)
    kept_BL = leading(data.plan, torch.full((5, 1), share))
    whole = completed(teacher, data, kept_BL, Sampler(), 7, batch_size=2)
    assert kept_BL.sum(1).tolist() == [int(8 * share)] * 5
    assert torch.equal(whole.codes_BL[kept_BL], data.codes_BL[kept_BL])
    fresh = sampled(teacher, data, Sampler(), 7)
    if share == 0:
        assert torch.equal(whole.codes_BL, fresh.codes_BL)
    # What the teacher would have drawn is what it draws, if it is given its own beginning.
    again = completed(teacher, fresh, kept_BL, Sampler(), 7)
    assert torch.equal(again.codes_BL, fresh.codes_BL)


def test_a_curve_has_the_interval_of_every_mean(batch: Batch):
    values_NL = batch.codes_BL.double()
    curve = mean_curve(values_NL, seed=4)
    for place in range(values_NL.shape[1]):
        mean = lambda counts_RN, place=place: counts_RN @ values_NL[:, place] / len(values_NL)
        expected = centered_bootstrap(mean, len(values_NL), seed=4)
        assert [float(part[place]) for part in curve] == pytest.approx(list(expected))
