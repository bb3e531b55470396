"""Difference sampling: which images are kept, by brute force, and what their score is."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from varkd.backbones.store import build
from varkd.distill.filtering import AllImages, DifferenceSampling, difference_scores
from varkd.errors import VarkdError
from varkd.types import Batch, Condition
from varkd.world import Rng

images = st.lists(st.tuples(st.integers(0, 4), st.integers(-50, 50)), min_size=1, max_size=60)


@settings(max_examples=100)
@given(images=images, keep=st.floats(0.01, 1))
def test_the_best_of_every_class_are_kept(images: list[tuple[int, int]], keep: float):
    label_M, score_M = torch.tensor([i[0] for i in images]), torch.tensor([float(i[1]) for i in images])
    kept_M = DifferenceSampling(keep).kept(score_M, label_M)
    assert kept_M.dtype == torch.int64 and kept_M.tolist() == sorted(set(kept_M.tolist()))
    expected = set()
    for label in {label for label, _ in images}:
        members = [number for number, image in enumerate(images) if image[0] == label]
        count = max(1, round(keep * len(members)))
        # Of equal scores the first image is kept.
        expected |= set(sorted(members, key=lambda number: (-images[number][1], number))[:count])
    assert set(kept_M.tolist()) == expected
    assert {int(label) for label in label_M[kept_M]} == {label for label, _ in images}


def test_the_label_marginal_stays():
    """Class 0 has all the best scores, and still only its half is kept."""
    label_M = torch.tensor([0] * 10 + [1] * 20 + [2])
    score_M = torch.cat([torch.full((10,), 100.0), torch.arange(20.0), torch.tensor([-100.0])])
    kept = DifferenceSampling(0.5).kept(score_M, label_M)
    assert Counter(label_M[kept].tolist()) == {0: 5, 1: 10, 2: 1}
    assert set(kept.tolist()) >= set(range(20, 30))
    assert DifferenceSampling(1.0).kept(score_M, label_M).tolist() == list(range(31))


@pytest.mark.parametrize("keep", [0.0, -0.5, 1.01])
def test_shares_that_cannot_be_kept_are_refused(keep: float):
    with pytest.raises(VarkdError, match="difference_sampling: keep must lie in"):
        DifferenceSampling(keep)
    assert DifferenceSampling().needs_teacher and not AllImages().needs_teacher


def split(batch: Batch, size: int) -> list[Batch]:
    return [batch.select(torch.arange(start, min(start + size, len(batch)))) for start in range(0, len(batch), size)]


@torch.no_grad()
def test_scores_are_mean_log_ratios(student, teacher, batch):
    found_M = difference_scores(teacher, student, [batch])
    assert found_M.dtype == torch.float32 and found_M.shape == (8,) and not found_M.requires_grad
    condition = Condition(batch.label_B)
    weight = [model.head(model(batch.codes_BL, condition, model.plan(8))).exp() for model in (teacher, student)]
    for row, codes_L in enumerate(batch.codes_BL.tolist()):
        ratio = 0.0
        for position, code in enumerate(codes_L):
            p, q = (w[row, position, code] / w[row, position].sum() for w in weight)
            ratio += float(p.log() - q.log()) / len(codes_L)
        assert float(found_M[row]) == pytest.approx(ratio, abs=1e-5)
    assert found_M.std() > 0.05
    torch.testing.assert_close(difference_scores(student, teacher, [batch]), -found_M)
    torch.testing.assert_close(difference_scores(student, student, [batch]), torch.zeros(8))


@pytest.mark.parametrize("family", ["llamagen", "randar"])
def test_scores_do_not_depend_on_batches_or_chunks(family: str, batch):
    """A family of random orders too: an image's order belongs to the image, and both models read it alike."""
    order = {"order": "random"} if family == "randar" else {}
    sizes = {
        "vocab_size": 12,
        "num_classes": 3,
        "grid": (2, 3),
        "num_layers": 2,
        "dim": 16,
        "num_heads": 2,
        "ffn_dim": 24,
        **order,
    }
    models = [build(family, sizes).double() for _ in range(2)]
    for seed, model in enumerate(models):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.4, generator=generator)
    whole_M = difference_scores(*models, [batch])
    for size in (1, 3, 5):
        for chunk_rows in (1, 7, 10**6):
            torch.testing.assert_close(difference_scores(*models, split(batch, size), chunk_rows=chunk_rows), whole_M)
    plan = models[0].plan(8, Rng(0), batch.row_B)
    with torch.no_grad():
        logp = [model.head(model(batch.codes_BL, batch.condition, plan)).log_softmax(-1) for model in models]
    expected_M = (logp[0] - logp[1]).gather(2, batch.codes_BL.unsqueeze(2)).squeeze(2).mean(1)
    torch.testing.assert_close(whole_M, expected_M.float(), rtol=1e-4, atol=1e-5)


def test_scoring_leaves_the_models_as_they_were(student, teacher, batch):
    student.train()
    difference_scores(teacher, student, split(batch, 4))
    assert student.training and not teacher.training
    assert difference_scores(teacher, student, []).shape == (0,)


def test_guidance_scales_of_a_batch_play_no_part(student, teacher, batch):
    scaled = replace(batch, guidance_B=torch.full((8,), 3.0))
    assert torch.equal(difference_scores(teacher, student, [scaled]), difference_scores(teacher, student, [batch]))
