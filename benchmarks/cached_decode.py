"""Cached decoding (`start`/`step`) against recomputing the prefix at every step: samples per second, in one run.

python benchmarks/cached_decode.py [--grid 8] [--layers 6] [--dim 192] [--batch 16]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from varkd.backbones.protocol import Backbone
from varkd.backbones.store import build
from varkd.rollout import Sampler, draw, rollout
from varkd.types import Condition
from varkd.world import Rng


@torch.no_grad()
def recompute(model: Backbone, condition: Condition, uniform_BL: torch.Tensor) -> torch.Tensor:
    """The same sampling, with a whole forward pass for every code."""
    plan = model.plan(len(condition))
    codes_BL = torch.zeros(plan.order_BL.shape, dtype=torch.long)
    for rank in range(codes_BL.shape[1]):
        hidden = model(codes_BL, condition, plan)[:, rank : rank + 1]
        codes_BL[:, rank : rank + 1] = draw(model.head(hidden), Sampler(), uniform_BL[:, rank : rank + 1])[0]
    return codes_BL


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("grid", 8), ("layers", 6), ("dim", 192), ("batch", 16), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    sizes = {"vocab_size": 512, "num_classes": 10, "grid": (options.grid, options.grid), "num_layers": options.layers,
             "dim": options.dim, "num_heads": options.dim // 32}  # fmt: skip
    model = build("llamagen", sizes).eval()
    torch.nn.init.normal_(model.head.weight, std=0.2, generator=torch.Generator().manual_seed(1))
    row_B = torch.arange(options.batch)
    condition, plan = Condition(row_B % 10), model.plan(options.batch)
    uniform_BL = Rng(0).uniform("benchmark", row_B, plan.order_BL.shape[1])
    sides = {
        "recompute": lambda: recompute(model, condition, uniform_BL),
        "cached": lambda: rollout(model, condition, plan, Sampler(), uniform_BL).codes_BL,
    }
    codes, seconds = {}, {side: [] for side in sides}
    for _ in range(options.repeats):
        for side, run in sides.items():
            begun = time.perf_counter()
            codes[side] = run()
            seconds[side].append(time.perf_counter() - begun)
    median = {side: statistics.median(times) for side, times in seconds.items()}
    same = (codes["cached"] == codes["recompute"]).float().mean()
    print(f"{options.batch} x {plan.order_BL.shape[1]} codes, {options.layers} layers, width {options.dim}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}; equal codes {same:.2%}")  # fmt: skip
    for side in sides:
        print(f"{side:10} {median[side]:.2f} s  {options.batch / median[side]:.1f} samples/s")
    print(f"cached / recompute: {median['recompute'] / median['cached']:.1f}x faster")


if __name__ == "__main__":
    main()
