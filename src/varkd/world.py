"""The processes of a run, and the random numbers that do not depend on how many there are.

`World` is the only doorway to collectives outside `train/parallel.py`; with one process every call is the identity.
`Rng` is counter-based: a draw is a function of (seed, stream, step, global row), so resume needs no generator state and
two ranks draw what one would.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from varkd.errors import VarkdError


@dataclass(frozen=True)
class World:
    """This process's rank among `size`."""

    rank: int = 0
    size: int = 1

    @classmethod
    def from_environment(cls) -> World:
        """What `torchrun` set, or a single process. Starts the process group on first use.

        Raises:
            VarkdError: an environment that only looks like torchrun's.
        """
        told = os.environ.get("WORLD_SIZE", "1")
        if told == "1":
            return cls()
        if not dist.is_initialized():
            lacking = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
            if lacking or not told.isdecimal() or not os.environ["RANK"].isdecimal():
                wrong = f"without {', '.join(lacking)}" if lacking else f"RANK={os.environ['RANK']}"
                raise VarkdError(
                    f"WORLD_SIZE={told} {wrong} is no group of processes: start them by torchrun, or unset WORLD_SIZE"
                )
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """The sum over ranks, on every rank."""
        if self.size == 1:
            return value
        value = value.clone()
        dist.all_reduce(value)
        return value

    def gather(self, rows: Tensor) -> Tensor:
        """Concatenate the rows of all ranks along axis 0, on every rank. Every rank must hold equally many."""
        if self.size == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.size)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    def gather_varied(self, rows: Tensor) -> Tensor:
        """`gather` for a number of rows that may differ between ranks."""
        if self.size == 1:
            return rows
        lengths = self.gather(torch.tensor([len(rows)], device=rows.device)).tolist()
        padded = rows.new_zeros((max(lengths), *rows.shape[1:]))
        padded[: len(rows)] = rows
        stacked = self.gather(padded).unflatten(0, (self.size, max(lengths)))
        return torch.cat([stacked[rank, :length] for rank, length in enumerate(lengths)])

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def close(self) -> None:
        """Leave the process group, if this process joined one."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


@dataclass(frozen=True)
class Rng:
    """Random numbers as a pure function of (seed, step, stream name, global row)."""

    seed: int
    step: int = 0

    def generator(self, stream: str, row: int = -1) -> torch.Generator:
        """A CPU generator for one stream (and row)."""
        key = f"{self.seed}/{self.step}/{stream}/{row}".encode()
        digest = hashlib.blake2b(key, digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)

    def subset(self, stream: str, num: int, most: int) -> Tensor:
        """A random `most` of `num` rows (all, where there are no more), ascending: int64.

        What looks at a part of a split takes this one, never the first rows: data sets are listed class by class.
        """
        if num <= most:
            return torch.arange(num)
        return torch.randperm(num, generator=self.generator(stream))[:most].sort().values

    def uniform(self, stream: str, row_B: Tensor, length: int) -> Tensor:
        """Numbers in [0, 1): float32 (B, length), one independent generator per global row."""
        rows = [torch.rand(length, generator=self.generator(stream, row)) for row in row_B.tolist()]
        return torch.stack(rows).to(row_B.device) if rows else torch.empty(0, length, device=row_B.device)
