"""`Distiller` in a loop of one's own: every preset runs, and it is the step that the training loop makes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import varkd
from varkd.distill.audit import Stats

TABLES = torch.randn(12, 4, generator=torch.Generator().manual_seed(3))


def make(method: str | varkd.Method, make_model: Any, **settings: Any) -> varkd.Distiller:
    teacher = make_model(2, dim=24, num_heads=3).eval().requires_grad_(False)
    return varkd.Distiller(method, make_model(1), teacher, TABLES, **{"updates": 4, **settings})


def losses(distiller: varkd.Distiller, make_batch: Any, steps: range) -> list[float]:
    optimizer = torch.optim.SGD(distiller.student.parameters(), lr=0.1)
    found = []
    for step in steps:
        loss, stats = distiller(make_batch(seed=step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        distiller.update(loss, stats)
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize("name", sorted(varkd.METHODS))
def test_every_preset_trains(name: str, make_model: Any, make_batch: Any):
    distiller = make(name, make_model)
    values = losses(distiller, make_batch, range(3))
    assert all(torch.isfinite(torch.tensor(values))) and distiller.step == 3


@pytest.mark.parametrize("name", ["kd", "dagger", "distillm", "distillm2", "eopd", "taid", "varkd"])
def test_a_loaded_state_continues_as_if_never_stopped(name: str, make_model: Any, make_batch: Any):
    whole = make(name, make_model)
    expected = losses(whole, make_batch, range(4))
    first = make(name, make_model, reference=make_model(1))
    begun = losses(first, make_batch, range(2))
    second = make(name, make_model, reference=make_model(1))
    second.student.load_state_dict(first.student.state_dict())
    second.load_state_dict(first.state_dict())
    assert begun + losses(second, make_batch, range(2, 4)) == expected


@pytest.mark.parametrize("name", ["gkd", "atkd", "minillm", "varkd"])
def test_micro_batches_sum_to_the_step(name: str, make_model: Any, make_batch: Any):
    def gradient(count: int) -> tuple[Tensor, Tensor, dict[str, float]]:
        distiller, stats, total = make(name, make_model), Stats(), torch.zeros((), dtype=torch.float64)
        for loss, some in distiller.micro_batches(make_batch(), count):
            loss.backward()
            total += loss.detach()
            stats.merge(some)
        grad = distiller.student.head.weight.grad
        assert grad is not None
        return total, grad, stats.collect(distiller.world).means

    (whole, grad, means), (split, split_grad, split_means) = gradient(1), gradient(4)
    torch.testing.assert_close(whole, split)
    torch.testing.assert_close(grad, split_grad)
    assert means == pytest.approx(split_means)


def test_autocast_of_ones_own_stays_in_force(make_model: Any, make_batch: Any):
    teacher = make_model(2, dtype=torch.float32).eval()
    distiller = varkd.Distiller("kd", make_model(1, dtype=torch.float32), teacher, TABLES, updates=1)
    plain, _ = distiller(make_batch())
    with torch.autocast("cpu", torch.bfloat16):
        rounded, _ = distiller(make_batch())
    assert 0 < abs(float(plain) - float(rounded)) < 0.05 * float(plain)


def test_mistakes_are_one_line_each(make_model: Any, make_batch: Any):
    student = make_model(1)
    with pytest.raises(varkd.VarkdError, match="unknown method 'kdd': did you mean 'kd'"):
        varkd.Distiller("kdd", student, updates=1)
    with pytest.raises(varkd.VarkdError, match="needs a teacher"):
        varkd.Distiller("kd", student, tokenizer=TABLES, updates=1)
    with pytest.raises(varkd.VarkdError, match="codebook"):
        varkd.Distiller("ce", student, updates=1)
    with pytest.raises(varkd.VarkdError, match="updates >= 1"):
        varkd.Distiller("ce", student, tokenizer=TABLES, updates=0)
    distiller = varkd.Distiller("ce", student, tokenizer=TABLES, updates=1)
    loss, stats = distiller(make_batch())
    distiller.update(loss, stats)
    with pytest.raises(varkd.VarkdError, match="call the distiller on a batch first"):
        distiller.update(loss, stats)
    with pytest.raises(varkd.VarkdError, match="not the state of a Distiller"):
        distiller.load_state_dict({})


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "total_variation"])
def test_divergences_on_plain_logits(name: str):
    """Shape, sign, zero where equal, gradient to the student; the two KLs against torch."""
    divergence = getattr(varkd.divergences, name)
    student, teacher = torch.randn(2, 3, 5, requires_grad=True), torch.randn(2, 3, 5)
    value = divergence(student, teacher)
    assert value.shape == (2, 3) and bool((value > 0).all())
    assert float(divergence(teacher, teacher).abs().max()) < 1e-6
    value.sum().backward()
    assert student.grad is not None and float(student.grad.abs().max()) > 0
    log_q, log_p = student.detach().log_softmax(-1), teacher.log_softmax(-1)
    sides = {"forward_kl": (log_q, log_p), "reverse_kl": (log_p, log_q)}
    if name in sides:
        expected = torch.nn.functional.kl_div(*sides[name], reduction="none", log_target=True).sum(-1)
        torch.testing.assert_close(value.detach(), expected)
