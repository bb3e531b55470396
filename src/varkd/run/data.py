"""Codes folders and what belongs to them: tokenizer and images. `varkd encode` and `varkd tokenizer fit`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from varkd.backbones.protocol import Layout
from varkd.config import RunConfig
from varkd.data.classes import read_class_map
from varkd.data.codes import CodeDataset, check_tokenizer, codes_hash, open_tokenizer, read_manifest
from varkd.data.images import ArchivedImages, ImageSet, Split, open_checked, open_images
from varkd.data.memory import Indexed
from varkd.data.remote import fetch_codes, is_url
from varkd.data.sources import is_gone, locate_source
from varkd.data.views import ten_crop_names, view_names
from varkd.errors import VarkdError
from varkd.folders import expand, locate
from varkd.tokenizers.multiscale import MultiScaleConfig
from varkd.tokenizers.pixels import Pixels, PixelsConfig
from varkd.tokenizers.protocol import Tokenizer
from varkd.tokenizers.store import TOKENIZER, load_official, load_tokenizer, save_tokenizer
from varkd.tokenizers.vq import VQConfig
from varkd.train.encode import encode_images
from varkd.train.fit_tokenizer import FitConfig, fit_tokenizer
from varkd.world import World

_SHOWN = 20  # names in one line


@dataclass(frozen=True)
class Codes:
    """A codes folder with the tokenizer and the images that it came from."""

    folder: Path

    @cached_property
    def manifest(self) -> dict[str, Any]:
        return read_manifest(self.folder)

    @cached_property
    def hash(self) -> str:
        """Names the codes (`codes_hash`)."""
        return codes_hash(self.manifest)

    @cached_property
    def original(self) -> Codes:
        """The codes of real images: these, or those beside which a teacher's samples were made. They are the judge.

        Raises:
            VarkdError: those are gone, or have changed.
        """
        made = self.manifest.get("samples")
        if made is None:
            return self
        found = Codes(locate(made["codes"]["path"], self.folder, made["codes"]["given"]))
        if not (found.folder / "manifest.json").is_file() or found.hash != made["codes"]["hash"]:
            raise VarkdError(
                f"{self.folder} holds samples of a teacher, and the codes of real images that judge them no longer lie "
                f"at {found.folder}: put them back"
            )
        return found

    @cached_property
    def layout(self) -> Layout:
        manifest = self.manifest
        sizes = manifest["tokenizer"]["vocab_size"], len(manifest["class_names"]), tuple(manifest["grid"])
        if "scales" not in manifest:
            return Layout(*sizes)
        num_phi, code_dim = self.tokenizer.quantizer["phi.bias"].shape
        return Layout(*sizes, tuple(manifest["scales"]), code_dim, num_phi)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the manifest, checked by its hash."""
        return open_tokenizer(self.folder, self.manifest)

    def checked(self, tokenizer: Tokenizer) -> Tokenizer:
        return check_tokenizer(tokenizer, self.folder, self.manifest)

    def split(self, split: Split) -> CodeDataset:
        return CodeDataset(self.folder, split)

    def images(self, split: Split, needed: bool = True) -> ImageSet:
        """The images that were encoded; where they are gone but not `needed`, what is known of them (`ArchivedImages`).

        Raises:
            VarkdError: they cannot be read, or are not the ones that were encoded.
        """
        if self.original is not self:
            return self.original.images(split, needed)
        source = self.manifest["source"]
        name = locate_source(source.get("path", source["name"]), self.folder, source["name"])
        fingerprint = source["fingerprints"][split]
        if is_gone(name):
            num = self.manifest["splits"][split]["num"]
            gone = ArchivedImages(name, split, tuple(self.manifest["class_names"]), fingerprint, num)
            return gone if not needed else gone.refuse()
        images = open_images(
            name,
            split,
            image_size=source["image_size"],
            validation=source["validation"],
            seed=source["seed"],
            label=source.get("label"),
            skip=source.get("skipped"),
        )
        if images.fingerprint != fingerprint:
            raise VarkdError(
                f"{name} no longer holds the images that were encoded into {self.folder}: put them back, "
                "or encode what is there now into another folder"
            )
        return images


