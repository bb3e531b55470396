"""Batches of codes as a pure function of the step: resuming needs a number, not a state.

Image e * N + i of the endless stream is the i-th of epoch e's permutation; step s takes B of them from
s * B on, across the border of epochs. Every rank computes the same global batch and keeps its own slice.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import numpy as np
import torch
from numpy.typing import NDArray

from varkd.data.codes import CodeDataset
from varkd.errors import VarkdError
from varkd.types import Batch
from varkd.world import Rng, World


class DataLoader:
    """Training batches of `codes`: each image once an epoch, each time in a view drawn at random.

    Iterate over it for the batches of `updates` steps, or ask for any step with `batch`.

    Args:
        batch_size: sequences per step, over all processes.
        updates: steps that an iteration runs through, from `start` on; None never ends.
        device: where batches go; None leaves them on the CPU.
        images: ascending int64 indices that restrict it to some images of the split.
        start: the first step of an iteration, to resume at.

    Raises:
        VarkdError: the global `batch_size` is no multiple of the number of processes, or there are no images.
    """

    def __init__(
        self,
        codes: CodeDataset,
        batch_size: int,
        seed: int = 0,
        world: World | None = None,
        images: NDArray[np.int64] | None = None,
        *,
        updates: int | None = None,
        device: torch.device | str | None = None,
        start: int = 0,
    ) -> None:
        self.codes, self.batch_size, self.seed, self.world = codes, batch_size, seed, world or World()
        self.images = np.arange(len(codes)) if images is None else images
        self.updates, self.device, self.start = updates, device, start
        if batch_size < 1 or batch_size % self.world.size:
            raise VarkdError(f"batch_size={batch_size} must be a positive multiple of the {self.world.size} processes")
        if len(self.images) == 0:
            raise VarkdError(f"the {codes.split} split of {codes.folder} is empty: encode some images")
        self._permutations: dict[int, NDArray[np.int64]] = {}

    def __iter__(self) -> Iterator[Batch]:
        for step in count(self.start) if self.updates is None else range(self.start, self.updates):
            batch = self.batch(step)
            yield batch if self.device is None else batch.to(self.device)

    def __len__(self) -> int:
        if self.updates is None:
            raise TypeError("this DataLoader never ends: give it updates=")
        return max(0, self.updates - self.start)

    def batch(self, step: int) -> Batch:
        """This rank's rows of the global batch of `step` (counted from 0)."""
        num, first = len(self.images), step * self.batch_size
        local = self.batch_size // self.world.size
        row_B = np.arange(local) + self.world.rank * local
        epoch_B, place_B = np.divmod(first + row_B, num)
        epochs = range(first // num, (first + self.batch_size - 1) // num + 1)
        self._permutations = {epoch: self._permutation(epoch) for epoch in epochs}
        index_B = np.empty(local, dtype=np.int64)
        for epoch in np.unique(epoch_B):
            rows = epoch_B == epoch
            index_B[rows] = self._permutations[int(epoch)][place_B[rows]]
        return _rows(self.codes, index_B, self._views(step)[row_B], row_B)

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        if epoch in self._permutations:
            return self._permutations[epoch]
        order = torch.randperm(len(self.images), generator=Rng(self.seed, epoch).generator("epoch")).numpy()
        return self.images[order]

    def _views(self, step: int) -> NDArray[np.int64]:
        """The view of every row of the global batch; one generator for all is far cheaper than one a row."""
        generator = Rng(self.seed, step).generator("view")
        return torch.randint(self.codes.num_views, (self.batch_size,), generator=generator).numpy()


def ordered_batches(codes: CodeDataset, batch_size: int, most: int | None = None) -> Iterator[Batch]:
    """The split once, in order, in the identity view; the last batch may be smaller. `row_B`: the image.

    Of a split with more than `most` images a random share of so many, the same one for all runs.
    """
    index_N = Rng(0).subset(f"share/{codes.split}", len(codes), len(codes) if most is None else most).numpy()
    for start in range(0, len(index_N), batch_size):
        index_B = index_N[start : start + batch_size]
        yield _rows(codes, index_B, np.zeros_like(index_B), index_B)


def _rows(codes: CodeDataset, index_B: NDArray[np.int64], view_B: NDArray[np.int64], row_B: NDArray[np.int64]) -> Batch:
    # Caches hold training sequences: a held-out one must not be taken for one of those.
    sequence_B = torch.from_numpy(index_B * codes.num_views + view_B) if codes.split == "train" else None
    label_B = torch.from_numpy(codes.labels[index_B])
    return Batch(codes.codes(index_B, view_B), label_B, torch.from_numpy(row_B), sequence_B=sequence_B)
