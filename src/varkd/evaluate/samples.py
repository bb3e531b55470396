"""What samples are worth: the "metrics" object of `metrics.json`, against a named set of real images.

A Fréchet distance rewards memorizing, so the distance to the nearest training image and the share of copies stand
beside it. All intervals are over the samples, with the reference held fixed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from varkd.data.images import ImageSet
from varkd.errors import VarkdError
from varkd.evaluate.features import FeatureNet, features_of
from varkd.evaluate.fid import frechet_distance, frechet_draws, gaussian
from varkd.evaluate.intervals import Estimate, centered_bootstrap, interval, share
from varkd.evaluate.precision_recall import MAX_POINTS, NEIGHBORS, precision_recall
from varkd.files import atomic_folder, read_json, sha256_of, write_json
from varkd.folders import Own, json_with
from varkd.progress import track
from varkd.world import Rng

COPY_QUANTILE = 0.01
MAX_HELD_OUT = 2000
_NEAREST_SIDE = 32
_ROWS = 2048
_KIND = "varkd-reference"
REFERENCE = Own("a reference", ("config.json",), json_with("key", kind=(_KIND,)), ("reference.safetensors",))


@dataclass(frozen=True)
class ReferenceSet:
    """The real images that samples are compared with.

    `features_NF` (float64) and `pixels_ND` (uint8, sides averaged down to at most 32) are of the same N training
    images. `copy_distance` is the 1 % quantile of the distances from held-out real images to their nearest training
    image: a sample that is no farther than that counts as a copy, and unseen real images score about 0.01. With
    `flips`, the mirror image of a sample is searched for too.
    """

    name: str
    class_names: tuple[str, ...]
    key: str
    net_hash: str
    flips: bool
    copy_distance: float
    features_NF: Tensor
    pixels_ND: Tensor

    @property
    def num(self) -> int:
        return len(self.features_NF)

    @cached_property
    def gaussian(self) -> tuple[Tensor, Tensor]:
        return gaussian(self.features_NF)

    def describe(self) -> dict[str, Any]:
        """The protocol for a person to read: which images, how many, and every cap and threshold."""
        return {
            "name": self.name,
            "num": self.num,
            "key": self.key,
            "copy_distance": self.copy_distance,
            "flips": self.flips,
            "precision_recall": {"neighbors": NEIGHBORS, "max_points": MAX_POINTS},
        }


def reference_set(
    train: ImageSet,
    validation: ImageSet,
    net: FeatureNet,
    *,
    flips: bool = False,
    max_images: int = 50_000,
    seed: int = 0,
    cache: Path | None = None,
    quiet: bool = False,
) -> ReferenceSet:
    """The reference for `train` (a random `max_images` of it where it is larger), built or read from `cache`.

    A cache that was built from other images, another network or other options is built again.

    Raises:
        VarkdError: fewer than 4 training or 2 validation images, or images of another shape than the network's.
    """
    if len(train) <= NEIGHBORS or len(validation) < 2:
        raise VarkdError(
            f"a reference needs at least {NEIGHBORS + 1} training and 2 validation images, "
            f"not {len(train)} and {len(validation)}"
        )
    options = f"{flips} {max_images} {seed} {_NEAREST_SIDE} {MAX_HELD_OUT} {COPY_QUANTILE}"
    key = sha256_of("/".join([net.hash, train.fingerprint, validation.fingerprint, options]).encode())
    if cache is not None and (cache / "config.json").exists():
        found = load_reference(cache)
        if found.key == key:
            return found
    chosen_N = _chosen(len(train), max_images, Rng(seed).generator("reference/train"))
    held_out_M = _chosen(len(validation), MAX_HELD_OUT, Rng(seed).generator("reference/validation"))
    features, pixels = [], []
    batches = chosen_N.split(_ROWS)
    for index_B in track(batches, "reference images", len(batches), quiet):
        images_BCHW = train.batch(index_B)
        features.append(features_of(net, images_BCHW)[0])
        pixels.append(_pixels(images_BCHW))
    held_out = torch.cat([_pixels(validation.batch(index_B)) for index_B in held_out_M.split(_ROWS)])
    pixels_ND = torch.cat(pixels).flatten(1)
    distances_M = _nearest(held_out, pixels_ND, flips, net.device)
    reference = ReferenceSet(
        name=train.name,
        class_names=tuple(train.class_names),
        key=key,
        net_hash=net.hash,
        flips=flips,
        copy_distance=distances_M.quantile(COPY_QUANTILE, interpolation="lower").item(),
        features_NF=torch.cat(features),
        pixels_ND=pixels_ND,
    )
    if cache is not None:
        save_reference(reference, cache)
    return reference


def save_reference(reference: ReferenceSet, folder: Path) -> None:
    """Write `config.json` and `reference.safetensors` as one folder, atomically."""
    names = ("name", "class_names", "key", "net_hash", "flips", "copy_distance")
    tensors = {"features": reference.features_NF, "pixels": reference.pixels_ND}
    with atomic_folder(folder, REFERENCE) as temporary:
        config = {"kind": _KIND, **{name: getattr(reference, name) for name in names}}
        write_json(temporary / "config.json", config | {"tensors": _tensor_hash(**tensors)})
        save_file(tensors, temporary / "reference.safetensors")


def load_reference(folder: Path) -> ReferenceSet:
    """What `save_reference` wrote.

    Raises:
        VarkdError: a file is missing or damaged.
    """
    config = read_json(folder / "config.json")
    path = folder / "reference.safetensors"
    try:
        tensors = load_file(path)
        if config.pop("kind") != _KIND or config.pop("tensors") != _tensor_hash(**tensors):
            raise ValueError("its hash does not fit")
        config["class_names"] = tuple(config["class_names"])
        return ReferenceSet(**config, features_NF=tensors["features"], pixels_ND=tensors["pixels"])
    except (AttributeError, KeyError, TypeError, ValueError, FileNotFoundError, SafetensorError) as error:
        raise VarkdError(f"the reference in {folder} is damaged: delete that folder to build it again") from error


def sample_metrics(
    images_BCHW: Tensor,
    label_B: Tensor,
    reference: ReferenceSet,
    net: FeatureNet,
    *,
    resamples: int = 200,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Samples (uint8) and the labels that they were drawn for (int64) -> the "metrics" object: value, low and high of

    fd              squared Fréchet distance of features to the reference (comparable at equal N only)
    precision       share of samples inside the manifold of real features      recall   the other way round
    accuracy        share of samples that the network assigns to their label; null where it knows no classes
    class_entropy   entropy (nats, 0 to ln K) of the mean predicted class distribution; null where it knows no classes
    nearest         mean root-mean-square pixel difference (pixels in [0, 1]) to the nearest training image
    copies          share of samples no farther than the reference's `copy_distance` from a training image

    "fd" also holds `draws`, its value on every resample: runs that share labels and noise are compared draw by draw.

    Raises:
        VarkdError: fewer than 4 samples; images, labels or a network that do not fit the reference; features that are
            not finite.
    """
    _check_samples(images_BCHW, label_B, reference, net)
    num = len(images_BCHW)
    features_BF, logits_BK = features_of(net, images_BCHW)
    manifolds = precision_recall(features_BF, reference.features_NF, resamples=resamples, seed=seed)
    nearest_B = _nearest(_pixels(images_BCHW), reference.pixels_ND, reference.flips, net.device)
    distance, draw_R = frechet_draws(features_BF, *reference.gaussian, resamples, seed)
    estimates: dict[str, Estimate | None] = {
        "fd": interval(distance, draw_R, bounds=(0, math.inf)),
        "precision": manifolds.precision,
        "recall": manifolds.recall,
        "accuracy": None,
        "class_entropy": None,
        "nearest": centered_bootstrap(
            lambda counts_RB: counts_RB @ nearest_B / num, num, resamples, seed, bounds=(0, 1)
        ),
        "copies": share(int((nearest_B <= reference.copy_distance).sum()), num),
    }
    if net.config.task == "classes":
        hits_B = logits_BK.argmax(1) == label_B.cpu()
        estimates["accuracy"] = share(int(hits_B.sum()), num)
        estimates["class_entropy"] = _class_entropy(logits_BK.softmax(1), resamples, seed)
    unknown: dict[str, Any] = dict.fromkeys(Estimate._fields)
    found = {name: unknown.copy() if estimate is None else estimate._asdict() for name, estimate in estimates.items()}
    found["fd"]["draws"] = [round(draw, 6) for draw in draw_R.tolist()]
    return found


