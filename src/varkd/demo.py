"""`varkd demo`: the main job, end to end, on real images that ship inside scikit-learn (1,797 handwritten digits).

A teacher and a ten times smaller student are trained from scratch, and the student is aligned by KD (VarKD's first
stage). Then, from that checkpoint and for the same number of updates: cross-entropy, KD, GKD, VarKD and our best of n;
then evaluation and a report. Every step reuses what is already done. The demo shows what it shows, also where VarKD
does not win.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from varkd.config import RunConfig, load_run
from varkd.data.codes import FORMAT
from varkd.files import read_json, write_json
from varkd.folders import Own, json_with
from varkd.progress import console
from varkd.report import write_report
from varkd.report.tables import comparison_table, format_text_table
from varkd.run.data import encode
from varkd.run.evaluation import evaluate_run
from varkd.run.training import train_run

# The codes of the digits are gray levels and no codebook, so VarKD runs without groups of codes here.
METHODS = {"ce": (), "kd": (), "gkd": (), "varkd": ("method.terms.varkd.space=full",), "best_of_n": ()}
WARM_UPDATES, START_UPDATES = 1000, 300  # cross-entropy, then KD: a poor start has no samples worth supervising

DEMO = Own("a demo", ("codes/manifest.json", "codes/partial.json"), json_with(format=(FORMAT,)))


def demo(out: Path, *, seed: int = 0, overwrite: bool = False, overrides: tuple[str, ...] = ()) -> Path:
    """Run (or finish) the demo in `out`; returns the report's path.

    Args:
        overrides: `key=value` for every run (tests make it small with them).
    """
    begun = time.monotonic()
    codes = out / "codes"
    DEMO.check(out)
    encode("digits", "pixels", codes)
    runs = _runs(out, codes, seed, overrides)
    for run in runs:
        train_run(run, overwrite=overwrite)
    folders = [Path(run.out) for run in runs if run.name != "warm"]
    metrics = [_evaluated(folder) for folder in folders]
    compared = [folder for folder in folders if folder.name != "start"]  # it made other updates than they did
    report = write_report(compared, out / "report", title="varkd demo: digits")
    rows = [_row(row) for row in metrics if row["name"] != "start"]
    seconds = time.monotonic() - begun
    write_json(out / "results.json", {"seconds": seconds, "num_samples": metrics[0]["num_samples"], "rows": rows})
    print(format_text_table(comparison_table(metrics)))
    print(f"{seconds:.0f} s; numbers in {out / 'results.json'}; the report: {report}")
    return report


def _runs(out: Path, codes: Path, seed: int, overrides: tuple[str, ...]) -> list[RunConfig]:
    """Teacher, the shared start, and one run per method from that start."""
    shared = (f"data={codes}", f"seed={seed}", "train.trackers=[]", *overrides)
    teacher, warm, start = out / "teacher", out / "warm", out / "start"
    runs = [
        load_run("digits-teacher", (f"out={teacher}", *shared)),
        load_run("digits-student", (f"out={warm}", "name=warm", f"train.updates={WARM_UPDATES}", *shared)),
        load_run(
            "digits-student",
            (
                f"out={start}",
                "name=start",
                "method=kd",
                f"teacher={teacher}",
                f"init={warm}",
                f"train.updates={START_UPDATES}",
                "train.select=best",
                *shared,
            ),
        ),
    ]
    for name, changes in METHODS.items():
        places = (f"out={out / name}", f"teacher={teacher}", f"init={start}")
        runs.append(load_run("digits-student", (*places, f"method={name}", f"name={name}", *changes, *shared)))
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
    return {
        "name": metrics["name"],
        "fd": fd["value"],
        "fd_low": fd["low"],
        "fd_high": fd["high"],
        "updates": metrics["updates"],
        "seconds": metrics["seconds"],
    }
