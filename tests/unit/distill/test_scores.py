"""Scores of teacher, student and both, and code log-probabilities, against numpy in any chunking."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import nn

from varkd.distill.scores import (
    ClusterMass,
    CodeProb,
    Entropy,
    Margin,
    MaxProb,
    ProposalAccepted,
    Score,
    ScoreInputs,
    Scores,
    StudentLogp,
    TeacherLogp,
    TopKAgrees,
    affordable_rows,
    chunks,
    code_logp,
    position_scores,
)
from varkd.distill.spaces import Clusters

SPACE = Clusters(count=3)
NAMES = [MaxProb(), Entropy(), Margin(), ClusterMass(SPACE.key)]


def head_and_hidden(rows: int = 11, vocab_size: int = 9) -> tuple[nn.Linear, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(5, vocab_size, dtype=torch.float64)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(generator=generator)
    return head, torch.randn(rows, 5, generator=generator, dtype=torch.float64)


def teacher_scores(
    names: list[Score],
    head: nn.Linear,
    hidden_ND: torch.Tensor,
    codebook_tables: dict[str, torch.Tensor],
    chunk_rows: int,
) -> Scores:
    sides = ScoreInputs(torch.zeros(len(hidden_ND), dtype=torch.long), lambda rows: head(hidden_ND[rows]))
    return position_scores(names, sides, codebook_tables, chunk_rows)


@pytest.mark.parametrize("chunk_rows", [1, 4, 100])
def test_scores(chunk_rows: int):
    head, hidden_ND = head_and_hidden()
    codebook_tables = SPACE.prepare(torch.randn(9, 2, generator=torch.Generator().manual_seed(1)))
    scores = teacher_scores(NAMES, head, hidden_ND, codebook_tables, chunk_rows)
    logits = head(hidden_ND).detach().numpy()
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    ordered = np.sort(p, axis=1)
    cluster_V = codebook_tables[SPACE.key].numpy()
    expected = {
        MaxProb(): p.max(1),
        Entropy(): (p * np.log(p)).sum(1) / np.log(9),
        Margin(): ordered[:, -1] - ordered[:, -2],
        ClusterMass(SPACE.key): np.stack([p[:, cluster_V == k].sum(1) for k in range(3)]).max(0),
    }
    for name in NAMES:
        assert scores[name].dtype == torch.float32 and not scores[name].requires_grad
        np.testing.assert_allclose(scores[name].numpy(), expected[name], rtol=1e-5, atol=1e-6)


def test_the_surest_teacher_scores_highest():
    head = nn.Linear(9, 9, bias=False)
    head.weight = nn.Parameter(torch.eye(9))
    flat, sure = torch.zeros(1, 9), torch.full((1, 9), -100.0).index_fill(1, torch.tensor([0]), 100.0)
    codebook_tables = SPACE.prepare(torch.randn(9, 2, generator=torch.Generator().manual_seed(1)))
    scores = teacher_scores(NAMES, head, torch.cat([flat, sure]), codebook_tables, 10)
    lowest = {MaxProb(): 1 / 9, Entropy(): -1.0, Margin(): 0.0, ClusterMass(SPACE.key): 1 / 3}
    highest = {MaxProb(): 1.0, Entropy(): 0.0, Margin(): 1.0, ClusterMass(SPACE.key): 1.0}
    for name in NAMES:
        torch.testing.assert_close(scores[name], torch.tensor([lowest[name], highest[name]]), rtol=1e-5, atol=1e-6)


def test_no_rows():
    head, hidden_ND = head_and_hidden()
    assert teacher_scores([Entropy()], head, hidden_ND[:0], {}, 4)[Entropy()].shape == (0,)


@pytest.mark.parametrize(("vocab_size", "rows"), [(256, 2048), (4096, 2048), (16384, 512), (2**20, 64)])
def test_chunks_fit_into_their_memory(vocab_size: int, rows: int):
    assert affordable_rows(vocab_size) == rows


@pytest.mark.parametrize("chunk_rows", [1, 5, 100])
def test_code_logp(chunk_rows: int):
    head, hidden_ND = head_and_hidden(12)
    codes_BL = torch.arange(12).view(3, 4) % 9
    logp_BL = code_logp(head, hidden_ND.view(3, 4, 5), codes_BL, chunk_rows)
    expected = head(hidden_ND).log_softmax(1)[torch.arange(12), codes_BL.flatten()].view(3, 4)
    torch.testing.assert_close(logp_BL, expected.float())


def test_chunks_cover_every_row_once():
    for num_rows in (0, 1, 7, 8):
        found = [row for rows in chunks(num_rows, 3) for row in range(rows.start, rows.stop)]
        assert found == list(range(num_rows))


# ---- scores of a code, of the student, and of both


def both_logits(rows: int = 11, vocab_size: int = 9) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Student logits, teacher logits and codes of some rows."""
    generator = torch.Generator().manual_seed(4)
    s, z = 2 * torch.randn(2, rows, vocab_size, generator=generator, dtype=torch.float64)
    return s, z, torch.randint(vocab_size, (rows,), generator=generator)


def sides(
    s: torch.Tensor, z: torch.Tensor, code_N: torch.Tensor, uniform_N2: torch.Tensor | None = None
) -> ScoreInputs:
    return ScoreInputs(code_N, lambda rows: z[rows], lambda rows: s[rows], uniform_N2)


def accepted(both: ScoreInputs, chunk_rows: int = 50) -> torch.Tensor:
    return position_scores([ProposalAccepted()], both, {}, chunk_rows)[ProposalAccepted()]


