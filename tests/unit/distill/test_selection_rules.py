"""Selections by threshold, acceptance of the sequence's own codes, entropy ratio, horizon and drift, against numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from varkd.distill.divergences import ForwardKL
from varkd.distill.method import Method, Term
from varkd.distill.schedule import LinearSchedule
from varkd.distill.scores import ScoreInputs, of_student, of_teacher, position_scores
from varkd.distill.selection import Accepted, Confidence, Drift, EntropyRatio, Horizon, Selection, Threshold, kept_share
from varkd.distill.spaces import Clusters, Full
from varkd.errors import VarkdError
from varkd.types import Condition, Part, Plan
from varkd.world import Rng

ROWS, LENGTH, VOCAB = 5, 6, 9
CODEBOOK_VE = torch.randn(VOCAB, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def part(sizes: tuple[int, ...] = (1,) * LENGTH, shuffled: bool = False) -> Part:
    generator, length = torch.Generator().manual_seed(7), sum(sizes)
    order = [torch.randperm(length, generator=generator) if shuffled else torch.arange(length) for _ in range(ROWS)]
    codes_BL = torch.randint(VOCAB, (ROWS, length), generator=generator)
    plan = Plan(torch.stack(order), sizes)
    return Part.of("student", codes_BL, Condition(torch.zeros(ROWS)), plan, torch.arange(ROWS))


def logits(seed: int = 0, rows: int = ROWS * LENGTH) -> tuple[Tensor, Tensor]:
    """Of the teacher and of the student, (N, V)."""
    generator = torch.Generator().manual_seed(seed)
    z, s = torch.randn(2, rows, VOCAB, generator=generator, dtype=torch.float64) * 2
    return z, s


def weights(selection: Selection, subject: Part, z: Tensor, s: Tensor, chunk_rows: int = 4) -> Tensor:
    """What the selection makes of logits, through the scores, in chunks. The targets are not the codes seen."""
    seen_N = subject.codes_BL.flatten()
    sides = ScoreInputs((seen_N + 1) % VOCAB, lambda rows: z[rows], lambda rows: s[rows], seen_N=seen_N)
    codebook_tables = selection.prepare(CODEBOOK_VE)
    found = position_scores(selection.score_names(Full()), sides, codebook_tables, chunk_rows)
    scores = {name: score_N.view(subject.codes_BL.shape) for name, score_N in found.items()}
    return selection(scores, subject, Full(), None, Rng(0))


def probabilities(z: Tensor) -> np.ndarray:
    numbers = np.exp(z.numpy() - z.numpy().max(1, keepdims=True))
    return numbers / numbers.sum(1, keepdims=True)


def entropy(p: np.ndarray) -> np.ndarray:
    return -(p * np.log(np.where(p > 0, p, 1))).sum(1)


def by_hand(rule: str, p: np.ndarray, q: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Acceptance of every code in plain numpy."""
    here, table = np.arange(len(codes)), CODEBOOK_VE.numpy()
    if rule == "code":
        return np.minimum(1, p[here, codes] / q[here, codes])
    if rule == "nucleus":
        return np.array([float(row[row > row[code]].sum() <= 0.7) for row, code in zip(p, codes, strict=True)])
    near = np.square(table[:, None] - table[None]).sum(-1).argsort(1)[:, :3]
    return np.minimum(1, np.take_along_axis(p, near[codes], 1).sum(1) / q[here, codes])


@pytest.mark.parametrize("chunk_rows", [1, 7, 1000])
@pytest.mark.parametrize("rule", ["code", "nucleus", "neighbors"])
def test_acceptance_judges_the_codes_of_the_sequence(rule, chunk_rows: int):
    (z, s), subject = logits(), part()
    found = weights(Accepted(rule, floor=0.2, top_p=0.7, neighbors=3), subject, z, s, chunk_rows)
    share = by_hand(rule, probabilities(z), probabilities(s), subject.codes_BL.flatten().numpy())
    np.testing.assert_allclose(found.flatten().numpy(), 0.2 + 0.8 * share, rtol=1e-5)
    assert 0.2 <= float(found.min()) < 1 and float(found.max()) == 1


def test_one_neighbor_is_the_code_itself():
    (z, s), subject = logits(), part()
    torch.testing.assert_close(
        weights(Accepted("neighbors", neighbors=1), subject, z, s), weights(Accepted("code"), subject, z, s)
    )
    everywhere = weights(Accepted("neighbors", neighbors=99), subject, z, s)
    assert (everywhere == 1).all(), "all codes hold all of the mass"


def test_the_mean_acceptance_of_the_students_samples_is_one_minus_total_variation():
    generator = torch.Generator().manual_seed(0)
    p, q = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.2, 0.2, 0.6]])
    codes = torch.multinomial(q.expand(20_000, -1), 1, generator=generator).squeeze(1)
    sides = ScoreInputs(
        codes, lambda rows: p.log().expand(20_000, -1)[rows], lambda rows: q.log().expand(20_000, -1)[rows]
    )
    found = position_scores(["code_ratio"], sides, {}, 4096)["code_ratio"]
    assert float(found.mean()) == pytest.approx(1 - 0.5 * float((p - q).abs().sum()), abs=0.01)