def codes_at(place: str | Path) -> Codes:
    """A codes folder, or the copy of one behind a URL."""
    return Codes(fetch_codes(str(place)) if is_url(place) else Path(place))


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise VarkdError(f"device={name}: use auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise VarkdError("device=cuda, but PyTorch sees no CUDA device here: use device=cpu")
    return device


def rank_device(device: str, world: World) -> torch.device:
    """The device of this rank: its own GPU where there are several ranks."""
    chosen = pick_device(device)
    if world.size > 1 and chosen.type == "cuda":
        chosen = torch.device("cuda", world.rank % torch.cuda.device_count())
        torch.cuda.set_device(chosen)
    return chosen


def pick_tokenizer(name: str, images: ImageSet) -> tuple[Tokenizer, str | None]:
    """A tokenizer folder, or `pixels` (17 gray levels at the images' size), and its path."""
    if name != "pixels":
        return load_tokenizer(expand(name)), expand(name)
    channels, height, width = images.image_shape
    if channels != 1:
        raise VarkdError(
            f"the pixels tokenizer takes gray images, these have {channels} channels: use "
            "`varkd tokenizer fit` and give its folder"
        )
    return Pixels(PixelsConfig(height=height, width=width)), None


def encode(
    data: str | Indexed,
    tokenizer: str,
    out: Path,
    *,
    image_size: int | None = None,
    validation: float = 0.1,
    seed: int = 0,
    flip: bool = False,
    shifts: int = 0,
    ten_crop: float | None = None,
    device: str = "auto",
    batch_size: int = 256,
    shard_size: int = 4096,
    class_map: Path | None = None,
    label: str | None = None,
    skip_corrupt: bool = False,
    workers: int = 0,
    quiet: bool = False,
) -> dict[str, Any]:
    """`varkd encode`: images -> code shards and a reconstruction check. Returns the manifest.

    `class_map` is a file that gives each class its number in a model of more classes (`data.classes`). `workers`
    processes decode images ahead of the tokenizer.
    """
    world = World.from_environment()
    if ten_crop is not None and (flip or shifts or image_size is None):
        raise VarkdError("--ten-crop needs --image-size and goes without --flip and --shifts: it has mirror images")
    views = ten_crop_names(image_size, ten_crop) if ten_crop and image_size else view_names(flip, shifts)
    images = open_images(data, "train", image_size=image_size, validation=validation, seed=seed, label=label)
    module, path = pick_tokenizer(tokenizer, images)
    return encode_images(
        data,
        module,
        path,
        out,
        image_size=image_size,
        validation=validation,
        seed=seed,
        views=views,
        batch_size=batch_size,
        shard_size=shard_size,
        class_map=read_class_map(class_map, images.class_names) if class_map else None,
        label=label,
        skip_corrupt=skip_corrupt,
        workers=workers,
        device=pick_device(device),
        world=world,
        quiet=quiet,
    )


def describe_codes(folder: Path) -> list[str]:
    """What `varkd encode` says in the end: images, classes, and everything that is not there or was not read."""
    manifest = read_manifest(folder)
    names, source, check = manifest["class_names"], manifest["source"], manifest["reconstruction"]
    count_SK = {
        split: np.bincount(CodeDataset(folder, split).labels, minlength=len(names)) for split in manifest["splits"]
    }
    images = ", ".join(f"{split} {count_K.sum()}" for split, count_K in count_SK.items())
    total_K = np.sum(list(count_SK.values()), axis=0)
    shown = ", ".join(f"{name} {total}" for name, total in zip(names[:_SHOWN], total_K, strict=False))
    more = ", ..." if len(names) > _SHOWN else ""
    lines = [
        f"{images} images in {len(manifest['views'])} view(s); reconstruction PSNR {check['psnr']:.2f} dB "
        f"(N = {check['num']})",
        f"{len(names)} class(es): {shown}{more}",
    ]
    for split, count_K in count_SK.items():
        empty = [name for name, count in zip(names, count_K, strict=True) if count == 0]
        if empty:
            more = ", ..." if len(empty) > _SHOWN else ""
            lines.append(f"no {split} images in {len(empty)} class(es): {', '.join(empty[:_SHOWN])}{more}")
    if ignored := source.get("ignored"):
        lines.append("not read as images: " + ", ".join(f"{num} {ending}" for ending, num in sorted(ignored.items())))
    if skipped := [key for keys in source.get("skipped", {}).values() for key in keys]:
        lines.append(
            f"left out as corrupt: {len(skipped)} ({', '.join(skipped[:_SHOWN])}"
            f"{', ...' if len(skipped) > _SHOWN else ''})"
        )
    return lines


def open_codes(run: RunConfig) -> Codes:
    """The codes of a run: `data` itself, or `out`/codes encoded from `data` with `tokenizer`."""
    if not run.data:
        raise VarkdError("give data= (a codes folder from `varkd encode`, or images together with tokenizer=)")
    if is_url(run.data) and run.tokenizer is None:
        return codes_at(run.data)
    codes = Codes(Path(run.data))
    if (codes.folder / "manifest.json").is_file():
        if run.tokenizer not in (None, "pixels"):
            codes.checked(load_tokenizer(str(run.tokenizer)))
        return codes
    if run.tokenizer is None:
        raise VarkdError(
            f"data={run.data} is not a codes folder: encode it first (`varkd encode {run.data} "
            "--tokenizer DIR --out CODES`), or give tokenizer= too"
        )
    encode(run.data, run.tokenizer, Path(run.out) / "codes", device=run.device)
    return Codes(Path(run.out) / "codes")


def fit(
    data: str,
    out: Path,
    *,
    kind: str = "vq",
    scales: Sequence[int] | None = None,
    image_size: int | None = None,
    validation: float = 0.1,
    vocab_size: int = 512,
    downsampling: int = 4,
    steps: int | None = None,
    seed: int = 0,
    flip: bool = True,
    label: str | None = None,
    skip_corrupt: bool = False,
    device: str = "auto",
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """`varkd tokenizer fit`: train a tokenizer on images, save it to `out`, return its record (PSNR, seconds)."""
    _check_free(out, overwrite)
    if kind == "vq" and scales is not None:
        raise VarkdError("--scales is for --kind multiscale: the vq tokenizer has one grid of codes")
    sets, skipped = open_checked(
        data,
        skip_corrupt=skip_corrupt,
        quiet=quiet,
        image_size=image_size,
        validation=validation,
        seed=seed,
        label=label,
    )
    train, held_out = sets["train"], sets["validation"]
    channels, height, width = train.image_shape
    if height != width:
        raise VarkdError(f"the {kind} tokenizer takes square images, these are {height}x{width}: give --image-size")
    if kind == "vq":
        config = VQConfig.small(height, channels, vocab_size, downsampling)
    else:
        config = MultiScaleConfig.small(height, channels, vocab_size, downsampling, scales)
    chosen = pick_device(device)
    settings = FitConfig(flip=flip, seed=seed, bf16=_multiplies_bf16(chosen))
    settings = settings if steps is None else replace(settings, steps=steps)
    tokenizer, record = fit_tokenizer(train, held_out, config, settings, device=chosen, quiet=quiet)
    record["skipped"] = sum(map(len, skipped.values()))
    save_tokenizer(tokenizer.cpu(), out, record)
    return record


def _multiplies_bf16(device: torch.device) -> bool:
    """Whether bfloat16 is faster than float32 there (its own instructions; emulation is slower)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # no public name for it yet
    return bool(native and native())


def import_official(
    file: Path,
    out: Path,
    *,
    image_size: int = 256,
    kind: str | None = None,
    scales: Sequence[int] | None = None,
    overwrite: bool = False,
) -> Tokenizer:
    """`varkd tokenizer import`: a published tokenizer (see `load_official`) -> a tokenizer folder."""
    _check_free(out, overwrite)
    tokenizer = load_official(file, image_size, kind, scales)
    save_tokenizer(tokenizer, out)
    return tokenizer


def _check_free(out: Path, overwrite: bool) -> None:
    if (out / "config.json").exists() and not overwrite:
        raise VarkdError(f"{out} already holds a tokenizer: choose another --out, or --overwrite")
    TOKENIZER.check_replaceable(out)
