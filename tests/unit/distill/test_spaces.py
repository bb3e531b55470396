"""Temperature, clusters, likeliest codes: the chain rule, data processing, gradients, and the cluster maps."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import reference
from varkd.distill.divergences import (
    JSD,
    AdaptiveKL,
    CrossEntropy,
    Decoupled,
    Divergence,
    ForwardKL,
    ReverseKL,
    SequenceSkew,
    SkewKL,
    SkewReverseKL,
    TargetRows,
    ToDi,
    TotalVariation,
)
from varkd.distill.spaces import (
    Clusters,
    CodebookTables,
    Full,
    Space,
    TopK,
    assign_clusters,
    cluster_logp,
    cluster_members,
    log_softmax,
)
from varkd.errors import VarkdError

DIVERGENCES = [ForwardKL(), ReverseKL(), JSD(0.5), JSD(0.2, "ends"), TotalVariation()]
CODE = torch.tensor([0, 3, 5, 1])


def pair(seed: int = 0, size: int = 12, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, 4, size, generator=generator, dtype=torch.float64) * scale)  # type: ignore[return-value]


def products_of(space: Clusters, cluster_V: Tensor) -> CodebookTables:
    return {space.key: cluster_V, f"{space.key}/members": cluster_members(cluster_V)}


def measure(
    space: Space, divergence: Divergence, s: Tensor, z: Tensor, codebook_tables: CodebookTables
) -> tuple[Tensor, Tensor]:
    s = s.detach().requires_grad_()
    value = torch.zeros(len(s), dtype=torch.float64)
    for view in space(log_softmax(s), log_softmax(z), TargetRows(CODE), codebook_tables):
        assert view.teacher_NK is not None
        value = value + view.weight * divergence(view.student_NK, view.teacher_NK, view.rows)
    return value.detach(), torch.autograd.grad(value.sum(), s)[0]


maps = st.integers(2, 12).flatmap(
    lambda count: st.lists(st.integers(0, count - 1), min_size=12, max_size=12).map(
        lambda labels: torch.from_numpy(np.unique(labels, return_inverse=True)[1])
    )
)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize(("divergence", "closed_form"), [(ForwardKL(), reference.forward_kl), (JSD(0.5), None)])
def test_temperature_scales_logits_and_restores_the_gradient(temperature, divergence, closed_form):
    s, z = pair(1)
    closed_form = closed_form or (lambda a, b: reference.jsd(a, b, beta=0.5))
    value, gradient = measure(Full(temperature), divergence, s, z, {})
    expected_value, expected_gradient = closed_form(s / temperature, z / temperature)
    torch.testing.assert_close(value, temperature**2 * expected_value)
    torch.testing.assert_close(gradient, temperature * expected_gradient)  # T^2, times 1/T of the chain rule


def test_hot_temperatures_tend_to_matching_logits():
    s, z = pair(2)
    value, _ = measure(Full(500.0), ForwardKL(), s, z, {})
    centered = (z - z.mean(1, keepdim=True)) - (s - s.mean(1, keepdim=True))
    torch.testing.assert_close(value, centered.square().mean(1) / 2, rtol=2e-2, atol=0)  # Hinton et al. 2015, sec. 2.1


@settings(max_examples=25, deadline=None)
@given(cluster_V=maps, seed=st.integers(0, 10**6), scale=st.floats(0.1, 20))
def test_chain_rule_and_data_processing(cluster_V: Tensor, seed: int, scale: float):
    s, z = pair(seed, scale=scale)
    q, p = s.softmax(1), z.softmax(1)
    coarse = Clusters(count=2, within=0.0)
    codebook_tables = products_of(coarse, cluster_V)
    P, Q = reference.cluster_masses(p, cluster_V), reference.cluster_masses(q, cluster_V)
    torch.testing.assert_close(cluster_logp(log_softmax(z), codebook_tables[f"{coarse.key}/members"]).exp(), P)
    torch.testing.assert_close(P.sum(1), torch.ones(4, dtype=torch.float64))

    kl_cluster, gradient = measure(coarse, ForwardKL(), s, z, codebook_tables)
    torch.testing.assert_close(kl_cluster, (P * (P / Q).log()).sum(1), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(gradient, q * (1 - (P / Q)[:, cluster_V]), rtol=1e-7, atol=1e-9)
    inside = torch.zeros_like(kl_cluster)  # sum_k P_k KL(p(.|k) || q(.|k)), by loops
    for k in range(P.shape[1]):
        member = cluster_V == k
        p_in, q_in = p[:, member] / P[:, [k]], q[:, member] / Q[:, [k]]
        inside += P[:, k] * (p_in * (p_in / q_in).log()).sum(1)
    full, _ = measure(Full(), ForwardKL(), s, z, {})
    torch.testing.assert_close(full, kl_cluster + inside, rtol=1e-7, atol=1e-9)

    for divergence in DIVERGENCES:
        fine, _ = measure(Full(), divergence, s, z, {})
        compressed, _ = measure(coarse, divergence, s, z, codebook_tables)
        assert (compressed <= fine + 1e-9).all() and (compressed >= -1e-12).all()


def test_finer_partitions_see_more():
    s, z = pair(3)
    coarse, fine = torch.arange(12) // 4, torch.arange(12) // 2
    space = Clusters(count=2, within=0.0)
    values = [measure(space, ForwardKL(), s, z, products_of(space, cluster_V))[0] for cluster_V in (coarse, fine)]
    assert (values[0] < values[1]).all() and (values[1] < measure(Full(), ForwardKL(), s, z, {})[0]).all()


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
@pytest.mark.parametrize("within", [0.0, 0.3, 1.0])
def test_within_mixes_full_and_cluster(divergence: Divergence, within: float):
    s, z = pair(4)
    cluster_V = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 2, 2, 2])
    only_clusters = Clusters(count=2, within=0.0)
    mixed = Clusters(count=2, within=within)
    codebook_tables = products_of(mixed, cluster_V)
    full, full_gradient = measure(Full(), divergence, s, z, {})
    coarse, coarse_gradient = measure(only_clusters, divergence, s, z, codebook_tables)
    value, gradient = measure(mixed, divergence, s, z, codebook_tables)
    torch.testing.assert_close(value, within * full + (1 - within) * coarse)
    torch.testing.assert_close(gradient, within * full_gradient + (1 - within) * coarse_gradient)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_one_cluster_per_code_is_the_full_space(divergence: Divergence):
    s, z = pair(5)
    space = Clusters(count=12, within=0.0)
    codebook_tables = space.prepare(torch.randn(12, 3, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(measure(space, divergence, s, z, codebook_tables), measure(Full(), divergence, s, z, {}))


def test_cross_entropy_of_the_code_cluster():
    s, z = pair(6)
    cluster_V = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 2, 2, 2])
    space = Clusters(count=2, within=0.0)
    value, _ = measure(space, CrossEntropy(), s, z, products_of(space, cluster_V))
    mass = reference.cluster_masses(s.softmax(1), cluster_V)
    torch.testing.assert_close(value, -mass[torch.arange(4), cluster_V[CODE]].log())


def test_recoloring_the_target_is_the_cluster_loss():
    s, z = pair(7)
    cluster_V = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 2, 2, 2])
    space = Clusters(count=2, within=0.0)
    value, gradient = measure(space, ForwardKL(), s, z, products_of(space, cluster_V))
    q, p = s.softmax(1), z.softmax(1)
    P, Q = reference.cluster_masses(p, cluster_V), reference.cluster_masses(q, cluster_V)
    recolored = P[:, cluster_V] * q / Q[:, cluster_V]  # the teacher's cluster masses, the student's split of each
    torch.testing.assert_close(measure(Full(), ForwardKL(), s, recolored.log(), {}), (value, gradient))


def test_cluster_masses_do_not_underflow():
    logits = torch.tensor([[0.0, 0.0, -200.0, -201.0]])  # exp(-200) is 0 in float32
    mass = cluster_logp(log_softmax(logits), cluster_members(torch.tensor([0, 0, 1, 1])))
    expected = torch.tensor([[0.0, -200 + math.log1p(math.exp(-1)) - math.log(2)]])
    torch.testing.assert_close(mass, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_a_cluster_of_masked_codes_counts_nothing(divergence: Divergence):
    s, z = pair(8)
    masked = torch.tensor([2, 3, 7])
    s[:, masked], z[:, masked] = -torch.inf, -torch.inf
    cluster_V = torch.tensor([0, 0, 2, 2, 1, 1, 0, 2, 1, 3, 3, 3])  # cluster 2 holds exactly the masked codes
    space = Clusters(count=2, within=0.4)
    value, gradient = measure(space, divergence, s, z, products_of(space, cluster_V))
    kept = torch.tensor([i for i in range(12) if i not in masked.tolist()])
    renumbered = torch.unique(cluster_V[kept], return_inverse=True)[1]
    fewer = s[:, kept], z[:, kept]
    expected_value, expected_gradient = measure(space, divergence, *fewer, products_of(space, renumbered))
    torch.testing.assert_close(value, expected_value)
    torch.testing.assert_close(gradient[:, kept], expected_gradient)
    assert (gradient[:, masked] == 0).all()


def test_a_missing_cluster_map_is_named():
    s, z = pair()
    with pytest.raises(VarkdError, match="no cluster map"):
        Clusters()(log_softmax(s), log_softmax(z), TargetRows(CODE), {})


def test_members_list_every_code_once():
    cluster_V = torch.tensor([2, 0, 1, 0, 2, 2])
    assert cluster_members(cluster_V).tolist() == [[1, 3, 6], [2, 6, 6], [0, 4, 5]]


@pytest.mark.parametrize("assignment", ["kmeans", "random"])
@pytest.mark.parametrize(("size", "count"), [(12, 12), (50, 7), (64, 8), (101, 2)])
def test_assignments_are_balanced_total_and_deterministic(assignment, size: int, count: int):
    codebook_VE = torch.randn(size, 4, generator=torch.Generator().manual_seed(0))
    cluster_V = assign_clusters(codebook_VE, count, assignment, seed=3)
    per_cluster = torch.bincount(cluster_V)
    assert cluster_V.shape == (size,) and len(per_cluster) == count
    assert per_cluster.max() - per_cluster.min() <= 1
    assert torch.equal(cluster_V, assign_clusters(codebook_VE, count, assignment, seed=3))


def variance_within(codebook_VE: Tensor, cluster_V: Tensor) -> float:
    parts = [codebook_VE[cluster_V == k] for k in range(int(cluster_V.max()) + 1)]
    return float(sum((part - part.mean(0)).square().sum() for part in parts))


def test_kmeans_follows_the_geometry_and_random_does_not():
    generator = torch.Generator().manual_seed(1)
    centers = torch.randn(8, 4, generator=generator) * 10
    truth = torch.arange(64) % 8
    codebook_VE = centers[truth] + 0.1 * torch.randn(64, 4, generator=generator)
    found = assign_clusters(codebook_VE, 8, "kmeans", seed=0)
    assert all(len(found[truth == k].unique()) == 1 for k in range(8))  # well separated blobs are found exactly
    chance = assign_clusters(codebook_VE, 8, "random", seed=0)
    assert variance_within(codebook_VE, found) < 0.05 * variance_within(codebook_VE, chance)


def test_the_random_control_depends_on_its_seed_but_not_on_the_codes():
    one, other = torch.randn(2, 64, 4, generator=torch.Generator().manual_seed(2))
    first = assign_clusters(one, 8, "random", seed=0)
    assert torch.equal(first, assign_clusters(other, 8, "random", seed=0))
    assert not torch.equal(first, assign_clusters(one, 8, "random", seed=1))


def test_duplicated_codes_are_still_balanced():
    codebook_VE = torch.zeros(20, 3)
    codebook_VE[10:] = 1.0
    assert torch.bincount(assign_clusters(codebook_VE, 6, "kmeans", seed=0)).tolist().count(3) == 4


def test_more_clusters_than_codes_are_refused():
    with pytest.raises(VarkdError, match="lower count"):
        assign_clusters(torch.zeros(4, 2), 5, "kmeans", 0)
    with pytest.raises(VarkdError, match="at least 2"):
        Clusters(count=1)


def test_the_default_count_is_the_square_root():
    key = Clusters().key
    for size, count in ((16, 4), (17, 5), (100, 10)):
        codebook_VE = torch.randn(size, 2, generator=torch.Generator().manual_seed(0))
        assert int(Clusters().prepare(codebook_VE)[key].max()) + 1 == count


@pytest.mark.parametrize("size", [4096])
def test_large_codebooks_are_clustered_in_seconds(size: int):
    codebook_VE = torch.nn.functional.normalize(torch.randn(size, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    found = assign_clusters(codebook_VE, 64, "kmeans", seed=0)
    assert torch.bincount(found).tolist() == [size // 64] * 64
    chance = assign_clusters(codebook_VE, 64, "random", seed=0)
    assert variance_within(codebook_VE, found) < 0.5 * variance_within(codebook_VE, chance)


# ---- the likeliest codes and their tail

BOUNDED = [*DIVERGENCES, SkewKL(0.1), SkewReverseKL(0.2)]  # every f-divergence
sides = pytest.mark.parametrize("of", ["teacher", "student"])


def likeliest(logits: Tensor, count: int) -> Tensor:
    """The codes by plain sorting, likeliest first."""
    return torch.tensor([sorted(range(logits.shape[1]), key=lambda v: -row[v])[:count] for row in logits.tolist()])


@sides
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(0.1, 20), count=st.integers(1, 11))
def test_a_tail_bucket_is_a_true_divergence_and_sees_less(of, seed: int, scale: float, count: int):
    s, z = pair(seed, scale=scale)
    for divergence in BOUNDED:
        full, _ = measure(Full(), divergence, s, z, {})
        value, gradient = measure(TopK(count, of), divergence, s, z, {})
        assert (value >= -1e-12).all() and (value <= full + 1e-9).all()
        assert gradient.sum(1).abs().max() < 1e-9
        for tail in (True, False) if count > 1 else (True,):
            same, still = measure(TopK(count, of, tail), divergence, s, s, {})
            assert same.abs().max() < 1e-11
            if not isinstance(divergence, TotalVariation):
                assert still.abs().max() < 1e-10


@sides
@pytest.mark.parametrize("count", [1, 2, 5, 11])
@pytest.mark.parametrize(
    ("divergence", "closed_form"), [(ForwardKL(), reference.forward_kl), (ReverseKL(), reference.reverse_kl)]
)
def test_value_and_gradient_over_the_likeliest_codes(of, count: int, divergence, closed_form):
    """Against the closed form on K + 1 logits, pushed back to the V logits by autograd through plain sums."""
    s, z = pair(9)
    codes = likeliest(z if of == "teacher" else s, count)
    s = s.requires_grad_()
    merged = reference.top_k_logits(s, codes)
    value, gradient = closed_form(merged, reference.top_k_logits(z, codes))
    (expected,) = torch.autograd.grad(merged, s, gradient)
    torch.testing.assert_close(measure(TopK(count, of), divergence, s, z, {}), (value.detach(), expected))
    if count > 1:  # without the tail: the same on the logits of these codes alone
        value, gradient = closed_form(s.gather(1, codes), z.gather(1, codes))
        expected = torch.zeros_like(s).scatter(1, codes, gradient).detach()
        torch.testing.assert_close(measure(TopK(count, of, False), divergence, s, z, {}), (value.detach(), expected))


@sides
@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("count", [12, 500])
@pytest.mark.parametrize("divergence", [*BOUNDED, AdaptiveKL(), ToDi()], ids=repr)
def test_all_codes_are_the_full_space(of, tail: bool, count: int, divergence: Divergence):
    s, z = pair(10)
    torch.testing.assert_close(
        measure(TopK(count, of, tail), divergence, s, z, {}), measure(Full(), divergence, s, z, {})
    )


def test_a_truncated_sum_is_no_divergence():
    """sum p (log p - log q) over the likeliest codes alone, as peers have it, falls below 0; ours cannot."""
    p = torch.tensor([[0.3, 0.2, 0.5 / 8] + [0.5 / 8] * 7]).double()
    q = torch.tensor([[0.6, 0.3, 0.1 / 8] + [0.1 / 8] * 7]).double()
    truncated = (p * (p / q).log())[:, :2].sum(1)
    assert truncated < -0.2
    for tail in (True, False):
        (view,) = TopK(2, tail=tail)(q.log(), p.log(), TargetRows(torch.zeros(1, dtype=torch.long)), {})
        assert view.teacher_NK is not None
        value = ForwardKL()(view.student_NK, view.teacher_NK, view.rows)
        assert value > 5e-3
        kept_p, kept_q = ((r / r.sum(1, keepdim=True)) for r in (p[:, :2], q[:, :2]))
        expected = (kept_p * (kept_p / kept_q).log()).sum(1) if not tail else truncated + 0.5 * math.log(0.5 / 0.1)
        torch.testing.assert_close(value, expected)


def test_more_codes_see_more():
    s, z = pair(11)
    values = [measure(TopK(count), ForwardKL(), s, z, {})[0] for count in (1, 3, 6, 9, 11)]
    assert all((fewer <= more + 1e-12).all() for fewer, more in pairwise(values))


@sides
def test_a_target_code_has_its_place_or_belongs_to_the_tail(of):
    s, z = pair(12)
    codes = likeliest(z if of == "teacher" else s, 3)
    rest = torch.tensor([next(v for v in range(12) if v not in row) for row in codes.tolist()])
    for place in range(3):
        (view,) = TopK(3, of)(log_softmax(s), log_softmax(z), TargetRows(codes[:, place]), {})
        assert view.rows.target_N.tolist() == [place] * 4
    (view,) = TopK(3, of)(log_softmax(s), log_softmax(z), TargetRows(rest, torch.ones(4)), {})
    assert view.rows.target_N.tolist() == [3] * 4 and torch.equal(view.rows.alpha_N, torch.ones(4))  # type: ignore[arg-type]
    q = s.softmax(1)
    tail_q = torch.tensor([1 - row[kept].sum() for row, kept in zip(q, codes, strict=True)])
    torch.testing.assert_close(CrossEntropy()(view.student_NK, None, view.rows), -tail_q.log())
    mixed = torch.stack([codes[:, 0], rest]).T.flatten()[[0, 3, 4, 7]]  # rows 0 and 2 in the set, 1 and 3 outside
    (view,) = TopK(3, of)(log_softmax(s), log_softmax(z), TargetRows(mixed), {})
    assert view.rows.target_N.tolist() == [0, 3, 0, 3]
    (view,) = TopK(3, of)(log_softmax(s), log_softmax(z), TargetRows(codes[:, 1]), {})
    assert view.teacher_NK is not None
    value = Decoupled("target")(view.student_NK, view.teacher_NK, view.rows)  # g against all others, in any space
    expected, _ = reference.decoupled(s, z, "target", codes[:, 1])
    torch.testing.assert_close(value, expected)


def test_without_a_tail_no_divergence_may_read_the_code():
    s, z = pair(13)
    (view,) = TopK(3, tail=False)(log_softmax(s), log_softmax(z), TargetRows(CODE), {})
    assert view.teacher_NK is not None
    for divergence in (CrossEntropy(), Decoupled("rest")):
        with pytest.raises(VarkdError, match=r"space\.tail=true"):
            divergence(view.student_NK, view.teacher_NK, view.rows)
    Decoupled("rest", "argmax")(view.student_NK, view.teacher_NK, view.rows)


@sides
def test_the_skew_of_a_sequence_reaches_the_likeliest_codes(of):
    s, z = pair(14)
    (view,) = TopK(4, of)(log_softmax(s), log_softmax(z), TargetRows(CODE, torch.full((4,), 0.3)), {})
    assert view.teacher_NK is not None
    value = SkewKL(SequenceSkew())(view.student_NK, view.teacher_NK, view.rows)
    torch.testing.assert_close(value, measure(TopK(4, of), SkewKL(0.3), s, z, {})[0])


@sides
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("divergence", [*BOUNDED, AdaptiveKL(), ToDi()], ids=repr)
def test_likeliest_codes_of_huge_logits(of, dtype: torch.dtype, divergence: Divergence):
    """Also where the likeliest codes hold all the mass that float32 can count."""
    generator = torch.Generator().manual_seed(0)
    for scale in (50.0, 1e4):
        s, z = torch.randn(2, 4, 30, generator=generator, dtype=dtype) * scale
        for tail in (True, False):
            space = TopK(3, of, tail)
            leaf = s.clone().requires_grad_()
            (view,) = space(log_softmax(leaf), log_softmax(z), TargetRows(CODE), {})
            assert view.teacher_NK is not None
            value = divergence(view.student_NK, view.teacher_NK, view.rows)
            (gradient,) = torch.autograd.grad(value.sum(), leaf)
            assert value.isfinite().all() and gradient.isfinite().all() and gradient.dtype == dtype
            assert (value >= -1e-5 * scale).all()


def test_the_tail_keeps_its_digits():
    """log(1 - sum) is -inf here in float32; the mass of the others is exp(-20) and exp(-21) to all digits."""
    s, z = torch.tensor([[20.0, 0.0, -50.0]]), torch.tensor([[21.0, 0.0, -50.0]])
    for logits, expected in ((s, -20.0), (z, -21.0)):
        assert torch.isneginf(torch.log1p(-log_softmax(logits)[:, :1].exp())).all()
        (view,) = TopK(1)(log_softmax(logits), log_softmax(logits), TargetRows(torch.zeros(1, dtype=torch.long)), {})
        assert view.student_NK[0, 1] == pytest.approx(expected, rel=1e-6)


@sides
def test_narrow_logits_are_widened(of):
    s, z = (logits.bfloat16() for logits in pair(15))
    (view,) = TopK(4, of)(log_softmax(s), log_softmax(z), TargetRows(CODE), {})
    assert view.teacher_NK is not None and view.student_NK.dtype == view.teacher_NK.dtype == torch.float32
    torch.testing.assert_close(view.student_NK.exp().sum(1), torch.ones(4))


@sides
@pytest.mark.parametrize("divergence", BOUNDED, ids=repr)
def test_masked_codes_count_nothing_among_the_likeliest(of, divergence: Divergence):
    s, z = pair(16)
    pad = torch.full((4, 3), -torch.inf, dtype=torch.float64)
    for count in (2, 12, 14):  # 14: some of the likeliest are masked
        value, gradient = measure(TopK(count, of), divergence, torch.cat([s, pad], 1), torch.cat([z, pad], 1), {})
        expected, expected_gradient = measure(TopK(count, of), divergence, s, z, {})
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(gradient, torch.cat([expected_gradient, torch.zeros_like(pad)], 1))


def test_a_teacher_that_excludes_all_of_the_students_codes():
    """A truncated teacher may: no NaN, and nothing to compare without the tail."""
    s, z = pair(17)
    z = z.scatter(1, likeliest(s, 3), -torch.inf)
    for divergence in (ForwardKL(), JSD(0.5), TotalVariation()):
        value, gradient = measure(TopK(3, "student", tail=False), divergence, s, z, {})
        assert value.isfinite().all() and gradient.abs().max() < 1e-12
        value, gradient = measure(TopK(3, "student"), divergence, s, z, {})
        assert value.isfinite().all() and (value > 0).all() and gradient.abs().max() > 1e-3


def test_top_k_needs_nothing_of_the_tokenizer_and_refuses_nonsense():
    s = log_softmax(pair()[0])
    assert TopK(4).prepare(torch.zeros(12, 2)) == {}
    for make in (lambda: TopK(0), lambda: TopK(-3), lambda: TopK(1, tail=False)):
        with pytest.raises(VarkdError, match="count must be at least"):
            make()
    with pytest.raises(VarkdError, match=r"space\.of=student"):
        TopK(4)(s, None, TargetRows(CODE), {})
    (view,) = TopK(4, "student")(s, None, TargetRows(CODE), {})
    assert view.teacher_NK is None and view.student_NK.shape == (4, 5)
    assert (CrossEntropy()(view.student_NK, None, view.rows) > 0).all()