@pytest.mark.parametrize("chunk_rows", [1, 4, 100])
def test_scores_of_codes_and_of_both_models(chunk_rows: int):
    s, z, code_N = both_logits()
    names = [TeacherLogp(), StudentLogp(), CodeProb(), TopKAgrees(1), TopKAgrees(3), TopKAgrees(9)]
    scores = position_scores(names, sides(s.requires_grad_(), z, code_N), {}, chunk_rows)
    q, p = (np.exp(x.detach().numpy()) / np.exp(x.detach().numpy()).sum(1, keepdims=True) for x in (s, z))
    expected = {TeacherLogp(): [], StudentLogp(): [], CodeProb(): [], **{name: [] for name in names[3:]}}
    for row, code in enumerate(code_N.tolist()):
        expected[TeacherLogp()].append(np.log(p[row, code]))
        expected[StudentLogp()].append(np.log(q[row, code]))
        expected[CodeProb()].append(p[row, code])
        for name in names[3:]:
            first = np.argsort(-p[row])[: name.top_k]
            expected[name].append(float(q[row].argmax() in first))
    for name in names:
        assert scores[name].dtype == torch.float32 and not scores[name].requires_grad
        np.testing.assert_allclose(scores[name].numpy(), expected[name], rtol=1e-5, atol=1e-6, err_msg=str(name))
    agree = [scores[name].mean() for name in names[3:]]
    assert agree[0] < agree[1] < agree[2] == 1


def test_equal_codes_of_the_teacher_share_their_rank():
    """A code that ties with the k-th likeliest one is among the k likeliest, whichever of them a sort puts first."""
    z, s = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]] * 5), 10 * torch.eye(5)
    scores = position_scores([TopKAgrees(2), TopKAgrees(4)], sides(s, z, torch.zeros(5, dtype=torch.long)), {}, 5)
    assert scores[TopKAgrees(2)].tolist() == [1, 1, 1, 1, 0]
    assert scores[TopKAgrees(4)].tolist() == [1, 1, 1, 1, 0]


@pytest.mark.parametrize("chunk_rows", [1, 7, 10_000])
def test_proposals_are_accepted_as_speculative_decoding_accepts(chunk_rows: int):
    """By plain loops: the code at which the student's CDF passes the first number, kept below min(1, p / q)."""
    s, z, code_N = both_logits(rows=40)
    uniform_N2 = torch.rand(40, 2, generator=torch.Generator().manual_seed(5))
    scores = position_scores([ProposalAccepted()], sides(s, z, code_N, uniform_N2), {}, chunk_rows)
    q, p, expected = s.softmax(1).numpy(), z.softmax(1).numpy(), []
    for row, (propose, verify) in enumerate(uniform_N2.tolist()):
        code = int((q[row].cumsum() <= propose).sum())
        expected.append(float(verify < min(1.0, p[row, code] / q[row, code])))
    assert scores[ProposalAccepted()].tolist() == expected and 0 < sum(expected) < 40


def test_the_acceptance_rate_is_one_minus_the_total_variation():
    s, z, _ = both_logits(rows=4)
    trials = 40_000
    uniform_N2 = torch.rand(4 * trials, 2, generator=torch.Generator().manual_seed(6))
    many = [logits.repeat_interleave(trials, 0) for logits in (s, z)]
    code_N = torch.zeros(4 * trials, dtype=torch.long)
    accepted_N = position_scores([ProposalAccepted()], sides(many[0], many[1], code_N, uniform_N2), {}, 50_000)[
        ProposalAccepted()
    ]
    rate = torch.minimum(s.softmax(1), z.softmax(1)).sum(1)
    assert rate.min() < 0.5 < rate.max()  # the rows differ
    error = (rate * (1 - rate) / trials).sqrt()
    assert ((accepted_N.view(4, trials).double().mean(1) - rate).abs() < 4 * error).all()


def test_a_code_that_the_teacher_excludes_is_never_accepted_and_equal_models_accept_everything():
    s, z, code_N = both_logits(rows=200)
    uniform_N2 = torch.rand(200, 2, generator=torch.Generator().manual_seed(7))
    assert (
        position_scores([ProposalAccepted()], sides(s, s, code_N, uniform_N2), {}, 50)[ProposalAccepted()] == 1
    ).all()
    excluded = torch.where(s == s.max(1, keepdim=True).values, -torch.inf, z)
    sure = torch.where(s == s.max(1, keepdim=True).values, 50.0, s)
    assert (
        position_scores([ProposalAccepted()], sides(sure, excluded, code_N, uniform_N2), {}, 50)[ProposalAccepted()]
        == 0
    ).all()


def test_each_model_runs_only_where_a_score_looks_at_it():
    s, z, code_N = both_logits()
    ran: list[str] = []
    watched = ScoreInputs(
        code_N,
        lambda rows: (ran.append("teacher"), z[rows])[1],
        lambda rows: (ran.append("student"), s[rows])[1],
        torch.rand(len(code_N), 2),
    )
    alone = {
        StudentLogp(): {"student"},
        TeacherLogp(): {"teacher"},
        CodeProb(): {"teacher"},
        Entropy(): {"teacher"},
        TopKAgrees(2): {"student", "teacher"},
        ProposalAccepted(): {"student", "teacher"},
    }
    for name, expected in alone.items():
        ran.clear()
        position_scores([name], watched, {}, 4)
        assert set(ran) == expected, name
        assert (name.reads_student, name.reads_teacher) == ("student" in expected, "teacher" in expected)
    ran.clear()
    assert position_scores([], watched, {}, 4) == {} and ran == []


@pytest.mark.parametrize("name", [TeacherLogp(), StudentLogp(), ProposalAccepted(), TopKAgrees(2)])
def test_a_missing_model_is_named(name: Score):
    with pytest.raises(ValueError, match=rf"{re.escape(str(name))} needs a model"):
        position_scores([name], ScoreInputs(torch.zeros(3, dtype=torch.long)), {}, 4)
