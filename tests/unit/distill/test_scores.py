"""Teacher scores and code log-probabilities against numpy, in any chunking."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from varkd.distill.scores import Scores, Sides, chunks, cluster_mass_name, code_logp, position_scores
from varkd.distill.spaces import Clusters

SPACE = Clusters(count=3)
NAMES = ["max_prob", "entropy", "margin", cluster_mass_name(SPACE)]


def head_and_hidden(rows: int = 11, vocab_size: int = 9) -> tuple[nn.Linear, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(5, vocab_size, dtype=torch.float64)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(generator=generator)
    return head, torch.randn(rows, 5, generator=generator, dtype=torch.float64)


def teacher_scores(
    names: list[str], head: nn.Linear, hidden_ND: torch.Tensor, products: dict[str, torch.Tensor], chunk_rows: int
) -> Scores:
    sides = Sides(torch.zeros(len(hidden_ND), dtype=torch.long), lambda rows: head(hidden_ND[rows]))
    return position_scores(names, sides, products, chunk_rows)


@pytest.mark.parametrize("chunk_rows", [1, 4, 100])
def test_scores(chunk_rows: int):
    head, hidden_ND = head_and_hidden()
    products = SPACE.prepare(torch.randn(9, 2, generator=torch.Generator().manual_seed(1)))
    scores = teacher_scores(NAMES, head, hidden_ND, products, chunk_rows)
    logits = head(hidden_ND).detach().numpy()
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    ordered = np.sort(p, axis=1)
    cluster_V = products[SPACE.key].numpy()
    expected = {
        "max_prob": p.max(1),
        "entropy": (p * np.log(p)).sum(1) / np.log(9),
        "margin": ordered[:, -1] - ordered[:, -2],
        cluster_mass_name(SPACE): np.stack([p[:, cluster_V == k].sum(1) for k in range(3)]).max(0),
    }
    for name in NAMES:
        assert scores[name].dtype == torch.float32 and not scores[name].requires_grad
        np.testing.assert_allclose(scores[name].numpy(), expected[name], rtol=1e-5, atol=1e-6)


def test_the_surest_teacher_scores_highest():
    head = nn.Linear(9, 9, bias=False)
    head.weight = nn.Parameter(torch.eye(9))
    flat, sure = torch.zeros(1, 9), torch.full((1, 9), -100.0).index_fill(1, torch.tensor([0]), 100.0)
    products = SPACE.prepare(torch.randn(9, 2, generator=torch.Generator().manual_seed(1)))
    scores = teacher_scores(NAMES, head, torch.cat([flat, sure]), products, 10)
    lowest = {"max_prob": 1 / 9, "entropy": -1.0, "margin": 0.0, cluster_mass_name(SPACE): 1 / 3}
    highest = {"max_prob": 1.0, "entropy": 0.0, "margin": 1.0, cluster_mass_name(SPACE): 1.0}
    for name in NAMES:
        torch.testing.assert_close(scores[name], torch.tensor([lowest[name], highest[name]]), rtol=1e-5, atol=1e-6)


def test_no_rows_and_unknown_names():
    head, hidden_ND = head_and_hidden()
    assert teacher_scores(["entropy"], head, hidden_ND[:0], {}, 4)["entropy"].shape == (0,)
    with pytest.raises(ValueError, match="unknown score"):
        teacher_scores(["nonsense"], head, hidden_ND, {}, 4)


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
