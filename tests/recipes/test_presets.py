"""Every preset trains on every family, and a run that was stopped goes on as if it never had been.

Below the command line, on models of one layer and images of 16 codes; at the end, two presets take the whole way.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tiny_runs import arguments, assert_same_state, checkpoint, largest_difference, log, stop_after, train
from varkd.backbones.protocol import Backbone
from varkd.backbones.store import FAMILIES, build
from varkd.cli import main
from varkd.data.codes import CodeDataset
from varkd.distill.method import Method
from varkd.distill.mixture import Mixture
from varkd.distill.schedule import Plateau
from varkd.errors import VarkdError
from varkd.methods import METHODS
from varkd.run import training
from varkd.train.distiller import Distiller
from varkd.train.loop import Job, Session, TrainConfig
from varkd.train.optim import OptimizerConfig
from varkd.types import Batch

VOCAB, CLASSES = 16, 3
SIZES = {"vocab_size": VOCAB, "num_classes": CLASSES, "num_layers": 1, "dim": 16, "num_heads": 2, "ffn_dim": 16}
OWN_SIZES = {"var": {"scales": (1, 2, 3), "code_dim": 4}, "arpg": {"grid": (4, 4), "num_layers": 2}}
CODEBOOK_VE = torch.randn(VOCAB, 4, generator=torch.Generator().manual_seed(0))
SPLICED = {"scheduled_sampling", "scheduled_sampling_parallel", "tiekd"}
NO_SPLICES = (
    "this method exchanges single codes of data sequences, but later codes of a var image encode what the earlier ones "
    "left over, so they would have to be quantized again: use a method with data, rollout or replay contexts"
)
PHI = "adaptive.contexts.shares.1.fraction"


def toy_model(family: str, seed: int) -> Backbone:
    """A model that prefers some codes to others."""
    built = build(family, {**SIZES, **OWN_SIZES.get(family, {"grid": (4, 4)})}, seed=seed)
    torch.nn.init.normal_(built.head.weight, std=0.3, generator=torch.Generator().manual_seed(seed))
    return built


@dataclass(frozen=True)
class ToyBatches:
    """Four random images of `length` codes a step."""

    length: int

    def batch(self, step: int) -> Batch:
        draw = torch.Generator().manual_seed(step)
        codes_BL = torch.randint(VOCAB, (4, self.length), generator=draw)
        return Batch(codes_BL, torch.randint(CLASSES, (4,), generator=draw), torch.arange(4))


def toy_job(method: Method, family: str, folder: Path, updates: int) -> Job:
    student, teacher = toy_model(family, 1), toy_model(family, 2).eval().requires_grad_(False)
    method.check(student, teacher)
    folder.mkdir(exist_ok=True)
    settings = TrainConfig(updates, batch_size=4, validate_every=1, checkpoint_every=2, trackers=(),
                     optim=OptimizerConfig(lr=0.01, warmup=0))  # fmt: skip

    def validate(evaluated: Backbone) -> dict[str, float]:
        return {"ce": float(evaluated.head.weight.detach().abs().mean())}

    distiller = Distiller(
        method, student, teacher if method.needs_teacher else None, CODEBOOK_VE, updates=updates,
        reference=toy_model(family, 3).eval().requires_grad_(False),
    )  # fmt: skip
    batches, new = ToyBatches(student.sequence_length), lambda: toy_model(family, 1)
    return Job(distiller, batches, settings, folder, new, validate, quiet=True)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("name", METHODS)
def test_a_preset_trains(tmp_path: Path, name: str, family: str):
    """Two updates, at the start and halfway: every term counts in one of them, and weights move."""
    method = METHODS[name].method
    if family == "var" and name in SPLICED:
        with pytest.raises(VarkdError) as refused:
            toy_job(method, family, tmp_path, updates=2)
        assert str(refused.value) == NO_SPLICES
        return
    session = Session(toy_job(method, family, tmp_path, updates=2))
    if name == "distillm":  # else no validation has gone wrong yet, and there are no student samples
        session.job.distiller.state = {PHI: torch.tensor([0.5, 1.0], dtype=torch.float64)}
    head = session.job.student.head.weight
    before = head.detach().clone()
    lines = [session.update(), session.update()]
    for line in lines:
        assert all(map(math.isfinite, line.values())) and line["grad_norm"] > 0
    terms = {term.name for term in method.terms}
    assert {term for term in terms for line in lines if line.get(f"terms/{term}", 0) != 0} == terms
    assert all(value.isfinite().all() for value in session.job.student.parameters())
    assert (head != before).any()


# ---- stopped and resumed


REMEMBERS = {
    "dagger": {"rows"},
    "imitation_mix": {"rows"},
    "distillm": {"rows", "adaptive"},
    "taid": {"adaptive"},
    "distillm2": {"skew"},
    "atkd": {"threshold"},
    "eopd": {"threshold"},
    **{name: {"rows"} for name in METHODS if name.startswith("best_of")},
}  # fmt: skip
"""What a preset carries from one update to the next, by the first word of the state's keys."""
FORGETFUL = sorted(set(METHODS) - set(REMEMBERS))


def lively(name: str) -> Method:
    """The preset, remembering from the first update on: DistiLLM's phi always grows."""
    method = METHODS[name].method
    if name != "distillm":
        return method
    assert isinstance(method.contexts, Mixture)
    data, student = method.contexts.shares
    return replace(method, contexts=Mixture((data, replace(student, fraction=Plateau(step=0.3, tolerance=-10.0)))))


