"""Every preset on digits, from one warm-started student, at equal updates: `python benchmarks/digits_presets.py OUT`.

A teacher and a start are trained once; then every preset trains the same student with the same data, updates and
learning rate, in a pool of single-threaded processes, and is evaluated by the same sampler. Run it again to resume or
to add presets. It prints one Markdown table, best Fréchet distance first, and writes OUT/presets.json. One seed: read
the intervals, and see docs/log.md for how far another seed moves them.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

START_UPDATES = 150


def main() -> None:
    arguments = _arguments()
    out, begun = arguments.out, time.monotonic()
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the processes of the pool when they import torch
    from varkd.files import read_json, write_json
    from varkd.methods import METHODS
    from varkd.run.data import encode

    codes = out / "codes"
    encode("digits", "pixels", codes, quiet=True)
    shared = (f"data={codes}", f"seed={arguments.seed}", "train.tensorboard=false", "train.grid_every=0")
    names = arguments.presets or list(METHODS)
    with ProcessPoolExecutor(arguments.processes, multiprocessing.get_context("spawn")) as pool:
        start = (f"out={out / 'start'}", "name=start", f"train.updates={START_UPDATES}", *shared)
        first = [pool.submit(_run, "digits-teacher", (f"out={out / 'teacher'}", *shared)),
                 pool.submit(_run, "digits-student", start)]  # fmt: skip
        rows = [future.result() for future in first]
        print(f"teacher and start: {time.monotonic() - begun:.0f} s", flush=True)
        students = [
            pool.submit(_run, "digits-student", _student(out, name, arguments.updates, shared)) for name in names
        ]
        for done, future in enumerate(as_completed(students), 1):
            rows.append(_told(future, done, len(students), begun))
    rows.sort(key=lambda row: row["fd"][1])
    write_json(out / "presets.json", {"seconds": time.monotonic() - begun, "updates": arguments.updates, "rows": rows})
    print(_table(rows))
    num = read_json(out / "teacher" / "metrics.json")["num_samples"]
    print(f"{time.monotonic() - begun:.0f} s in all; {num} samples each")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--presets", nargs="+", default=None, help="default: all")
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    return parser.parse_args()


def _student(out: Path, name: str, updates: int, shared: tuple[str, ...]) -> tuple[str, ...]:
    places = (f"out={out / name}", f"teacher={out / 'teacher'}", f"init={out / 'start'}", f"name={name}")
    return (*places, f"method={name}", f"train.updates={updates}", *shared)


def _run(recipe: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    """Train (or resume) and evaluate one run in this process; its row of the table."""
    import torch

    from varkd.config import load_run
    from varkd.files import read_json
    from varkd.run.evaluation import evaluate_run
    from varkd.run.training import train_run

    torch.set_num_threads(1)
    run = load_run(recipe, overrides)
    train_run(run, quiet=True)
    metrics_path = Path(run.out) / "metrics.json"
    metrics = read_json(metrics_path) if metrics_path.is_file() else evaluate_run(Path(run.out), quiet=True)
    found, status = metrics["metrics"], read_json(Path(run.out) / "status.json")
    of = lambda name: [found[name]["low"], found[name]["value"], found[name]["high"]]
    return {"name": metrics["name"], "fd": of("fd"), "precision": of("precision"), "recall": of("recall"),
            "accuracy": of("accuracy"), "ce": metrics["validation_ce"], "seconds": status["seconds"]}  # fmt: skip


def _told(future: Future[dict[str, Any]], done: int, total: int, begun: float) -> dict[str, Any]:
    row, seconds = future.result(), time.monotonic() - begun
    left = seconds / done * (total - done)
    print(f"{done}/{total} {row['name']}: FD {row['fd'][1]:.2f}, {row['seconds']:.0f} s; ETA {left:.0f} s", flush=True)
    return row


def _table(rows: list[dict[str, Any]]) -> str:
    lines = ["| method | FD | precision | recall | accuracy | CE (nats) | seconds |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        low, value, high = row["fd"]
        middle = " | ".join(f"{row[name][1]:.3f}" for name in ("precision", "recall", "accuracy"))
        lines.append(f"| `{row['name']}` | {value:.2f} [{low:.2f}, {high:.2f}] | {middle} | {row['ce']:.3f} | "
                     f"{row['seconds']:.0f} |")  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    main()
