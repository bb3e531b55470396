"""Every divergence against its closed form (values and gradients) and against the inequalities that it must obey."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import reference
from varkd.distill.divergences import (
    JSD,
    AdaptiveKL,
    CrossEntropy,
    Divergence,
    ForwardKL,
    ReverseKL,
    Rows,
    SkewKL,
    SkewReverseKL,
    TeacherArgmax,
    ToDi,
    TotalVariation,
)
from varkd.distill.spaces import log_softmax
from varkd.errors import VarkdError

CODE = torch.tensor([0, 1, 1])
TWO_SIDED: dict[str, tuple[Divergence, Callable[..., tuple[Tensor, Tensor]]]] = {
    "forward_kl": (ForwardKL(), reference.forward_kl),
    "reverse_kl": (ReverseKL(), reference.reverse_kl),
    "jsd.5": (JSD(0.5), partial(reference.jsd, beta=0.5)),
    "jsd.1": (JSD(0.1), partial(reference.jsd, beta=0.1)),
    "jsd.9": (JSD(0.9), partial(reference.jsd, beta=0.9)),
    "jsd.3ends": (JSD(0.3, "ends"), partial(reference.jsd, beta=0.3, ends=True)),
    "skew_kl": (SkewKL(0.1), partial(reference.skew_kl, alpha=0.1)),
    "skew_kl.7": (SkewKL(0.7), partial(reference.skew_kl, alpha=0.7)),
    "skew_reverse_kl": (SkewReverseKL(0.1), partial(reference.skew_reverse_kl, alpha=0.1)),
    "skew_reverse_kl.7": (SkewReverseKL(0.7), partial(reference.skew_reverse_kl, alpha=0.7)),
    "total_variation": (TotalVariation(), reference.total_variation),
    "adaptive_kl": (AdaptiveKL(0.5), partial(reference.adaptive_kl, head=0.5)),
    "adaptive_kl.9": (AdaptiveKL(0.9), partial(reference.adaptive_kl, head=0.9)),
    "todi": (ToDi(), partial(reference.todi, sharpness=1.0)),
    "todi.3": (ToDi(3.0), partial(reference.todi, sharpness=3.0)),
}
ALL = {
    **TWO_SIDED,
    "teacher_argmax": (TeacherArgmax(), reference.teacher_argmax),
    "cross_entropy": (CrossEntropy(), partial(reference.cross_entropy, code=CODE)),
}
every = pytest.mark.parametrize("name", ALL)
two_sided = pytest.mark.parametrize("name", TWO_SIDED)

scales = st.floats(-1, 2).map(lambda exponent: 10**exponent)
sizes = st.integers(2, 1000)
seeds = st.integers(0, 2**30)
some = settings(max_examples=12, deadline=None)


def logits(seed: int, scale: float, size: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    s, z = torch.randn(2, 3, size, generator=generator, dtype=torch.float64) * scale
    return s.to(dtype), z.to(dtype)


def apply(divergence: Divergence, s: Tensor, z: Tensor, code: Tensor = CODE) -> tuple[Tensor, Tensor]:
    """The value and its gradient with respect to the student's logits, by autograd through the log-softmax."""
    s = s.detach().requires_grad_()
    value = divergence(log_softmax(s), log_softmax(z), Rows(code))
    (gradient,) = torch.autograd.grad(value.sum(), s)
    return value.detach(), gradient


@every
@some
@given(seed=seeds, scale=scales, size=sizes)
def test_closed_form_of_value_and_gradient(name: str, seed: int, scale: float, size: int):
    divergence, closed_form = ALL[name]
    s, z = logits(seed, scale, size)
    value, gradient = apply(divergence, s, z)
    expected_value, expected_gradient = closed_form(s, z)
    torch.testing.assert_close(value, expected_value, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-7, atol=1e-10)
    assert (value >= -1e-12).all()
    assert gradient.sum(1).abs().max() < 1e-10  # shifting the logits changes nothing


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("scale", "size"), [(0.1, 2), (1.0, 1000), (10.0, 16384), (100.0, 1000)])
def test_precision_from_narrow_logits(name: str, dtype: torch.dtype, scale: float, size: int):
    divergence, closed_form = ALL[name]
    s, z = logits(7, scale, size, dtype)
    value, gradient = apply(divergence, s, z)
    assert value.dtype == torch.float32  # bfloat16 logits are widened before the log-softmax
    expected_value, expected_gradient = closed_form(s, z)
    tolerance = 1e-5 * max(1.0, scale)
    torch.testing.assert_close(value.double(), expected_value, rtol=1e-5, atol=tolerance)
    # A gradient leaves in the dtype of the logits: eight bits of mantissa for bfloat16.
    rtol = 1e-2 if dtype == torch.bfloat16 else 1e-3
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=rtol, atol=tolerance)


