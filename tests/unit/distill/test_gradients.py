"""The gradients that the loss writes out, against autograd of the definitions: every divergence over every space."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from varkd.distill import divergences as kinds
from varkd.distill.divergence_rule import DivergenceRule, Own
from varkd.distill.divergences import Divergence, TargetRows
from varkd.distill.logspace import log_softmax, to_logits
from varkd.distill.skew import SequenceSkew
from varkd.distill.spaces import Clusters, CodebookTables, Full, Space, TopK, cluster_members

N, V = 7, 12
CLUSTER_V = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 4, 0, 1, 3])


def squared(student_NK: Tensor, teacher_NK: Tensor, rows: TargetRows) -> Tensor:
    return (student_NK.exp() - teacher_NK.exp()).square().sum(1)


DIVERGENCES: dict[str, DivergenceRule] = {
    "cross entropy": kinds.CrossEntropy(), "forward": kinds.ForwardKL(), "reverse": kinds.ReverseKL(),
    "jsd": kinds.JSD(0.3), "jsd, ends": kinds.JSD(0.3, "ends"), "jsd at 0": kinds.JSD(0.0), "jsd at 1": kinds.JSD(1.0),
    "jsd at 0, ends": kinds.JSD(0.0, "ends"), "jsd at 1, ends": kinds.JSD(1.0, "ends"),
    "skew": kinds.SkewKL(0.2), "skew at 0": kinds.SkewKL(0.0), "skew at 1": kinds.SkewKL(1.0),
    "skew by row": kinds.SkewKL(SequenceSkew()), "skew reverse": kinds.SkewReverseKL(0.2),
    "skew reverse at 0": kinds.SkewReverseKL(0.0), "skew reverse at 1": kinds.SkewReverseKL(1.0),
    "skew reverse, detached": kinds.SkewReverseKL(0.2, detached=True),
    "skew reverse by row": kinds.SkewReverseKL(SequenceSkew()), "total variation": kinds.TotalVariation(),
    "argmax": kinds.TeacherArgmax(), "adaptive": kinds.AdaptiveKL(), "todi": kinds.ToDi(), "sharper": kinds.ToDi(3.0),
    "taid": kinds.TAID(0.4), "taid at 0": kinds.TAID(0.0), "taid at 1": kinds.TAID(1.0), "ranking": kinds.Ranking(3),
    "target": kinds.Decoupled("target"), "rest": kinds.Decoupled("rest"), "own": Own(squared),
    "rest of argmax": kinds.Decoupled("rest", "argmax"), "target of argmax": kinds.Decoupled("target", "argmax"),
}  # fmt: skip
SPACES: dict[str, Space] = {
    "full": Full(), "hot": Full(2.5), "clusters": Clusters(5, within=0), "mixed clusters": Clusters(5, within=0.3),
    "clusters, all within": Clusters(5, within=1.0), "top k": TopK(4), "student's top k": TopK(4, "student"),
    "top k without a tail": TopK(4, tail=False),
}  # fmt: skip


def test_every_divergence_is_here():
    assert {type(each) for each in DIVERGENCES.values()} == {*get_args(Divergence), Own}


def sides(seed: int, scale: float = 2.0) -> tuple[Tensor, Tensor, TargetRows]:
    draw = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, N, V, generator=draw, dtype=torch.float64) * scale
    alpha_N = 0.05 + 0.9 * torch.rand(N, generator=draw)
    return student, teacher, TargetRows(torch.randint(V, (N,), generator=draw), alpha_N)


def tables(space: Space) -> CodebookTables:
    if not isinstance(space, Clusters):
        return {}
    return {space.key: CLUSTER_V, f"{space.key}/members": cluster_members(CLUSTER_V)}


def by_autograd(
    divergence: DivergenceRule, space: Space, student: Tensor, teacher: Tensor, rows: TargetRows
) -> tuple[Tensor, Tensor]:
    leaf = student.detach().requires_grad_()
    value_N = torch.zeros(N, dtype=student.dtype)
    for each in space(log_softmax(leaf), log_softmax(teacher), rows, tables(space)):
        assert each.teacher_NK is not None
        value_N = value_N + each.weight * divergence(each.student_NK, each.teacher_NK, each.rows)
    weighed = value_N * torch.arange(1, N + 1)
    return value_N.detach(), torch.autograd.grad(weighed.sum(), leaf)[0]


@torch.no_grad()
def written_out(divergence: DivergenceRule, space: Space, student: Tensor, teacher: Tensor, rows: TargetRows) -> Tensor:
    logp_NV, total_NV = log_softmax(student), torch.zeros(N, V, dtype=log_softmax(student).dtype)
    for each in space(logp_NV, log_softmax(teacher), rows, tables(space)):
        assert each.teacher_NK is not None
        total_NV += each.weight * each.back(divergence.gradient(each.student_NK, each.teacher_NK, each.rows))
    return to_logits(total_NV * torch.arange(1, N + 1).unsqueeze(1), logp_NV)


def skip_what_reads_the_code(divergence: DivergenceRule, space: Space) -> None:
    reads = isinstance(divergence, kinds.CrossEntropy) or (
        isinstance(divergence, kinds.Decoupled) and divergence.of == "code"
    )
    if isinstance(space, TopK) and not space.tail and reads:
        pytest.skip("the target code has no place there")


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
def test_gradients_are_those_of_autograd(divergence: DivergenceRule, space: Space):
    skip_what_reads_the_code(divergence, space)
    for seed, scale in ((0, 0.3), (1, 2.0), (2, 8.0)):
        given = sides(seed, scale)
        _, expected = by_autograd(divergence, space, *given)
        torch.testing.assert_close(written_out(divergence, space, *given), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
def test_codes_that_both_exclude_get_nothing(divergence: DivergenceRule, space: Space):
    """They change neither the other codes' gradients nor any value, and what comes out is finite."""
    skip_what_reads_the_code(divergence, space)
    student, teacher, rows = sides(3)
    rows = TargetRows(rows.target_N.clamp(max=6), rows.alpha_N)
    student[:, 7:9] = teacher[:, 7:9] = -torch.inf  # a whole cluster
    student[:, 11] = teacher[:, 11] = -torch.inf
    value_N, expected = by_autograd(divergence, space, student, teacher, rows)
    found = written_out(divergence, space, student, teacher, rows)
    assert value_N.isfinite().all() and found.isfinite().all() and (found[:, [7, 8, 11]] == 0).all()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["forward", "jsd", "skew", "skew reverse", "total variation", "taid", "argmax"])
@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_codes_that_the_teacher_alone_excludes(name: str, space: Space):
    student, teacher, rows = sides(4)
    teacher[:, 7:10] = -torch.inf
    _, expected = by_autograd(DIVERGENCES[name], space, student, teacher, rows)
    found = written_out(DIVERGENCES[name], space, student, teacher, rows)
    assert found.isfinite().all()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
def test_narrow_logits_give_nearly_the_same(divergence: DivergenceRule):
    student, teacher, rows = sides(5, 1.0)
    exact = written_out(divergence, Full(), student, teacher, rows)
    narrow = written_out(divergence, Full(), student.bfloat16(), teacher.bfloat16(), rows)
    assert narrow.dtype == torch.float32
    bound = 0.15 if isinstance(divergence, kinds.Ranking) else 0.03  # a ranking may turn around
    assert (narrow.double() - exact).norm() <= bound * exact.norm() + 1e-6
