"""Sequential and ZipAR rollouts of one LlamaGen model with random weights, alternating, as a ratio of medians.

python benchmarks/zipar.py --layers 12 --dim 768 --grid 16 --batch 8 --repeats 3
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

import varkd
from varkd.rollout import Sampler, rollout
from varkd.types import Condition
from varkd.zipar import schedule


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"layers": 12, "dim": 768, "grid": 16, "batch": 8, "window": 4, "repeats": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    model = varkd.build("llamagen", {
        "vocab_size": 16384, "num_classes": 1000, "grid": (args.grid, args.grid), "num_layers": args.layers,
        "dim": args.dim, "num_heads": max(1, args.dim // 64)}).to(args.device)  # fmt: skip
    condition = Condition(torch.zeros(args.batch, dtype=torch.long, device=args.device))
    uniform_BL = torch.rand(args.batch, args.grid**2, device=args.device)
    ways = {"sequential": Sampler(guidance=args.guidance),
            "zipar": Sampler(guidance=args.guidance, parallel="zipar", window=args.window)}  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.repeats):
        for name, sampler in ways.items():
            begun = time.perf_counter()
            rollout(model, condition, model.plan(args.batch), sampler, uniform_BL)
            if args.device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - begun)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    steps = len(schedule(args.grid, args.grid, args.window))
    print(f"{args.device}, {torch.get_num_threads()} threads, {args.layers} x {args.dim}, batch {args.batch}, guidance "
          f"{args.guidance:g}: sequential {medians['sequential']:.2f} s ({args.grid**2} steps), zipar window "
          f"{args.window} {medians['zipar']:.2f} s ({steps} steps), ratio "
          f"{medians['sequential'] / medians['zipar']:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
