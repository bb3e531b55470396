"""How far `varkd plan` is from the truth here: seconds an update and peak memory, planned and measured, in one run.

python benchmarks/plan.py CODES TEACHER [key=value ...] --out DIR [--methods kd varkd]

Each method is planned, then trained for 20 updates in a process of its own (validation and checkpoints outside the
count), then planned again: the mean of the two plans is compared, for a shared machine changes its speed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from statistics import median

from varkd.config import load_run
from varkd.run.planning import plan_run

UPDATES = 20
_TRAIN = "import sys, resource; from varkd.cli import main; code = main(sys.argv[1:]); " \
         "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(code)"  # fmt: skip


def idle_memory() -> float:
    """MiB of a process that has imported everything."""
    command = [sys.executable, "-c", "import resource, varkd.run.training; "
               "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"]  # fmt: skip
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) / 1024


def measured(recipe: str, overrides: list[str], out: Path) -> tuple[float, float]:
    """Seconds an update (median over the log's windows of 2), and MiB at most."""
    options = [f"out={out}", f"train.updates={UPDATES}", "train.log_every=2", "train.trackers=[]",
               "train.validate_every=1000", "train.checkpoint_every=1000"]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", _TRAIN, "train", recipe, *overrides, *options, "--overwrite"],
                          capture_output=True, text=True, check=True)  # fmt: skip
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    seconds = [line["seconds"] for line in lines if line["split"] == "train"]
    windows = [(later - earlier) / 2 for earlier, later in pairwise(seconds)]
    return median(windows), int(done.stdout.split()[-1]) / 1024


def compare(options: argparse.Namespace) -> None:
    base = [f"data={options.codes}", f"teacher={options.teacher}", *options.overrides]
    idle = idle_memory()
    print(
        "| method | s/update planned | measured | ratio | MiB planned | measured | ratio |",
        "|---|" + "---|" * 6,
        sep="\n",
    )
    for method in options.methods:
        overrides = [*base, f"method={method}"]
        plans = [plan_run(load_run(options.recipe, overrides))]
        seconds, peak = measured(options.recipe, overrides, options.out / method)
        plans.append(plan_run(load_run(options.recipe, overrides)))
        planned = sum(plan["seconds_per_update"] for plan in plans) / 2
        memory = plans[0]["memory_gib"]["peak"] * 1024
        print(f"| {method} | {planned:.3f} | {seconds:.3f} | {planned / seconds:.2f}", end=" | ")
        print(f"{memory:.0f} | {peak - idle:.0f} | {memory / (peak - idle):.2f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("codes", type=Path)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipe", default="mnist-student")
    parser.add_argument("--methods", nargs="+", default=["kd", "varkd"])
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    compare(parser.parse_args())
