"""`varkd train`: claim the run folder, build the objects, record what they are, run the loop."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from varkd import pictures
from varkd.backbones.protocol import Backbone
from varkd.backbones.store import load_backbone, weights_hash
from varkd.config import RunConfig, differences, dump, read_run
from varkd.data.codes import CodeDataset
from varkd.data.loader import DataLoader, ordered_batches
from varkd.distill.clustering import cluster_statistics
from varkd.distill.filtering import difference_scores
from varkd.errors import VarkdError
from varkd.evaluate.agreement import cross_entropy
from varkd.files import atomic_file, read_json, write_errors, write_json, write_text
from varkd.progress import console, track
from varkd.run.data import Codes, open_codes, pick_device
from varkd.run.environment import environment
from varkd.run.models import Objects, build_objects, new_student
from varkd.sampling import generate_with_codes
from varkd.train.checkpoint import Progress
from varkd.train.loop import Job, train
from varkd.train.parallel import gathered
from varkd.types import Batch, state_hash
from varkd.world import World

_VALIDATION_CODES = 512  # validation images that the loop looks at; `varkd evaluate` looks at all
_GRID_ROWS = 4
_OURS = ("run.yaml", "environment.json", "config.json", "log.jsonl", "status.json", "metrics.json",
         "checkpoints", "samples", "evaluation", "tensorboard", "images.npy")  # fmt: skip


def train_run(run: RunConfig, *, overwrite: bool = False, quiet: bool = False) -> Progress:
    """`varkd train`: start or resume a run.

    Raises:
        VarkdError: bad input, or a folder that holds another run (unless `overwrite`).
        Stopped: a signal arrived; the same command resumes.
    """
    world, device, folder = World.from_environment(), pick_device(run.device), Path(run.out)
    if world.size > 1 and device.type == "cuda":
        device = torch.device("cuda", world.rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if not run.out:
        raise VarkdError("give out= (the run folder)")
    check_folder(run, folder, overwrite, world)
    codes = open_codes(run)
    objects = build_objects(run, codes, world, device)
    job = _job(run, codes, folder, objects, world, device, quiet)
    claim_folder(run, folder, overwrite, world)  # only now: bad input leaves no trace, and deletes nothing
    _record(run, codes, folder, objects, world)
    if objects.distiller.reference is not None:
        _note_start(run, "best_of", world, quiet)
    images = chosen_images(run, codes, objects.distiller.teacher, folder, world, device, quiet)
    job.batches = DataLoader(codes.split("train"), run.train.batch_size, run.seed, world, images)
    return train(job)


def chosen_images(
    run: RunConfig,
    codes: Codes,
    teacher: Backbone | None,
    folder: Path,
    world: World,
    device: torch.device,
    quiet: bool,
) -> NDArray[np.int64] | None:
    """The training images that the method keeps, or None for all of them; kept in the run folder for a resume."""
    if not run.method.images.needs_teacher or teacher is None:
        return None
    path = folder / "images.npy"
    missing = world.sum(torch.tensor(float(world.is_main and not path.is_file())))
    if missing:  # every rank scores every image: a sharded teacher needs all of them
        train_codes = codes.split("train")
        _note_start(run, "difference sampling", world, quiet)
        batches = ordered_batches(train_codes, 256)
        shown = track(batches, "score images", -(-len(train_codes) // 256), quiet or not world.is_main)
        with gathered(teacher):
            score_M = difference_scores(teacher, new_student(run, codes).to(device), shown, run.seed)
        kept = run.method.images.kept(score_M, torch.from_numpy(train_codes.labels))
        if world.is_main:
            with atomic_file(path) as temporary, temporary.open("wb") as file:
                np.save(file, kept.numpy())
        world.barrier()
    return np.load(path, allow_pickle=False)


def _note_start(run: RunConfig, what: str, world: World, quiet: bool) -> None:
    if not run.init and world.is_main and not quiet:
        console.print(f"note: without init= the reference of {what} is an untrained student")


def check_folder(run: RunConfig, folder: Path, overwrite: bool, world: World) -> None:
    """Whether the run folder is ours to use: new, or the same run to resume, or (with `overwrite`) any former run.

    Raises:
        VarkdError: it holds another run or foreign files.
    """
    if world.is_main:
        if (folder / "run.yaml").is_file() and not overwrite:
            changed = differences(read_run(folder), run)
            if changed:
                raise VarkdError(f"{folder} holds a run with other settings ({'; '.join(changed[:3])}): choose another "
                                 "out=, or --overwrite to start it anew")  # fmt: skip
        elif not (folder / "run.yaml").is_file() and _foreign(folder):
            raise VarkdError(f"{folder} is not empty and not a run folder: choose another out=")
    world.barrier()


def _foreign(folder: Path) -> bool:
    """Whether anything stands there but codes, which answer for themselves."""
    return folder.is_dir() and any(path.name != "codes" for path in folder.iterdir())


def claim_folder(run: RunConfig, folder: Path, overwrite: bool, world: World) -> None:
    """Make the run folder ours, with `overwrite` emptied of a former run.

    Raises:
        VarkdError: it cannot be written.
    """
    if world.is_main:
        with write_errors(folder):
            if overwrite:
                _empty(folder)
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / "run.yaml", dump(run))
    world.barrier()


def _empty(folder: Path) -> None:
    """Remove what varkd writes into a run folder, and nothing else."""
    for name in _OURS:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _record(run: RunConfig, codes: Codes, folder: Path, objects: Objects, world: World) -> None:
    """Write `config.json` and `environment.json`; refuse to resume on another teacher or other codes."""
    if not world.is_main:
        return
    recorded = {
        "teacher_hash": objects.teacher_hash,
        "tokenizer_hash": codes.manifest["tokenizer"]["hash"],
        "codes": str(codes.folder.resolve()),
        "codebook_tables_hash": state_hash(codes.manifest["tokenizer"]["hash"], objects.distiller.codebook_tables),
        "init_hash": weights_hash(load_backbone(run.init)[0]) if run.init else None,
    }
    path = folder / "environment.json"
    if path.is_file():
        before = read_json(path)
        for name in ("teacher_hash", "tokenizer_hash", "init_hash", "codebook_tables_hash"):
            if before.get(name) != recorded[name]:
                old, new = (str(values.get(name))[:12] for values in (before, recorded))
                what = name.removesuffix("_hash")
                raise VarkdError(f"{folder} was begun with another {what} ({old}, now {new}): --overwrite starts anew")
    plain = objects.distiller.student if world.size == 1 else new_student(run, codes)
    write_json(folder / "config.json", plain.describe())
    codebook_VE = codes.tokenizer.codebook_VE
    clusters = {
        key: cluster_statistics(codebook_VE, objects.distiller.codebook_tables[key]) for key in run.method.cluster_keys
    }
    write_json(path, {**recorded, **({"clusters": clusters} if clusters else {}), **environment(world)})


def _job(
    run: RunConfig, codes: Codes, folder: Path, objects: Objects, world: World, device: torch.device, quiet: bool
) -> Job:
    validation = codes.split("validation")

    def validate(model: Backbone) -> dict[str, float]:
        batches = _first(validation, _VALIDATION_CODES, run.train.batch_size)
        return {"ce": cross_entropy(model, batches, device)}

    def draw_grid(model: Backbone, path: Path) -> None:
        columns = min(model.num_classes, 10)
        label_B = torch.arange(columns).repeat(_GRID_ROWS)
        images, _ = generate_with_codes(
            model, codes.tokenizer, label_B, run.evaluation.sampler, run.evaluation.seed, quiet=True
        )
        pictures.save_png(path, pictures.grid(images.permute(0, 2, 3, 1).numpy(), columns))

    def plain_copy() -> Backbone:
        return new_student(run, codes).to(device)

    return Job(
        objects.distiller, DataLoader(codes.split("train"), run.train.batch_size, run.seed, world), run.train, folder,
        plain_copy, validate, draw_grid, label=run.name or folder.name, quiet=quiet,
    )  # fmt: skip


def _first(codes: CodeDataset, num: int, batch_size: int) -> Iterator[Batch]:
    seen = 0
    for batch in ordered_batches(codes, batch_size):
        if seen >= num:
            return
        seen += len(batch)
        yield batch
