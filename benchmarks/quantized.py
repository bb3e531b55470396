"""What quantization costs a distilled student: FD, size on disk and speed, from fp32 to int4, from one start.

python benchmarks/quantized.py CODES TEACHER START [key=value ...] --out DIR [--updates 500]

KD for `updates` from START, once as usual and once with `train.quantize=int4`; the first is then quantized to bf16,
int8 and int4, the second to int4. The same command goes on where it was stopped. A baseline row: START itself.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from varkd.backbones.store import load_backbone, weights_path
from varkd.cli import main
from varkd.config import read_run
from varkd.evaluate.speed import samples_per_second


def run(*command: object) -> None:
    if main([str(part) for part in command]):
        raise SystemExit(f"failed: varkd {' '.join(map(str, command))}")


def row(folder: Path, name: str) -> str:
    """FD with its interval, validation cross-entropy, MiB of weights, samples/s: measured now, one after the other."""
    if not (folder / "metrics.json").is_file():
        run("evaluate", folder)
    metrics = json.loads((folder / "metrics.json").read_text())
    fd = metrics["metrics"]["fd"]
    size = weights_path(folder).stat().st_size / 2**20
    speed = samples_per_second(load_backbone(folder)[0], read_run(folder).evaluation.sampler)
    return (f"| {name} | {fd['value']:.2f} [{fd['low']:.2f}, {fd['high']:.2f}] | {metrics['validation_ce']:.4f} | "
            f"{size:.3f} | {speed:.0f} |")  # fmt: skip


def compare(options: argparse.Namespace) -> None:
    common = (options.recipe, f"data={options.codes}", f"teacher={options.teacher}", f"init={options.start}",
              "method=kd", f"train.updates={options.updates}", *options.overrides)  # fmt: skip
    exact, aware = options.out / "kd", options.out / "kd-int4"
    run("train", *common, f"out={exact}", "name=kd")
    run("train", *common, f"out={aware}", "name=kd-int4", "train.quantize=int4")
    rows = [row(exact, "fp32")]
    for source, weights, name in ((exact, "bf16", "bf16"), (exact, "int8", "int8"), (exact, "int4", "int4"),
                                  (aware, "int4", "int4 after QAT-KD")):  # fmt: skip
        folder = options.out / f"{source.name}-as-{weights}"
        if not folder.exists():
            run("quantize", source, "--out", folder, "--weights", weights)
        rows.append(row(folder, name))
    print("| weights | FD | validation CE | MiB | samples/s |\n|---|---|---|---|---|", *rows, sep="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("codes", type=Path)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("start", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--updates", type=int, default=500)
    parser.add_argument("--recipe", default="mnist-student")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    compare(parser.parse_args())
