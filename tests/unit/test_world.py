"""Randomness as a pure function, and the collectives of a single process."""

from __future__ import annotations

import pytest
import torch

from varkd.world import Rng, World


def test_draws_are_a_function_of_seed_step_stream_and_row():
    rows = torch.arange(6)
    whole = Rng(0, 1).uniform("a", rows, 8)
    assert torch.equal(whole, Rng(0, 1).uniform("a", rows, 8))
    assert torch.equal(whole[[4, 2]], Rng(0, 1).uniform("a", torch.tensor([4, 2]), 8))
    others = [Rng(1, 1).uniform("a", rows, 8), Rng(0, 2).uniform("a", rows, 8), Rng(0, 1).uniform("b", rows, 8)]
    assert all(not torch.equal(whole, other) for other in others)
    assert len({tuple(row) for row in whole.tolist()}) == 6


def test_longer_draws_begin_like_shorter_ones():
    assert torch.equal(Rng(0).uniform("a", torch.arange(2), 20)[:, :5], Rng(0).uniform("a", torch.arange(2), 5))


def test_no_rows():
    assert Rng(0).uniform("a", torch.arange(0), 5).shape == (0, 5)


def test_the_global_generator_is_neither_read_nor_moved():
    before = torch.random.get_rng_state()
    first = Rng(3).uniform("a", torch.arange(3), 4)
    assert torch.equal(torch.random.get_rng_state(), before)
    with torch.random.fork_rng():
        torch.manual_seed(123)
        assert torch.equal(Rng(3).uniform("a", torch.arange(3), 4), first)


def test_draws_are_uniform_and_rows_and_steps_uncorrelated():
    values = Rng(0).uniform("a", torch.arange(2000), 10)
    assert values.min() >= 0 and values.max() < 1
    observed = torch.histc(values, 20, 0, 1)
    assert float(((observed - 1000) ** 2 / 1000).sum()) < 43.8  # 99.9 % quantile with 19 degrees of freedom
    assert abs(float(torch.corrcoef(torch.stack([values[:-1, 0], values[1:, 0]]))[0, 1])) < 0.08
    next_step = Rng(0, 1).uniform("a", torch.arange(2000), 10)
    assert abs(float(torch.corrcoef(torch.stack([values.flatten(), next_step.flatten()]))[0, 1])) < 0.03


def test_one_process_is_the_identity(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    world, rows = World.from_environment(), torch.arange(6).view(3, 2)
    assert world == World(0, 1) and world.is_main
    assert world.sum(rows) is rows and world.gather(rows) is rows and world.gather_varied(rows) is rows
    world.barrier()
    world.close()
    assert not World(1, 2).is_main


def test_gathering_rows_of_different_numbers():
    """`gather_varied` over a fake `gather` that hands out what two ranks would hold."""
    ranks = [torch.tensor([[1, 2], [3, 4], [5, 6]]), torch.tensor([[7, 8]])]
    seen: list[torch.Tensor] = []

    class Fake(World):
        def gather(self, rows: torch.Tensor) -> torch.Tensor:
            seen.append(rows)
            if len(seen) == 1:
                return torch.tensor([3, 1])
            return torch.cat([ranks[0], torch.cat([ranks[1], torch.zeros(2, 2, dtype=torch.long)])])

    assert Fake(1, 2).gather_varied(ranks[1]).tolist() == [[1, 2], [3, 4], [5, 6], [7, 8]]
    assert seen[0].tolist() == [1] and seen[1].tolist() == [[7, 8], [0, 0], [0, 0]]  # padded to the longest
