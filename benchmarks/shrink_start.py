"""Does a student cut out of its teacher learn faster than a random one? Same sizes, updates and data, some seeds.

python benchmarks/shrink_start.py CODES TEACHER --out DIR [--method kd] [--updates 500] [--recipe mnist-student]

Prints the validation cross-entropy of both along the way, and FD with its interval at the end. The same command goes on
where it was stopped.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from varkd.backbones.store import load_backbone
from varkd.cli import main


def run(*command: object) -> None:
    if main([str(part) for part in command]):
        raise SystemExit(f"failed: varkd {' '.join(map(str, command))}")


def losses(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["ce"] for line in lines if line["split"] == "validation"}


def compare(options: argparse.Namespace) -> None:
    shrunk = options.out / "shrunk"
    if not shrunk.exists():
        run("shrink", options.teacher, "--data", options.codes, "--out", shrunk, "--layers", options.layers,
            "--dim", options.dim, "--ffn", options.ffn)  # fmt: skip
    config = load_backbone(shrunk)[0].config
    sizes = [f"model.{name}={getattr(config, name)}" for name in ("num_layers", "dim", "num_heads", "ffn_dim")]
    starts = {"random": sizes, "shrunk": [f"init={shrunk}"]}
    for name, start in starts.items():
        for seed in range(options.seeds):
            out = options.out / f"{name}-{seed}"
            run("train", options.recipe, f"out={out}", f"data={options.codes}", f"teacher={options.teacher}",
                f"method={options.method}", f"train.updates={options.updates}", f"seed={seed}",
                f"train.validate_every={options.updates // 10}", *start)  # fmt: skip
            run("evaluate", out)
    steps = sorted(losses(options.out / "random-0"))
    print(f"| start | {' | '.join(f'CE at {step}' for step in steps)} | FD |\n|{'---|' * (len(steps) + 2)}")
    for name in starts:
        for seed in range(options.seeds):
            out = options.out / f"{name}-{seed}"
            fd = json.loads((out / "metrics.json").read_text())["metrics"]["fd"]
            values = " | ".join(f"{value:.3f}" for _, value in sorted(losses(out).items()))
            print(f"| {name}, seed {seed} | {values} | {fd['value']:.2f} [{fd['low']:.2f}, {fd['high']:.2f}] |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("codes", type=Path)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--method", default="kd")
    parser.add_argument("--updates", type=int, default=500)
    parser.add_argument("--recipe", default="mnist-student")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--dim", type=int, default=96)
    parser.add_argument("--ffn", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=3)
    compare(parser.parse_args())
