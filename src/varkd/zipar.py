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

    @classmethod
    def of(cls, grid: tuple[int, int], window: int, kept_B: Sequence[int], device: torch.device) -> Waves:
        """Each row after its own number of kept codes, so that no row's samples depend on another row."""
        rows = [schedule(*grid, window, kept) for kept in kept_B]
        steps = max(map(len, rows))
        open_rows = max((len(step.positions) for row in rows for step in row), default=1)
        position = torch.full((len(rows), steps, open_rows), NONE)
        inputs, refresh = position.clone(), torch.full((len(rows), steps), NONE)
        for number, row in enumerate(rows):
            for index, step in enumerate(row):
                position[number, index, : len(step.positions)] = torch.tensor(step.positions)
                inputs[number, index, : len(step.inputs)] = torch.tensor(step.inputs)
                refresh[number, index] = step.refresh
        return cls(position.to(device), inputs.to(device), refresh.to(device))
