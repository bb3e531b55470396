"""Synthetic run folders in the documented format; the numbers are made up and known to the tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from varkd.pictures import grid, save_png


def interval(value: float, half: float) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def metrics(name: str, method: str, *, fd: float, teacher: str | None, seed: int = 0) -> dict[str, Any]:
    """The contents of a metrics.json over N = 1000 samples with a 4 x 4 grid of codes."""
    rng = np.random.default_rng(seed)
    decay = np.linspace(0.4, 0.1, 16)
    sources = ("data", "student")
    agreement = {
        "ce": 1.23, "ce_teacher": 1.11, "teacher_entropy": 1.1,
        "forward_kl": 0.2 + fd / 100, "reverse_kl": 0.3, "acceptance": 0.81, "top1": 0.7,
        "top1_cluster": 0.9, "num": 360,
    }  # fmt: skip
    by_position = {"forward_kl": (decay + rng.random(16) / 20).tolist(), "acceptance": (1 - decay).tolist()}
    return {
        "name": name, "method": method, "updates": 600, "seconds": 41.25,
        "parameters": 213_400 if teacher else 1_650_000, "samples_per_second": 812.4 if teacher else 203.1,
        "num_samples": 1000,
        "metrics": {
            "fd": interval(fd, 0.4), "precision": interval(0.913, 0.012), "recall": interval(0.871, 0.015),
            "accuracy": interval(0.974, 0.005), "class_entropy": interval(2.29, 0.01), "nearest": interval(0.13, 0.01),
            "copies": interval(0.003, 0.002),
        },
        "floors": {"fd_validation": 1.234, "fd_reconstruction": 0.567, "num": 180},
        "agreement": {source: dict(agreement) for source in sources} if teacher else None,
        "agreement_by_position": dict.fromkeys(sources, by_position) if teacher else None,
        "grid": [4, 4],
        "protocol": {
            "reference": {"name": "digits/train", "num": 1437},
            "features": {"name": "digits-features", "hash": "f00d", "accuracy": 0.985,
                         "num_train": 1437, "num_validation": 180},
            "tokenizer": "abc123", "data": "digits",
            "sampler": {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "guidance": 1.0},
            "seed": 7, "labels": "balanced",
            "versions": {"varkd": "0.1.0", "torch": "2.13.0"}, "weights": "ema",
            "checkpoint": "checkpoints/step-00000600", "teacher": teacher, "teacher_hash": "beef" if teacher else None,
        },
        "samples": "evaluation/samples.png",
    }  # fmt: skip


def log_lines(seed: int, steps: int = 600) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    entries: list[dict[str, Any]] = []
    for step in range(10, steps + 1, 10):
        loss = float(2 * np.exp(-step / 200) + 0.5 + rng.random() / 10)
        entries.append({
            "split": "train", "step": step, "loss": loss, "terms/kl": loss, "grad_norm": 1.0, "lr": 1e-3,
            "seconds": step / 20, "sequences_per_second": 1500.0 + seed,
        })  # fmt: skip
        if step % 100 == 0:
            entries.append({"split": "validation", "step": step, "ce": loss + 0.1, "forward_kl": loss / 5})
    return entries


def write_run(folder: Path, values: dict[str, Any] | None, *, seed: int = 0, pixels: int = 8) -> Path:
    """A run folder; `values` None leaves it without an evaluation."""
    (folder / "samples").mkdir(parents=True)
    (folder / "run.yaml").write_text(f"name: {folder.name}\ntrain:\n  steps: 600\n")
    (folder / "environment.json").write_text(json.dumps({"torch": "2.13.0", "device": "cpu"}))
    (folder / "status.json").write_text(json.dumps({"state": "finished", "step": 600}))
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log_lines(seed)))
    rng = np.random.default_rng(seed)
    shade = rng.integers(0, 256, (80, pixels, pixels, 1), dtype=np.uint8)
    save_png(folder / "samples" / "step-00000600.png", grid(shade[:20], 10))
    if values is not None:
        (folder / "metrics.json").write_text(json.dumps(values))
        save_png(folder / "evaluation" / "samples.png", grid(shade, 10))
    return folder


def study(root: Path) -> list[Path]:
    """A teacher, three students (FD 9.0, 5.0 and 5.5, the last two tied) and a run that is not evaluated."""
    students = [("hard-labels", "ce", 9.0), ("forward-kl", "forward_kl", 5.0), ("varkd", "varkd", 5.5)]
    runs = [write_run(root / "teacher", metrics("teacher", "ce", fd=2.5, teacher=None))]
    for seed, (name, method, fd) in enumerate(students, 1):
        values = metrics(name, method, fd=fd, teacher=str(root / "teacher"), seed=seed)
        runs.append(write_run(root / name, values, seed=seed))
    return [*runs, write_run(root / "later", None, seed=9)]


def write_official(run: Path, name: str, *, fid: float, num: int = 50_000) -> None:
    """What `varkd evaluate RUN --reference` writes."""
    drawn = {"protocol": name, "num": num, "labels": "random", "seed": 0}
    result = {
        "fid": fid, "sfid": 6.1, "is": 215.8, "precision": 0.8265, "recall": None,
        "intervals": {"fid": [fid - 0.1, fid + 0.1], "sfid": None},
        "protocol": {"reference": "VIRTUAL", "drawn": drawn}, "warnings": [],
    }  # fmt: skip
    (run / "evaluation" / f"{name}.json").write_text(json.dumps(result))
