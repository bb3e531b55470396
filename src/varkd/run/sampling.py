"""`varkd sample`: images from a trained run, with noise that runs under comparison share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from varkd import pictures
from varkd.errors import VarkdError
from varkd.files import atomic_folder, write_json
from varkd.folders import Own, json_with
from varkd.progress import console
from varkd.rollout import Sampler
from varkd.run.models import load_trained
from varkd.sampling import generate_with_codes

SAMPLES = Own("samples", ("samples.json",), json_with("run", "num", "seed", "sampler"), ("samples.npz", "grid.png"))


def balanced_labels(num: int, num_classes: int) -> Tensor:
    """Labels 0, 1, .., K-1, 0, 1, ..: as many of each class as of any other, to within one.

    Fewer samples than classes are spread evenly over them, not all of what comes first in the alphabet.
    """
    return torch.arange(num) * num_classes // num if num < num_classes else torch.arange(num) % num_classes


def labels_in_words(num: int, num_classes: int) -> str:
    """What `balanced_labels` gives, for a record."""
    return "balanced" if num >= num_classes else f"one of each of {num} classes, spread evenly over {num_classes}"


def sample_run(
    folder: Path, out: Path, num: int, *, seed: int | None = None, sampler: Sampler | None = None,
    labels: list[int] | None = None, batch_size: int = 250, device: str = "auto", quiet: bool = False,
) -> Path:  # fmt: skip
    """Write `num` images of a run to `out`: `samples.npz` (arr_0 uint8 NHWC, label), `grid.png`, `samples.json`.

    Labels are balanced (`balanced_labels`) unless given (then they repeat). Seed and sampler default to the run's own
    evaluation settings.

    Raises:
        VarkdError: no such run, or a label that it does not have.
    """
    SAMPLES.check_replaceable(out)
    run, codes, model = load_trained(folder, device)
    if num < 1 or batch_size < 1:
        raise VarkdError(f"num={num}, batch_size={batch_size}: ask for at least one sample at a time")
    wrong = [label for label in labels or [] if not 0 <= label < model.num_classes]
    if wrong:
        raise VarkdError(f"label {wrong[0]} is outside 0..{model.num_classes - 1} (the classes of this run)")
    label_B = (
        torch.tensor(labels).repeat(-(-num // len(labels)))[:num] if labels else balanced_labels(num, model.num_classes)
    )
    if not labels and num < model.num_classes and not quiet:
        console.print(f"note: {labels_in_words(num, model.num_classes)}; --num {model.num_classes} shows all")
    sampler, seed = sampler or run.evaluation.sampler, run.evaluation.seed if seed is None else seed
    images, codes_BL = generate_with_codes(model, codes.tokenizer, label_B, sampler, seed, batch_size, "sample", quiet)
    images_NHWC = images.permute(0, 2, 3, 1).numpy()
    columns = min(model.num_classes, 10) if model.num_classes > 1 else 10
    about = {
        "run": str(folder),
        "num": num,
        "seed": seed,
        "sampler": vars(sampler),
        "labels": "given" if labels else labels_in_words(num, model.num_classes),
        "class_names": codes.manifest["class_names"],
    }
    with atomic_folder(out, SAMPLES) as temporary:
        np.savez(
            temporary / "samples.npz", images_NHWC, label=label_B.numpy(), codes=codes_BL.numpy().astype(np.uint16)
        )
        pictures.save_png(temporary / "grid.png", pictures.grid(images_NHWC[: columns * 10], columns))
        write_json(temporary / "samples.json", about)
    return out
