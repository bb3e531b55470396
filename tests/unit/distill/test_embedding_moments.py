"""The distance between the moments of codebook vectors: closed form, gradient, and which spaces have vectors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from varkd.distill.divergences import EmbeddingMoments, TargetRows
from varkd.distill.method import Method, Term
from varkd.distill.prefixes import Completions
from varkd.distill.spaces import CODEBOOK, Clusters, Full, Neighbors, TopK, log_softmax
from varkd.errors import VarkdError

VOCAB, WIDTH = 9, 4
CODEBOOK_VE = torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
ROWS = TargetRows(torch.zeros(3, dtype=torch.long), codebook_VE=CODEBOOK_VE)


def pair(seed: int = 0, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, 3, VOCAB, generator=generator, dtype=torch.float64) * scale)  # type: ignore[return-value]


def measure(divergence: EmbeddingMoments, s: Tensor, z: Tensor, rows: TargetRows = ROWS) -> tuple[Tensor, Tensor]:
    s = s.detach().requires_grad_()
    value = divergence(log_softmax(s), log_softmax(z), rows)
    return value.detach(), torch.autograd.grad(value.sum(), s)[0]


@pytest.mark.parametrize("second", [0.0, 1.0, 0.3])
def test_value_and_gradient_by_hand(second: float):
    s, z = pair()
    value, gradient = measure(EmbeddingMoments(second), s, z)
    p, q = z.softmax(1), s.softmax(1)
    for row in range(3):
        moments = []
        for law in (p[row], q[row]):
            first = sum(law[v] * CODEBOOK_VE[v] for v in range(VOCAB))
            outer = sum(law[v] * torch.outer(CODEBOOK_VE[v], CODEBOOK_VE[v]) for v in range(VOCAB))
            moments.append((first, outer))
        gaps = moments[1][0] - moments[0][0], moments[1][1] - moments[0][1]
        assert float(value[row]) == pytest.approx(float(gaps[0].square().sum() + second * gaps[1].square().sum()))
        # d/dq_v = 2 e_v . gap + 2 second e_v^T Gap e_v, through the softmax
        slope = 2 * CODEBOOK_VE @ gaps[0] + 2 * second * torch.einsum("ve,ef,vf->v", CODEBOOK_VE, gaps[1], CODEBOOK_VE)
        torch.testing.assert_close(gradient[row], q[row] * (slope - (q[row] * slope).sum()))


def test_it_vanishes_at_the_teacher_and_where_near_equal_codes_swap():
    s, z = pair()
    value, gradient = measure(EmbeddingMoments(), z + 7, z)
    assert value.abs().max() < 1e-12 and gradient.abs().max() < 1e-12
    twins = TargetRows(None, codebook_VE=torch.cat([CODEBOOK_VE[:1], CODEBOOK_VE[:1], CODEBOOK_VE[2:]]))
    swapped = z.clone()
    swapped[:, [0, 1]] = z[:, [1, 0]]
    assert measure(EmbeddingMoments(), swapped, z, twins)[0].abs().max() < 1e-12
    assert measure(EmbeddingMoments(), s, z, twins)[0].min() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_huge_logits_and_masked_codes(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(3)
    s, z = ((torch.randint(2, (3, VOCAB), generator=generator) * 2.0 - 1).to(dtype) * 1e4 for _ in range(2))
    s[:, 4] = z[:, 4] = -torch.inf
    for tensors in measure(EmbeddingMoments(), s, z):
        assert torch.isfinite(tensors).all()


def test_it_is_at_home_where_outcomes_are_codes():
    for space in (Full(), Full(2.0), Neighbors(3)):
        method = Method((Term("moments", EmbeddingMoments(), space=space),))
        assert CODEBOOK in method.prepare(CODEBOOK_VE) and method.needs_teacher
    for space in (Clusters(3), TopK(4)):
        with pytest.raises(VarkdError, match=f"term 'moments': embedding_moments .* {space.kind} merges codes"):
            Term("moments", EmbeddingMoments(), space=space)


def test_no_vectors_are_named():
    s, z = pair()
    with pytest.raises(VarkdError, match="set space to full or neighbors"):
        EmbeddingMoments()(log_softmax(s), log_softmax(z), TargetRows(None))
    space = Clusters(3, within=0.0)
    (coarse,) = space(s, z, ROWS, space.prepare(CODEBOOK_VE))
    assert coarse.rows.codebook_VE is None
    assert all(view.rows.codebook_VE is None for tail in (True, False) for view in TopK(4, tail=tail)(s, z, ROWS, {}))
    with pytest.raises(VarkdError, match="second must lie in"):
        EmbeddingMoments(-1.0)


def test_the_codebook_is_one_product_for_all_who_ask():
    term = Term("moments", EmbeddingMoments())
    codebook_tables = Method((term,), Completions()).prepare(CODEBOOK_VE)
    assert list(codebook_tables) == [CODEBOOK] and codebook_tables[CODEBOOK].dtype == torch.float32
