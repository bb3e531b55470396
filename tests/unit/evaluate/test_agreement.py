"""Agreement in the units of training: a model with itself, against plain formulas, and over positions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from varkd.backbones.llamagen import LlamaGen
from varkd.evaluate.agreement import agreement, cross_entropy, student_batches
from varkd.evaluate.speed import samples_per_second
from varkd.rollout import Sampler
from varkd.types import Batch, Condition

CPU = torch.device("cpu")
Models = Callable[..., LlamaGen]


@pytest.fixture
def batches(make_batch: Callable[..., Batch]) -> list[Batch]:
    return [make_batch(5, seed=1), make_batch(3, seed=2)]


def clusters(model: LlamaGen) -> torch.Tensor:
    return torch.arange(model.vocab_size) // 4


def logp(model: LlamaGen, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        hidden = model(batch.codes_BL, Condition(batch.label_B), model.plan(len(batch)))
        return model.head(hidden).log_softmax(-1)


def test_a_model_agrees_with_itself(make_model: Models, batches: list[Batch]) -> None:
    model = make_model(3)
    means, curves = agreement(model, model, batches, clusters(model), CPU)
    assert abs(means["forward_kl"]) < 1e-12 and abs(means["reverse_kl"]) < 1e-12
    assert means["acceptance"] == pytest.approx(1) and means["top1"] == means["top1_cluster"] == 1
    assert means["ce"] == means["ce_teacher"]
    assert all(len(values) == model.sequence_length for values in curves.values())


def test_means_and_curves_equal_the_formulas(make_model: Models, batches: list[Batch]) -> None:
    student, teacher = make_model(3), make_model(4)
    means, curves = agreement(student, teacher, batches, clusters(student), CPU)
    q = torch.cat([logp(student, batch) for batch in batches])
    p = torch.cat([logp(teacher, batch) for batch in batches])
    codes = torch.cat([batch.codes_BL for batch in batches])
    expected = {
        "forward_kl": (p.exp() * (p - q)).sum(-1),
        "reverse_kl": (q.exp() * (q - p)).sum(-1),
        "acceptance": torch.minimum(p.exp(), q.exp()).sum(-1),
        "ce": -q.gather(-1, codes.unsqueeze(-1)).squeeze(-1),
        "top1": (p.argmax(-1) == q.argmax(-1)).double(),
        "top1_cluster": (p.argmax(-1) // 4 == q.argmax(-1) // 4).double(),
        "teacher_entropy": -(p.exp() * p).sum(-1),
    }
    for name, value_BL in expected.items():
        assert means[name] == pytest.approx(float(value_BL.mean()), abs=1e-9), name
        assert curves[name] == pytest.approx(value_BL.mean(0).tolist(), abs=1e-9), name
    assert means["top1_cluster"] >= means["top1"]


def test_cross_entropy_weighs_codes_not_batches(make_model: Models, batches: list[Batch]) -> None:
    model = make_model(3)
    q = torch.cat([logp(model, batch) for batch in batches])
    codes = torch.cat([batch.codes_BL for batch in batches])
    expected = -q.gather(-1, codes.unsqueeze(-1)).mean()
    assert cross_entropy(model, batches, CPU) == pytest.approx(float(expected), abs=1e-9)


def test_student_contexts_do_not_depend_on_the_batch_size(make_model: Models) -> None:
    model, label_B = make_model(3), torch.arange(7) % 3
    whole = torch.cat([batch.codes_BL for batch in student_batches(model, label_B, 1, 7)])
    split = torch.cat([batch.codes_BL for batch in student_batches(model, label_B, 1, 3)])
    other = torch.cat([batch.codes_BL for batch in student_batches(model, label_B, 2, 7)])
    assert torch.equal(whole, split)
    assert not torch.equal(whole, other)


def test_a_smaller_model_samples_faster(make_model: Models) -> None:
    small, large = make_model(1, num_layers=1), make_model(1, num_layers=12, dim=64, num_heads=4, ffn_dim=256)
    assert samples_per_second(small, Sampler(), 8) > 1.5 * samples_per_second(large, Sampler(), 8)
