"""A made-up study in the format of results.json; the numbers are known to the tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from varkd.pictures import grid, save_png

NAMES = [
    ("ce", "baseline"), ("kd", "baseline"), ("varkd", "varkd"), ("best_of_n_random_select", "control"),
    ("varkd_no_anchor", "ablation"), ("gkd", "method"), ("imitkd_full", "method"), ("distillspec", "baseline"),
    ("varkd_uniform_weight", "ablation"), ("varkd_shuffled_space", "control"), ("seqkd", "baseline"),
    ("taid", "method"), ("minillm", "method"), ("distillm2", "method"), ("fdistill_tvd", "method"),
    ("akl", "method"), ("todi", "method"),
    ("skd", "method"), ("selectkd_topk", "method"), ("scheduled_sampling_parallel", "method"),
]  # fmt: skip
SEEDS = [0, 1, 2]


def spread(values: list[float]) -> dict[str, float]:
    mean, half = float(np.mean(values)), float(2 * np.std(values, ddof=1) / len(values) ** 0.5)
    return {"value": mean, "low": mean - half, "high": mean + half}


def model(run: str, fd: float, parameters: int) -> dict[str, Any]:
    return {
        "run": run, "parameters": parameters, "fd": fd, "fd_low": fd - 0.2, "fd_high": fd + 0.2, "precision": 0.931,
        "recall": 0.884, "accuracy": 0.972, "sampler": {"temperature": 1.0, "guidance": 1.0},
        "samples": f"{run}/samples.png", "seconds": 512.5,
    }  # fmt: skip


def family_rows(family: str, number: int, methods: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """`ce` is the worst and the others step down; seeds move all methods together."""
    rng = np.random.default_rng(number)
    seed_effect = rng.normal(0, 0.5, len(SEEDS))
    level = 9 + number - rng.permutation(len(methods)) * 3.5 / max(len(methods) - 1, 1)
    rows = []
    for index, (method, _) in enumerate(methods):
        for seed in SEEDS:
            fd = float(level[index] + seed_effect[seed] + rng.normal(0, 0.15))
            for budget, late in (("updates", 0.0), ("time", 0.9)):
                rows.append({
                    "family": family, "method": method, "seed": seed, "budget": budget,
                    "updates": 2000 if budget == "updates" else 1400,
                    "seconds": (150.0 + 23 * (index % 7)) * (0.7 if late else 1),
                    "fd": fd + late, "fd_low": fd + late - 0.3, "fd_high": fd + late + 0.3,
                    "precision": float(rng.normal(0.9 + index / 1000, 0.004)),
                    "recall": float(rng.normal(0.85 - index / 1000, 0.01)), "accuracy": float(rng.normal(0.95, 0.004)),
                    "ce": 2.1 + index / 50, "student_kl": float(rng.normal(0.3 + index / 100, 0.01)), "acceptance": 0.8,
                    "gap_closed": (12.0 - fd) / 9, "sampler": {"temperature": 0.9, "guidance": 1.5},
                    "setting": ["train.optim.lr=3e-3", "method.terms.kd.weight=0.5"][: 1 + index % 2],
                    "run": f"{family}/{method}/seed-{seed}", "samples": f"{family}/{method}/seed-{seed}/samples.png",
                })  # fmt: skip
    return rows


def summarize(rows: list[dict[str, Any]], methods: list[tuple[str, str]], budget: str) -> list[dict[str, Any]]:
    of = {method: [row for row in rows if (row["method"], row["budget"]) == (method, budget)] for method, _ in methods}
    column = lambda method, key: [row[key] for row in of[method]]
    mean = lambda method: float(np.mean(column(method, "fd")))
    best = min((method for method, role in methods if role == "baseline"), key=mean)
    entries = []
    for method, role in methods:
        paired = np.subtract(column(method, "fd"), column(best, "fd"))
        entries.append({
            "family": rows[0]["family"], "budget": budget, "method": method, "role": role, "num_seeds": len(SEEDS),
            "updates": float(np.mean(column(method, "updates"))), "seconds": float(np.mean(column(method, "seconds"))),
            **{key: spread(column(method, key))
               for key in ("fd", "precision", "recall", "accuracy", "student_kl", "gap_closed")},
            "difference": None if method == best else {"to": best, **spread(paired.tolist())},
            "wins": int((paired < 0).sum()), "losses": int((paired > 0).sum()), "warnings": [],
        })  # fmt: skip
    return entries


def results(num_methods: int = 5, families: tuple[str, ...] = ("llamagen",)) -> dict[str, Any]:
    """The contents of a results.json; methods beyond the named ones are numbered."""
    methods = [*NAMES, *((f"method_{index}", "method") for index in range(len(NAMES), num_methods))][:num_methods]
    study: dict[str, Any] = {
        "format": "varkd-study", "version": 1, "name": "Twenty methods, one start", "finished": True, "updates": 2000,
        "seeds": SEEDS, "validation_seed": 100, "num_samples": 2000, "gap_baseline": "ce", "families": [], "rows": [],
        "summary": [], "controls": [], "sweeps": [], "samplers": [],
        "machine": {"cores": 2, "workers": 1, "seconds": 54321.0, "versions": {"varkd": "0.1.0", "torch": "2.13.0"}},
    }  # fmt: skip
    for number, family in enumerate(families):
        study["families"].append({
            "family": family, "data": "digits of 8 x 8 pixels", "teacher": model(f"{family}/teacher", 2.5, 1_650_000),
            "start": model(f"{family}/start", 12.25 + number, 213_400),
            "floors": {"num": 180, "fd_validation": 1.234, "fd_reconstruction": 0.567}, "time_budget": 173.0,
            "verdict": "The teacher is 6.5 below hard labels, ten times the interval: methods can be told apart.",
            "distinguishable": True,
        })  # fmt: skip
        rows = family_rows(family, number, methods)
        study["rows"] += rows
        for budget in ("updates", "time"):
            entries = summarize(rows, methods, budget)
            study["summary"] += entries
            fd = {row["method"]: [] for row in rows}
            for row in rows:
                if row["budget"] == budget:
                    fd[row["method"]].append(row["fd"])
            for control in [method for method, role in methods if role == "control"]:
                paired = np.subtract(fd["varkd"], fd[control])
                study["controls"].append({
                    "family": family, "budget": budget, "method": "varkd", "control": control,
                    **spread(paired.tolist()), "wins": int((paired < 0).sum()), "losses": int((paired > 0).sum()),
                })  # fmt: skip
        for method, _ in methods:
            rates = ("1e-3", "3e-3", "1e-2")
            study["sweeps"].append({
                "family": family, "method": method, "chosen": 1,
                "settings": [{"setting": [f"train.optim.lr={rate}"], "fd": 7.5 + abs(index - 1)}
                             for index, rate in enumerate(rates)],
            })  # fmt: skip
            study["samplers"].append({
                "family": family, "method": method, "chosen": 0,
                "choices": [{"temperature": 0.9, "guidance": g, "fd": 6.25 + g} for g in (1.5, 2.0)],
            })  # fmt: skip
    return study


def write_folder(folder: Path, study: dict[str, Any]) -> Path:
    """The study folder with the logs and samples that its first seed names."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(study))
    rng = np.random.default_rng(0)
    picture = grid(rng.integers(0, 256, (40, 8, 8, 1), dtype=np.uint8), 10)
    models = [entry[who] for entry in study["families"] for who in ("teacher", "start")]
    for run in [*models, *(row for row in study["rows"] if row["seed"] == SEEDS[0] and row["budget"] == "updates")]:
        save_png(folder / run["samples"], picture)
        end = run.get("ce", 2.0)
        log = [{"split": "validation", "step": 200 * k, "ce": end + 2 * float(np.exp(-k / 2))} for k in range(1, 11)]
        (folder / run["run"] / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    return folder