def test_codes_that_the_target_excludes_are_not_accepted():
    (z, s), subject = logits(), part()
    z.scatter_(1, subject.codes_BL.flatten().unsqueeze(1), -torch.inf)
    for rule in ("code", "nucleus"):
        assert (weights(Accepted(rule, floor=0.0), subject, z, s) == 0).all()


@pytest.mark.parametrize("score", ["max_prob", "entropy", "margin", "code_prob"])
def test_a_threshold_by_hand(score):
    (z, s), subject = logits(), part()
    p = probabilities(z)
    ordered, target = np.sort(p, 1), (subject.codes_BL.flatten().numpy() + 1) % VOCAB
    measured = {
        "max_prob": ordered[:, -1], "entropy": -entropy(p) / math.log(VOCAB), "margin": ordered[:, -1] - ordered[:, -2],
        "code_prob": p[np.arange(len(p)), target],
    }[score]  # fmt: skip
    middle = float(np.median(measured)) + 1e-4
    hard = weights(Threshold(middle, score, floor=0.25), subject, z, s)
    np.testing.assert_array_equal(hard.flatten().numpy(), np.where(measured >= middle, 1, np.float32(0.25)))
    soft = weights(Threshold(middle, score, floor=0.25, softness=0.1), subject, z, s)
    expected = 0.25 + 0.75 / (1 + np.exp(-(measured - middle) / 0.1))
    np.testing.assert_allclose(soft.flatten().numpy(), expected, rtol=1e-5)
    sharp = weights(Threshold(middle, score, floor=0.25, softness=1e-7), subject, z, s)
    np.testing.assert_allclose(sharp.numpy(), hard.numpy(), atol=1e-5)


def test_a_threshold_over_clusters_needs_clusters():
    space = Clusters(count=3)
    assert Threshold(0.5, "cluster_mass").score_names(space) == Confidence(score="cluster_mass").score_names(space)
    with pytest.raises(VarkdError, match="threshold: score 'cluster_mass' needs"):
        Term("kd", ForwardKL(), selection=Threshold(0.5, "cluster_mass"))


def test_the_entropy_ratio_by_hand():
    (z, s), subject = logits(), part()
    ratio = entropy(probabilities(z)) / entropy(probabilities(s))
    for bound in (0.8, 1.0, 1.3):
        found = weights(EntropyRatio(bound, floor=0.3), subject, z, s)
        np.testing.assert_array_equal(found.flatten().numpy(), np.where(ratio <= bound, 1, np.float32(0.3)))


def test_entropy_ratios_of_certain_models():
    certain = torch.full((ROWS * LENGTH, VOCAB), -1e4, dtype=torch.float64)
    certain[:, 2] = 1e4
    flat = torch.zeros_like(certain)
    select = EntropyRatio(1.0, floor=0.0)
    assert (weights(select, part(), certain, certain) == 1).all(), "0 <= 0"
    assert (weights(select, part(), certain, flat) == 1).all(), "the teacher is surer"
    assert (weights(select, part(), flat, certain) == 0).all(), "the student is surer"


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("sizes", [(1,) * 10, (1, 4, 5), (2, 3, 3, 2)])
def test_a_horizon_counts_the_codes_of_earlier_steps(sizes: tuple[int, ...], shuffled: bool):
    subject, length = part(sizes, shuffled), sum(sizes)
    for share in (0.0, 0.07, 0.1, 0.3, 0.5, 1.0):
        found = Horizon(share, floor=0.2)({}, subject, Full(), None, Rng(0))
        for row in range(ROWS):
            walk, begin = subject.plan.order_BL[row].tolist(), 0
            for size in sizes:
                for position in walk[begin : begin + size]:
                    kept = begin < share * length
                    assert found[row, position] == torch.tensor(1.0 if kept else 0.2)
                begin += size


def test_a_horizon_does_not_stumble_over_rounding_and_may_grow():
    subject = part((1,) * 100)
    assert 0.07 * 100 > 7
    assert Horizon(0.07)({}, subject, Full(), None, Rng(0)).sum(1).tolist() == [7.0] * ROWS
    method = Method((Term("kd", ForwardKL(), selection=Horizon(LinearSchedule(0.2, 1.0))),))
    grown = method.at(0.5).terms[0].selection
    assert isinstance(grown, Horizon) and grown.share == pytest.approx(0.6)


