"""`varkd evaluate`: a run's samples, agreement and speed as `metrics.json`, under one protocol for all runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from varkd import pictures
from varkd.backbones.protocol import Backbone
from varkd.backbones.store import weights_hash
from varkd.config import EvaluationConfig, RunConfig
from varkd.data.loader import ordered_batches
from varkd.data.views import has_flips
from varkd.distill.method import Method
from varkd.errors import VarkdError
from varkd.evaluate.agreement import agreement, cross_entropy, student_batches
from varkd.evaluate.features import (
    FEATURES,
    FeatureNet,
    FitFeatures,
    features_of,
    fit_features,
    load_features,
    save_features,
)
from varkd.evaluate.fid import frechet_distance, gaussian
from varkd.evaluate.samples import ReferenceSet, floors, reference_set, sample_metrics
from varkd.evaluate.speed import samples_per_second
from varkd.files import check_writable, read_json, sha256_of, write_json
from varkd.progress import console
from varkd.rollout import Sampler
from varkd.run.data import Codes, pick_device
from varkd.run.environment import versions
from varkd.run.models import load_trained, open_model, recorded_model
from varkd.run.sampling import balanced_labels, labels_in_words
from varkd.sampling import generate_with_codes
from varkd.types import Batch

_GRID_ROWS = 4
_MOVE_CACHES = "give --features DIR/features, the other caches are kept in DIR too"
_AGREEMENT_SEQUENCES = 512


def evaluate_run(
    folder: Path,
    *,
    features: Path | None = None,
    teacher: Path | None = None,
    settings: EvaluationConfig | None = None,
    device: str = "auto",
    quiet: bool = False,
) -> dict[str, Any]:
    """Measure a run and write `metrics.json` and `evaluation/samples.png` into its folder.

    Args:
        features: the feature network's folder; by default `features` in the codes folder, fitted on first use, so that
            all runs on the same codes share it.
        teacher: the model to compare with; by default the run's own teacher.
        settings: number of samples, sampler and seed; by default the run's own.
    """
    run, codes, model = load_trained(folder, device)
    settings = settings or run.evaluation
    teacher_path = teacher or recorded_model(folder, "teacher", run.teacher)
    loaded = open_model(teacher_path, codes, model, str(pick_device(device))) if teacher_path else None
    recorded = read_json(folder / "environment.json").get("teacher_hash")
    teacher_hash = weights_hash(loaded) if loaded else recorded
    if loaded is None and recorded and not quiet:
        console.print("note: the teacher behind the run's cache is gone, so agreement is left out: give --teacher")
    if teacher is None and teacher_hash != recorded:
        raise VarkdError(f"{teacher_path} is not the teacher that {folder} was trained with: give that by --teacher")
    judge = Judge.of(codes, device, features, quiet)
    seen = judge.see(model, settings, f"sample {folder.name}", quiet)
    seen.save_grid(folder / "evaluation" / "samples.png")
    means, curves = judge.agreement(model, loaded, run.method, settings.seed) if loaded else (None, None)
    status = read_json(folder / "status.json")
    metrics = {
        "name": run.name or folder.name,
        "method": run.preset,
        "updates": status["step"],
        "seconds": status["seconds"],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "samples_per_second": samples_per_second(model, settings.sampler),
        "num_samples": settings.num_samples,
        "metrics": seen.metrics,
        "floors": judge.floors(),
        "validation_ce": judge.cross_entropy(model),
        "agreement": means,
        "agreement_by_position": curves,
        "grid": codes.manifest["grid"],
        "protocol": _protocol(run, codes, settings, judge, teacher_path, teacher_hash, folder),
        "samples": "evaluation/samples.png",
    }
    write_json(folder / "metrics.json", metrics)
    return metrics


@dataclass(frozen=True)
class Seen:
    """Samples of a model (uint8 (N, C, H, W)) and what they are worth."""

    images_BCHW: Tensor
    num_classes: int
    metrics: dict[str, dict[str, Any]]

    def save_grid(self, path: Path) -> None:
        """The first samples as a picture: one column per class."""
        columns = min(self.num_classes, 10)
        shown = self.images_BCHW[: columns * _GRID_ROWS].permute(0, 2, 3, 1).numpy()
        pictures.save_png(path, pictures.grid(shown, columns))


@dataclass(frozen=True)
class Judge:
    """What all runs on the same codes are measured with: one feature network and one reference."""

    codes: Codes
    net: FeatureNet
    record: dict[str, Any]
    reference: ReferenceSet
    caches: Path

    @classmethod
    def of(cls, codes: Codes, device: str = "auto", features: Path | None = None, quiet: bool = False) -> Judge:
        """Read from beside the codes of real images (or where `features` says), or fitted there on first use."""
        codes = codes.original
        folder = features or codes.folder / "features"
        net, record = feature_network(codes, folder, device, quiet)
        return cls(codes, net, record, reference_for(codes, net, quiet, folder.parent), folder.parent)

    def see(self, model: Backbone, settings: EvaluationConfig, label: str = "sample", quiet: bool = False) -> Seen:
        """Sample as the settings say, and measure."""
        images, label_B = self._samples(model, settings.num_samples, settings.sampler, settings, label, quiet)
        found = sample_metrics(
            images, label_B, self.reference, self.net, resamples=settings.resamples, seed=settings.seed
        )
        return Seen(images, model.num_classes, found)

    def distance(self, model: Backbone, num: int, sampler: Sampler, settings: EvaluationConfig) -> float:
        """The Fréchet distance alone, of `num` samples by `sampler`: for choosing settings."""
        images, _ = self._samples(model, num, sampler, settings, "sample", quiet=True)
        return frechet_distance(*gaussian(features_of(self.net, images)[0]), *self.reference.gaussian)

    def _samples(
        self, model: Backbone, num: int, sampler: Sampler, settings: EvaluationConfig, label: str, quiet: bool
    ) -> tuple[Tensor, Tensor]:
        label_B = balanced_labels(num, model.num_classes)
        images, _ = generate_with_codes(
            model, self.codes.tokenizer, label_B, sampler, settings.seed, settings.batch_size, label, quiet
        )
        return images, label_B

    def cross_entropy(self, model: Backbone) -> float:
        """-log q of the held-out images' codes, nats per code."""
        return cross_entropy(model, ordered_batches(self.codes.split("validation"), 256), model.head.weight.device)

    def agreement(
        self, model: Backbone, teacher: Backbone, method: Method, seed: int
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """With the teacher, on data and on the model's own samples: means, and by position."""
        device = model.head.weight.device
        clusters = method.clusters
        cluster_V = clusters.prepare(self.codes.tokenizer.codebook_VE.cpu())[clusters.key]
        own = student_batches(model, balanced_labels(_AGREEMENT_SEQUENCES, model.num_classes), seed, 128)
        contexts: dict[str, list[Batch]] = {"data": _data_batches(self.codes), "student": own}
        means, curves = {}, {}
        for name, batches in contexts.items():
            means[name], curves[name] = agreement(model, teacher, batches, cluster_V, device)
            means[name]["num"] = sum(len(batch) for batch in batches)
        return means, curves

    def floors(self) -> dict[str, float | None]:
        """What real held-out images, and the tokenizer's reconstructions of them, reach; kept with the caches."""
        cache = self.caches / f"floors-{self.net.hash[:8]}.json"
        key = sha256_of(f"{self.reference.key}/{self.codes.hash}".encode())
        found = read_json(cache) if cache.is_file() else {}
        if found.get("key") != key:
            check_writable(self.caches, _MOVE_CACHES)
            found = {"key": key, "floors": self._floors()}
            write_json(cache, found)
        return found["floors"]

    def _floors(self) -> dict[str, float | None]:
        images = self.codes.images("validation")
        tokenizer = self.codes.tokenizer.to(self.net.device).eval()
        lossless = self.codes.manifest["reconstruction"]["psnr"] >= 99
        with torch.no_grad():
            batches = [] if lossless else ordered_batches(self.codes.split("validation"), 256)
            rebuilt = [tokenizer.to_uint8(tokenizer.decode(b.codes_BL.to(self.net.device))).cpu() for b in batches]
        reconstructed = torch.cat(rebuilt) if rebuilt else None
        return {"num": len(images), **floors(images, reconstructed, self.reference, self.net)}


def feature_network(codes: Codes, folder: Path, device: str, quiet: bool = False) -> tuple[FeatureNet, dict[str, Any]]:
    """The small network that sees samples: read from `folder`, or fitted on the data set and saved there."""
    fingerprint = codes.manifest["source"]["fingerprints"]["train"]
    if (folder / "config.json").is_file():
        net, record = load_features(folder)
        own = folder.resolve() == (codes.folder / "features").resolve()  # another folder was chosen on purpose
        if own and record.get("images", fingerprint) != fingerprint:
            raise VarkdError(
                f"{folder} was fitted on other images than these codes: move it away, and it is fitted anew"
            )
    else:
        FEATURES.check_replaceable(folder, "--features")
        check_writable(folder.parent, _MOVE_CACHES)
        images = codes.images("train"), codes.images("validation")
        if not quiet:
            console.print(f"fitting the feature network on {codes.manifest['source']['name']} (once; kept in {folder})")
        flip = has_flips(codes.manifest["views"])
        net, record = fit_features(*images, FitFeatures(flip=flip), device=pick_device(device), quiet=quiet)
        record["images"] = fingerprint
        save_features(net, record, folder)
    return net.to(pick_device(device)), record


def reference_for(codes: Codes, net: FeatureNet, quiet: bool = False, folder: Path | None = None) -> ReferenceSet:
    """The training images as the reference, kept in `folder`, by default beside the codes."""
    flips = has_flips(codes.manifest["views"])
    cache = (folder or codes.folder) / f"reference-{net.hash[:8]}"
    if not (cache / "config.json").is_file():
        check_writable(cache.parent, _MOVE_CACHES)
    images = codes.images("train", needed=False), codes.images("validation", needed=False)
    return reference_set(*images, net, flips=flips, cache=cache, quiet=quiet)


def _data_batches(codes: Codes) -> list[Batch]:
    return list(ordered_batches(codes.split("validation"), 128, most=_AGREEMENT_SEQUENCES))


def _protocol(
    run: RunConfig,
    codes: Codes,
    settings: EvaluationConfig,
    judge: Judge,
    teacher: Path | None,
    teacher_hash: str | None,
    folder: Path,
) -> dict[str, Any]:
    selected = read_json(folder / "checkpoints" / "selected.json")
    labels = labels_in_words(settings.num_samples, len(codes.manifest["class_names"]))
    return {
        "reference": judge.reference.describe(),
        "features": judge.record,
        "tokenizer": codes.manifest["tokenizer"]["hash"],
        "data": codes.manifest["source"]["name"],
        "sampler": vars(settings.sampler),
        "seed": settings.seed,
        "training_seed": run.seed,
        "labels": labels,
        "versions": versions(),
        "weights": selected["weights"],
        "checkpoint": selected["checkpoint"],
        "teacher": str(teacher) if teacher else None,
        "teacher_hash": teacher_hash,
        "init": run.init,
    }
