"""Selections by the acceptance of the sequence's own codes, and by entropy, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from varkd.distill.divergences import CrossEntropy, ForwardKL
from varkd.distill.method import Term
from varkd.distill.schedule import LinearSchedule
from varkd.distill.scores import (
    CodeRatio,
    InNucleus,
    NearRatio,
    ProposalAccepted,
    ScoreInputs,
    Surprise,
    TopKAgrees,
    position_scores,
)
from varkd.distill.selection import Accepted, Confidence, EntropyWeight, Random, Selection
from varkd.distill.spaces import Full
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
    found = position_scores(selection.reads(Full()), sides, codebook_tables, chunk_rows)
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
    found = position_scores([CodeRatio()], sides, {}, 4096)[CodeRatio()]
    assert float(found.mean()) == pytest.approx(1 - 0.5 * float((p - q).abs().sum()), abs=0.01)


def test_codes_that_the_target_excludes_are_not_accepted():
    (z, s), subject = logits(), part()
    z.scatter_(1, subject.codes_BL.flatten().unsqueeze(1), -torch.inf)
    for rule in ("code", "nucleus"):
        assert (weights(Accepted(rule, floor=0.0), subject, z, s) == 0).all()


def test_the_surprise_of_the_teachers_own_samples_is_standardized():
    """Mean 0 and variance 1 under the teacher itself; none where nothing can surprise; infinite at excluded codes."""
    generator = torch.Generator().manual_seed(0)
    p = torch.softmax(torch.randn(40, 30, generator=generator, dtype=torch.float64), 1)  # a law for each position
    codes_BL = torch.stack([torch.multinomial(row, 4000, replacement=True, generator=generator) for row in p], 1)
    sides = ScoreInputs(codes_BL.flatten(), lambda rows: p.log().repeat(4000, 1)[rows])
    surprise_BL = position_scores([Surprise()], sides, {}, 10**6)[Surprise()].view(4000, 40)
    assert surprise_BL.mean(0).abs().max() < 0.08 and (surprise_BL.var(0) - 1).abs().max() < 0.2
    logp = p.log()[0]
    spread = float((p[0] * (logp + entropy(p[:1].numpy())[0]) ** 2).sum() ** 0.5)
    expected = (-float(logp[codes_BL[7, 0]]) - entropy(p[:1].numpy())[0]) / spread
    assert float(surprise_BL[7, 0]) == pytest.approx(expected, rel=1e-5)
    code_N = torch.tensor([0, 0, 1])
    logits = torch.tensor([[0.0, 0.0, 0.0], [1e4, -1e4, -1e4], [0.0, -torch.inf, 0.0]])
    found = position_scores([Surprise()], ScoreInputs(code_N, lambda rows: logits[rows]), {}, 2)[Surprise()]
    assert found[:2].abs().max() < 1e-3 and found[2] == torch.inf


def test_every_rule_belongs_to_its_rows():
    (z, s), subject = logits(), part((1, 2, 3), shuffled=True)
    rows_N = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH)[2:4].flatten()
    selections = (Accepted("code"), Accepted("neighbors"), Accepted("nucleus"), EntropyWeight(0.3), Random(0.5))
    for selection in selections:
        whole = weights(selection, subject, z, s)
        assert torch.equal(weights(selection, subject.select(slice(2, 4)), z[rows_N], s[rows_N]), whole[2:4])


def test_which_models_the_scores_look_at():
    both = (CodeRatio(), NearRatio("nearest/8"), ProposalAccepted(), TopKAgrees(5))
    assert all(score.reads_student and score.reads_teacher for score in both)
    assert not any(score.reads_student for score in (Surprise(), InNucleus(0.9)))
    assert Term("ce", CrossEntropy(), selection=EntropyWeight()).needs_teacher
    assert not Term("kd", ForwardKL(), selection=Random()).reads


def test_the_kept_share_is_the_way_from_the_floor_to_one():
    weight = torch.tensor([0.1, 1.0, 0.55])
    assert Accepted(floor=0.1).kept_share(weight).tolist() == pytest.approx([0, 1, 0.5])
    assert EntropyWeight().kept_share(torch.tensor([0.0, 1.0])).tolist() == [0, 1]
    assert Accepted(floor=1.0).kept_share(torch.ones(2)).tolist() == [1, 1]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Accepted(neighbors=0),
        lambda: Accepted(top_p=1.5),
        lambda: Accepted(floor=-1),
        lambda: EntropyWeight(1.5),
        lambda: Random(LinearSchedule(0, 2)),
        lambda: Confidence(floor=2),
    ],
)
def test_nonsense_is_refused(make):
    with pytest.raises(VarkdError):
        make()
