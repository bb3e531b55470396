"""The models of a run, and whether they fit together."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import torch

from varkd.backbones.protocol import Backbone
from varkd.backbones.store import build, check_state, family_class, load_backbone, weights_hash, with_classes
from varkd.config import RunConfig, read_run
from varkd.data.classes import match_classes
from varkd.data.codes import sequence_length
from varkd.data.remote import is_url
from varkd.data.teacher_cache import TeacherCache, is_cache
from varkd.distill.method import Method
from varkd.distill.prefixes import Data, Rollout
from varkd.distill.teachers import CachedTeacher
from varkd.errors import VarkdError
from varkd.files import read_json
from varkd.folders import locate
from varkd.run.data import Codes, codes_at, pick_device
from varkd.run.official import load_official
from varkd.train.compiling import compile_blocks
from varkd.train.distiller import Distiller
from varkd.train.parallel import distribute
from varkd.world import Rng, World


@dataclass(frozen=True)
class Objects:
    """A run's distiller, and the hashes of its teacher's weights and of the cache that speaks for it."""

    distiller: Distiller
    teacher_hash: str | None
    cache_hash: str | None


def build_objects(run: RunConfig, codes: Codes, world: World, device: torch.device) -> Objects:
    """Student and teacher on their device (sharded where there are several ranks), and the method's products.

    Raises:
        VarkdError: a teacher is missing, or does not fit the data or the student.
    """
    student, teacher, cache = new_student(run, codes), None, None
    method = trained_method(run.method, codes)
    if run.teacher and is_cache(Path(run.teacher)):
        cache = CachedTeacher(TeacherCache(run.teacher, codes.hash))
        cache.check(method, student, run.train.label_drop)
    elif run.teacher:
        teacher = open_model(run.teacher, codes, student)
        for sampler in method.contexts.samplers:
            teacher.check(sampler.plan(student, Rng(0), torch.zeros(1, dtype=torch.long)))
    elif method.needs_teacher:
        raise VarkdError(f"method '{run.preset}' needs a teacher: give teacher=RUN")
    method.check(student, teacher)
    check_scale(run, student)
    teacher_hash = cache.cache.teacher_hash if cache else weights_hash(teacher) if teacher is not None else None
    if method is not run.method:
        _check_sampled_by(run, codes, teacher_hash)
    codebook_tables = {name: value.to(device) for name, value in method.prepare(codes.tokenizer.codebook_VE).items()}
    student = distribute(student.to(device), world, run.train.replicas)
    if teacher is not None:
        teacher = distribute(teacher.to(device).requires_grad_(False), world, run.train.replicas)
    reference = None
    if method.needs_reference:
        reference = distribute(new_student(run, codes).to(device).requires_grad_(False), world, run.train.replicas)
    distiller = Distiller(
        method,
        student,
        cache or teacher,
        updates=run.train.updates,
        seed=run.seed,
        label_drop=run.train.label_drop,
        chunk_rows=run.train.chunk_rows,
        precision=run.train.precision,
        world=world,
        reference=reference,
        codebook_tables=codebook_tables,
        compile=run.train.compile and compile_blocks(student, teacher, reference),
    )
    return Objects(distiller, teacher_hash, cache.cache.hash if cache else None)


def trained_method(method: Method, codes: Codes) -> Method:
    """`method`, which takes the samples of `codes` (`varkd teach --samples`) for those of a teacher in every update.

    Raises:
        VarkdError: they were drawn by another sampler than the method's.
    """
    made, contexts = codes.manifest.get("samples"), method.contexts
    if made is None or not isinstance(contexts, Rollout) or contexts.by != "teacher":
        return method
    for name, asked in asdict(contexts.sampler).items():
        if asked != (found := made["sampler"].get(name)):
            raise VarkdError(
                f"{codes.folder} was sampled with {name}={found}, but this method samples with {name}={asked}: set "
                f"method.contexts.sampler.{name}={found}, or make such samples by `varkd teach --samples`"
            )
    terms = tuple(replace(term, on=("data",)) if "teacher" in term.on else term for term in method.terms)
    return replace(method, contexts=Data(), terms=terms)


def _check_sampled_by(run: RunConfig, codes: Codes, teacher_hash: str | None) -> None:
    """Raise `VarkdError` where the samples that stand in for a teacher's are those of another one."""
    found = codes.manifest["samples"]["teacher"]["hash"]
    if teacher_hash not in (None, found):
        raise VarkdError(
            f"{codes.folder} was sampled by another teacher ({found[:12]}) than teacher={run.teacher} "
            f"({str(teacher_hash)[:12]}): give that one, or method=kd, which takes the samples as data"
        )


