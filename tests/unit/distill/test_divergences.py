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
    TAID,
    AdaptiveKL,
    CrossEntropy,
    Decoupled,
    Divergence,
    ForwardKL,
    Ranking,
    ReverseKL,
    SequenceSkew,
    SkewKL,
    SkewReverseKL,
    TargetRows,
    TeacherArgmax,
    ToDi,
    TotalVariation,
    log_mass,
    renormalized,
)
from varkd.distill.schedule import LinearSchedule
from varkd.distill.scores import StudentLogp, TeacherLogp
from varkd.distill.spaces import log_softmax
from varkd.errors import VarkdError

CODE = torch.tensor([0, 1, 1])
ALPHA = torch.tensor([0.02, 0.3, 0.07], dtype=torch.float64)  # a skew for each row
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
    "taid.4": (TAID(0.4), partial(reference.taid, time=0.4)),
    "taid.9": (TAID(0.9), partial(reference.taid, time=0.9)),
    "skew_kl.rows": (SkewKL(SequenceSkew()), partial(reference.skew_kl, alpha=ALPHA.unsqueeze(1))),
    "skew_reverse_kl.rows": (
        SkewReverseKL(SequenceSkew()),
        partial(reference.skew_reverse_kl, alpha=ALPHA.unsqueeze(1)),
    ),
    "skew_reverse_kl.detached": (
        SkewReverseKL(0.1, detached=True),
        partial(reference.skew_reverse_kl, alpha=0.1, detached=True),
    ),
    "skew_reverse_kl.rows.detached": (
        SkewReverseKL(SequenceSkew(), detached=True),
        partial(reference.skew_reverse_kl, alpha=ALPHA.unsqueeze(1), detached=True),
    ),
}
ALL = {
    **TWO_SIDED,
    # 0 as soon as the order of the first codes agrees (ranking), or one half of the distribution does (decoupled).
    "ranking": (Ranking(), partial(reference.ranking, top_k=5)),
    "ranking.1": (Ranking(1), partial(reference.ranking, top_k=1)),
    "decoupled.target": (Decoupled("target"), partial(reference.decoupled, part="target", code=CODE)),
    "decoupled.rest": (Decoupled("rest"), partial(reference.decoupled, part="rest", code=CODE)),
    "decoupled.target.argmax": (Decoupled("target", "argmax"), partial(reference.decoupled, part="target")),
    "decoupled.rest.argmax": (Decoupled("rest", "argmax"), partial(reference.decoupled, part="rest")),
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
    value = divergence(log_softmax(s), log_softmax(z), TargetRows(code, ALPHA))
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


@pytest.mark.parametrize("name", ["jsd.5", "skew_kl", "skew_reverse_kl", "skew_reverse_kl.detached", "skew_kl.rows",
                                  "skew_reverse_kl.rows", "total_variation", "taid.4"])  # fmt: skip
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


@pytest.mark.parametrize(
    "divergence", [JSD(0.0), JSD(1.0), SkewKL(1.0), SkewReverseKL(1.0), SkewReverseKL(1.0, detached=True)]
)
def test_degenerate_ends_are_zero_and_can_be_trained_through(divergence: Divergence):
    s, z = logits(6, 2.0, 10)
    value, gradient = apply(divergence, s, z)
    assert (value == 0).all() and gradient.abs().max() < 1e-15


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
    # Next to codes that differ, a subgradient of -1/2 at the ties (a peer's) would no longer cancel.
    q, p = torch.tensor([[0.25, 0.25, 0.125, 0.375]]), torch.tensor([[0.25, 0.25, 0.375, 0.125]])
    student = q.double().log().requires_grad_()
    (gradient,) = torch.autograd.grad(TotalVariation()(student, p.double().log(), TargetRows(None)).sum(), student)
    torch.testing.assert_close(gradient, 0.5 * q.double() * torch.tensor([[0.0, 0.0, -1.0, 1.0]]))


def test_the_teacher_gets_no_say_in_cross_entropy():
    s, z = logits(9, 2.0, 10)
    torch.testing.assert_close(apply(CrossEntropy(), s, z), apply(CrossEntropy(), s, -z))
    torch.testing.assert_close(apply(CrossEntropy(), s, z)[0], F.cross_entropy(s, CODE, reduction="none"))


@pytest.mark.parametrize("make", [lambda x: JSD(x), lambda x: SkewKL(x), lambda x: SkewReverseKL(x), lambda x: TAID(x)])
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


def test_jsd_measures_both_sides_against_the_mixture():
    """1/2 KL(p || m) + 1/2 KL(q || m); a peer's has the arguments the other way round."""
    s, z = logits(12, 3.0, 30)
    (lq, lp), kl = reference.log_probs(s, z), lambda first, second: (first.exp() * (first - second)).sum(1)
    lm = ((lq.exp() + lp.exp()) / 2).log()
    value, _ = apply(JSD(0.5), s, z)
    torch.testing.assert_close(value, (kl(lp, lm) + kl(lq, lm)) / 2)
    assert ((kl(lm, lp) + kl(lm, lq)) / 2 - value > 0.1).all()  # the case tells the two apart


@pytest.mark.parametrize("name", ["jsd.5", "skew_kl", "skew_reverse_kl", "skew_kl.rows", "skew_reverse_kl.detached"])
def test_mixtures_are_formed_in_the_log_domain(name: str):
    """Codes that both sides find less likely than float32 can say: the log of a plain mixture is -inf there."""
    s, z = torch.tensor([[200.0, 0.0, 1.0]] * 3), torch.tensor([[201.0, 0.0, -1.0]] * 3)
    lq, lp = log_softmax(s), log_softmax(z)
    naive = (0.5 * lp.exp() + 0.5 * lq.exp()).log()
    assert torch.isneginf(naive[:, 1:]).all() and (lp.exp() * (lp - naive)).sum(1).isnan().all()
    value, gradient = apply(ALL[name][0], s, z)
    expected_value, expected_gradient = ALL[name][1](s, z)
    torch.testing.assert_close(value.double(), expected_value, rtol=0, atol=1e-6)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=0, atol=1e-6)


