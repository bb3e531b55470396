"""`varkd evaluate`: a run's samples, agreement and speed as `metrics.json`, under one protocol for all runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from varkd import pictures
from varkd.backbones.protocol import Backbone
from varkd.backbones.store import load_backbone
from varkd.config import Evaluation, Run
from varkd.data.loader import ordered_batches
from varkd.distill.spaces import Clusters
from varkd.evaluate.agreement import agreement, cross_entropy, student_batches
from varkd.evaluate.features import FeatureNet, FitFeatures, fit_features, load_features, save_features
from varkd.evaluate.samples import ReferenceSet, floors, reference_set, sample_metrics
from varkd.evaluate.speed import samples_per_second
from varkd.files import read_json, write_json
from varkd.progress import console
from varkd.run.data import Codes, pick_device
from varkd.run.environment import versions
from varkd.run.models import load_trained
from varkd.run.sampling import balanced_labels, generate
from varkd.types import Batch

_GRID_ROWS = 4
_AGREEMENT_SEQUENCES = 512


def evaluate_run(
    folder: Path, *, features: Path | None = None, teacher: Path | None = None, settings: Evaluation | None = None,
    device: str = "auto", quiet: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Measure a run and write `metrics.json` and `evaluation/samples.png` into its folder.

    Args:
        features: the feature network's folder; by default `features` in the codes folder, fitted on first use, so that
            all runs on the same codes share it.
        teacher: the model to compare with; by default the run's own teacher.
        settings: number of samples, sampler and seed; by default the run's own.
    """
    run, codes, model = load_trained(folder, device)
    settings = settings or run.evaluation
    net, record = feature_network(codes, features or codes.folder / "features", device, quiet)
    reference = reference_for(codes, net, quiet)
    label_B = balanced_labels(settings.num_samples, model.num_classes)
    images, _ = generate(model, codes.tokenizer, label_B, settings.sampler, settings.seed, settings.batch_size,
                         f"sample {folder.name}", quiet)  # fmt: skip
    found = sample_metrics(images, label_B, reference, net, resamples=settings.resamples, seed=settings.seed)
    columns = min(model.num_classes, 10)
    shown = images[: columns * _GRID_ROWS].permute(0, 2, 3, 1).numpy()
    pictures.save_png(folder / "evaluation" / "samples.png", pictures.grid(shown, columns))

    teacher_path = teacher or (Path(run.teacher) if run.teacher else None)
    means, curves = _agreement(run, codes, model, teacher_path, settings)
    status, info = read_json(folder / "status.json"), read_json(folder / "environment.json")
    held_out = ordered_batches(codes.split("validation"), 256)
    metrics = {
        "name": run.name or folder.name, "method": run.preset, "updates": status["step"], "seconds": status["seconds"],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "samples_per_second": samples_per_second(model, settings.sampler),
        "num_samples": settings.num_samples, "metrics": found, "floors": _floors(codes, reference, net),
        "validation_ce": cross_entropy(model, held_out, model.head.weight.device),
        "agreement": means, "agreement_by_position": curves, "grid": codes.manifest["grid"],
        "protocol": _protocol(run, codes, settings, reference, record, teacher_path, info, folder),
        "samples": "evaluation/samples.png",
    }  # fmt: skip
    write_json(folder / "metrics.json", metrics)
    return metrics


def feature_network(codes: Codes, folder: Path, device: str, quiet: bool = False) -> tuple[FeatureNet, dict[str, Any]]:
    """The small network that sees samples: read from `folder`, or fitted on the data set and saved there."""
    if (folder / "config.json").is_file():
        net, record = load_features(folder)
    else:
        if not quiet:
            console.print(f"fitting the feature network on {codes.manifest['source']['name']} (once; kept in {folder})")
        flip = "flip" in codes.manifest["views"]
        net, record = fit_features(codes.images("train"), codes.images("validation"), FitFeatures(flip=flip),
                                   device=pick_device(device), quiet=quiet)  # fmt: skip
        save_features(net, record, folder)
    return net.to(pick_device(device)), record


def reference_for(codes: Codes, net: FeatureNet, quiet: bool = False) -> ReferenceSet:
    """The training images as the reference, kept beside the codes."""
    flips = "flip" in codes.manifest["views"]
    cache = codes.folder / f"reference-{net.hash[:8]}"
    return reference_set(codes.images("train"), codes.images("validation"), net, flips=flips, cache=cache, quiet=quiet)


def _floors(codes: Codes, reference: ReferenceSet, net: FeatureNet) -> dict[str, float | None]:
    """What real held-out images, and the tokenizer's reconstructions of them, reach."""
    images = codes.images("validation")
    device = net.device
    tokenizer = codes.tokenizer.to(device).eval()
    with torch.no_grad():
        batches = ordered_batches(codes.split("validation"), 256)
        reconstructed = torch.cat(
            [tokenizer.to_uint8(tokenizer.decode(batch.codes_BL.to(device))).cpu() for batch in batches]
        )
    num = len(images)
    lossless = codes.manifest["reconstruction"]["psnr"] >= 99
    return {"num": num, **floors(images, None if lossless else reconstructed, reference, net)}


def _agreement(
    run: Run, codes: Codes, model: Backbone, teacher_path: Path | None, settings: Evaluation
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    if teacher_path is None:
        return None, None
    device = model.head.weight.device
    teacher, _ = load_backbone(teacher_path, str(device))
    space = next((t.space for t in run.method.terms if isinstance(t.space, Clusters)), Clusters())
    cluster_V = space.prepare(codes.tokenizer.codebook_VE.cpu())[space.key]
    own = student_batches(model, balanced_labels(_AGREEMENT_SEQUENCES, model.num_classes), settings.seed, 128)
    contexts: dict[str, list[Batch]] = {"data": _data_batches(codes), "student": own}
    means, curves = {}, {}
    for name, batches in contexts.items():
        means[name], curves[name] = agreement(model, teacher, batches, cluster_V, device)
        means[name]["num"] = sum(len(batch) for batch in batches)
    return means, curves


def _data_batches(codes: Codes) -> list[Batch]:
    batches, seen = [], 0
    for batch in ordered_batches(codes.split("validation"), 128):
        batches.append(batch)
        seen += len(batch)
        if seen >= _AGREEMENT_SEQUENCES:
            break
    return batches


def _protocol(
    run: Run, codes: Codes, settings: Evaluation, reference: ReferenceSet, record: dict[str, Any],
    teacher: Path | None, info: dict[str, Any], folder: Path,
) -> dict[str, Any]:  # fmt: skip
    selected = read_json(folder / "checkpoints" / "selected.json")
    return {
        "reference": reference.describe(), "features": record, "tokenizer": codes.manifest["tokenizer"]["hash"],
        "data": codes.manifest["source"]["name"], "sampler": vars(settings.sampler), "seed": settings.seed,
        "training_seed": run.seed, "labels": "balanced", "versions": versions(),
        "weights": selected["weights"], "checkpoint": selected["checkpoint"],
        "teacher": str(teacher) if teacher else None, "teacher_hash": info.get("teacher_hash"),
        "init": run.init,
    }  # fmt: skip
