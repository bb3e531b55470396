"""`varkd teach`: a teacher's word on every training sequence, once, so that methods on data train without it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from varkd.backbones.protocol import Backbone
from varkd.backbones.store import weights_hash
from varkd.data.codes import CodeDataset
from varkd.data.shards import MANIFEST, Manifest
from varkd.data.teacher_cache import (
    CACHE,
    CacheWriter,
    Dtype,
    Entries,
    map_entries,
    plan_cache,
    read_cache_manifest,
)
from varkd.distill.divergences import ForwardKL
from varkd.distill.logspace import log_mass, log_softmax
from varkd.distill.method import Method, Term
from varkd.distill.scores import affordable_rows, chunks
from varkd.distill.target import Guided, Plain, Target
from varkd.distill.teachers import live_rows, one_plan
from varkd.errors import VarkdError
from varkd.files import read_json, write_errors
from varkd.folders import locked, relative
from varkd.progress import bar
from varkd.run.data import codes_at, rank_device
from varkd.run.models import open_model
from varkd.types import Condition, Part, Plan
from varkd.world import World

_TOP_K = 64
_BINS = 10_000  # of the histogram of kept mass
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_MOST_LINES = 16


def teach(
    teacher: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    top_k: int | None = None,
    dtype: Dtype = "float16",
    null: bool = True,
    guidance: float | None = None,
    batch_size: int = 64,
    shard_size: int = 1024,
    device: str = "auto",
    quiet: bool = False,
) -> Manifest:
    """Write the cache `out` of what a model says of the codes `data`; a stopped job goes on where it stopped.

    Sequences are read in raster order (in maps, where the codes are multi-scale), also by a model whose own order is
    random. Ranks of a `torchrun` share the shards.

    Args:
        teacher: a run or model folder.
        top_k: how many of the likeliest codes are kept at a position, by default 64 (all, where there are fewer); the
            mass of the others is one number.
        null: keep the null branch too, which students need that are trained with `train.label_drop`.
        guidance: ask the guided teacher, at this scale along its family's schedule.
        batch_size: images read at a time.
        shard_size: images in a file; what is made of a shard when a job dies is made again.

    Returns:
        The manifest of the cache, with `kept_mass`.

    Raises:
        VarkdError: a model that does not fit the codes, or a folder that holds another cache or other things.
    """
    world = World.from_environment()
    chosen = rank_device(device, world)
    if batch_size < 1:
        raise VarkdError(f"batch_size={batch_size} must be at least 1 image")
    codes, folder = codes_at(data), Path(out)
    CACHE.check(folder)
    model = open_model(teacher, codes).requires_grad_(False)
    target = Plain() if guidance is None else Guided(guidance)
    Method((Term("kd", ForwardKL()),), target=target).check(model, model)
    places = {"teacher": (teacher, weights_hash(model)), "codes": (data, codes.hash)}
    train, plan = codes.split("train"), raster_plan(model)
    top_k = min(_TOP_K, model.vocab_size) if top_k is None else top_k
    planned = plan_cache(
        **{
            name: {"path": relative(path, folder), "given": str(path), "hash": found}
            for name, (path, found) in places.items()
        },
        tokenizer_hash=train.tokenizer_hash,
        vocab_size=model.vocab_size,
        num_classes=model.num_classes,
        sizes=plan.sizes,
        views=codes.manifest["views"],
        num=len(train),
        top_k=top_k,
        dtype=dtype,
        null=null,
        guidance=guidance,
        shard_size=shard_size,
    )
    writer = CacheWriter(folder, planned, world)
    was_finished = writer.is_finished
    world.barrier()  # every rank has looked before one writes
    with write_errors(folder), locked(folder) if world.is_main and not was_finished else nullcontext():
        _write_shards(writer, train, Asked(model.to(chosen), target, plan, top_k), batch_size, quiet)
        world.barrier()
        if world.is_main and not was_finished:
            writer.finish_with(kept_mass=kept_mass(folder, planned, codes.manifest))
    world.barrier()
    return read_cache_manifest(folder)


def raster_plan(model: Backbone) -> Plan:
    """The plan (1, L) that a cache is of: the model's own, or raster order where it draws orders at random."""
    order_1L = torch.arange(model.sequence_length, device=model.device).unsqueeze(0)
    return one_plan(model) or model.plan(1, order_BL=order_1L)


class Asked:
    """A teacher, and what it is asked at every position."""

    def __init__(self, model: Backbone, target: Target, plan: Plan, top_k: int) -> None:
        self.model, self.target, self.top_k = model, target, top_k
        self.plan = Plan(plan.order_BL.to(model.device), plan.sizes)
        self.chunk_rows = affordable_rows(model.vocab_size)

    def __call__(self, codes_BL: Tensor, label_B: Tensor, null: bool) -> Entries:
        """Its likeliest codes, and the log of the mass of the others."""
        device, target = self.model.device, Plain() if null else self.target
        row_B = torch.arange(len(label_B), device=device)
        condition = Condition(label_B.to(device))
        part = Part.of(
            "data",
            codes_BL.to(device),
            condition.null(self.model.null_label) if null else condition,
            Plan(self.plan.order_BL.expand(len(row_B), -1), self.plan.sizes),
            row_B,
        )
        rows, shape, found = live_rows(self.model, part, target), codes_BL.shape, []
        for chunk in chunks(codes_BL.numel(), self.chunk_rows):
            logp_NV = log_softmax(rows.logits(chunk))
            logp_NK, code_NK = logp_NV.topk(self.top_k, dim=1)
            tail_N = log_mass(logp_NV.scatter(1, code_NK, -torch.inf)).squeeze(1)
            found.append((logp_NK, tail_N, code_NK.int()))
        return Entries(*(torch.cat(parts).unflatten(0, shape).cpu().numpy() for parts in zip(*found, strict=True)))