def test_adaptive_kl_takes_the_head_and_the_gaps_in_one_order():
    """A peer's mask is in the order of p but lies on gaps in the order of the vocabulary."""
    s, z = logits(13, 2.0, 30)
    q, p = s.softmax(1), z.softmax(1)
    (forward, _), (reverse, _) = apply(ForwardKL(), s, z), apply(ReverseKL(), s, z)
    value, _ = apply(AdaptiveKL(0.5), s, z)
    gap, ordered = (p - q).abs(), p.sort(dim=1, descending=True)
    mask = ordered.values.cumsum(1) <= 0.5
    mask[:, 0] = True

    def blend(of_head: Tensor) -> Tensor:
        share = of_head.sum(1) / gap.sum(1)
        return share * forward + (1 - share) * reverse

    torch.testing.assert_close(value, blend(gap.gather(1, ordered.indices) * mask))
    assert ((blend(gap * mask) - value).abs() > 1e-2).any()
    low, high = torch.minimum(forward, reverse), torch.maximum(forward, reverse)
    assert (low - 1e-9 <= value).all() and (value <= high + 1e-9).all()


@some
@given(seed=seeds, scale=scales, size=sizes)
def test_taid_goes_from_the_student_to_the_teacher(seed: int, scale: float, size: int):
    s, z = logits(seed, scale, size)
    torch.testing.assert_close(apply(TAID(1.0), s, z), apply(ForwardKL(), s, z), rtol=1e-9, atol=1e-11)
    value, gradient = apply(TAID(0.0), s, z)
    assert value.abs().max() < 1e-11 and gradient.abs().max() < 1e-11
    along = torch.stack([apply(TAID(time), s, z)[0] for time in (0.0, 0.25, 0.5, 0.75, 1.0)])
    assert (along.diff(dim=0) >= -1e-9).all()  # the target only moves away


def test_taid_holds_the_student_fixed_inside_its_target():
    s, z = logits(14, 1.0, 20)
    mean_of_logits = (0.3 * s + 0.7 * z).softmax(1)  # geometric: of logits, not of probabilities
    _, gradient = apply(TAID(0.7), s, z)
    torch.testing.assert_close(gradient, s.softmax(1) - mean_of_logits)


