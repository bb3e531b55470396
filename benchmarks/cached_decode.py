"""Cached decoding (`start`/`step`) against recomputing the whole pass at every step: samples per second, in one run.

For every family; for those that decode in parallel also with a quarter of the steps.

python benchmarks/cached_decode.py [--family arpg] [--grid 8] [--layers 6] [--dim 192] [--batch 16]
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from varkd.backbones.protocol import Backbone
from varkd.backbones.store import FAMILIES, build
from varkd.errors import VarkdError
from varkd.rollout import Sampler, draw, rollout
from varkd.types import Condition, Plan
from varkd.world import Rng


@torch.no_grad()
def recompute(model: Backbone, condition: Condition, plan: Plan, uniform_BL: Tensor) -> Tensor:
    """The same sampling, with a whole forward pass for every step."""
    codes_BL, done = torch.zeros(plan.order_BL.shape, dtype=torch.long), 0
    for size in plan.sizes:
        rank = slice(done, done + size)
        cells = plan.order_BL[:, rank]
        hidden = model(codes_BL, condition, plan)
        hidden = hidden.gather(1, cells.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
        codes_BL.scatter_(1, cells, draw(model.head(hidden), Sampler(), uniform_BL[:, rank], model.nucleus)[0])
        done += size
    return codes_BL


def compare(model: Backbone, sampler: Sampler, batch: int, repeats: int) -> str:
    """One line: both sides' median seconds, their ratio, and how many codes agree."""
    row_B = torch.arange(batch)
    condition, plan = Condition(row_B % model.num_classes), sampler.plan(model, Rng(0), row_B)
    uniform_BL = Rng(0).uniform("benchmark", row_B, plan.order_BL.shape[1])
    sides = {
        "recompute": lambda: recompute(model, condition, plan, uniform_BL),
        "cached": lambda: rollout(model, condition, plan, sampler, uniform_BL).codes_BL,
    }
    codes, seconds = {}, {side: [] for side in sides}
    for _ in range(repeats):
        for side, run in sides.items():
            begun = time.perf_counter()
            codes[side] = run()
            seconds[side].append(time.perf_counter() - begun)
    old, new = (statistics.median(seconds[side]) for side in sides)
    same = (codes["cached"] == codes["recompute"]).float().mean()
    speeds = f"recompute {batch / old:7.1f}  cached {batch / new:7.1f} samples/s  {old / new:5.1f}x"
    return f"{model.family:9} {len(plan.sizes):3} steps  {speeds}  equal codes {same:.2%}"


def sizes_of(family: str, options: argparse.Namespace) -> dict[str, Any]:
    """The same width and depth for every family; VAR's scales double up to the grid."""
    shape = {"scales": tuple(2**i for i in range(options.grid.bit_length())), "code_dim": 8}
    return {
        "vocab_size": 512, "num_classes": 10, "num_layers": options.layers, "dim": options.dim,
        "num_heads": options.dim // 32, **(shape if family == "var" else {"grid": (options.grid, options.grid)}),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    for name, default in (("grid", 8), ("layers", 6), ("dim", 192), ("batch", 16), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    size = f"{options.grid}x{options.grid} codes, {options.layers} layers, width {options.dim}"
    print(f"batches of {options.batch}, {size}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for family in options.family:
        model = build(family, sizes_of(family, options)).eval()
        torch.nn.init.normal_(model.head.weight, std=0.2, generator=torch.Generator().manual_seed(1))
        print(compare(model, Sampler(), options.batch, options.repeats), flush=True)
        try:
            fewer = Sampler(steps=options.grid**2 // 4)
            model.check(fewer.plan(model, Rng(0), torch.arange(1)))
        except VarkdError:
            continue  # one code (or one scale) a step is all that this family does
        print(compare(model, fewer, options.batch, options.repeats), flush=True)


if __name__ == "__main__":
    main()
