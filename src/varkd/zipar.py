"""ZipAR: raster codes of several rows of the grid in one step (arXiv 2412.04062; VarKD's eq. 13).

Row r + 1 may begin once row r holds `window` codes; from then on every step decodes one code in every open row. A grid
of H x W takes W + (H - 1) window steps instead of H W (16 x 16 with window 4: 76 instead of 256).

The first code of a row needs the last code of the row above as its input, which is not there yet. The most recent code
of that row stands in, at the position of the row's last code, until the true one arrives. No torch models here: this is
the schedule alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

NONE = -1
"""No position: padding of a schedule."""


@dataclass(frozen=True)
class Step:
    """One step: the raster positions that it decodes and, for each, the position whose code is its input.

    An input of `NONE` is the class. `refresh` is the last position of a row that the step before decoded, if the row
    below had already begun on a stand-in: its true code now replaces what the stand-in left in the cache.
    """

    positions: tuple[int, ...]
    inputs: tuple[int, ...]
    refresh: int = NONE


@lru_cache(maxsize=4096)
def schedule(height: int, width: int, window: int, kept: int = 0) -> tuple[Step, ...]:
    """The steps of a grid of which the first `kept` codes in raster order are there already."""
    held = [min(max(kept - row * width, 0), width) for row in range(height)]
    least, steps, before = min(window, width), [], ()
    while held[-1] < width:
        rows = [row for row in range(height) if held[row] < width and (row == 0 or held[row - 1] >= least)]
        positions = tuple(row * width + held[row] for row in rows)
        inputs = tuple(
            position - 1 if held[row] or row == 0 else (row - 1) * width + held[row - 1] - 1
            for row, position in zip(rows, positions, strict=True)
        )
        ended = [
            position
            for position in before
            if (position + 1) % width == 0 and position + 1 < height * width and position + 1 not in positions
        ]
        steps.append(Step(positions, inputs, ended[0] if ended else NONE))
        for row in rows:
            held[row] += 1
        before = positions
    return tuple(steps)


@lru_cache(maxsize=4096)
def _as_tensors(height: int, width: int, window: int, kept: int) -> tuple[Tensor, Tensor, Tensor]:
    """`schedule` as int64 (S, n), (S, n) and (S,), padded with `NONE`; n rows are the most that are ever open."""
    steps = schedule(height, width, window, kept)
    open_rows = min(height, -(-width // min(window, width)))
    pad = lambda places: places + (NONE,) * (open_rows - len(places))
    rows = [[pad(step.positions) for step in steps], [pad(step.inputs) for step in steps]]
    position_Sn, input_Sn = (torch.tensor(each, dtype=torch.long).view(len(steps), open_rows) for each in rows)
    return position_Sn, input_Sn, torch.tensor([step.refresh for step in steps], dtype=torch.long)


@dataclass(frozen=True)
class Waves:
    """The schedules of a batch: int64 (B, S, n) of positions and of their inputs, (B, S) of refreshed positions.

    Rows with fewer steps, and steps with fewer open rows, are padded with `NONE`; `live_BSn` tells padding apart.
    """

    position_BSn: Tensor
    input_BSn: Tensor
    refresh_BS: Tensor

    @property
    def live_BSn(self) -> Tensor:
        return self.position_BSn != NONE

    @property
    def end_S(self) -> tuple[int, ...]:
        """The first slot of the cache that lies behind all slots of a step, for every step."""
        last_S = torch.maximum(self.position_BSn.amax((0, 2)), self.refresh_BS.amax(0) + 1)
        return tuple((last_S + 1).clamp(min=1).tolist())

    @classmethod
    def of(cls, grid: tuple[int, int], window: int, kept_B: Sequence[int], multiple: int = 1) -> Waves:
        """On the CPU: each row after its own number of kept codes, so that no row's samples depend on another row.

        The number of steps is rounded up to a `multiple`, for those who want few different ones.
        """
        rows = [_as_tensors(*grid, window, kept) for kept in kept_B]
        steps = -(-max(len(refresh_S) for _, _, refresh_S in rows) // multiple) * multiple
        padded = [torch.full((len(rows), steps, *each.shape[1:]), NONE) for each in rows[0]]
        for index, row in enumerate(rows):
            for whole, part in zip(padded, row, strict=True):
                whole[index, : len(part)] = part
        return cls(*padded)