def test_ranking_by_hand():
    """Teacher 0 > 1 > 2, student 2 > 0 > 1 (probabilities 0.5, 0.3, 0.2): with k = 2, T = 0, 1 and S = 2, 0."""
    q, p = torch.tensor([[0.3, 0.2, 0.5]]).double(), torch.tensor([[0.7, 0.2, 0.1]]).double()
    # No teacher code stands above T_1 = 0; the pairs (T, S) in the wrong order are (0, 2) by 0.2 and (1, 2) by 0.3.
    torch.testing.assert_close(Ranking(2)(q.log(), p.log(), TargetRows(None)), torch.tensor([0.5]).double())
    # With k = 3 the teacher's code 2 also stands above code 0 in the first sum, by 0.2.
    torch.testing.assert_close(Ranking(3)(q.log(), p.log(), TargetRows(None)), torch.tensor([0.7]).double())
    torch.testing.assert_close(Ranking(99)(q.log(), p.log(), TargetRows(None)), torch.tensor([0.7]).double())
    agreeing = torch.tensor([[0.4, 0.35, 0.25]]).double()
    assert Ranking(3)(agreeing.log(), p.log(), TargetRows(None)) == 0
    with pytest.raises(VarkdError, match="top_k must be at least 1"):
        Ranking(0)


def test_ranking_still_sees_an_order_that_underflows():
    """The teacher's second and third code both have probability 0 in float32."""
    s, z = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[0.0, -200.0, -300.0]])
    q = s.double().softmax(1)[0]
    expected = 2 * (q[2] - q[0]) + 2 * (q[1] - q[0]) + (q[2] - q[1])
    torch.testing.assert_close(Ranking(3)(log_softmax(s), log_softmax(z), TargetRows(None))[0].double(), expected)


