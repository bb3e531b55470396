"""Blurred codes: the kernel, its bandwidth, its log-space product, and what a divergence over them obeys."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from varkd.distill.divergences import JSD, CrossEntropy, ForwardKL, ReverseKL, Rows, TotalVariation
from varkd.distill.method import Method, Term
from varkd.distill.neighbours import displacement, half_way_bandwidth, log_kernel, nearest_codes, smoothed
from varkd.distill.spaces import Neighbours, Products, log_softmax
from varkd.errors import VarkdError

VOCAB = 12
CODEBOOK_VE = torch.randn(VOCAB, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
CODE = torch.tensor([0, 3, 5, 1])
SPACES = [Neighbours(4), Neighbours(4, 0.7), Neighbours(99, 2.0), Neighbours(2)]
DIVERGENCES = [ForwardKL(), ReverseKL(), JSD(0.5), TotalVariation()]


def pair(seed: int = 0, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, 4, VOCAB, generator=generator, dtype=torch.float64) * scale)  # type: ignore[return-value]


def dense(space: Neighbours, products: Products) -> Tensor:
    """K as a matrix, from the products: float64 (V, V), columns sum to 1."""
    matrix = torch.zeros(VOCAB, VOCAB, dtype=torch.float64)
    for code in range(VOCAB):
        for near, log_weight in zip(products[space.key][code], products[f"{space.key}/log_weight"][code], strict=True):
            matrix[near, code] += math.exp(float(log_weight))
    return matrix


def measure(space: Neighbours, divergence, s: Tensor, z: Tensor, products: Products) -> tuple[Tensor, Tensor]:
    s = s.detach().requires_grad_()
    (view,) = space(s, z, Rows(CODE), products)
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
    products = Neighbours(3).prepare(torch.ones(5, 2))
    assert products["neighbours/3-auto/log_weight"].exp().sum(1).tolist() == pytest.approx([1] * 5)


@pytest.mark.parametrize("space", SPACES, ids=repr)
def test_smoothing_is_the_matrix_product_in_value_and_gradient(space: Neighbours):
    products = space.prepare(CODEBOOK_VE)
    matrix, (s, _) = dense(space, products), pair()
    leaf, other = (s.clone().requires_grad_() for _ in range(2))
    found = smoothed(leaf.log_softmax(1), products[space.key], products[f"{space.key}/log_weight"])
    expected = (other.softmax(1) @ matrix.T).log()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.exp().sum(1), torch.ones(4, dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(matrix.sum(0), torch.ones(VOCAB, dtype=torch.float64), rtol=1e-6, atol=0)
    pull = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    gradients = [torch.autograd.grad((out * pull).sum(), x)[0] for out, x in ((found, leaf), (expected, other))]
    torch.testing.assert_close(*gradients)


def test_smoothing_passes_gradcheck():
    products = SPACES[0].prepare(CODEBOOK_VE)
    index_Vn, log_weight_Vn = products[SPACES[0].key], products[f"{SPACES[0].key}/log_weight"]
    s = pair()[0].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: smoothed(x.log_softmax(1), index_Vn, log_weight_Vn), (s,))


@pytest.mark.parametrize("sides", ["both", "teacher"])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_a_divergence_over_blurred_codes_is_that_of_the_products(sides, divergence):
    space = Neighbours(5, 0.8, sides)
    products, (s, z) = space.prepare(CODEBOOK_VE), pair(2)
    matrix, leaf = dense(space, products), s.clone().requires_grad_()
    teacher = (z.softmax(1) @ matrix.T).log()
    student = (leaf.softmax(1) @ matrix.T).log() if sides == "both" else leaf.log_softmax(1)
    expected = divergence(student, teacher, Rows(CODE))
    value, gradient = measure(space, divergence, s, z, products)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), leaf)[0])


@pytest.mark.parametrize("space", SPACES, ids=repr)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_data_processing_and_the_minimiser(space: Neighbours, divergence):
    products = space.prepare(CODEBOOK_VE)
    for seed in range(5):
        s, z = pair(seed, 3.0)
        full = divergence(log_softmax(s), log_softmax(z), Rows(CODE))
        value, _ = measure(space, divergence, s, z, products)
        assert (value <= full + 1e-9).all() and (value >= -1e-9).all()
        value, gradient = measure(space, divergence, z + 3, z, products)
        assert value.abs().max() < 1e-6
        # Where K p and K q differ by rounding, half of their absolute difference has a slope.
        assert isinstance(divergence, TotalVariation) or gradient.abs().max() < 1e-6


def test_a_blurred_target_alone_teaches_the_blur():
    space = Neighbours(5, 0.8, "teacher")
    products, (_, z) = space.prepare(CODEBOOK_VE), pair(2)
    blurred = z.softmax(1) @ dense(space, products).T
    _, gradient = measure(space, ForwardKL(), blurred.log(), z, products)
    assert gradient.abs().max() < 1e-6, "the student has arrived at K p"
    _, gradient = measure(space, ForwardKL(), z, z, products)
    assert gradient.abs().max() > 1e-3, "and would leave p"


def test_a_tiny_bandwidth_is_the_full_space():
    space, (s, z) = Neighbours(5, 1e-4), pair(1)
    value, gradient = measure(space, ForwardKL(), s, z, space.prepare(CODEBOOK_VE))
    torch.testing.assert_close(value, ForwardKL()(log_softmax(s), log_softmax(z), Rows(CODE)))
    torch.testing.assert_close(gradient, s.softmax(1) - z.softmax(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sides", ["both", "teacher"])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_huge_logits_and_masked_codes(divergence, sides, dtype: torch.dtype):
    space = Neighbours(4, 0.5, sides)
    products = space.prepare(CODEBOOK_VE)
    generator = torch.Generator().manual_seed(3)
    s, z = ((torch.randint(2, (4, VOCAB), generator=generator) * 2.0 - 1) * 1e4 for _ in range(2))
    for tensors in measure(space, divergence, s.to(dtype), z.to(dtype), products):
        assert torch.isfinite(tensors).all()
    s, z = (x.to(dtype) for x in pair(5))
    masked = [0, 4, int(products[space.key][0, 1])]
    s[:, masked], z[:, masked] = -torch.inf, -torch.inf
    if sides == "both":  # a blurred target has mass at masked codes, where a student alone can have none
        value, gradient = measure(space, divergence, s, z, products)
        assert torch.isfinite(value).all() and torch.isfinite(gradient).all()
        assert (gradient[:, masked] == 0).all()


def test_far_away_masks_leave_an_outcome_empty():
    """A code whose whole neighbourhood is masked on both sides counts nothing."""
    space, codebook_VE = Neighbours(2, 0.5), torch.tensor([[0.0], [0.1], [50.0], [50.1]])
    products = space.prepare(codebook_VE)
    s = torch.tensor([[1.0, -0.5, -torch.inf, -torch.inf]], dtype=torch.float64)
    z = torch.tensor([[0.0, 0.7, -torch.inf, -torch.inf]], dtype=torch.float64)
    s.requires_grad_()
    (view,) = space(s, z, Rows(CODE[:1]), products)
    assert torch.isneginf(view.student_NK[0]).tolist() == [False, False, True, True]
    value = ForwardKL()(view.student_NK, view.teacher_NK, view.rows)
    (gradient,) = torch.autograd.grad(value.sum(), s)
    assert torch.isfinite(value).all() and torch.isfinite(gradient).all()


def test_the_target_code_keeps_its_number():
    space, (s, _) = Neighbours(4, 0.5), pair()
    products = space.prepare(CODEBOOK_VE)
    (view,) = space(s, None, Rows(CODE), products)
    assert view.teacher_NK is None
    value = CrossEntropy()(view.student_NK, None, view.rows)
    expected = -(s.softmax(1) @ dense(space, products).T).log()[torch.arange(4), CODE]
    torch.testing.assert_close(value, expected)


def test_the_products_of_a_method_and_what_is_refused():
    method = Method((Term("kd", ForwardKL(), space=Neighbours(4)),))
    assert set(method.prepare(CODEBOOK_VE)) == {"neighbours/4-auto", "neighbours/4-auto/log_weight"}
    with pytest.raises(VarkdError, match="call method"):
        Neighbours(4)(*pair(), Rows(CODE), {})
    for make in (lambda: Neighbours(1), lambda: Neighbours(4, 0.0), lambda: Neighbours(4, -1.0)):
        with pytest.raises(VarkdError, match="neighbours: "):
            make()
