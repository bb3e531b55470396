"""Tiny runs through the command line: digits as pixel codes, one layer, batches of eight. Some folders' fixtures."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from varkd.cli import main

SIZES = ("model.num_layers=1", "model.dim=16", "model.num_heads=1", "model.ffn_dim=16")
SETTINGS = (
    *SIZES, "train.updates=6", "train.batch_size=8", "train.grid_every=0", "train.log_every=1",
    "train.validate_every=3", "train.checkpoint_every=3", "train.trackers=[]", "train.optim.warmup=2",
    "train.optim.lr=0.01", "evaluation.num_samples=40", "evaluation.resamples=20", "device=cpu",
)  # fmt: skip
# Student samples that are refreshed every other update, and a gate: rings, ages and thresholds all matter at once.
FROM_THE_START = (
    "method=best_of_n", "method.terms.anchor.divergence=forward_kl", "method.terms.student.divergence=forward_kl",
    "method.contexts={kind: mixture, shares: [{contexts: {kind: data}, fraction: 0.5}, "
    "{contexts: {kind: replay, every: 2, capacity: 2}, fraction: 0.5}]}",
    "method.terms.student.space={kind: clusters, within: 0.3}",
    "method.terms.student.selection={kind: confidence, quantile: 0.5, score: cluster_mass}",
)  # fmt: skip
# Other parts beside them: the best of two samples against the student at its start, cuts, skews by sequence.
BEST_OF_TWO = "{kind: replay, every: 2, capacity: 2, rollout: {kind: best_of, count: 2}}"
OTHER_PARTS = (
    "method=best_of_n",
    "method.contexts={kind: mixture, shares: "
    "[{contexts: {kind: data}, fraction: 0.5}, {contexts: " + BEST_OF_TWO + ", fraction: 0.5}]}",
    "method.terms.student.selection={kind: accepted, rule: top_k, top_k: 1, floor: 0.2}",
    "method.terms.student.space={kind: top_k, count: 4}",
    "method.terms.anchor.selection={kind: accepted, rule: neighbors, neighbors: 3}",
    "method.terms.anchor.divergence={kind: skew_reverse_kl, alpha: {kind: sequence_skew}}", "train.log_every=2",
)  # fmt: skip
TIMING = ("seconds", "sequences_per_second")


def arguments(out: Path, codes: Path, *overrides: object, recipe: str = "digits-student") -> list[str]:
    """The command line of a tiny `varkd train`; later overrides win."""
    return ["train", recipe, f"out={out}", f"data={codes}", *SETTINGS, *map(str, overrides)]


def train(out: Path, codes: Path, *overrides: object, recipe: str = "digits-student") -> Path:
    """Train in this process and expect success."""
    assert main(arguments(out, codes, *overrides, recipe=recipe)) == 0
    return out


def process(command: list[str], **options: Any) -> subprocess.Popen[str]:
    """`varkd` as a process of its own, whose standard error can be read."""
    return subprocess.Popen([sys.executable, "-m", "varkd.cli", *command], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, **options)  # fmt: skip


def checkpoint(run: Path, step: int) -> dict[str, Tensor]:
    """Every tensor of a checkpoint as `{file}/{name}`."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    names = ("student", "ema", "optimizer", "method")
    return {
        f"{name}/{key}": value for name in names for key, value in load_file(folder / f"{name}.safetensors").items()
    }


def progress(run: Path, step: int) -> dict[str, Any]:
    """The counters of a checkpoint, apart from its seconds."""
    state = json.loads((run / "checkpoints" / f"step-{step:08d}" / "state.json").read_text())
    return {name: value for name, value in state.items() if name != "seconds"}


def log(run: Path) -> list[dict[str, Any]]:
    """The lines of `log.jsonl`, apart from what a clock says."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMING} for line in lines]


def assert_same_state(run: Path, other: Path, step: int) -> None:
    """Two checkpoints are equal bit by bit."""
    first, second = checkpoint(run, step), checkpoint(other, step)
    assert sorted(first) == sorted(second)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert progress(run, step) == progress(other, step)


def both_weights(run: Path, other: Path, step: int, part: str) -> tuple[Tensor, Tensor]:
    """All numbers of one part of two checkpoints, end to end.

    RAR's key bias shifts all logits of a query alike: its gradient is zero but for rounding, which Adam blows up.
    """
    first, second = checkpoint(run, step), checkpoint(other, step)
    names = [name for name in first if name.startswith(f"{part}/") and not name.endswith("k_norm.bias")]
    assert names and first.keys() == second.keys()
    return torch.cat([first[name].flatten() for name in names]), torch.cat([second[name].flatten() for name in names])


def largest_difference(run: Path, other: Path, step: int, part: str = "student") -> float:
    """max |a - b|."""
    first, second = both_weights(run, other, step, part)
    return float((first - second).abs().max())


def relative_difference(run: Path, other: Path, step: int, part: str = "student") -> float:
    """||a - b|| / ||a||: not moved by the few smallest gradients, whose rounding Adam enlarges."""
    first, second = both_weights(run, other, step, part)
    return float((first - second).norm() / first.norm())


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGTERM) -> None:
    """Send this process a signal right after update `step`, as an operator or a batch system would."""
    from varkd.train.loop import Session

    report = Session.report

    def report_and_stop(self: Session, *arguments: Any) -> None:
        report(self, *arguments)
        if self.progress.step == step:
            signal.raise_signal(number)

    monkeypatch.setattr(Session, "report", report_and_stop)


def quicken(patch: pytest.MonkeyPatch) -> None:
    """A judge that looks for a moment: a feature network of 25 updates, agreement on a few sequences."""
    from varkd.evaluate.features import FitFeatures
    from varkd.run import evaluation

    patch.setattr(evaluation, "FitFeatures", partial(FitFeatures, updates=25))
    patch.setattr(evaluation, "_AGREEMENT_SEQUENCES", 16)


@pytest.fixture(scope="session")
def codes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits as pixel codes."""
    out = _shared(tmp_path_factory) / "codes"
    if not out.exists():
        from varkd.run.data import encode

        encode("digits", "pixels", out, quiet=True)
    return out


@pytest.fixture(scope="session")
def scale_codes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits as codes of an untrained multi-scale tokenizer: 21 an image, in maps of side 1, 2 and 4."""
    folder = _shared(tmp_path_factory) / "scales"
    if not (folder / "codes").exists():
        from varkd.run.data import encode
        from varkd.tokenizers.multiscale import MultiScale, MultiScaleConfig
        from varkd.tokenizers.store import save_tokenizer

        torch.manual_seed(0)
        save_tokenizer(MultiScale(MultiScaleConfig.small(8, 1, vocab_size=32, downsampling=2)), folder / "tokenizer")
        encode("digits", str(folder / "tokenizer"), folder / "codes", quiet=True)
    return folder / "codes"


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory, codes: Path) -> Path:
    """A run folder whose model has learnt a little, so that a teacher's word differs from a student's."""
    out = _shared(tmp_path_factory) / "teacher"
    longer = ("train.updates=30", "train.batch_size=32", "train.checkpoint_every=30", "train.optim.lr=0.03")
    return out if out.exists() else train(out, codes, *longer, "train.optim.ema=0.5", "seed=1")


def _shared(factory: pytest.TempPathFactory) -> Path:
    """One folder a session, whichever test folder imports these fixtures."""
    folder = factory.getbasetemp() / "tiny-runs"
    folder.mkdir(exist_ok=True)
    return folder