def _write_shards(writer: CacheWriter, train: CodeDataset, ask: Asked, batch_size: int, quiet: bool) -> None:
    todo, views = writer.todo(), range(train.num_views)
    branches = writer.planned["branches"]
    total = sum(shard["num"] for _, shard in todo) * len(views) * len(branches)
    with bar("teaching", total, quiet or not writer.world.is_main) as running:
        done = 0
        for _, shard in todo:
            with writer.open(shard) as append:
                for image_B in _batches(shard, batch_size):
                    label_B = torch.from_numpy(train.labels[image_B])
                    made = []
                    for view in views:
                        codes_BL = train.codes(image_B, np.full_like(image_B, view))
                        made.append([ask(codes_BL, label_B, branch == "null") for branch in branches])
                        running.update(done := done + len(image_B) * len(branches))
                    logp, tail, code = (_stacked(made, field) for field in range(3))
                    append(file=logp, tail=tail, codes=code)


def _batches(shard: Manifest, batch_size: int) -> Iterator[NDArray[np.int64]]:
    """The images of a shard. Batches begin with it, so a resumed job makes the same ones."""
    for start in range(0, shard["num"], batch_size):
        yield np.arange(start, min(start + batch_size, shard["num"])) + shard["start"]


def _stacked(made: list[list[Entries]], field: int) -> NDArray[Any]:
    """One field of all views and branches, (B, views, branches, L, ...)."""
    return np.stack([np.stack([entries[field] for entries in branches], axis=1) for branches in made], axis=1)


def kept_mass(folder: Path, manifest: Manifest, codes: Manifest) -> dict[str, Any]:
    """The mass of the codes that are kept, from the shards' tails: by branch the mean, quantiles (to 1e-4) and bands.

    Bands are the rows of the grid (a few together, where there are many) or the maps of multi-scale codes.
    """
    branches, bands = manifest["branches"], _bands(codes)
    sums = np.zeros((len(branches), sum(manifest["sizes"])))
    histograms, count = np.zeros((len(branches), _BINS), dtype=np.int64), 0
    for shard in manifest["splits"]["train"]["shards"]:
        kept = -np.expm1(map_entries(folder, manifest, shard, "tail").astype(np.float64))
        kept = kept.clip(0, 1)  # the tail was rounded
        sums += kept.sum((0, 1))
        count += kept.shape[0] * kept.shape[1]
        for branch in range(len(branches)):
            histograms[branch] += np.histogram(kept[:, :, branch], _BINS, (0, 1))[0]
    return {
        name: {
            "mean": float(sums[branch].mean() / count),
            "quantiles": {f"{share:g}": _quantile(histograms[branch], share) for share in _QUANTILES},
            "bands": {band: float(sums[branch, where].mean() / count) for band, where in bands.items()},
        }
        for branch, name in enumerate(branches)
    }


def _quantile(histogram: NDArray[np.int64], share: float) -> float:
    """The upper edge of the bin in which the quantile lies."""
    below = histogram.cumsum()
    return float((np.searchsorted(below, share * below[-1]) + 1) / _BINS)


def _bands(codes: Manifest) -> dict[str, slice]:
    """Names and positions of the bands of an image."""
    if "scales" in codes:
        sides = codes["scales"]
        ends = np.cumsum(np.square(sides)).tolist()
        return {f"{side}x{side} map": slice(end - side**2, end) for side, end in zip(sides, ends, strict=True)}
    height, width = codes["grid"]
    parts = np.array_split(np.arange(height), min(height, _MOST_LINES))
    names = [f"row {part[0] + 1}" if len(part) == 1 else f"rows {part[0] + 1}-{part[-1] + 1}" for part in parts]
    return {name: slice(part[0] * width, (part[-1] + 1) * width) for name, part in zip(names, parts, strict=True)}


def describe_cache(folder: Path) -> list[str]:
    """What `varkd teach` says in the end: how much of the teacher the cache holds, and what it takes on disk."""
    manifest = read_json(folder / MANIFEST)
    kept, branches = manifest["kept_mass"], manifest["branches"]
    sequences = manifest["splits"]["train"]["num"] * len(manifest["views"])
    taken = sum(path.stat().st_size for path in folder.glob("train-*.npy"))
    heads = {"label": "with label", "null": "without"}
    lines = [
        f"{sequences} sequences, the {manifest['top_k']} likeliest of {manifest['vocab_size']} codes in "
        f"{manifest['dtype']}: {taken / 2**20:.1f} MiB, {taken / max(1, sequences) / 2**10:.1f} KiB a sequence",
        f"{'kept mass':14}" + "".join(f"{heads[branch]:>12}" for branch in branches),
        _line("mean", [kept[branch]["mean"] for branch in branches]),
    ]
    for share in _QUANTILES:
        lines.append(_line(f"quantile {share:g}", [kept[branch]["quantiles"][f"{share:g}"] for branch in branches]))
    for band in kept["label"]["bands"]:
        lines.append(_line(band, [kept[branch]["bands"][band] for branch in branches]))
    return lines


def _line(name: str, values: list[float]) -> str:
    return f"{name:14}" + "".join(f"{value:12.4f}" for value in values)
