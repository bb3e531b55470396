"""`varkd train`: claim the run folder, build the objects, record what they are, run the loop."""

from __future__ import annotations

import shutil
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from varkd import pictures
from varkd.backbones.protocol import Backbone
from varkd.backbones.store import load_backbone, weights_hash
from varkd.config import RunConfig, differences, dump, read_run, settings
from varkd.data.loader import DataLoader, ordered_batches
from varkd.data.shards import save_array
from varkd.distill.clustering import cluster_statistics
from varkd.distill.filtering import difference_scores
from varkd.errors import VarkdError
from varkd.evaluate.agreement import cross_entropy
from varkd.files import NPY_ERRORS, read_errors, read_json, write_errors, write_json, write_text
from varkd.folders import Own, contents, locked, relative
from varkd.progress import console, track
from varkd.run.data import Codes, open_codes, rank_device
from varkd.run.environment import environment
from varkd.run.models import Objects, build_objects, new_student
from varkd.run.sampling import balanced_labels
from varkd.sampling import generate_with_codes
from varkd.train.checkpoint import Checkpoints, Progress
from varkd.train.loop import Job, train
from varkd.train.parallel import gathered
from varkd.train.trackers import check_installed
from varkd.types import state_hash
from varkd.world import World

_VALIDATION_CODES = 512  # a random share of the validation images; `varkd evaluate` looks at all
_GRID_ROWS = 4
RUN = Own("a run", ("run.yaml",), lambda text: "\npreset:" in text and "\ntrain:" in text)
_OURS = (
    "run.yaml", "environment.json", "config.json", "log.jsonl", "status.json", "metrics.json", "images.npy",
    "checkpoints/step-*", "checkpoints/.step-*", "checkpoints/selected.json", "samples/step-*.png",
    "evaluation/samples.png", "tensorboard/events.out.tfevents.*", "trackers.json",
    "wandb/*run-*", "wandb/debug*.log",
)  # fmt: skip


def train_run(run: RunConfig, *, overwrite: bool = False, quiet: bool = False) -> Progress:
    """`varkd train`: start or resume a run.

    Raises:
        VarkdError: bad input, or a folder that holds another run (unless `overwrite`).
        Stopped: a signal arrived; the same command resumes.
    """
    world, folder = World.from_environment(), Path(run.out)
    device = rank_device(run.device, world)
    if not run.out:
        raise VarkdError("give out= (the run folder)")
    check_installed(run.train.trackers)
    check_folder(run, folder, overwrite, world)
    codes = open_codes(run)
    objects = build_objects(run, codes, world, device)
    job = _job(run, codes, folder, objects, world, device, quiet)
    made_of = identity(run, codes, objects)
    if not overwrite:
        check_same(folder, made_of)
        checkpoints = Checkpoints(folder, world, run.train.keep, run.train.select)
        if world.is_main and (latest := checkpoints.latest()) is not None:
            checkpoints.check(latest)
    with write_errors(folder), locked(folder) if world.is_main else nullcontext():
        # Only now: bad input leaves no trace, and deletes nothing.
        claim_folder(run, folder, overwrite, world, quiet)
        _record(run, codes, folder, objects, made_of, world)
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
            save_array(path, kept.numpy())
        world.barrier()
    with read_errors(path, "is damaged: move it away, and the images are chosen again", NPY_ERRORS):
        return np.load(path, allow_pickle=False)


def _note_start(run: RunConfig, what: str, world: World, quiet: bool) -> None:
    if not run.init and world.is_main and not quiet:
        console.print(f"note: without init= the reference of {what} is an untrained student")


def check_folder(run: RunConfig, folder: Path, overwrite: bool, world: World) -> None:
    """Whether the run folder is ours to use: new, or the same run to resume, or (with `overwrite`) any former run.

    Raises:
        VarkdError: it holds another run or foreign files, or what the run reads stands there, above or below.
    """
    if world.is_main:
        _check_apart(run, folder)
        if (folder / "run.yaml").is_file():
            RUN.check(folder, "out=")
            if (folder / "model.safetensors").is_file():
                raise VarkdError(
                    f"{folder} holds a finished model (varkd quantize), not a run that can go on: choose another out="
                )
            before = None if overwrite else read_run(folder)
            changed = [] if before is None else differences(_grown(before, run), run)
            if changed:
                raise VarkdError(
                    f"{folder} holds a run with other settings ({'; '.join(changed[:3])}): choose another "
                    "out=, or --overwrite to start it anew"
                )
        elif _foreign(folder):
            raise VarkdError(f"{folder} is not empty and not a run folder: choose another out=")
    world.barrier()


def _check_apart(run: RunConfig, folder: Path) -> None:
    """A run may not write where it reads: its inputs would be replaced, or taken for its own files."""
    out = folder.resolve()
    for name in ("teacher", "init", "data", "tokenizer"):
        given = getattr(run, name)
        if given in (None, "") or not Path(given).exists():
            continue
        path = Path(given).resolve()
        if path != out / "codes" and (path == out or path in out.parents or out in path.parents):
            where = "is" if path == out else "lies inside" if path in out.parents else "contains"
            raise VarkdError(f"out={run.out} {where} {name}={given}, which the run reads: choose another out=")


def _foreign(folder: Path) -> bool:
    """Whether anything stands there but codes, which answer for themselves."""
    return folder.is_dir() and any(name != "codes" for name in contents(folder))


