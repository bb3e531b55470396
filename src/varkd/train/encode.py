"""Images -> codes folder (`varkd encode`), and a check of what the tokenizer loses on the way there and back.

PSNR = 10 log10(255^2 / MSE) of each image in uint8, then the mean over images.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from varkd import pictures, progress
from varkd.data.codes import MANIFEST, PARTIAL, CodeDataset, read_manifest
from varkd.data.images import ImageSet, Skipped, Split, open_checked, open_images
from varkd.data.memory import Indexed
from varkd.data.sources import relative_source
from varkd.data.views import apply_view, check_views, load_size
from varkd.data.workers import check_workers, mapped
from varkd.data.writer import CodeWriter, Manifest, plan_manifest
from varkd.errors import VarkdError
from varkd.files import read_json
from varkd.folders import relative
from varkd.tokenizers.protocol import Tokenizer, to_unit
from varkd.world import Rng, World

PSNR_CAP = 99.0  # dB; stands for an image that comes back without any error
_SPLITS: tuple[Split, ...] = ("train", "validation")
_CHECKED_IMAGES = 1024
_SHOWN_IMAGES = 16
_PIECE = 32  # images that a process decodes at a time: two pieces a process wait in memory
Sets = dict[Split, ImageSet]
Piece = tuple[Split, int, int]


def encode_images(
    source: str | Indexed,
    tokenizer: Tokenizer,
    tokenizer_path: str | None,
    out: Path,
    *,
    image_size: int | None = None,
    validation: float = 0.1,
    seed: int = 0,
    views: tuple[str, ...] = ("identity",),
    batch_size: int = 256,
    shard_size: int = 4096,
    class_map: list[int] | None = None,
    label: str | None = None,
    skip_corrupt: bool = False,
    workers: int = 0,
    device: str | torch.device = "cpu",
    world: World | None = None,
    quiet: bool = False,
) -> Manifest:
    """Encode both splits of `source` into `out` and return the manifest; a stopped job goes on where it stopped.

    The train split is encoded in all `views`, the validation split as it is. With `tokenizer_path` None the tokenizer
    is saved to `out/tokenizer`. Ranks of `world` share the shards, and in each rank `workers` processes decode images
    ahead of the tokenizer (0: none; the bytes are the same). Every image is decoded before the first shard is written;
    with `skip_corrupt` those that cannot be used are left out, and named in the manifest.

    Raises:
        VarkdError: see `open_images`; also images of another shape than the tokenizer's, unknown views, or a folder
            that holds the codes of another job.
    """
    world = world or World()
    check_views(views)
    check_workers(workers)
    if batch_size < 1:
        raise VarkdError(f"batch_size={batch_size} must be at least 1 image")
    options = {"image_size": image_size, "validation": validation, "seed": seed, "label": label}
    _check_shape(open_images(source, "train", **options), tokenizer)
    sets, skipped = _sets(source, out, skip_corrupt, workers, world, quiet, options)
    train = sets["train"]
    planned = plan_manifest(
        tokenizer={
            "path": relative(tokenizer_path, out) if tokenizer_path else "tokenizer",
            **({"given": tokenizer_path} if tokenizer_path else {}),
            "hash": tokenizer.hash,
            "kind": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size,
        },
        grid=tokenizer.grid,
        scales=tokenizer.scales,
        image_shape=train.image_shape,
        class_names=train.class_names,
        views=views,
        source={
            "name": train.name,
            "path": relative_source(source, out),
            "image_size": image_size,
            "seed": seed,
            "validation": validation,
            "fingerprints": {split: images.fingerprint for split, images in sets.items()},
            **({"label": label} if label else {}),
            **({"skipped": skipped} if skipped else {}),
            **({"ignored": train.ignored} if train.ignored else {}),
        },
        nums={split: len(images) for split, images in sets.items()},
        shard_size=shard_size,
        class_map=class_map,
    )
    writer = CodeWriter(out, planned, world)
    was_finished = writer.is_finished
    if world.is_main and tokenizer_path is None and not was_finished:
        _save_tokenizer(tokenizer, out / "tokenizer")
    tokenizer = tokenizer.to(device).eval()
    if (load := load_size(views)) is not None:  # crops are cut from larger images than the tokenizer's
        sets["train"] = open_images(source, "train", skip=skipped, **{**options, "image_size": load})
    _write_shards(writer, sets, tokenizer, views, batch_size, workers, device, quiet)
    world.barrier()
    if world.is_main and not was_finished:
        writer.finish(_reconstruction(out, planned, sets["validation"], tokenizer, batch_size, device))
    elif world.is_main and class_map is not None:
        writer.note(class_map=class_map)
    world.barrier()
    return read_manifest(out)


def _sets(
    source: str | Indexed,
    out: Path,
    skip_corrupt: bool,
    workers: int,
    world: World,
    quiet: bool,
    options: dict[str, Any],
) -> tuple[Sets, Skipped]:
    """Both splits, and what was left out of them. A job that goes on has been checked, and leaves out the same ones."""
    begun = next((out / name for name in (MANIFEST, PARTIAL) if (out / name).is_file()), None)
    if begun is None:
        return open_checked(source, skip_corrupt=skip_corrupt, workers=workers, world=world, quiet=quiet, **options)
    skip = read_json(begun).get("source", {}).get("skipped", {})
    return {split: open_images(source, split, skip=skip, **options) for split in _SPLITS}, skip


def _check_shape(images: ImageSet, tokenizer: Tokenizer) -> None:
    if images.image_shape != tokenizer.image_shape:
        found, asked = ("x".join(map(str, shape)) for shape in (images.image_shape, tokenizer.image_shape))
        raise VarkdError(
            f"{images.name} has images of {found} (channels x height x width) but the tokenizer takes {asked}: "
            "set image_size, or use a tokenizer for these images"
        )


def _save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    from varkd.tokenizers.store import save_tokenizer

    save_tokenizer(tokenizer, folder)


def _write_shards(
    writer: CodeWriter,
    sets: Sets,
    tokenizer: Tokenizer,
    views: tuple[str, ...],
    batch_size: int,
    workers: int,
    device: str | torch.device,
    quiet: bool,
) -> None:
    todo: list[tuple[Split, Manifest, tuple[str, ...]]] = [
        ("train" if split == "train" else "validation", shard, views if split == "train" else ("identity",))
        for split, shard in writer.todo()
    ]
    total = sum(shard["num"] * len(names) for _, shard, names in todo)
    batches = _batches(sets, [(split, shard) for split, shard, _ in todo], batch_size, workers)
    with progress.bar("encoding", total, quiet or not writer.world.is_main) as bar:
        done = 0
        for split, shard, names in todo:
            shape = (shard["num"], len(names), tokenizer.sequence_length)
            codes_NvL = np.empty(shape, dtype=np.uint16)
            for rows in _rows(shard, batch_size):
                for view, codes_BL in enumerate(_encoded(next(batches).to(device), names, tokenizer)):
                    codes_NvL[rows, view] = codes_BL
                    bar.update(done := done + len(codes_BL))
            label_N = sets[split].labels[shard["start"] : shard["start"] + shard["num"]]
            writer.write(split, shard, codes_NvL, label_N)


def _rows(shard: Manifest, batch_size: int) -> Iterator[slice]:
    """Batches begin with the shard, so a resumed job makes the same ones."""
    for start in range(0, shard["num"], batch_size):
        yield slice(start, min(start + batch_size, shard["num"]))


def _batches(sets: Sets, todo: list[tuple[Split, Manifest]], batch_size: int, workers: int) -> Iterator[Tensor]:
    """The images of all batches of all shards, in order: uint8 (B, C, H, W). Processes decode them piece by piece."""
    batches: list[Piece] = [
        (split, shard["start"] + rows.start, shard["start"] + rows.stop)
        for split, shard in todo
        for rows in _rows(shard, batch_size)
    ]
    if not workers:
        yield from (sets[split].batch(np.arange(start, stop)) for split, start, stop in batches)
        return

    def decode(piece: Piece) -> NDArray[np.uint8]:
        split, start, stop = piece
        return sets[split].decoded(np.arange(start, stop))

    pieces: list[list[Piece]] = [
        [(split, at, min(at + _PIECE, stop)) for at in range(start, stop, _PIECE)] for split, start, stop in batches
    ]
    decoded = mapped(decode, [piece for batch in pieces for piece in batch], workers)
    for batch in pieces:
        yield torch.from_numpy(np.concatenate([next(decoded) for _ in batch]))


@torch.no_grad()
def _encoded(images_BCHW: Tensor, views: tuple[str, ...], tokenizer: Tokenizer) -> Iterator[NDArray[np.int64]]:
    """The codes of every view: (B, L)."""
    for name in views:
        yield tokenizer.encode(to_unit(apply_view(name, images_BCHW))).cpu().numpy()


@torch.no_grad()
def _reconstruction(
    out: Path,
    planned: Manifest,
    images: ImageSet,
    tokenizer: Tokenizer,
    batch_size: int,
    device: str | torch.device,
) -> dict[str, Any]:
    """Decode validation codes, write reconstruction.png, return {"psnr": mean dB, "num": images}."""
    codes = CodeDataset(out, "validation", manifest=planned)
    index_N = Rng(0).subset("reconstruction", len(codes), _CHECKED_IMAGES).numpy()

    def pair(index_B: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        codes_BL = codes.codes(index_B, np.zeros_like(index_B)).to(device)
        return images.batch(index_B), tokenizer.to_uint8(tokenizer.decode(codes_BL)).cpu()

    batches = [index_N[start : start + batch_size] for start in range(0, len(index_N), batch_size)]
    psnrs = [psnr(*pair(index_B)) for index_B in batches]
    shown_B = index_N[np.unique(np.linspace(0, len(index_N) - 1, _SHOWN_IMAGES).astype(int))]  # of all classes
    rows = torch.cat(pair(shown_B)).permute(0, 2, 3, 1).numpy()
    pictures.save_png(out / "reconstruction.png", pictures.grid(rows, len(shown_B)))
    return {"psnr": float(torch.cat(psnrs).mean()), "num": len(index_N)}


def psnr(images_BCHW: Tensor, others_BCHW: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of uint8 images in dB: float64 (B,), `PSNR_CAP` where they are equal."""
    error_B = (images_BCHW.double() - others_BCHW.double()).square().flatten(1).mean(1)
    return (10 * torch.log10(255.0**2 / error_B)).clamp(max=PSNR_CAP)
