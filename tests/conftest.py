"""Shared toys: tiny backbones with random weights (float64 by default), batches and contexts of a few rows."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from hypothesis import settings

from varkd.backbones.llamagen import LlamaGen, LlamaGenConfig
from varkd.types import Batch

# One thread, here and in the processes that tests start: other numbers of threads sum in another order.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
# The same examples on every run: a red test must mean a change. Search further with `--hypothesis-profile=default`.
settings.register_profile("varkd", derandomize=True, deadline=None)
settings.load_profile("varkd")

VOCAB, CLASSES, GRID = 12, 3, (2, 3)


def make_model(
    seed: int,
    vocab_size: int = VOCAB,
    grid: tuple[int, int] = GRID,
    dtype: torch.dtype = torch.float64,
    scale: float = 0.4,
    **sizes: int,
) -> LlamaGen:
    """A LlamaGen whose weights, the head included, are all drawn from normal(0, scale): nothing is uniform or zero."""
    config = LlamaGenConfig(
        vocab_size, CLASSES, grid, **{"num_layers": 2, "dim": 16, "num_heads": 2, "ffn_dim": 24, **sizes}
    )
    generator = torch.Generator().manual_seed(seed)
    model = LlamaGen(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=scale, generator=generator)
    return model


def make_batch(num_rows: int = 8, seed: int = 0, vocab_size: int = VOCAB, length: int = GRID[0] * GRID[1]) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    codes_BL = torch.randint(vocab_size, (num_rows, length), generator=generator)
    return Batch(codes_BL, torch.randint(CLASSES, (num_rows,), generator=generator), torch.arange(num_rows))


@pytest.fixture(name="make_model")
def make_model_fixture() -> Callable[..., LlamaGen]:
    return make_model


@pytest.fixture(name="make_batch")
def make_batch_fixture() -> Callable[..., Batch]:
    return make_batch


@pytest.fixture
def student() -> LlamaGen:
    return make_model(1)


@pytest.fixture
def teacher() -> LlamaGen:
    """Frozen, as a run does it."""
    return make_model(2, dim=24, num_heads=3).eval().requires_grad_(False)


@pytest.fixture
def batch() -> Batch:
    return make_batch()