def floors(
    validation: ImageSet | Tensor, reconstructions: Tensor | None, reference: ReferenceSet, net: FeatureNet
) -> dict[str, float | None]:
    """Fréchet distances that no model is to blame for: of real held-out images, and of the tokenizer's reconstructions.

    Like every distance they shrink with the number of images, so give about as many as there are samples.
    """

    def distance(images: ImageSet | Tensor) -> float:
        return frechet_distance(*gaussian(features_of(net, images)[0]), *reference.gaussian)

    reconstruction = None if reconstructions is None else distance(reconstructions)
    return {"fd_validation": distance(validation), "fd_reconstruction": reconstruction}


def _check_samples(images_BCHW: Tensor, label_B: Tensor, reference: ReferenceSet, net: FeatureNet) -> None:
    if len(images_BCHW) <= NEIGHBORS:
        raise VarkdError(f"sample metrics need at least {NEIGHBORS + 1} samples, not {len(images_BCHW)}: draw more")
    if label_B.shape != images_BCHW.shape[:1]:
        raise VarkdError(f"{len(images_BCHW)} samples need as many labels, not shape {tuple(label_B.shape)}")
    if reference.net_hash != net.hash:
        raise VarkdError(f"the reference {reference.name} was built with another feature network: build it again")
    num_classes = len(reference.class_names)
    if int(label_B.min()) < 0 or int(label_B.max()) >= num_classes:
        raise VarkdError(f"the labels of the samples are not among the {num_classes} classes of {reference.name}")


