"""Every verb that writes, as a command on tiny inputs, and what its result is apart from what a clock says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny_runs import FROM_THE_START, SETTINGS
from varkd.cli import main

CLOCKS = ("seconds", "sequences_per_second", "samples_per_second", "budget")
_LEFT = re.compile(r".*\.tmp(\.old)?|.*\.partial|\.lock|partial\.json")
_ROLLOUT = "method.contexts={kind: rollout}"
_MIXED = (
    "method.contexts={kind: mixture, shares: [{contexts: {kind: data}, fraction: 0.5}, "
    "{contexts: {kind: rollout}, fraction: 0.5}]}"
)
_STUDY = """name: chaos
pairs:
  llamagen:
    teacher_set: [train.updates=4, model.num_layers=1, model.dim=16, model.num_heads=1, model.ffn_dim=16]
    student_set: [model.num_layers=1, model.dim=16, model.num_heads=1, model.ffn_dim=16, train.batch_size=8]
    start_updates: 2
methods: {kd: }
seeds: [0]
updates: 4
sweep: [[], ["train.optim.lr*=0.5"]]
sweep_updates: 2
temperatures: [1.0]
search_samples: 40
time_points: 2
device: cpu
evaluation: {num_samples: 40, resamples: 5}
"""


def commands(inputs: Path) -> dict[str, list[str]]:
    """A command for each verb; all write to `out` in the working directory."""
    codes, teacher, run = (str(inputs / name) for name in ("codes", "teacher", "run"))
    (inputs / "study.yaml").write_text(_STUDY)

    def train(*overrides: str) -> list[str]:
        return ["train", "digits-student", "out=out", f"data={codes}", f"teacher={teacher}", *SETTINGS, *overrides]

    cpu = ["--device", "cpu"]
    return {
        "encode": ["encode", "digits", "--tokenizer", "pixels", "--shard-size", "600", "--out", "out", *cpu],
        "train: data": train("method=kd"),
        "train: rollout": train("method=gkd", _ROLLOUT),
        "train: mixture": train("method=gkd", _MIXED),
        "train: replay": train(*FROM_THE_START),
        "train: adaptive": train("method=distillm", "method.contexts.shares.1.fraction.tolerance=-10"),
        "teach": ["teach", teacher, "--data", codes, "--top-k", "4", "--shard-size", "600", "--out", "out", *cpu],
        "sample": ["sample", run, "--out", "out", "--num", "40", "--batch-size", "20", *cpu],
        "sample: png": ["sample", run, "--out", "out", "--num", "4", "--batch-size", "2", "--format", "png", *cpu],
        "quantize": ["quantize", run, "--weights", "int8", "--out", "out"],
        "shrink": ["shrink", teacher, "--data", codes, "--ffn", "8", "--num", "16", "--out", "out", *cpu],
        "publish": ["publish", run, "--to", "out", "--rows", "1", *cpu],
        "export": ["export", run, "--out", "out"],
        "study": ["study", str(inputs / "study.yaml"), "out=out", "workers=0"],
    }


def result(folder: Path) -> dict[str, Any]:
    """Name -> content of every file below a folder, apart from times and where the folder lies."""
    return {path.relative_to(folder).as_posix(): _content(path, folder) for path in folder.rglob("*") if path.is_file()}


def _content(path: Path, folder: Path) -> Any:
    content = path.read_bytes()
    if path.suffix in (".json", ".jsonl"):
        text = content.decode().replace(str(folder), "HERE")
        lines = text.splitlines() if path.suffix == ".jsonl" else [text]
        return [_without_clocks(json.loads(line)) for line in lines]
    if path.suffix in (".html", ".yaml"):
        return "" if path.suffix == ".html" else content.replace(str(folder).encode(), b"HERE")
    return content


def _without_clocks(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_clocks(each) for name, each in value.items() if name not in CLOCKS}
    return [_without_clocks(each) for each in value] if isinstance(value, list) else value


def left_behind(folder: Path) -> list[str]:
    """Temporary names, unfinished work and locks."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if _LEFT.fullmatch(path.name))


def quick_main() -> Callable[[Any], int]:
    """`main` with a judge that looks for a moment; torch on one thread, as a fork needs it."""
    from functools import partial

    import torch

    from varkd.evaluate.features import FitFeatures
    from varkd.run import evaluation

    torch.set_num_threads(1)

    def call(command: Any) -> int:
        evaluation.FitFeatures = partial(FitFeatures, updates=5)  # type: ignore[misc,assignment]
        evaluation._AGREEMENT_SEQUENCES = 8
        return main(command)

    return call
