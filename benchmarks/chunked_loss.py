"""Chunked against plain distillation loss: time and peak memory, both sides in one run.

    python benchmarks/chunked_loss.py [--rows 4096] [--codes 16384] [--dim 768] [--repeats 5]

Both sides compute forward KL between two heads and its gradient on the same hidden states, alternating. Peak memory
on the CPU is the growth of the resident set (Linux), each side in a fresh process; on CUDA the allocator's peak.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from varkd.distill.divergences import ForwardKL, TargetRows
from varkd.distill.logspace import log_softmax
from varkd.distill.loss import chunked_head_loss


def chunked(hidden_ND: Tensor, teacher_ND: Tensor, head: nn.Linear, teacher_head: nn.Linear, chunk_rows: int) -> Tensor:
    code_N = torch.zeros(len(hidden_ND), dtype=torch.long, device=hidden_ND.device)

    def evaluate(logits_NV: Tensor, rows: slice) -> Tensor:
        with torch.no_grad():
            teacher_NV = log_softmax(teacher_head(teacher_ND[rows]))
        return ForwardKL()(log_softmax(logits_NV), teacher_NV, TargetRows(code_N[rows])).sum()

    return chunked_head_loss(hidden_ND, head, evaluate, chunk_rows)


def plain(hidden_ND: Tensor, teacher_ND: Tensor, head: nn.Linear, teacher_head: nn.Linear, chunk_rows: int) -> Tensor:
    del chunk_rows
    with torch.no_grad():
        teacher_NV = log_softmax(teacher_head(teacher_ND))
    rows = TargetRows(torch.zeros(len(hidden_ND), dtype=torch.long, device=hidden_ND.device))
    return ForwardKL()(log_softmax(head(hidden_ND)), teacher_NV, rows).sum()


SIDES = {"plain": plain, "chunked": chunked}


def problem(rows: int, codes: int, dim: int, device: str) -> tuple[Tensor, Tensor, nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    hidden, teacher = (torch.randn(rows, dim, device=device) for _ in range(2))
    return (
        hidden.requires_grad_(),
        teacher,
        nn.Linear(dim, codes, bias=False).to(device),
        nn.Linear(dim, codes, bias=False).to(device),
    )


def step(side: str, inputs: tuple[Tensor, Tensor, nn.Linear, nn.Linear], chunk_rows: int) -> float:
    begun = time.perf_counter()
    SIDES[side](*inputs, chunk_rows).backward()
    if inputs[0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def peak_bytes(side: str, size: tuple[int, int, int], chunk_rows: int, device: str) -> int:
    """Memory above the inputs that one step needs, measured in a fresh process."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak, (side, size, chunk_rows, device))


def _peak(side: str, size: tuple[int, int, int], chunk_rows: int, device: str) -> int:
    inputs = problem(*size, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(side, inputs, chunk_rows)
        return torch.cuda.max_memory_allocated() - before
    small = problem(8, 64, 8, device)
    step(side, small, chunk_rows)  # libraries load on first use; that is not the loss's memory
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far, which a child inherits from its parent
    before = _status("VmHWM")
    step(side, inputs, chunk_rows)
    return _status("VmHWM") - before


def _status(name: str) -> int:
    """A line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 4096), ("codes", 16384), ("dim", 768), ("chunk-rows", 512), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = (options.rows, options.codes, options.dim)
    inputs = problem(*size, device)
    values = {side: SIDES[side](*inputs, options.chunk_rows).item() for side in SIDES}
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(options.repeats):
        for side in SIDES:
            seconds[side].append(step(side, inputs, options.chunk_rows))
    median = {side: statistics.median(times) for side, times in seconds.items()}
    peak = {side: peak_bytes(side, size, options.chunk_rows, device) for side in SIDES}
    print(f"{options.rows} rows x {options.codes} codes, width {options.dim}, chunks of {options.chunk_rows}, "
          f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}")  # fmt: skip
    for side in SIDES:
        print(f"{side:8} value {values[side]:.6g}  {median[side]:.3f} s  peak {peak[side] / 2**20:.0f} MiB")
    print(f"chunked / plain: time {median['chunked'] / median['plain']:.2f}, "
          f"memory {peak['chunked'] / peak['plain']:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
