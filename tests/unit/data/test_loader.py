"""The loader: coverage of epochs, resume, ranks, views."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from varkd.data.codes import CodeDataset
from varkd.data.loader import DataLoader, ordered_batches
from varkd.errors import VarkdError
from varkd.types import Batch
from varkd.world import World

CodesFolder = Callable[..., Path]


def same(one: Batch, other: Batch) -> bool:
    return one.codes_BL.equal(other.codes_BL) and one.label_B.equal(other.label_B) and one.row_B.equal(other.row_B)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(num=st.integers(1, 40), batch_size=st.integers(1, 50), seed=st.integers(0, 3))
def test_every_epoch_is_a_permutation(codes_folder: CodesFolder, num: int, batch_size: int, seed: int) -> None:
    folder = codes_folder(num=num, views=2, shard_size=7, name=f"codes-{num}")
    loader = DataLoader(CodeDataset(folder), batch_size, seed)
    steps = -(-3 * num // batch_size)
    images = torch.cat([loader.batch(step).codes_BL[:, 0] for step in range(steps)]).tolist()
    epochs = [images[start : start + num] for start in range(0, 3 * num, num)]
    assert all(sorted(epoch) == list(range(num)) for epoch in epochs)
    if num >= 15:
        assert epochs[0] != epochs[1] != epochs[2]


def test_batches_are_consistent_and_typed(codes_folder: CodesFolder) -> None:
    batch = DataLoader(CodeDataset(codes_folder()), 8, seed=0).batch(2)
    assert batch.codes_BL.shape == (8, 6) and batch.row_B.tolist() == list(range(8))
    assert batch.codes_BL.dtype == batch.label_B.dtype == batch.row_B.dtype == torch.int64
    assert batch.label_B.equal(batch.codes_BL[:, 0] % 3)


def test_batches_say_which_training_sequences_they_hold(codes_folder: CodesFolder) -> None:
    """image * views + view, also of chosen images; held-out sequences are in no cache."""
    codes = CodeDataset(codes_folder())
    every = [DataLoader(codes, 8, seed=0).batch(2), DataLoader(codes, 8, images=np.array([3, 9, 20])).batch(1)]
    for batch in [*every, *ordered_batches(codes, 10), every[0].to("cpu").select(torch.tensor([5, 1]))]:
        assert batch.sequence_B is not None and batch.sequence_B.dtype == torch.int64
        assert batch.sequence_B.equal(batch.codes_BL[:, 0] * 3 + batch.codes_BL[:, 1])
    held_out = CodeDataset(codes.folder, "validation")
    assert DataLoader(held_out, 2).batch(0).sequence_B is None
    assert all(batch.sequence_B is None for batch in ordered_batches(held_out, 3))


def test_resume_in_mid_epoch_and_any_order(codes_folder: CodesFolder) -> None:
    codes = CodeDataset(codes_folder())
    straight = DataLoader(codes, 8, seed=1)
    batches = [straight.batch(step) for step in range(9)]
    for step in (5, 0, 8, 2):
        assert same(DataLoader(codes, 8, seed=1).batch(step), batches[step])
        assert same(straight.batch(step), batches[step])
    assert not same(DataLoader(codes, 8, seed=2).batch(0), batches[0])


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_together_are_one(codes_folder: CodesFolder, size: int) -> None:
    codes = CodeDataset(codes_folder())
    for step in range(6):  # 12 of 23 images: crosses the border of epochs
        whole = DataLoader(codes, 12, seed=0).batch(step)
        parts = [DataLoader(codes, 12, 0, World(rank, size)).batch(step) for rank in range(size)]
        for field in ("codes_BL", "label_B", "row_B"):
            assert torch.cat([getattr(part, field) for part in parts]).equal(getattr(whole, field))


def test_views_are_drawn_evenly(codes_folder: CodesFolder) -> None:
    loader = DataLoader(CodeDataset(codes_folder()), 23, seed=0)
    views = Counter(torch.cat([loader.batch(step).codes_BL[:, 1] for step in range(40)]).tolist())
    assert set(views) == {0, 1, 2}
    assert all(abs(count - 920 / 3) < 70 for count in views.values())  # 5 sigma


def test_permutation_is_cached(codes_folder: CodesFolder) -> None:
    loader = DataLoader(CodeDataset(codes_folder()), 5, seed=0)
    loader.batch(0)
    first = loader._permutations[0]
    loader.batch(1)
    assert loader._permutations[0] is first
    loader.batch(4)
    assert set(loader._permutations) == {0, 1} and loader._permutations[0] is first
    loader.batch(5)
    assert set(loader._permutations) == {1}


def test_ordered_batches(codes_folder: CodesFolder) -> None:
    batches = list(ordered_batches(CodeDataset(codes_folder()), 10))
    assert [len(batch) for batch in batches] == [10, 10, 3]
    codes_BL, row_B = torch.cat([b.codes_BL for b in batches]), torch.cat([b.row_B for b in batches])
    assert codes_BL[:, 0].tolist() == row_B.tolist() == list(range(23))
    assert (codes_BL[:, 1] == 0).all()
    assert torch.cat([b.label_B for b in batches]).tolist() == [n % 3 for n in range(23)]


def test_batch_sizes_that_do_not_divide(codes_folder: CodesFolder) -> None:
    codes = CodeDataset(codes_folder())
    for batch_size in (0, 9):
        with pytest.raises(VarkdError, match="positive multiple of the 2 processes"):
            DataLoader(codes, batch_size, 0, World(0, 2))


# ---- a part of the images


def chosen(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


def test_only_the_chosen_images_are_shown_each_once_an_epoch(codes_folder: CodesFolder) -> None:
    images = chosen(1, 4, 5, 9, 16, 20, 22)
    loader = DataLoader(CodeDataset(codes_folder()), 3, seed=0, images=images)
    batches = [loader.batch(step) for step in range(14)]  # 42 rows: six epochs, borders within batches
    shown = torch.cat([batch.codes_BL[:, 0] for batch in batches]).tolist()
    epochs = [shown[start : start + 7] for start in range(0, 42, 7)]
    assert all(sorted(epoch) == images.tolist() for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 3
    for batch in batches:  # labels and views are those of the image, not of its place among the chosen
        assert batch.label_B.equal(batch.codes_BL[:, 0] % 3) and batch.row_B.tolist() == [0, 1, 2]
    assert set(torch.cat([batch.codes_BL[:, 1] for batch in batches]).tolist()) == {0, 1, 2}


def test_all_images_by_name_are_all_images(codes_folder: CodesFolder) -> None:
    codes = CodeDataset(codes_folder())
    named, plain = DataLoader(codes, 8, seed=3, images=np.arange(23)), DataLoader(codes, 8, seed=3)
    assert all(same(named.batch(step), plain.batch(step)) for step in range(6))


def test_chosen_images_on_several_ranks_and_after_a_resume(codes_folder: CodesFolder) -> None:
    codes, images = CodeDataset(codes_folder()), chosen(0, 2, 3, 7, 11, 13, 21)
    straight = DataLoader(codes, 4, seed=0, images=images)
    batches = [straight.batch(step) for step in range(8)]
    for step in (6, 0, 3):
        assert same(DataLoader(codes, 4, seed=0, images=images).batch(step), batches[step])
        parts = [DataLoader(codes, 4, 0, World(rank, 2), images).batch(step) for rank in range(2)]
        for field in ("codes_BL", "label_B", "row_B"):
            assert torch.cat([getattr(part, field) for part in parts]).equal(getattr(batches[step], field))


def test_one_image_fills_every_batch_and_none_is_refused(codes_folder: CodesFolder) -> None:
    codes = CodeDataset(codes_folder())
    assert DataLoader(codes, 4, 0, images=chosen(17)).batch(5).codes_BL[:, 0].tolist() == [17] * 4
    with pytest.raises(VarkdError, match="empty"):
        DataLoader(codes, 4, 0, images=chosen())
