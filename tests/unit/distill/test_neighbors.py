"""Blurred codes: the kernel, its bandwidth, its log-space product, and what a divergence over them obeys."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from varkd.distill.divergences import JSD, CrossEntropy, ForwardKL, ReverseKL, TargetRows, TotalVariation
from varkd.distill.method import Method, Term
from varkd.distill.neighbors import displacement, half_way_bandwidth, log_kernel, nearest_codes, smoothed
from varkd.distill.spaces import CodebookTables, Neighbors, log_softmax
from varkd.errors import VarkdError

VOCAB = 12
CODEBOOK_VE = torch.randn(VOCAB, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
CODE = torch.tensor([0, 3, 5, 1])
SPACES = [Neighbors(4), Neighbors(4, 0.7), Neighbors(99, 2.0), Neighbors(2)]
DIVERGENCES = [ForwardKL(), ReverseKL(), JSD(0.5), TotalVariation()]


def pair(seed: int = 0, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, 4, VOCAB, generator=generator, dtype=torch.float64) * scale)  # type: ignore[return-value]


def dense(space: Neighbors, codebook_tables: CodebookTables) -> Tensor:
    """K as a matrix, from the products: float64 (V, V), columns sum to 1."""
    matrix = torch.zeros(VOCAB, VOCAB, dtype=torch.float64)
    for code in range(VOCAB):
        for near, log_weight in zip(
            codebook_tables[space.key][code], codebook_tables[f"{space.key}/log_weight"][code], strict=True
        ):
            matrix[near, code] += math.exp(float(log_weight))
    return matrix


def measure(
    space: Neighbors, divergence, s: Tensor, z: Tensor, codebook_tables: CodebookTables
) -> tuple[Tensor, Tensor]:
    s = s.detach().requires_grad_()
    (view,) = space(s, z, TargetRows(CODE), codebook_tables)
    value = divergence(view.student_NK, view.teacher_NK, view.rows)
    return value.detach(), torch.autograd.grad(value.sum(), s)[0]


def test_the_nearest_codes_in_any_chunking_with_the_code_first():
    squared_VV = (CODEBOOK_VE.unsqueeze(1) - CODEBOOK_VE).square().sum(2)
    for chunk_rows in (1, 5, 100):
        index_Vn, squared_Vn = nearest_codes(CODEBOOK_VE, 4, chunk_rows)
        assert torch.equal(index_Vn, squared_VV.argsort(1)[:, :4])
        torch.testing.assert_close(squared_Vn, squared_VV.sort(1).values[:, :4], rtol=1e-9, atol=1e-12)
    twins = torch.cat([CODEBOOK_VE[:3], CODEBOOK_VE[:3]])
    index_Vn, squared_Vn = nearest_codes(twins, 2)
    assert index_Vn[:, 0].tolist() == list(range(6)) and squared_Vn.max() < 1e-12
    assert nearest_codes(CODEBOOK_VE, 99)[0].shape == (VOCAB, VOCAB)


@pytest.mark.parametrize("width", [0.2, 0.7, 3.0])
def test_the_kernel_by_hand(width: float):
    _, squared_Vn = nearest_codes(CODEBOOK_VE, 5)
    weight_Vn = torch.exp(-squared_Vn / (2 * width**2))
    weight_Vn = weight_Vn / weight_Vn.sum(1, keepdim=True)
    torch.testing.assert_close(log_kernel(squared_Vn, width).exp(), weight_Vn)
    assert displacement(squared_Vn, width) == pytest.approx(float((weight_Vn * squared_Vn).sum(1).mean()))


@pytest.mark.parametrize("count", [2, 3, 8, 12])
def test_the_automatic_bandwidth_moves_mass_half_way_to_the_next_code(count: int):
    for codebook_VE in (CODEBOOK_VE, torch.linspace(-1, 1, 17).unsqueeze(1), CODEBOOK_VE * 1000):
        _, squared_Vn = nearest_codes(codebook_VE, count)
        half = (squared_Vn[:, 1].sqrt() / 2).square().mean()
        assert displacement(squared_Vn, half_way_bandwidth(squared_Vn)) == pytest.approx(float(half), rel=1e-6)


def test_a_codebook_of_one_repeated_code_still_has_a_kernel():
    codebook_tables = Neighbors(3).prepare(torch.ones(5, 2))
    assert codebook_tables["neighbors/3-auto/log_weight"].exp().sum(1).tolist() == pytest.approx([1] * 5)


@pytest.mark.parametrize("space", SPACES, ids=repr)
def test_smoothing_is_the_matrix_product_in_value_and_gradient(space: Neighbors):
    codebook_tables = space.prepare(CODEBOOK_VE)
    matrix, (s, _) = dense(space, codebook_tables), pair()
    leaf, other = (s.clone().requires_grad_() for _ in range(2))
    found = smoothed(leaf.log_softmax(1), codebook_tables[space.key], codebook_tables[f"{space.key}/log_weight"])
    expected = (other.softmax(1) @ matrix.T).log()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.exp().sum(1), torch.ones(4, dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(matrix.sum(0), torch.ones(VOCAB, dtype=torch.float64), rtol=1e-6, atol=0)
    pull = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    gradients = [torch.autograd.grad((out * pull).sum(), x)[0] for out, x in ((found, leaf), (expected, other))]
    torch.testing.assert_close(*gradients)


def test_smoothing_passes_gradcheck():
    codebook_tables = SPACES[0].prepare(CODEBOOK_VE)
    index_Vn, log_weight_Vn = codebook_tables[SPACES[0].key], codebook_tables[f"{SPACES[0].key}/log_weight"]
    s = pair()[0].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: smoothed(x.log_softmax(1), index_Vn, log_weight_Vn), (s,))


@pytest.mark.parametrize("sides", ["both", "teacher"])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_a_divergence_over_blurred_codes_is_that_of_the_products(sides, divergence):
    space = Neighbors(5, 0.8, sides)
    codebook_tables, (s, z) = space.prepare(CODEBOOK_VE), pair(2)
    matrix, leaf = dense(space, codebook_tables), s.clone().requires_grad_()
    teacher = (z.softmax(1) @ matrix.T).log()
    student = (leaf.softmax(1) @ matrix.T).log() if sides == "both" else leaf.log_softmax(1)
    expected = divergence(student, teacher, TargetRows(CODE))
    value, gradient = measure(space, divergence, s, z, codebook_tables)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), leaf)[0])


@pytest.mark.parametrize("space", SPACES, ids=repr)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_data_processing_and_the_minimizer(space: Neighbors, divergence):
    codebook_tables = space.prepare(CODEBOOK_VE)
    for seed in range(5):
        s, z = pair(seed, 3.0)
        full = divergence(log_softmax(s), log_softmax(z), TargetRows(CODE))
        value, _ = measure(space, divergence, s, z, codebook_tables)
        assert (value <= full + 1e-9).all() and (value >= -1e-9).all()
        value, gradient = measure(space, divergence, z + 3, z, codebook_tables)
        assert value.abs().max() < 1e-6
        # Where K p and K q differ by rounding, half of their absolute difference has a slope.
        assert isinstance(divergence, TotalVariation) or gradient.abs().max() < 1e-6


def test_a_blurred_target_alone_teaches_the_blur():
    space = Neighbors(5, 0.8, "teacher")
    codebook_tables, (_, z) = space.prepare(CODEBOOK_VE), pair(2)
    blurred = z.softmax(1) @ dense(space, codebook_tables).T
    _, gradient = measure(space, ForwardKL(), blurred.log(), z, codebook_tables)
    assert gradient.abs().max() < 1e-6, "the student has arrived at K p"
    _, gradient = measure(space, ForwardKL(), z, z, codebook_tables)
    assert gradient.abs().max() > 1e-3, "and would leave p"


def test_a_tiny_bandwidth_is_the_full_space():
    space, (s, z) = Neighbors(5, 1e-4), pair(1)
    value, gradient = measure(space, ForwardKL(), s, z, space.prepare(CODEBOOK_VE))
    torch.testing.assert_close(value, ForwardKL()(log_softmax(s), log_softmax(z), TargetRows(CODE)))
    torch.testing.assert_close(gradient, s.softmax(1) - z.softmax(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sides", ["both", "teacher"])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_huge_logits_and_masked_codes(divergence, sides, dtype: torch.dtype):
    space = Neighbors(4, 0.5, sides)
    codebook_tables = space.prepare(CODEBOOK_VE)
    generator = torch.Generator().manual_seed(3)
    s, z = ((torch.randint(2, (4, VOCAB), generator=generator) * 2.0 - 1) * 1e4 for _ in range(2))
    for tensors in measure(space, divergence, s.to(dtype), z.to(dtype), codebook_tables):
        assert torch.isfinite(tensors).all()
    s, z = (x.to(dtype) for x in pair(5))
    masked = [0, 4, int(codebook_tables[space.key][0, 1])]
    s[:, masked], z[:, masked] = -torch.inf, -torch.inf
    if sides == "both":  # a blurred target has mass at masked codes, where a student alone can have none
        value, gradient = measure(space, divergence, s, z, codebook_tables)
        assert torch.isfinite(value).all() and torch.isfinite(gradient).all()
        assert (gradient[:, masked] == 0).all()


def test_far_away_masks_leave_an_outcome_empty():
    """A code whose whole neighborhood is masked on both sides counts nothing."""
    space, codebook_VE = Neighbors(2, 0.5), torch.tensor([[0.0], [0.1], [50.0], [50.1]])
    codebook_tables = space.prepare(codebook_VE)
    s = torch.tensor([[1.0, -0.5, -torch.inf, -torch.inf]], dtype=torch.float64)
    z = torch.tensor([[0.0, 0.7, -torch.inf, -torch.inf]], dtype=torch.float64)
    s.requires_grad_()
    (view,) = space(s, z, TargetRows(CODE[:1]), codebook_tables)
    assert torch.isneginf(view.student_NK[0]).tolist() == [False, False, True, True]
    value = ForwardKL()(view.student_NK, view.teacher_NK, view.rows)
    (gradient,) = torch.autograd.grad(value.sum(), s)
    assert torch.isfinite(value).all() and torch.isfinite(gradient).all()


def test_the_target_code_keeps_its_number():
    space, (s, _) = Neighbors(4, 0.5), pair()
    codebook_tables = space.prepare(CODEBOOK_VE)
    (view,) = space(s, None, TargetRows(CODE), codebook_tables)
    assert view.teacher_NK is None
    value = CrossEntropy()(view.student_NK, None, view.rows)
    expected = -(s.softmax(1) @ dense(space, codebook_tables).T).log()[torch.arange(4), CODE]
    torch.testing.assert_close(value, expected)


def test_the_products_of_a_method_and_what_is_refused():
    method = Method((Term("kd", ForwardKL(), space=Neighbors(4)),))
    assert set(method.prepare(CODEBOOK_VE)) == {"neighbors/4-auto", "neighbors/4-auto/log_weight"}
    with pytest.raises(VarkdError, match="call method"):
        Neighbors(4)(*pair(), TargetRows(CODE), {})
    for make in (lambda: Neighbors(1), lambda: Neighbors(4, 0.0), lambda: Neighbors(4, -1.0)):
        with pytest.raises(VarkdError, match="neighbors: "):
            make()
