"""`varkd demo`: the main job, end to end, on real images that ship inside scikit-learn (1,797 handwritten digits).

A teacher and a ten times smaller student are trained from scratch. Then, from the same student checkpoint and for the
same number of updates: continued cross-entropy, word-KD, GKD and VarKD; then evaluation and a report. Every step reuses
what is already done. The demo shows what it shows, also where VarKD does not win.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from varkd.config import RunConfig, load_run
from varkd.files import read_json, write_json
from varkd.progress import console
from varkd.report import write_report
from varkd.report.tables import comparison_table, format_text_table
from varkd.run.data import encode
from varkd.run.evaluation import evaluate_run
from varkd.run.training import train_run

METHODS = ("ce", "kd", "gkd", "varkd")
START_UPDATES = 1000  # from a poorer start student samples are not worth supervising (docs/varkd.md)


def demo(out: Path, *, seed: int = 0, overwrite: bool = False, overrides: tuple[str, ...] = ()) -> Path:
    """Run (or finish) the demo in `out`; returns the report's path.

    Args:
        overrides: `key=value` for every run (tests make it small with them).
    """
    begun = time.monotonic()
    codes = out / "codes"
    encode("digits", "pixels", codes)
    runs = _runs(out, codes, seed, overrides)
    for run in runs:
        train_run(run, overwrite=overwrite)
    metrics = [_evaluated(Path(run.out)) for run in runs]
    report = write_report([Path(run.out) for run in runs], out / "report", title="varkd demo: digits")
    rows = [_row(row) for row in metrics if row["name"] != "start"]
    seconds = time.monotonic() - begun
    write_json(out / "results.json", {"seconds": seconds, "num_samples": metrics[0]["num_samples"], "rows": rows})
    print(format_text_table(comparison_table(metrics)))
    print(f"{seconds:.0f} s; numbers in {out / 'results.json'}; the report: {report}")
    return report


def _runs(out: Path, codes: Path, seed: int, overrides: tuple[str, ...]) -> list[RunConfig]:
    """Teacher, the shared start, and one run per method from that start."""
    shared = (f"data={codes}", f"seed={seed}", "train.tensorboard=false", *overrides)
    teacher, start = out / "teacher", out / "start"
    runs = [
        load_run("digits-teacher", (f"out={teacher}", *shared)),
        load_run("digits-student", (f"out={start}", "name=start", f"train.updates={START_UPDATES}", *shared)),
    ]
    for name in METHODS:
        places = (f"out={out / name}", f"teacher={teacher}", f"init={start}")
        runs.append(load_run("digits-student", (*places, f"method={name}", f"name={name}", *shared)))
    return runs


def _evaluated(folder: Path) -> dict[str, Any]:
    """The metrics of a run, measured again only when its weights are newer."""
    metrics = folder / "metrics.json"
    if metrics.is_file() and metrics.stat().st_mtime >= (folder / "checkpoints" / "selected.json").stat().st_mtime:
        return read_json(metrics)
    console.print(f"evaluating {folder.name}")
    return evaluate_run(folder)


def _row(metrics: dict[str, Any]) -> dict[str, Any]:
    fd = metrics["metrics"]["fd"]
    return {"name": metrics["name"], "fd": fd["value"], "fd_low": fd["low"], "fd_high": fd["high"],
            "updates": metrics["updates"], "seconds": metrics["seconds"]}  # fmt: skip