@two_sided
@some
@given(seed=seeds, scale=scales, size=sizes)
def test_zero_exactly_where_equal(name: str, seed: int, scale: float, size: int):
    divergence, _ = TWO_SIDED[name]
    s, z = logits(seed, scale, size)
    value, gradient = apply(divergence, s + 3.0, s)  # equal up to a shift of the logits
    assert value.abs().max() < 1e-11
    if name != "total_variation":  # its gradient is the sign of a rounding error here; exact ties are tested below
        assert gradient.abs().max() < 1e-11
    different, _ = apply(divergence, s, z)
    apart = (s.softmax(1) - z.softmax(1)).abs().sum(1) > 1e-4
    assert (different[apart] > 1e-11).all()


@every
def test_shifts_and_permutations_change_nothing(name: str):
    divergence, _ = ALL[name]
    s, z = logits(1, 3.0, 50)
    value, gradient = apply(divergence, s, z)
    shifted, shifted_gradient = apply(divergence, s + 11.0, z - 7.0)
    torch.testing.assert_close(shifted, value)
    torch.testing.assert_close(shifted_gradient, gradient)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(2))
    moved, moved_gradient = apply(divergence, s[:, order], z[:, order], torch.argsort(order)[CODE])
    torch.testing.assert_close(moved, value)
    torch.testing.assert_close(moved_gradient, gradient[:, order])


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_for_huge_logits(name: str, dtype: torch.dtype):
    sign = torch.tensor([[1.0, -1.0, 1.0, -1.0], [-1.0, 1.0, 1.0, -1.0], [1.0, 1.0, 1.0, 1.0]], dtype=dtype)
    value, gradient = apply(ALL[name][0], 1e4 * sign, -1e4 * sign)
    assert value.isfinite().all() and gradient.isfinite().all()


@every
def test_masked_ids_count_nothing(name: str):
    divergence, closed_form = ALL[name]
    s, z = logits(3, 2.0, 20)
    pad = torch.full((3, 5), -torch.inf, dtype=torch.float64)
    value, gradient = apply(divergence, torch.cat([s, pad], 1), torch.cat([z, pad], 1))
    expected_value, expected_gradient = closed_form(s, z)
    torch.testing.assert_close(value, expected_value)
    torch.testing.assert_close(gradient, torch.cat([expected_gradient, torch.zeros_like(pad)], 1))


@pytest.mark.parametrize("name", ["jsd.5", "skew_kl", "skew_reverse_kl", "total_variation"])
def test_one_sided_masks_stay_finite_where_the_value_is_bounded(name: str):
    s, z = logits(4, 2.0, 20)
    hidden = torch.arange(20) < 5
    for masked_s, masked_z in ((s.masked_fill(hidden, -torch.inf), z), (s, z.masked_fill(hidden, -torch.inf))):
        value, gradient = apply(TWO_SIDED[name][0], masked_s, masked_z)
        assert value.isfinite().all() and gradient.isfinite().all() and (value > 0).all()


