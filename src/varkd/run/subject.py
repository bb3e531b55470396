"""Whom `varkd analyze` looks at: the models, checked against the codes, and the sequences of its three contexts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from varkd.backbones.protocol import Backbone
from varkd.backbones.store import load_backbone
from varkd.config import RunConfig
from varkd.data.images import Split
from varkd.distill.spaces import Clusters
from varkd.errors import VarkdError
from varkd.evaluate.diagnostics import CodeSpace, Sequences, sampled
from varkd.files import read_json
from varkd.progress import console
from varkd.rollout import Sampler
from varkd.run.data import Codes, pick_device
from varkd.run.models import check_pair, load_trained
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
        run, codes, student = load_trained(folder, device)
        codes = codes if data is None else Codes(data)
        teacher = teacher or (Path(run.teacher) if run.teacher else None)
    else:
        run, (student, _) = None, load_backbone(folder, str(chosen))
        if data is None:
            raise VarkdError(f"{folder} is a model folder, not a run: give its codes with --data")
        codes = Codes(data)
    _check("the student", student, student, folder, codes)
    if teacher is None:
        raise VarkdError(f"{folder} has no teacher of its own: give --teacher MODEL")
    sampler = run.evaluation.sampler if run else Sampler()
    models = {}
    for option, path in (("--teacher", teacher), ("--second", second)):
        models[option] = None
        if path is not None:
            models[option] = load_backbone(path, str(chosen))[0].requires_grad_(False)
            _check(option, student, models[option], path, codes)
            models[option].check(sampler.plan(student, Rng(0), torch.zeros(1, dtype=torch.long)))
    return Subject(folder, run, codes, student.requires_grad_(False), models["--teacher"], models["--second"], teacher,
                   second, sampler, seed, chosen, quiet)  # fmt: skip


def _check(what: str, student: Backbone, model: Backbone, path: Path, codes: Codes) -> None:
    try:
        check_pair(student, model, read_json(path / "config.json").get("tokenizer_hash"), codes)
    except VarkdError as error:
        raise VarkdError(f"{what} ({path}): {error}") from None


def sequences_of(subject: Subject, split: Split, num: int) -> dict[str, Sequences]:
    """Data, teacher and student sequences with the same labels, under plans that the student draws."""
    if num < 2:
        raise VarkdError(f"--num {num}: an interval needs at least 2 sequences")
    codes, rng = subject.codes.split(split), Rng(subject.seed)
    if len(codes) < 2:
        raise VarkdError(f"the {split} split has {len(codes)} sequences: take --split train")
    # A random share of the split, so that an ordered data set does not show its first classes only.
    chosen_N = torch.randperm(len(codes), generator=rng.generator("analyze/images"))[:num].sort().values.numpy()
    codes_NL = codes.codes(chosen_N, chosen_N * 0).to(subject.device)
    label_N = torch.from_numpy(codes.labels[chosen_N]).to(subject.device)
    plan = subject.sampler.plan(subject.student, rng, torch.arange(len(chosen_N), device=subject.device))
    data = Sequences(codes_NL, Condition(label_N), plan)
    models = {"teacher": subject.teacher, "student": subject.student}
    if not subject.quiet:
        console.print(f"{len(data)} sequences of the {split} split, as many of the teacher and of the student")
    return {"data": data, **{name: sampled(model, data, subject.sampler, subject.seed)
                             for name, model in models.items()}}  # fmt: skip
