"""`varkd sample`: images from a trained run, with noise that runs under comparison share."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from varkd.errors import VarkdError
from varkd.progress import console
from varkd.rollout import Sampler
from varkd.run.drawing import SAMPLES, Drawing, Layout, draw_to, file_order
from varkd.run.models import load_trained
from varkd.world import World


def balanced_labels(num: int, num_classes: int) -> Tensor:
    """Labels 0, 1, .., K-1, 0, 1, ..: as many of each class as of any other, to within one.

    Fewer samples than classes are spread evenly over them, not all of what comes first in the alphabet.
    """
    return torch.arange(num) * num_classes // num if num < num_classes else torch.arange(num) % num_classes


def labels_in_words(num: int, num_classes: int) -> str:
    """What `balanced_labels` gives, for a record."""
    return "balanced" if num >= num_classes else f"one of each of {num} classes, spread evenly over {num_classes}"


def sample_run(
    folder: Path,
    out: Path,
    num: int,
    *,
    seed: int | None = None,
    sampler: Sampler | None = None,
    labels: list[int] | None = None,
    batch_size: int = 250,
    device: str = "auto",
    quiet: bool = False,
    layout: Layout = "npz",
    world: World | None = None,
) -> Path:
    """Write `num` images of a run to `out`: `samples.npz` (arr_0 uint8 NHWC, label, codes), or PNGs; `grid.png`.

    Labels are balanced (`balanced_labels`) unless given (then they repeat). Seed and sampler default to the run's own
    evaluation settings. More than 5,000 images stand in a random order, which the Inception Score of consecutive chunks
    needs. Ranks share the work out, and the same call resumes what was killed.

    Raises:
        VarkdError: no such run, a label that it does not have, or unfinished samples of other settings in the way.
    """
    SAMPLES.check_replaceable(out)
    run, codes, model = load_trained(folder, device)
    if num < 1 or batch_size < 1:
        raise VarkdError(f"num={num}, batch_size={batch_size}: ask for at least one sample at a time")
    wrong = [label for label in labels or [] if not 0 <= label < model.num_classes]
    if wrong:
        raise VarkdError(f"label {wrong[0]} is outside 0..{model.num_classes - 1} (the classes of this run)")
    label_N = (
        torch.tensor(labels).repeat(-(-num // len(labels)))[:num] if labels else balanced_labels(num, model.num_classes)
    )
    if not labels and num < model.num_classes and not quiet:
        console.print(f"note: {labels_in_words(num, model.num_classes)}; --num {model.num_classes} shows all")
    sampler, seed = sampler or run.evaluation.sampler, run.evaluation.seed if seed is None else seed
    drawing = Drawing(model, codes.tokenizer, label_N, sampler, seed, batch_size, order=file_order(num))
    about = {
        "run": str(folder),
        "labels": "given" if labels else labels_in_words(num, model.num_classes),
        "class_names": codes.manifest["class_names"],
    }
    return draw_to(drawing, out, layout, about=about, world=world, quiet=quiet)
