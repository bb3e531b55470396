"""Cluster maps of every kind: total, deterministic, by the geometry; their statistics; masses of unequal clusters."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from varkd.distill.clustering import assign_clusters, cluster_statistics
from varkd.distill.divergences import ForwardKL
from varkd.distill.method import Method, Term
from varkd.distill.spaces import Clusters, cluster_logp, cluster_members

UNEVEN = ["plain", "agglomerative"]


def blobs(sizes: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Points of well separated groups in a random order, and the group of each."""
    generator = torch.Generator().manual_seed(seed)
    group_V = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    group_V = group_V[torch.randperm(len(group_V), generator=generator)]
    centers = torch.randn(len(sizes), 4, generator=generator) * 20
    return centers[group_V] + torch.randn(len(group_V), 4, generator=generator) * 0.3, group_V


@pytest.mark.parametrize("assignment", UNEVEN)
@pytest.mark.parametrize(("size", "count"), [(12, 12), (50, 7), (64, 8), (101, 2)])
def test_every_code_has_a_cluster_and_no_cluster_is_empty(assignment, size: int, count: int):
    codebook_VE = torch.randn(size, 4, generator=torch.Generator().manual_seed(2))
    cluster_V = assign_clusters(codebook_VE, count, assignment, seed=0)
    assert cluster_V.shape == (size,) and cluster_V.dtype == torch.long
    assert torch.bincount(cluster_V, minlength=count).min() >= 1 and int(cluster_V.max()) == count - 1
    assert torch.equal(assign_clusters(codebook_VE, count, assignment, seed=0), cluster_V)


@pytest.mark.parametrize("assignment", UNEVEN)
def test_unequal_groups_are_found_as_they_are(assignment):
    """Balanced clusters must cut the large group; these need not."""
    codebook_VE, group_V = blobs((40, 5, 3))
    found = assign_clusters(codebook_VE, 3, assignment, seed=1)
    assert sorted(torch.bincount(found).tolist()) == [3, 5, 40]
    for cluster in range(3):
        assert len(group_V[found == cluster].unique()) == 1


@pytest.mark.parametrize("assignment", UNEVEN)
def test_repeated_codes_leave_no_cluster_empty(assignment):
    codebook_VE = torch.zeros(10, 2)
    codebook_VE[0] = 1
    cluster_V = assign_clusters(codebook_VE, 4, assignment, seed=0)
    assert torch.bincount(cluster_V, minlength=4).min() >= 1


def test_agglomerative_clusters_are_those_of_wards_rule_and_numbered_by_first_code():
    from sklearn.cluster import AgglomerativeClustering

    codebook_VE = torch.randn(60, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    found = assign_clusters(codebook_VE, 9, "agglomerative", seed=0)
    labels = AgglomerativeClustering(9, linkage="ward").fit_predict(codebook_VE.numpy())
    assert len(set(zip(found.tolist(), labels.tolist(), strict=True))) == 9, "the same partition"
    firsts = [found.tolist().index(cluster) for cluster in range(9)]
    assert firsts == sorted(firsts)
    assert torch.equal(assign_clusters(codebook_VE, 9, "agglomerative", seed=7), found), "no chance in it"


def test_plain_k_means_has_come_to_rest_and_beats_balanced_clusters():
    codebook_VE, _ = blobs((30, 6, 4, 8))
    plain, balanced = (assign_clusters(codebook_VE, 4, kind, seed=0) for kind in ("plain", "kmeans"))
    centers = torch.stack([codebook_VE[plain == k].mean(0) for k in range(4)])
    assert torch.equal(torch.cdist(codebook_VE, centers).argmin(1), plain)
    spread = [cluster_statistics(codebook_VE, found)["within_variance"] for found in (plain, balanced)]
    assert spread[0] < 0.1 * spread[1]


def test_statistics_by_hand():
    codebook_VE = torch.tensor([[0.0], [2.0], [10.0], [14.0], [12.0]])
    found = cluster_statistics(codebook_VE, torch.tensor([0, 0, 1, 1, 1]))
    total = float(np.square(codebook_VE.numpy() - codebook_VE.numpy().mean()).sum())
    assert found == {"count": 2, "smallest": 2, "largest": 3, "within_variance": pytest.approx((1 + 1 + 4 + 4) / total)}
    assert cluster_statistics(torch.ones(3, 2), torch.tensor([0, 1, 1]))["within_variance"] == 0


def test_the_masses_of_very_unequal_clusters():
    """They go another way, without padding: the same numbers, the same gradient, no NaN where a cluster is masked."""
    cluster_V = torch.tensor([0] * 37 + [1, 2, 3, 4, 5, 6, 7])
    members = cluster_members(cluster_V)
    assert members.numel() > 4 * len(cluster_V), "else this is the usual way"
    logits = torch.randn(3, 44, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 5
    logits[:, [38, 41]] = -torch.inf
    logits[0, :37] -= 5000
    seen = [0, 1, 3, 4, 6, 7]
    leaf, other = (logits.clone().requires_grad_() for _ in range(2))
    mass = cluster_logp(leaf.log_softmax(1), members)
    expected = torch.stack([other.log_softmax(1)[:, cluster_V == k].logsumexp(1) for k in seen], 1)
    assert torch.isneginf(mass[:, [2, 5]]).all()
    torch.testing.assert_close(mass[:, seen], expected)
    slopes = torch.arange(1, 7)
    gradients = [torch.autograd.grad((m * slopes).sum(), x)[0] for m, x in ((mass[:, seen], leaf), (expected, other))]
    assert torch.isfinite(gradients[0]).all()
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("assignment", UNEVEN)
def test_a_method_over_these_clusters(assignment):
    space = Clusters(3, within=0.0, assignment=assignment)
    codebook_VE, _ = blobs((40, 5, 3))
    method = Method((Term("kd", ForwardKL(), space=space),))
    assert set(method.prepare(codebook_VE)) == {space.key, f"{space.key}/members"}
    assert method.cluster_keys == (space.key,) and assignment in space.key