def drift_by_hand(surprise: np.ndarray, window: int, sigmas: float) -> int:
    """The number of codes before a sequence has drifted."""
    rate, mean, variance = 2 / (window + 1), 0.0, 0.0
    for nth, z in enumerate(surprise):
        mean, variance = (1 - rate) * mean + rate * z, (1 - rate) ** 2 * variance + rate**2
        if mean > sigmas * math.sqrt(variance):
            return nth
    return len(surprise)


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize(("window", "sigmas"), [(1, 1.0), (4, 0.5), (16, 1.0)])
def test_drift_by_hand(window: int, sigmas: float, shuffled: bool):
    sizes = (1, 2) * 10
    subject = part(sizes, shuffled)
    length = sum(sizes)
    z, s = logits(3, ROWS * length)
    found = weights(Drift(window, sigmas, floor=0.1), subject, z, s)
    p = probabilities(z)
    h = entropy(p)
    spread = np.sqrt((p * (np.log(p) + h[:, None]) ** 2).sum(1))
    codes = subject.codes_BL.flatten().numpy()
    surprise = ((-np.log(p[np.arange(len(p)), codes]) - h) / spread).reshape(ROWS, length)
    ends = []
    for row in range(ROWS):
        walk = subject.plan.order_BL[row].tolist()
        end = drift_by_hand(surprise[row][walk], window, sigmas)
        expected = np.full(length, np.float32(0.1))
        expected[walk[:end]] = 1
        np.testing.assert_array_equal(found[row].numpy(), expected)
        ends.append(end)
    assert min(ends) < length, "else nothing was tested"


def test_the_teachers_own_samples_drift_as_rarely_as_the_law_says():
    """At one given position the average exceeds 2 standard deviations in about 1 of 40 sequences."""
    generator = torch.Generator().manual_seed(0)
    p = torch.softmax(torch.randn(40, 30, generator=generator, dtype=torch.float64), 1)  # a law for each position
    codes_BL = torch.stack([torch.multinomial(row, 4000, replacement=True, generator=generator) for row in p], 1)
    sides = ScoreInputs(codes_BL.flatten(), lambda rows: p.log().repeat(4000, 1)[rows])
    surprise_BL = position_scores(["surprise"], sides, {}, 10**6)["surprise"].view(4000, 40)
    assert surprise_BL.mean(0).abs().max() < 0.08 and (surprise_BL.var(0) - 1).abs().max() < 0.2
    rate, mean_B = 2 / 17, torch.zeros(4000)
    for rank, surprise_B in enumerate(surprise_BL.unbind(1), 1):
        mean_B = (1 - rate) * mean_B + rate * surprise_B
        law = rate / (2 - rate) * (1 - (1 - rate) ** (2 * rank))
        assert float(mean_B.var()) == pytest.approx(law, rel=0.15)


def test_a_certain_teacher_and_an_excluded_code():
    """No noise where nothing can surprise; and the first code that the target excludes ends the sequence."""
    subject = part()
    flat, s = torch.zeros(ROWS * LENGTH, VOCAB), torch.zeros(ROWS * LENGTH, VOCAB)
    assert (weights(Drift(), subject, flat, s) == 1).all()
    certain = torch.full_like(flat, -1e4).scatter(1, subject.codes_BL.view(-1, 1), 1e4)
    assert (weights(Drift(), subject, certain, s) == 1).all()
    excluded = flat.clone()
    excluded[2, int(subject.codes_BL[0, 2])] = -torch.inf
    found = weights(Drift(), subject, excluded, s)
    assert found[0].tolist() == [1, 1, 0, 0, 0, 0] and (found[1:] == 1).all()


def test_every_rule_belongs_to_its_rows():
    (z, s), subject = logits(), part((1, 2, 3), shuffled=True)
    rows_N = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH)[2:4].flatten()
    selections = (Threshold(0.3), Accepted("code"), Accepted("neighbors"), EntropyRatio(), Horizon(), Drift(4, 0.5))
    for selection in selections:
        whole = weights(selection, subject, z, s)
        assert torch.equal(weights(selection, subject.select(slice(2, 4)), z[rows_N], s[rows_N]), whole[2:4])


def test_which_models_the_scores_look_at():
    both = ("code_gap", "code_ratio", "near_ratio:nearest/8", "entropy_ratio")
    assert all(of_student(name) and of_teacher(name) for name in both)
    assert not any(of_student(name) for name in ("surprise", "in_nucleus:0.9"))
    assert Term("kd", ForwardKL(), selection=Drift()).needs_teacher
    assert not Term("kd", ForwardKL(), selection=Horizon()).score_names


def test_the_kept_share_is_the_way_from_the_floor_to_one():
    weight = torch.tensor([0.1, 1.0, 0.55])
    assert kept_share(Drift(floor=0.1), weight).tolist() == pytest.approx([0, 1, 0.5])
    assert kept_share(Drift(floor=0.0), torch.tensor([0.0, 1.0])).tolist() == [0, 1]
    assert kept_share(Drift(floor=1.0), torch.ones(2)).tolist() == [1, 1]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Threshold(2.0), lambda: Threshold(0.5, softness=-1), lambda: Threshold(0.5, floor=2),
        lambda: Accepted(neighbors=0), lambda: Accepted(top_p=1.5), lambda: EntropyRatio(-1),
        lambda: Horizon(1.5), lambda: Horizon(LinearSchedule(0, 2)), lambda: Drift(0), lambda: Drift(sigmas=0),
        lambda: Drift(floor=-1),
    ],
)  # fmt: skip
def test_nonsense_is_refused(make):
    with pytest.raises(VarkdError):
        make()