def go_on(job: Job, until: int, forget: bool = False) -> list[dict[str, float]]:
    """Train like `train` does up to update `until`, from the newest checkpoint of the run folder if there is one."""
    session, lines = Session(job), []
    session.job.distiller.state = {} if forget else session.job.distiller.state
    session.validate_at_start()
    while session.progress.step < until:
        lines.append(session.update())
        session.look_around(stop=False)
    session.close("stopped")
    return lines


def assert_resumes(name: str, family: str, folder: Path) -> None:
    """2 + 2 updates are 4, bit by bit: losses, weights, averages, optimizer, state."""
    whole = go_on(toy_job(lively(name), family, folder / "whole", updates=4), until=4)
    first, second = (go_on(toy_job(lively(name), family, folder / "run", updates=4), until) for until in (2, 4))
    assert len(first) == len(second) == 2
    assert first + second == whole
    assert_same_state(folder / "run", folder / "whole", 4)


def remembered(run: Path, step: int) -> set[str]:
    return {key.split("/")[1].split(".")[0] for key in checkpoint(run, step) if key.startswith("method/")}


@pytest.mark.parametrize("name", FORGETFUL)
def test_a_preset_without_memory_resumes(tmp_path: Path, name: str):
    assert_resumes(name, "llamagen", tmp_path)
    assert remembered(tmp_path / "run", 2) == set()


@pytest.mark.parametrize("family", ["llamagen", "randar"])
@pytest.mark.parametrize("name", REMEMBERS)
def test_a_preset_with_memory_resumes(tmp_path: Path, name: str, family: str):
    """And it would not, had the checkpoint lost the memory."""
    assert_resumes(name, family, tmp_path)
    assert remembered(tmp_path / "run", 2) == REMEMBERS[name]
    shutil.copytree(tmp_path / "whole", tmp_path / "spoilt")
    shutil.rmtree(tmp_path / "spoilt" / "checkpoints" / "step-00000004")
    go_on(toy_job(lively(name), family, tmp_path / "spoilt", updates=4), until=4, forget=True)
    assert largest_difference(tmp_path / "whole", tmp_path / "spoilt", 4) > 1e-6


def test_phi_grows_over_the_stop(tmp_path: Path):
    whole = go_on(toy_job(lively("distillm"), "llamagen", tmp_path, updates=4), until=4)
    assert [line[PHI] for line in whole] == pytest.approx([0.0, 0.3, 0.6, 0.9])
    assert ["age/student" in line for line in whole] == [False, True, True, True]


# ---- the whole way


FOUR = ("train.updates=4", "train.validate_every=1", "train.checkpoint_every=2", "train.batch_size=4")


def stopped_and_resumed(
    run: Path, codes: Path, overrides: tuple[str, ...], patch: pytest.MonkeyPatch, between: Callable[[], None]
) -> None:
    """Four updates through the command line, with a signal after the second one."""
    command = arguments(run, codes, *FOUR, *overrides)
    with patch.context() as inner:
        stop_after(inner, 2)
        assert main(command) == 143
    between()
    assert main(command) == 0


def test_difference_sampling_from_the_command_line(
    tmp_path: Path, codes: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
):
    """Images are scored once, before training; a resumed run reads what was kept, and sees the same batches."""
    overrides = ("method=miniplm", f"teacher={teacher}")
    whole = train(tmp_path / "whole", codes, *FOUR, *overrides)
    kept = np.load(whole / "images.npy")
    train_codes = CodeDataset(codes, "train")
    for label, count in enumerate(np.bincount(train_codes.labels)):
        assert (train_codes.labels[kept] == label).sum() == round(0.5 * count)

    def score_no_more() -> None:
        monkeypatch.setattr(training, "difference_scores", lambda *_: pytest.fail("scored again"))

    stopped_and_resumed(tmp_path / "run", codes, overrides, monkeypatch, score_no_more)
    assert (tmp_path / "run" / "images.npy").read_bytes() == (whole / "images.npy").read_bytes()
    assert_same_state(tmp_path / "run", whole, 4)
    assert log(tmp_path / "run") == log(whole)
    everything = train(tmp_path / "ce", codes, *FOUR, "method=ce")
    assert not (everything / "images.npy").exists() and log(everything) != log(whole)


def test_an_adaptive_share_from_the_command_line(
    tmp_path: Path, codes: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
):
    """DistiLLM: phi is logged and checkpointed, and grows with the validations of the loop itself."""
    share = "method.contexts.shares.1.fraction"
    overrides = ("method=distillm", f"teacher={teacher}", f"{share}.tolerance=-10", f"{share}.step=0.3")
    whole = train(tmp_path / "whole", codes, *FOUR, *overrides)
    lines = [line for line in log(whole) if line["split"] == "train"]
    assert [line[PHI] for line in lines] == pytest.approx([0.0, 0.3, 0.6, 0.9])
    stopped_and_resumed(tmp_path / "run", codes, overrides, monkeypatch, lambda: None)
    assert_same_state(tmp_path / "run", whole, 4)
    assert log(tmp_path / "run") == log(whole)


def test_a_preset_that_does_not_fit_is_refused_in_one_line(
    tmp_path: Path, scale_codes: Path, capsys: pytest.CaptureFixture[str]
):
    command = arguments(tmp_path / "run", scale_codes, "model.family=var", "method=scheduled_sampling")
    assert main(command) == 2
    assert capsys.readouterr().err.splitlines() == [f"varkd: error: {NO_SPLICES}"]
    assert not (tmp_path / "run").exists()