def _class_entropy(probability_BK: Tensor, resamples: int, seed: int) -> Estimate:
    num, num_classes = probability_BK.shape

    def entropy(counts_RB: Tensor) -> Tensor:
        return torch.special.entr(counts_RB @ probability_BK / num).sum(1)

    return centered_bootstrap(entropy, num, resamples, seed, bounds=(0.0, math.log(num_classes)))


def _nearest(images_BCHW: Tensor, pixels_ND: Tensor, flips: bool, device: torch.device) -> Tensor:
    """Root-mean-square pixel difference (pixels in [0, 1]) to the nearest row of `pixels_ND`: float64 (B,).

    The winner is found by one matrix product in float32; its distance is then computed exactly, so that a copy is at 0.
    """
    views = [images_BCHW, images_BCHW.flip(3)] if flips else [images_BCHW]
    return torch.stack([_nearest_rows(view.flatten(1), pixels_ND, device) for view in views]).amin(0)


def _nearest_rows(rows_BD: Tensor, pixels_ND: Tensor, device: torch.device) -> Tensor:
    centered = lambda pixels: pixels.to(device).float() / 255 - 0.5
    rows = centered(rows_BD)
    best_B = torch.full((len(rows),), math.inf, device=device)
    index_B = torch.zeros(len(rows), dtype=torch.int64, device=device)
    for start in range(0, len(pixels_ND), _ROWS):
        candidates = centered(pixels_ND[start : start + _ROWS])
        # |row|^2 is left out: it is the same for all candidates of a row.
        scores = torch.addmm(candidates.square().sum(1), rows, candidates.T, alpha=-2)
        least_B, where_B = scores.min(1)
        index_B = torch.where(least_B < best_B, where_B + start, index_B)
        best_B = torch.minimum(least_B, best_B)
    difference_B = [
        (chunk.double() - pixels_ND[index]).square().mean(1).sqrt() / 255
        for chunk, index in zip(rows_BD.split(_ROWS), index_B.cpu().split(_ROWS), strict=True)
    ]
    return torch.cat(difference_B)


def _pixels(images_BCHW: Tensor) -> Tensor:
    """uint8 images with sides averaged down to at most 32, which bounds the cost of the search."""
    height, width = images_BCHW.shape[2:]
    if max(height, width) <= _NEAREST_SIDE:
        return images_BCHW.cpu()
    sides = (min(height, _NEAREST_SIDE), min(width, _NEAREST_SIDE))
    return F.adaptive_avg_pool2d(images_BCHW.float(), sides).round().to(torch.uint8).cpu()


def _tensor_hash(**tensors: Tensor) -> str:
    return sha256_of(*(name.encode() + tensors[name].numpy().tobytes() for name in sorted(tensors)))


def _chosen(num: int, most: int, generator: torch.Generator) -> Tensor:
    """All indices, or a random `most` of them in ascending order."""
    if num <= most:
        return torch.arange(num)
    return torch.randperm(num, generator=generator)[:most].sort().values