def new_student(run: RunConfig, codes: Codes) -> Backbone:
    """The student at its first step: drawn from the seed, or the weights of `init`."""
    if run.init:
        student = _from_start(run, run.init, codes)
    else:
        chosen = {name: value for name, value in asdict(run.model).items() if name != "family" and value is not None}
        sizes = {**family_class(run.model.family).sizes_for(codes.layout), **chosen}
        student = build(run.model.family, sizes, _dropout(run), run.seed, quantizer=codes.tokenizer.quantizer)
    student.tokenizer_hash = codes.manifest["tokenizer"]["hash"]
    student.class_names = tuple(codes.manifest["class_names"])
    return student


def _from_start(run: RunConfig, init: str, codes: Codes) -> Backbone:
    """The weights of `init`, where `model.guidance_conditioned` asks for it with a new embedding of zeros."""
    model = open_model(init, codes)
    if run.model.guidance_conditioned is False and model.guidance_conditioned:
        raise VarkdError(f"init={init} reads the guidance scale: leave model.guidance_conditioned=false out")
    sizes = {field.name: getattr(model.config, field.name) for field in fields(model.config)}
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
    if student.guidance_conditioned and target.one_scale is not None:
        raise VarkdError(
            f"this student reads the guidance scale, and one scale for all is not told: set "
            f"method.target.highest ({target.one_scale:g} or more)"
        )


def open_model(path: str | Path, codes: Codes, student: Backbone | None = None, device: str = "cpu") -> Backbone:
    """A teacher or an initialization, of the data's classes (a model of more, or in another order, is cut to them).

    Args:
        student: whose plans the model must follow; by default its own.

    Raises:
        VarkdError: no model there, or one of other codes or classes, or that cannot follow the plans.
    """
    model, _ = load_backbone(path, device)
    _check_codes(model, codes)
    names = codes.manifest["class_names"]
    index = match_classes(model.class_names, model.num_classes, names, codes.manifest.get("class_map"))
    if index is not None:
        model = with_classes(model, index, names)
    model.check((student or model).plan(1, Rng(0), torch.zeros(1, dtype=torch.long)))
    return model


def _check_codes(model: Backbone, codes: Codes) -> None:
    """Raise `VarkdError` unless `model` speaks of the same codes."""
    recorded = codes.manifest["tokenizer"]["hash"]
    if model.tokenizer_hash is not None and model.tokenizer_hash != recorded:
        raise VarkdError(
            f"this {model.family} model was trained on codes of tokenizer {model.tokenizer_hash[:12]}, the data are of "
            f"{recorded[:12]}: encode the data with the model's tokenizer"
        )
    wanted = codes.manifest["tokenizer"]["vocab_size"]
    if model.vocab_size != wanted:
        raise VarkdError(f"this model has {model.vocab_size} codes, the data {wanted}: use codes of the same tokenizer")
    length = sequence_length(codes.manifest)
    if model.sequence_length != length:
        raise VarkdError(
            f"this model has {model.sequence_length} codes an image, the data {length} "
            f"({codes.layout}): use codes with the same grid"
        )


def load_trained(folder: str | Path, device: str = "auto") -> tuple[RunConfig, Codes, Backbone]:
    """A run folder's settings, its codes and its model with the selected weights.

    Where it was trained on samples of a teacher, these are the codes of real images: what the run is judged by.

    Raises:
        VarkdError: no run there, or other codes than it was trained on.
    """
    run, folder = read_run(folder), Path(folder)
    recorded = read_json(folder / "environment.json")
    place = locate(recorded["codes"], folder, run.data)
    codes = codes_at(run.data) if is_url(run.data) and not place.is_dir() else Codes(place)
    for name, found in (("tokenizer_hash", codes.manifest["tokenizer"]["hash"]), ("codes_hash", codes.hash)):
        if recorded.get(name, found) != found:
            raise VarkdError(
                f"{folder} was trained on other codes than {codes.folder} holds now ({name[:-5]} "
                f"{recorded[name][:12]}, now {found[:12]}): put them back"
            )
    model, _ = load_backbone(folder, str(pick_device(device)))
    return run, codes.original, model


def recorded_model(folder: Path, name: Literal["teacher", "init"], given: str | None) -> Path | None:
    """Where the model lies that a run was trained with; `given` is what its settings say.

    For a teacher cache that is the model which made it; None where that is gone, for the run did not need it.
    """
    if given is None:
        return None
    record = read_json(folder / "environment.json")
    if name == "teacher" and record.get("teacher_cache"):
        found = locate(record["teacher"], folder)
        return found if found.is_dir() else None
    return locate(record.get(name) or given, folder, given)


def load(path: str | Path, device: str = "auto") -> Backbone:
    """`varkd.load`: the model of a run folder (its selected weights), a model folder or an official file.

    An official file that does not say all of its sizes needs `varkd.load_official`, which takes them as arguments.

    Raises:
        VarkdError: no model there, a truncated file, or weights of other shapes.
    """
    if Path(path).is_file():
        return load_official(path, device=device)
    return load_backbone(path, str(pick_device(device)))[0]
