"""FID, sFID, Inception Score, precision and recall as the evaluator of ADM (Dhariwal and Nichol 2021) computes them.

Published numbers of class-conditional ImageNet models are of this evaluator. Every step that moves a number is written
in the protocol that a result carries; two results are compared only where their protocols agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from varkd.errors import VarkdError
from varkd.evaluate.extraction import extract
from varkd.evaluate.image_files import ImageFiles, class_sorted, open_image_files
from varkd.evaluate.inception import Inception
from varkd.evaluate.inception_files import load_inception
from varkd.evaluate.inception_score import CHUNK, inception_score, inception_score_interval
from varkd.evaluate.intervals import Estimate
from varkd.evaluate.kernel_distance import fid_infinity, kid
from varkd.evaluate.manifolds import MODES, NEIGHBORS, Mode, precision_recall
from varkd.evaluate.moments import frechet, frechet_interval, gaussian_of
from varkd.evaluate.reference import Reference, open_reference
from varkd.world import World

NAMES = ("fid", "sfid", "is", "precision", "recall")
EXTRA_NAMES = ("kid", "fid_infinity")
PUBLISHED_NUM = 50_000


@dataclass(frozen=True)
class AdmResult:
    """Numbers by name (see `NAMES`; None: the reference lacks what it takes), 95 % intervals where they are valid, the
    protocol, and warnings of one line each."""

    values: dict[str, float | None]
    intervals: dict[str, tuple[float, float] | None]
    protocol: dict[str, Any]
    warnings: list[str] = field(default_factory=list)

    def __getitem__(self, name: str) -> float | None:
        return self.values[name]

    def keys(self) -> list[str]:
        """The names of the numbers: `dict(result)` holds them."""
        return list(self.values)

    def to_json(self) -> dict[str, Any]:
        """One flat JSON object: the numbers, `intervals`, `protocol` and `warnings`."""
        return {**self.values, "intervals": self.intervals, "protocol": self.protocol, "warnings": self.warnings}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> AdmResult:
        """What `to_json` gave.

        Raises:
            VarkdError: some other JSON.
        """
        try:
            names = [name for name in (*NAMES, *EXTRA_NAMES) if name in record]
            return cls(
                {name: record[name] for name in names},
                dict(record["intervals"]),
                dict(record["protocol"]),
                list(record["warnings"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise VarkdError("this is no result of `varkd evaluate --reference`: it has no protocol") from error


def adm(
    samples: str | Path | Tensor | NDArray[np.uint8],
    reference: str | Path | Reference,
    inception: str | Path | Inception | None = None,
    *,
    k: int = NEIGHBORS,
    mode: Mode = "adm",
    resamples: int = 200,
    extras: bool = False,
    batch_size: int | None = None,
    device: torch.device | str = "cpu",
    world: World | None = None,
    seed: int = 0,
    quiet: bool = True,
) -> AdmResult:
    """Judge images against a reference.

    Args:
        samples: a folder, an .npz with `arr_0`, or uint8 images (N, H, W, 3), in the order that counts for the IS.
        reference: OpenAI's .npz, images, or a saved reference.
        inception: a weight file, a loaded network, or None for the published weights in the cache.
        mode: "adm" rounds distances of precision and recall to float16 as published numbers do; "float32" does not.
        resamples: bootstrap draws behind the intervals of IS and recall; 0 leaves these intervals out.
        extras: KID and FID-infinity too (needs the reference's images; minutes on a CPU).
        device: of the network, where it is loaded here.
        world: the ranks that share the work; each returns the whole result.
        seed: of the bootstrap and of KID's subsets.

    Raises:
        VarkdError: unreadable or wrong images, references or weights, or fewer than k + 1 images in either set.
    """
    if mode not in MODES:
        raise VarkdError(f"unknown mode '{mode}' of precision and recall: known: {', '.join(MODES)}")
    images = open_image_files(samples)
    if images.num <= k:
        raise VarkdError(f"{images.name} holds {images.num} images: at least {k + 1} are needed")
    net = inception if isinstance(inception, Inception) else load_inception(inception, device=device)
    world = world or World()
    options: dict[str, Any] = {"batch_size": batch_size, "world": world, "quiet": quiet}
    real = open_reference(reference, net, **options)
    features = extract(images, net, label="samples", **options)
    logits_NC = torch.cat([net.logits(rows) for rows in features.pool_NF.split(4096)])
    found: dict[str, Estimate | float | None] = dict.fromkeys(NAMES)
    for name, sample_NF, against in (("fid", features.pool_NF, real.pool), ("sfid", features.spatial_NF, real.spatial)):
        if against is not None:
            own = gaussian_of(sample_NF)
            value = frechet(own, against)
            found[name] = frechet_interval(sample_NF, own, against, value) or value
    if resamples:
        found["is"] = inception_score_interval(logits_NC, resamples, seed)
    else:
        found["is"] = inception_score(logits_NC)
    if real.features_MF is not None:
        points = precision_recall(
            real.features_MF, features.pool_NF, k, mode, resamples=resamples, seed=seed, world=world
        )
        found |= {"precision": points.precision, "recall": points.recall if resamples else points.recall.value}
    if extras:
        found |= _extras(real, features.pool_NF, seed)
    warnings = [*images.warnings, *_warnings(images, real, logits_NC)]
    values = {name: value.value if isinstance(value, Estimate) else value for name, value in found.items()}
    intervals = {
        name: (value.low, value.high) if isinstance(value, Estimate) else None for name, value in found.items()
    }
    return AdmResult(values, intervals, _protocol(images, real, net, k, mode), warnings)


def _extras(real: Reference, pool_NF: Tensor, seed: int) -> dict[str, Estimate | float]:
    if real.features_MF is None:
        raise VarkdError(f"KID needs images in the reference, and {real.name} holds statistics only")
    return {
        "kid": kid(real.features_MF.to(pool_NF.device), pool_NF, seed=seed),
        "fid_infinity": fid_infinity(pool_NF, real.pool, seed=seed),
    }


def _protocol(images: ImageFiles, real: Reference, net: Inception, k: int, mode: Mode) -> dict[str, Any]:
    return {
        "evaluator": "ADM",
        "num": images.num,
        "image_size": [images.height, images.width],
        "reference": real.describe(),
        "inception": {
            "network": "2015-12-05",
            "weights": net.hash,
            "resize": "TF1 bilinear to 299",
            "dtype": str(net.dtype).removeprefix("torch."),
        },
        "fid": "pool_3 (2048)",
        "sfid": "mixed_6/conv after ReLU, 7 channels, NHWC (2023)",
        "is": {"chunk": CHUNK, "order": "file", "outputs": 1008, "bias": False},
        "precision_recall": {
            "k": k,
            "mode": mode,
            "samples": images.num,
            "reference": None if real.features_MF is None else len(real.features_MF),
        },
    }


def _warnings(images: ImageFiles, real: Reference, logits_NC: Tensor) -> list[str]:
    found = []
    by_label = images.labels is not None and class_sorted(images.labels)
    if by_label or class_sorted(logits_NC.argmax(1).cpu().numpy()):
        found.append(
            f"{images.name} is sorted by class: the Inception Score of consecutive chunks is far too low; "
            "shuffle the images (the other numbers do not depend on the order)"
        )
    if images.num < PUBLISHED_NUM:
        found.append(f"{images.num} samples: FID and sFID are biased upward against published numbers of 50,000")
    if "mu" in images.statistics():
        found.append(
            f"{images.name} stores a key mu, which OpenAI's evaluator would use instead of the images: remove it"
        )
    if real.spatial is None:
        found.append(f"{Path(real.name).name} has no mu_s and sigma_s: no sFID")
    if real.features_MF is None:
        found.append(f"{Path(real.name).name} holds no images: no precision and recall")
    return found


def protocol_differences(protocols: Sequence[Mapping[str, Any]]) -> list[str]:
    """The settings in which protocols differ, one line each: "setting: value / value".

    The name of the reference does not count: its hash does.
    """
    flat = [_flat(protocol) for protocol in protocols]
    names = dict.fromkeys(name for row in flat for name in row if name != "reference.name")
    lines = []
    for name in names:
        values = list(dict.fromkeys(repr(row.get(name)) for row in flat))
        if len(values) > 1:
            lines.append(f"{name}: {' / '.join(values)}")
    return lines


def compare(results: Mapping[str, AdmResult]) -> dict[str, dict[str, float | None]]:
    """The numbers of several results side by side, by name.

    Raises:
        VarkdError: fewer than 2 results, or protocols that differ: such numbers say nothing about each other.
    """
    if len(results) < 2:
        raise VarkdError("a comparison needs at least 2 results")
    if different := protocol_differences([result.protocol for result in results.values()]):
        raise VarkdError(f"{' and '.join(results)} were judged under different protocols: {'; '.join(different)}")
    return {name: dict(result.values) for name, result in results.items()}


def format_result(result: AdmResult) -> str:
    """The numbers, their intervals and the protocol as text."""
    lines = []
    for name, value in result.values.items():
        interval = result.intervals.get(name)
        shown = "-" if value is None else f"{value:.4f}"
        lines.append(f"{name:<13}{shown:>12}" + (f"   [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else ""))
    lines += ["", *(f"{name}: {value}" for name, value in _flat(result.protocol).items())]
    return "\n".join([*lines, *(f"warning: {warning}" for warning in result.warnings)])


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {name: value}
    return {
        key: item
        for part, inner in value.items()
        for key, item in _flat(inner, f"{name}.{part}" if name else str(part)).items()
    }