@pytest.mark.parametrize("of", ["code", "argmax"])
@some
@given(seed=seeds, scale=scales, size=sizes)
def test_the_two_halves_make_the_forward_kl(of, seed: int, scale: float, size: int):
    """KL = target + (1 - p(g)) rest, in value and in gradient (the factor belongs to the teacher)."""
    s, z = logits(seed, scale, size)
    g = CODE if of == "code" else z.argmax(1)
    (target, target_gradient), (rest, rest_gradient) = (apply(Decoupled(part, of), s, z) for part in ("target", "rest"))
    unsure = 1 - z.softmax(1)[torch.arange(3), g]
    forward, gradient = apply(ForwardKL(), s, z)
    torch.testing.assert_close(target + unsure * rest, forward, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(target_gradient + unsure.unsqueeze(1) * rest_gradient, gradient, rtol=1e-7, atol=1e-9)


def test_the_rest_does_not_cancel_where_the_target_holds_nearly_everything():
    s, z = torch.tensor([[60.0, 0.0, 1.0]] * 3), torch.tensor([[60.0, 1.0, 0.0]] * 3)
    code = torch.zeros(3, dtype=torch.long)
    assert (1 - log_softmax(z).exp()[:, 0] == 0).all()  # what is left is lost in float32
    value, _ = apply(Decoupled("rest"), s, z, code)
    expected, _ = apply(ForwardKL(), s[:, 1:], z[:, 1:])
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("part", ["target", "rest"])
def test_a_teacher_that_leaves_one_code_only(part):
    """A truncated teacher often keeps a single code: then there is no rest to compare."""
    s, z = logits(15, 2.0, 10)
    z[:, :] = torch.where(torch.nn.functional.one_hot(z.argmax(1), 10).bool(), z, -torch.inf)
    value, gradient = apply(Decoupled(part, "argmax"), s, z)
    if part == "rest":
        assert (value == 0).all() and (gradient == 0).all()
    else:
        torch.testing.assert_close((value, gradient), apply(TeacherArgmax(), s, z))


def test_log_masses_leave_out_what_is_excluded():
    logp = torch.tensor([[0.5, 0.25, 0.25], [0.0, 0.5, 0.0], [0.0, 0.0, 0.0]]).log().requires_grad_()
    mass = log_mass(logp)
    torch.testing.assert_close(mass.detach().exp(), torch.tensor([[1.0], [0.5], [0.0]]))
    (gradient,) = torch.autograd.grad(mass[:2].sum(), logp)
    torch.testing.assert_close(gradient, torch.tensor([[0.5, 0.25, 0.25], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))
    torch.testing.assert_close(
        renormalized(logp).detach().exp(), torch.tensor([[0.5, 0.25, 0.25], [0, 1.0, 0], [0, 0, 0]])
    )


# ---- a skew for every sequence


def test_the_sequence_skew_by_hand():
    skew = SequenceSkew(largest=0.1, smallest=0.01)
    teacher_logp = torch.tensor([[-1.0, -3.0], [-2.0, -2.0], [-0.5, -0.5]])
    student_logp = torch.tensor([[-2.0, -2.0], [-3.0, -5.0], [-4.0, -4.0]])
    gap = skew.observed(
        {TeacherLogp(): teacher_logp, StudentLogp(): student_logp}, None, None
    )  # of exp of mean log-probabilities
    expected = [math.exp(-2) - math.exp(-2), math.exp(-2) - math.exp(-4), math.exp(-0.5) - math.exp(-4)]
    torch.testing.assert_close(gap, torch.tensor(expected).unsqueeze(1))
    assert skew.alpha(gap, None).tolist() == [[pytest.approx(0.1)]] * 3  # nothing to compare with yet
    mean = torch.tensor([0.2])
    alphas = skew.alpha(gap, mean).squeeze(1).tolist()
    raw = [1 - 0.9 * 0.2 / (each + 1e-5) for each in expected]
    assert raw[0] < 0.01 and raw[1] < 0.01 and raw[2] > 0.1  # one at each end of the clip
    assert alphas == pytest.approx([0.01, 0.01, 0.1])
    assert skew.alpha(torch.tensor([[0.19]]), mean).item() == pytest.approx(1 - 0.18 / 0.19001, rel=1e-5)


def test_the_running_gap_by_hand():
    skew, first, second = SequenceSkew(decay=0.75), torch.tensor([[0.2], [0.4]]), torch.tensor([[-0.1], [0.1], [0.3]])
    mean = skew.updated(None, first)
    torch.testing.assert_close(mean, torch.tensor([0.3]))
    torch.testing.assert_close(skew.updated(mean, second), torch.tensor([0.75 * 0.3 + 0.25 * 0.1]))


def test_a_skew_per_row_is_that_skew_in_every_row():
    s, z = logits(16, 2.0, 20)
    kinds: tuple[Callable[..., Divergence], ...] = (SkewKL, SkewReverseKL, partial(SkewReverseKL, detached=True))
    for kind in kinds:
        value, gradient = apply(kind(SequenceSkew()), s, z)
        for row, alpha in enumerate(ALPHA.tolist()):
            alone_value, alone_gradient = apply(kind(alpha), s, z)
            torch.testing.assert_close((value[row], gradient[row]), (alone_value[row], alone_gradient[row]))


def test_a_detached_mixture_changes_the_gradient_and_not_the_value():
    s, z = logits(17, 2.0, 20)
    (value, gradient), (other_value, other) = (apply(SkewReverseKL(0.4, d), s, z) for d in (False, True))
    torch.testing.assert_close(value, other_value)
    assert (gradient - other).abs().max() > 1e-2


def test_a_skew_per_row_must_be_given():
    s, z = logits(18, 2.0, 5)
    with pytest.raises(ValueError, match=r"Rows\.alpha_N"):
        SkewKL(SequenceSkew())(log_softmax(s), log_softmax(z), TargetRows(CODE))


@pytest.mark.parametrize("values", [{"smallest": 0.0}, {"largest": 1.0}, {"smallest": 0.2}, {"decay": 1.5}])
def test_a_skew_out_of_range_is_refused(values: dict[str, float]):
    with pytest.raises(VarkdError, match="sequence_skew"):
        SequenceSkew(**values)


def test_who_is_infinite_where_the_teacher_excludes_a_code():
    """`needs_support` against the divergences themselves."""
    s, z = logits(19, 1.0, 8)
    z[:, 3] = -torch.inf
    one_of_each = {**ALL, "jsd.ends": (JSD(1.0, "ends"), None), "skew_reverse_kl.0": (SkewReverseKL(0.0), None)}
    for name, (divergence, _) in one_of_each.items():
        code = z.argmax(1)  # a code that the teacher keeps
        value = divergence(log_softmax(s), log_softmax(z), TargetRows(code, ALPHA))
        assert bool(value.isfinite().all()) is not divergence.needs_support, name
    assert JSD(LinearSchedule(0.0, 1.0), "ends").needs_support and SkewReverseKL(LinearSchedule(0.0, 0.5)).needs_support
    assert not JSD(LinearSchedule(0.0, 0.9), "ends").needs_support and not JSD(1.0).needs_support