def _grown(before: RunConfig, run: RunConfig) -> RunConfig:
    """The former settings with more updates, where there are more: a finished run may be trained longer."""
    updates = max(before.train.updates, run.train.updates)
    return replace(before, train=replace(before.train, updates=updates))


def extension(before: RunConfig, run: RunConfig) -> str | None:
    """What it means that a run is given more updates, in words; None where it is not."""
    old, new = before.train.updates, run.train.updates
    if new <= old:
        return None
    was, now = (run.train.optim.lr_at(old - 1, updates) for updates in (old, new))
    moved = [f"the learning rate goes from {was:.3g} to {now:.3g}"] if was != now else []
    moved += ["so do the schedules of the method"] if run.method.at(0.0) != run.method.at(1.0) else []
    told = (
        f"schedules now end there ({', '.join(moved)}), so this is not a run of {new} from the start"
        if moved
        else (f"no schedule depends on it, so this is a run of {new} from the start")
    )
    return f"train.updates {old} -> {new}: {told}"


def claim_folder(run: RunConfig, folder: Path, overwrite: bool, world: World, quiet: bool = False) -> None:
    """Make the run folder ours, with `overwrite` emptied of a former run.

    Raises:
        VarkdError: it cannot be written.
    """
    if world.is_main:
        with write_errors(folder):
            if overwrite:
                _empty(folder)
            longer = extension(read_run(folder), run) if (folder / "run.yaml").is_file() else None
            if longer and not quiet:
                console.print(f"note: {longer}", markup=False)
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / "run.yaml", dump(run))
    world.barrier()


def _empty(folder: Path) -> None:
    """Remove what varkd writes into a run folder, and nothing else."""
    for pattern in _OURS:
        for path in folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        with suppress(OSError):  # it is not empty: somebody else's files stand there
            (folder / pattern).parent.rmdir()


def identity(run: RunConfig, codes: Codes, objects: Objects) -> dict[str, str | None]:
    """What the run is made of, by hash: the same paths may hold other things tomorrow."""
    tokenizer_hash = codes.manifest["tokenizer"]["hash"]
    return {
        "teacher_hash": objects.teacher_hash,
        "teacher_cache_hash": objects.cache_hash,
        "init_hash": weights_hash(load_backbone(run.init)[0]) if run.init else None,
        "tokenizer_hash": tokenizer_hash,
        "codes_hash": codes.hash,
        "codebook_tables_hash": state_hash(tokenizer_hash, objects.distiller.codebook_tables),
    }


def check_same(folder: Path, made_of: dict[str, str | None]) -> None:
    """Refuse to go on with a run on another teacher or other codes; what an older record lacks is not asked."""
    before = read_json(folder / "environment.json") if (folder / "environment.json").is_file() else {}
    for name, now in made_of.items():
        if before.get(name, now) != now:
            old, new = (str(value)[:12] for value in (before[name], now))
            what = name.removesuffix("_hash").replace("_", " ")
            raise VarkdError(
                f"{folder} was begun with another {what} ({old}, now {new}): give "
                "the same one again, or choose another out= (--overwrite starts anew)"
            )


def _record(
    run: RunConfig, codes: Codes, folder: Path, objects: Objects, made_of: dict[str, str | None], world: World
) -> None:
    """Write `config.json` and `environment.json`."""
    if not world.is_main:
        return
    plain = objects.distiller.student if world.size == 1 else new_student(run, codes)
    write_json(folder / "config.json", plain.describe())
    codebook_VE = codes.tokenizer.codebook_VE
    clusters = {
        key: cluster_statistics(codebook_VE, objects.distiller.codebook_tables[key]) for key in run.method.cluster_keys
    }
    cached = objects.distiller.cache
    teacher = cached.cache.teacher_place if cached else run.teacher
    paths = {
        "codes": codes.folder,
        "teacher": teacher,
        "teacher_cache": run.teacher if cached else None,
        "init": run.init,
    }
    write_json(
        folder / "environment.json",
        {
            **made_of,
            **{name: relative(path, folder) if path else None for name, path in paths.items()},
            **({"clusters": clusters} if clusters else {}),
            **environment(world),
        },
    )


def _job(
    run: RunConfig, codes: Codes, folder: Path, objects: Objects, world: World, device: torch.device, quiet: bool
) -> Job:
    validation = codes.split("validation")

    def validate(model: Backbone) -> dict[str, float]:
        batches = ordered_batches(validation, run.train.batch_size, most=_VALIDATION_CODES)
        return {"ce": cross_entropy(model, batches, device)}

    def draw_grid(model: Backbone, path: Path) -> None:
        columns = min(model.num_classes, 10)
        label_B = balanced_labels(columns, model.num_classes).repeat(_GRID_ROWS)
        images, _ = generate_with_codes(
            model, codes.tokenizer, label_B, run.evaluation.sampler, run.evaluation.seed, quiet=True
        )
        pictures.save_png(path, pictures.grid(images.permute(0, 2, 3, 1).numpy(), columns))

    def plain_copy() -> Backbone:
        return new_student(run, codes).to(device)

    return Job(
        objects.distiller,
        DataLoader(codes.split("train"), run.train.batch_size, run.seed, world),
        run.train,
        folder,
        plain_copy,
        validate,
        draw_grid,
        label=run.name or folder.name,
        quiet=quiet,
        settings=settings(run),
    )
