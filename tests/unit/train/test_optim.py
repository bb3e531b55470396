"""AdamW's groups, the learning-rate schedule and the moving average, against closed forms."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from varkd.errors import VarkdError
from varkd.train.optim import Ema, OptimizerConfig


def test_the_rate_warms_up_linearly_and_falls_along_a_cosine():
    optim = OptimizerConfig(lr=2.0, warmup=4, min_lr_ratio=0.1)
    rates = [optim.lr_at(step, 104) for step in range(105)]
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert rates[4] == pytest.approx(2.0)
    assert rates[54] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5)), "half-way down at half-time"
    assert rates[104] == pytest.approx(0.2)
    assert all(later <= earlier for earlier, later in pairwise(rates[4:]))


@pytest.mark.parametrize(("warmup", "updates"), [(0, 1), (10, 5), (5, 5), (0, 3)])
def test_short_runs_have_finite_positive_rates(warmup: int, updates: int):
    optim = OptimizerConfig(lr=1e-3, warmup=warmup)
    assert all(0 < optim.lr_at(step, updates) <= 1e-3 for step in range(updates))


def test_gains_and_biases_are_not_decayed():
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    model[0].bias.requires_grad_(False)
    matrices, vectors = OptimizerConfig(weight_decay=0.3).build(model).param_groups
    assert [p.shape for p in matrices["params"]] == [(2, 3)] and matrices["weight_decay"] == 0.3
    assert [p.shape for p in vectors["params"]] == [(2,), (2,)] and vectors["weight_decay"] == 0.0


def test_one_step_is_adamw():
    """The first AdamW step moves every weight by lr sign(g), after the decay."""
    model = nn.Linear(2, 1, bias=False)
    before = model.weight.detach().clone()
    optimizer = OptimizerConfig(lr=0.1, weight_decay=0.5).build(model)
    (model.weight * torch.tensor([[3.0, -7.0]])).sum().backward()
    optimizer.step()
    expected = before * (1 - 0.1 * 0.5) - 0.1 * torch.tensor([[1.0, -1.0]])
    torch.testing.assert_close(model.weight.detach(), expected, rtol=1e-6, atol=1e-6)


def test_the_average_follows_its_recursion():
    model = nn.Linear(1, 1, bias=False)
    ema = Ema(model, decay=0.6)
    average = float(model.weight.detach())
    for step in range(12):
        with torch.no_grad():
            model.weight.fill_(math.sin(step))
        ema.update(step)
        decay = min(0.6, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * math.sin(step)
        assert float(ema.average["weight"]) == pytest.approx(average, abs=1e-6)
    assert not ema.average["weight"].requires_grad


def test_the_average_takes_over_saved_values():
    model = nn.Linear(2, 2)
    ema = Ema(model, 0.9)
    saved = {name: torch.full_like(value, 7.0) for name, value in ema.average.items()}
    ema.load(saved)
    assert all(torch.equal(ema.average[name], saved[name]) for name in saved)
    assert not torch.equal(model.weight, saved["weight"]), "the live weights stay"


@pytest.mark.parametrize(
    "settings", [{"lr": 0.0}, {"lr": -1.0}, {"clip": 0.0}, {"warmup": -1}, {"weight_decay": -0.1}, {"ema": 1.5},
                 {"min_lr_ratio": -0.1}, {"lr": float("nan")}, {"clip": float("nan")}]
)  # fmt: skip
def test_settings_are_checked(settings: dict[str, float]):
    with pytest.raises(VarkdError, match="optim"):
        OptimizerConfig(**settings)  # type: ignore[arg-type]