@some
@given(seed=seeds, scale=scales, size=sizes)
def test_bounds_and_identities(seed: int, scale: float, size: int):
    s, z = logits(seed, scale, size)
    q, p = s.softmax(1), z.softmax(1)
    forward, reverse = (apply(d, s, z)[0] for d in (ForwardKL(), ReverseKL()))
    tv, half = (apply(d, s, z)[0] for d in (TotalVariation(), JSD(0.5)))
    slack = 1e-9
    assert (tv >= 0).all() and (tv <= 1 + slack).all()
    torch.testing.assert_close(tv, 1 - torch.minimum(p, q).sum(1), rtol=1e-9, atol=1e-10)
    for kl in (forward, reverse):  # Pinsker; a KL of 1e-24 may round below 0
        assert (tv <= (kl.clamp_min(0) / 2).sqrt() + slack).all()
    assert (half <= math.log(2) + slack).all() and (half <= math.log(2) * tv + slack).all()
    torch.testing.assert_close(half, apply(JSD(0.5), z, s)[0], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(apply(JSD(0.2), s, z)[0], apply(JSD(0.8), z, s)[0], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(reverse, apply(ForwardKL(), z, s)[0], rtol=1e-9, atol=1e-11)
    for alpha in (0.05, 0.5, 0.95):
        for skewed, full in ((SkewKL(alpha), forward), (SkewReverseKL(alpha), reverse)):
            value, _ = apply(skewed, s, z)
            assert (value <= -math.log(alpha) + slack).all() and (value <= (1 - alpha) * full + slack).all()


def test_limits_in_beta_and_alpha():
    s, z = logits(5, 1.0, 40)
    (forward, forward_gradient), (reverse, reverse_gradient) = apply(ForwardKL(), s, z), apply(ReverseKL(), s, z)
    tiny = 1e-6
    torch.testing.assert_close(apply(JSD(tiny), s, z)[0] / tiny, forward, rtol=1e-4, atol=0)
    torch.testing.assert_close(apply(JSD(1 - tiny), s, z)[0] / tiny, reverse, rtol=1e-4, atol=0)
    for beta in (tiny, 0.0):
        value, gradient = apply(JSD(beta, "ends"), s, z)
        torch.testing.assert_close(value, forward, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradient, forward_gradient, rtol=1e-4, atol=1e-5)
    for beta in (1 - tiny, 1.0):
        value, gradient = apply(JSD(beta, "ends"), s, z)
        torch.testing.assert_close(value, reverse, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradient, reverse_gradient, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(apply(SkewKL(0.0), s, z), (forward, forward_gradient))
    torch.testing.assert_close(apply(SkewReverseKL(0.0), s, z), (reverse, reverse_gradient))


@pytest.mark.parametrize("divergence", [JSD(0.0), JSD(1.0), SkewKL(1.0), SkewReverseKL(1.0)])
def test_degenerate_ends_are_zero_and_can_be_trained_through(divergence: Divergence):
    s, z = logits(6, 2.0, 10)
    value, gradient = apply(divergence, s, z)
    assert (value == 0).all() and (gradient == 0).all()


def test_argument_order():
    s, z = logits(8, 2.0, 30)
    ours, _ = apply(ForwardKL(), s, z)
    torchs = F.kl_div(s.log_softmax(1), z.log_softmax(1), log_target=True, reduction="none").sum(1)
    torch.testing.assert_close(ours, torchs)
    assert (ours - apply(ReverseKL(), s, z)[0]).abs().max() > 0.1  # the case tells the two apart


def test_total_variation_has_no_gradient_at_ties():
    s = torch.zeros(3, 4, dtype=torch.float64)
    _, gradient = apply(TotalVariation(), s, s.clone())
    assert (gradient == 0).all()


def test_the_teacher_gets_no_say_in_cross_entropy():
    s, z = logits(9, 2.0, 10)
    torch.testing.assert_close(apply(CrossEntropy(), s, z), apply(CrossEntropy(), s, -z))
    torch.testing.assert_close(apply(CrossEntropy(), s, z)[0], F.cross_entropy(s, CODE, reduction="none"))


@pytest.mark.parametrize("make", [lambda x: JSD(x), lambda x: SkewKL(x), lambda x: SkewReverseKL(x)])
@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_parameters_out_of_range_are_refused(make: Callable[[float], Divergence], value: float):
    with pytest.raises(VarkdError, match=r"must lie in \[0, 1\]"):
        make(value)


def test_adaptive_kl_moves_with_the_codes():
    """The head belongs to codes, not to places: renumbering the codes changes nothing (a peer's bug)."""
    s, z = logits(11, 2.0, 50)
    renumbered = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    value, gradient = apply(AdaptiveKL(), s, z)
    again, moved = apply(AdaptiveKL(), s[:, renumbered], z[:, renumbered])
    torch.testing.assert_close(again, value)
    torch.testing.assert_close(moved, gradient[:, renumbered])
    value, gradient = apply(AdaptiveKL(), s, s.clone())
    assert (value == 0).all() and gradient.abs().max() < 1e-12


@some
@given(seed=seeds, scale=scales, size=sizes)
def test_todi_is_the_sum_of_both_kl_in_value_only(seed: int, scale: float, size: int):
    s, z = logits(seed, scale, size)
    both = apply(ForwardKL(), s, z), apply(ReverseKL(), s, z)
    value, _ = apply(ToDi(), s, z)
    torch.testing.assert_close(value, both[0][0] + both[1][0], rtol=1e-7, atol=1e-9)
    for sharpness in (0.0, 0.5, 4.0):
        assert (apply(ToDi(sharpness), s, z)[0] >= -1e-12).all()
    half, half_gradient = apply(ToDi(0.0), s, z)  # a = 1/2 everywhere
    torch.testing.assert_close(half, (both[0][0] + both[1][0]) / 2, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(half_gradient, (both[0][1] + both[1][1]) / 2, rtol=1e-7, atol=1e-9)
