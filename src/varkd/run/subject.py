"""Whom `varkd analyze` looks at: the models, checked against the codes, and the sequences of its three contexts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from varkd.backbones.protocol import Backbone
from varkd.backbones.store import load_backbone
from varkd.config import RunConfig
from varkd.data.images import Split
from varkd.distill.spaces import Clusters
from varkd.errors import VarkdError
from varkd.evaluate.diagnostics import CodeSpace, Sequences, sampled
from varkd.progress import console
from varkd.rollout import Sampler
from varkd.run.data import Codes, pick_device
from varkd.run.models import load_trained, open_model, recorded_model
from varkd.types import Condition
from varkd.world import Rng


@dataclass(frozen=True)
class Subject:
    """What is looked at: the models, the codes that they speak of, and how sequences are sampled."""

    folder: Path
    run: RunConfig | None
    codes: Codes
    student: Backbone
    teacher: Backbone
    second: Backbone | None
    teacher_path: Path
    second_path: Path | None
    sampler: Sampler
    seed: int
    device: torch.device
    quiet: bool

    @property
    def resamples(self) -> int:
        """Of the image metrics: as in an evaluation of the run."""
        return self.run.evaluation.resamples if self.run else 200

    @cached_property
    def clusters(self) -> Clusters:
        """The method's own clusters, else the default ones."""
        return self.run.method.clusters if self.run else Clusters()

    @cached_property
    def space(self) -> CodeSpace:
        return CodeSpace.of(self.codes.tokenizer.codebook_VE, self.clusters, self.device)


def open_subject(
    folder: Path, teacher: Path | None, second: Path | None, data: Path | None, seed: int, device: str, quiet: bool
) -> Subject:
    """Load the models and check that they speak of the same codes."""
    chosen = pick_device(device)
    if (folder / "run.yaml").is_file():
        run, codes, _ = load_trained(folder, device)
        codes = codes if data is None else Codes(data).original
        teacher = teacher or recorded_model(folder, "teacher", run.teacher)
    else:
        if data is None:
            load_backbone(folder)  # which may have more to say of the folder
            raise VarkdError(f"{folder} is a model folder, not a run: give its codes with --data")
        run, codes = None, Codes(data).original
    student = _open("the student", folder, codes, None, str(chosen))
    if teacher is None:
        raise VarkdError(f"{folder} has no teacher of its own: give --teacher MODEL")
    sampler = run.evaluation.sampler if run else Sampler()
    models = {}
    for option, path in (("--teacher", teacher), ("--second", second)):
        models[option] = None
        if path is not None:
            models[option] = _open(option, path, codes, student, str(chosen)).requires_grad_(False)
            models[option].check(sampler.plan(student, Rng(0), torch.zeros(1, dtype=torch.long)))
    return Subject(
        folder,
        run,
        codes,
        student.requires_grad_(False),
        models["--teacher"],
        models["--second"],
        teacher,
        second,
        sampler,
        seed,
        chosen,
        quiet,
    )


def _open(what: str, path: Path, codes: Codes, student: Backbone | None, device: str) -> Backbone:
    try:
        return open_model(path, codes, student, device)
    except VarkdError as error:
        raise VarkdError(f"{what} ({path}): {error}") from None


def chosen_images(subject: Subject, length: int, num: int) -> NDArray[np.int64]:
    """Ascending indices of a random share of a split, so that ordered data do not show their first classes only."""
    return Rng(subject.seed).subset("analyze/images", length, num).numpy()


def sequences_of(subject: Subject, split: Split, num: int) -> dict[str, Sequences]:
    """Data, teacher and student sequences with the same labels, under plans that the student draws."""
    if num < 2:
        raise VarkdError(f"--num {num}: an interval needs at least 2 sequences")
    codes, rng = subject.codes.split(split), Rng(subject.seed)
    if len(codes) < 2:
        raise VarkdError(f"the {split} split has {len(codes)} sequences: take --split train")
    chosen_N = chosen_images(subject, len(codes), num)
    codes_NL = codes.codes(chosen_N, chosen_N * 0).to(subject.device)
    label_N = torch.from_numpy(codes.labels[chosen_N]).to(subject.device)
    plan = subject.sampler.plan(subject.student, rng, torch.arange(len(chosen_N), device=subject.device))
    data = Sequences(codes_NL, Condition(label_N), plan)
    models = {"teacher": subject.teacher, "student": subject.student}
    if not subject.quiet:
        console.print(f"{len(data)} sequences of the {split} split, as many of the teacher and of the student")
    return {
        "data": data,
        **{name: sampled(model, data, subject.sampler, subject.seed) for name, model in models.items()},
    }
