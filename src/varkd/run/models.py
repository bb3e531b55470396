"""The models of a run, and whether they fit together."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from varkd.backbones.protocol import Backbone
from varkd.backbones.store import build, check_state, family_class, load_backbone, weights_hash
from varkd.config import RunConfig, read_run
from varkd.data.codes import sequence_length
from varkd.distill.spaces import CodebookTables
from varkd.distill.target import Guided
from varkd.errors import VarkdError
from varkd.files import read_json
from varkd.run.data import Codes, pick_device
from varkd.train.parallel import distribute
from varkd.world import Rng, World


@dataclass(frozen=True)
class Objects:
    """The models of a run and what a method makes of the tokenizer.

    `reference` is a second student that stays as it was at the start, where the method compares with it.
    """

    student: Backbone
    teacher: Backbone | None
    codebook_tables: CodebookTables
    teacher_hash: str | None
    reference: Backbone | None = None


def build_objects(run: RunConfig, codes: Codes, world: World, device: torch.device) -> Objects:
    """Student and teacher on their device (sharded where there are several ranks), and the method's products.

    Raises:
        VarkdError: a teacher is missing, or does not fit the data or the student.
    """
    student = new_student(run, codes)
    teacher = None
    if run.teacher:
        teacher, info = load_backbone(run.teacher)
        check_pair(student, teacher, info.get("tokenizer_hash"), codes)
        for sampler in run.method.contexts.samplers:
            teacher.check(sampler.plan(student, Rng(0), torch.zeros(1, dtype=torch.long)))
    elif run.method.needs_teacher:
        raise VarkdError(f"method '{run.preset}' needs a teacher: give teacher=RUN")
    run.method.check(student, teacher)
    check_scale(run, student)
    teacher_hash = weights_hash(teacher) if teacher is not None else None
    codebook_tables = {
        name: value.to(device) for name, value in run.method.prepare(codes.tokenizer.codebook_VE).items()
    }
    student = distribute(student.to(device), world, run.train.replicas)
    if teacher is not None:
        teacher = distribute(teacher.to(device).requires_grad_(False), world, run.train.replicas)
    reference = None
    if run.method.needs_reference:
        reference = distribute(new_student(run, codes).to(device).requires_grad_(False), world, run.train.replicas)
    return Objects(student, teacher, codebook_tables, teacher_hash, reference)


def new_student(run: RunConfig, codes: Codes) -> Backbone:
    """The student at its first step: drawn from the seed, or the weights of `init`."""
    if run.init:
        return _from_start(run, run.init, codes)
    chosen = {name: value for name, value in asdict(run.model).items() if name != "family" and value is not None}
    sizes = {**family_class(run.model.family).sizes_for(codes.layout), **chosen}
    return build(run.model.family, sizes, _dropout(run), run.seed, quantizer=codes.tokenizer.quantizer)


def _from_start(run: RunConfig, init: str, codes: Codes) -> Backbone:
    """The weights of `init`, where `model.guidance_conditioned` asks for it with a new embedding of zeros."""
    model, info = load_backbone(init)
    check_pair(model, model, info.get("tokenizer_hash"), codes)
    if run.model.guidance_conditioned is False and model.guidance_conditioned:
        raise VarkdError(f"init={init} reads the guidance scale: leave model.guidance_conditioned=false out")
    sizes = {name: value for name, value in info.items() if name not in ("family", "tokenizer_hash")}
    if run.model.guidance_conditioned:
        sizes["guidance_conditioned"] = True
    student = build(model.family, sizes, _dropout(run))
    own, start = student.state_dict(), model.state_dict()
    fresh = {name: value for name, value in own.items() if name.startswith("guidance_embedding.")}
    check_state(student, fresh | start, f"init={init}")
    student.load_state_dict(fresh | start)
    return student


def _dropout(run: RunConfig) -> float:
    if run.train.dropout and run.teacher and run.method.needs_teacher:
        raise VarkdError("distillation with dropout makes the objective noisy: set train.dropout=0")
    return run.train.dropout


def check_scale(run: RunConfig, student: Backbone) -> None:
    """Raise `VarkdError` where a student reads the guidance scale but would be taught a guided teacher as scale 1."""
    target = run.method.target
    if student.guidance_conditioned and isinstance(target, Guided) and target.highest is None:
        raise VarkdError(f"this student reads the guidance scale, and one scale for all is not told: set "
                         f"method.target.highest ({target.scale:g} or more)")  # fmt: skip


def check_pair(student: Backbone, model: Backbone, tokenizer_hash: str | None, codes: Codes) -> None:
    """Raise `VarkdError` unless `model` (teacher or initialization) speaks of the same codes and classes."""
    recorded = codes.manifest["tokenizer"]["hash"]
    if tokenizer_hash is not None and tokenizer_hash != recorded:
        raise VarkdError(
            f"this {model.family} model was trained on codes of tokenizer {tokenizer_hash[:12]}, the data are of "
            f"{recorded[:12]}: encode the data with the model's tokenizer"
        )
    wanted = (codes.manifest["tokenizer"]["vocab_size"], len(codes.manifest["class_names"]))
    if (model.vocab_size, model.num_classes) != wanted:
        raise VarkdError(f"this model has {model.vocab_size} codes and {model.num_classes} classes, the data "
                         f"{wanted[0]} and {wanted[1]}: use codes with the same tokenizer and classes")  # fmt: skip
    length = sequence_length(codes.manifest)
    if model.sequence_length != length:
        raise VarkdError(f"this model has {model.sequence_length} codes an image, the data {length} "
                         f"({codes.layout}): use codes with the same grid")  # fmt: skip
    model.check(student.plan(1, Rng(0), torch.zeros(1, dtype=torch.long)))


def load_trained(folder: str | Path, device: str = "auto") -> tuple[RunConfig, Codes, Backbone]:
    """A run folder's settings, its codes and its model with the selected weights."""
    run = read_run(folder)
    environment_path = Path(folder) / "environment.json"
    codes = Codes(Path(read_json(environment_path)["codes"]))
    model, _ = load_backbone(folder, str(pick_device(device)))
    return run, codes, model


def load(path: str | Path, device: str = "auto") -> Backbone:
    """`varkd.load`: the model of a run folder (its selected weights) or of an exported folder, in eval mode.

    Raises:
        VarkdError: no model there, a truncated file, or weights of other shapes.
    """
    return load_backbone(path, str(pick_device(device)))[0]
