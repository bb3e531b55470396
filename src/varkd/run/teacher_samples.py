"""`varkd teach --samples`: sequences that a teacher samples once, as a codes folder that students train on.

The codes are the teacher's own, never decoded and encoded again. They are the `train` split; the `validation` split is
copied from the codes of real images that they were made beside, and everything that judges goes back to those
(`Codes.original`): a student of samples is measured like any other. Row i depends on (seed, i, label, teacher, sampler)
only and shards are of fixed size, so ranks share them, and a job that was killed writes the bytes of one that was not.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from varkd.backbones.protocol import Backbone
from varkd.backbones.store import weights_hash
from varkd.data.codes import CodeDataset, read_manifest
from varkd.data.shards import Manifest
from varkd.data.writer import CODES, CodeWriter, plan_manifest
from varkd.errors import VarkdError
from varkd.folders import locate, locked, relative
from varkd.progress import bar
from varkd.rollout import Sampler
from varkd.run.data import Codes, codes_at, rank_device
from varkd.run.models import open_model
from varkd.run.sampling import balanced_labels
from varkd.sampling import sample_codes
from varkd.world import Rng, World

Labels = Literal["data", "balanced"]


def teach_samples(
    teacher: str | Path,
    data: str | Path,
    out: str | Path,
    num: int,
    *,
    sampler: Sampler | None = None,
    labels: Labels = "data",
    seed: int = 0,
    batch_size: int = 64,
    shard_size: int = 1024,
    device: str = "auto",
    quiet: bool = False,
) -> Manifest:
    """Write `num` sequences that a model samples to the codes folder `out`; a stopped job goes on where it stopped.

    Args:
        teacher: a run or model folder.
        data: the codes of real images, which give classes, their shares and the validation split.
        labels: "data" draws labels as often as the training images have them, "balanced" all equally often.
        batch_size: sequences sampled at a time.

    Returns:
        The manifest of the folder.

    Raises:
        VarkdError: a model that does not fit the codes, or a folder that holds other codes or other things.
    """
    world = World.from_environment()
    chosen, sampler = rank_device(device, world), sampler or Sampler()
    if num < 1 or batch_size < 1:
        raise VarkdError(f"samples={num}, batch_size={batch_size}: ask for at least one sequence at a time")
    codes, folder = codes_at(data), Path(out)
    CODES.check(folder)
    if codes.original is not codes:
        raise VarkdError(f"{data} holds samples of a teacher: give the codes of real images that they were made beside")
    model = open_model(teacher, codes).requires_grad_(False)
    model.check(sampler.plan(model, Rng(seed), torch.zeros(1, dtype=torch.long)))
    places = {"teacher": (teacher, weights_hash(model)), "codes": (data, codes.hash)}
    made = {
        **{
            name: {"path": relative(path, folder), "given": str(path), "hash": found}
            for name, (path, found) in places.items()
        },
        "sampler": asdict(sampler),
        "labels": labels,
        "seed": seed,
    }
    writer = CodeWriter(folder, _planned(codes, folder, num, shard_size, made), world)
    was_finished = writer.is_finished
    world.barrier()  # every rank has looked before one writes
    with locked(folder) if world.is_main and not was_finished else nullcontext():
        label_N = label_rows(labels, num, codes.split("train"), seed)
        _write_shards(writer, codes, Sampled(model.to(chosen), sampler, seed, batch_size), label_N, quiet)
        world.barrier()
        if world.is_main and not was_finished:
            writer.finish(codes.manifest["reconstruction"])
    world.barrier()
    return read_manifest(folder)


def label_rows(labels: Labels, num: int, train: CodeDataset, seed: int) -> Tensor:
    """The label of every sample, int64 (num,): rounds of the training images' own in random order, or balanced."""
    if labels == "balanced":
        return balanced_labels(num, train.num_classes)
    rounds = -(-num // len(train))
    order = [
        torch.randperm(len(train), generator=Rng(seed, turn).generator("samples/labels")) for turn in range(rounds)
    ]
    return torch.from_numpy(train.labels)[torch.cat(order)[:num]]


class Sampled:
    """A model, and how rows are drawn from it."""

    def __init__(self, model: Backbone, sampler: Sampler, seed: int, batch_size: int) -> None:
        self.model, self.sampler, self.seed, self.batch_size = model, sampler, seed, batch_size

    def __call__(self, label_B: Tensor, first_row: int) -> Tensor:
        """The codes of rows that begin with `first_row`, int64 (B, L) on the CPU."""
        return sample_codes(self.model, label_B, self.sampler, self.seed, first_row).cpu()


def _planned(codes: Codes, folder: Path, num: int, shard_size: int, made: Manifest) -> Manifest:
    """The manifest of the samples: that of the real codes, with another train split in one view."""
    real, recorded = codes.manifest, codes.manifest["tokenizer"]
    tokenizer = locate(recorded["path"], codes.folder, recorded.get("given"))
    source = {name: value for name, value in real["source"].items() if name != "path"}  # `codes` leads to the images
    planned = plan_manifest(
        tokenizer={**recorded, "path": relative(tokenizer, folder)},
        grid=tuple(real["grid"]),
        scales=tuple(real["scales"]) if "scales" in real else None,
        image_shape=tuple(real["image_shape"]),
        class_names=tuple(real["class_names"]),
        views=("identity",),
        source=source,
        nums={"train": num, "validation": real["splits"]["validation"]["num"]},
        shard_size=shard_size,
        class_map=real.get("class_map"),
    )
    return {**planned, "samples": made}


def _write_shards(writer: CodeWriter, codes: Codes, sampled: Sampled, label_N: Tensor, quiet: bool) -> None:
    todo, validation = writer.todo(), codes.split("validation")
    total = sum(shard["num"] for split, shard in todo if split == "train")
    with bar("sample", total, quiet or not writer.world.is_main) as running:
        done = 0
        for split, shard in todo:
            rows = np.arange(shard["start"], shard["start"] + shard["num"])
            if split == "validation":
                codes_BL = validation.codes(rows, np.zeros_like(rows))
                writer.write(split, shard, codes_BL.numpy().astype(np.uint16)[:, None], validation.labels[rows])
                continue
            found = []
            for label_B in label_N[rows].split(sampled.batch_size):  # batches begin with the shard
                found.append(sampled(label_B, shard["start"] + sum(map(len, found))))
                running.update(done := done + len(label_B))
            codes_BL = torch.cat(found).numpy().astype(np.uint16)
            writer.write(split, shard, codes_BL[:, None], label_N[rows].numpy())


def describe_samples(folder: Path) -> list[str]:
    """What `varkd teach --samples` says in the end."""
    manifest, train = read_manifest(folder), CodeDataset(folder)
    count_K = np.bincount(train.labels, minlength=train.num_classes)
    taken = sum(path.stat().st_size for path in folder.glob("*.npy"))
    splits = {name: entry["num"] for name, entry in manifest["splits"].items()}
    return [
        f"{splits['train']} sequences by the teacher, {count_K.min()} to {count_K.max()} of a class "
        f"({manifest['samples']['labels']} labels); validation: {splits['validation']} real images; "
        f"{taken / 2**20:.1f} MiB"
    ]
