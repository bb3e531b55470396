"""The best of several student samples, decoded in one pass, against one after the other: seconds, in one run.

python benchmarks/best_of.py [--count 8] [--rows 32] [--layers 2] [--dim 40] [--grid 8]
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace

import torch

from varkd.backbones.store import build
from varkd.distill.bestof import FAR, BestOf
from varkd.distill.inputs import StepInputs
from varkd.distill.prefixes import Rollout
from varkd.methods import METHODS
from varkd.types import Batch
from varkd.world import Rng


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = {"count": 8, "rows": 32, "layers": 2, "dim": 40, "grid": 8, "vocab": 17, "repeats": 5}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.manual_seed(0)
    for family in ("llamagen", "arpg"):
        layers = args.layers * (2 if family == "arpg" else 1)  # half of ARPG's layers are its decoder
        sizes = {"num_layers": layers, "dim": args.dim, "num_heads": 2, "ffn_dim": 2 * args.dim}
        sizes |= {"vocab_size": args.vocab, "num_classes": 10, "grid": (args.grid, args.grid)}
        model = build(family, sizes).eval()
        inputs = StepInputs(METHODS["ce"].method, model, model, {}, Rng(0, 1), reference=model)
        rows = torch.arange(args.rows)
        batch = Batch(torch.zeros(args.rows, args.grid**2, dtype=torch.long), rows % 10, rows)

        def apart(batch: Batch = batch, inputs: StepInputs = inputs) -> None:
            for nth in range(args.count):
                (part,) = Rollout()(replace(batch, row_B=batch.row_B + nth * FAR), inputs).parts
                inputs.logp("teacher", part)
                inputs.logp("reference", part)

        sides = {"apart": apart, "together": lambda batch=batch, inputs=inputs: BestOf(count=args.count)(batch, inputs)}
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(args.repeats):
            for side, run in sides.items():
                begun = time.perf_counter()
                run()
                seconds[side].append(time.perf_counter() - begun)
        old, new = (statistics.median(seconds[side]) for side in sides)
        print(f"{family:9} best of {args.count} for {args.rows} rows: apart {old:.3f} s  together {new:.3f} s  "
              f"{old / new:.2f}x")  # fmt: skip


if __name__ == "__main__":
    main()
