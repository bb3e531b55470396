"""`varkd sample`: images from a trained run, with noise that runs under comparison share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from varkd import pictures
from varkd.backbones.protocol import Backbone
from varkd.errors import VarkdError
from varkd.files import atomic_folder, write_json
from varkd.progress import bar
from varkd.rollout import Sampler, rollout
from varkd.run.models import load_trained
from varkd.tokenizers.protocol import Tokenizer
from varkd.types import Condition
from varkd.world import Rng


def generate(
    model: Backbone, tokenizer: Tokenizer, label_B: Tensor, sampler: Sampler, seed: int, batch_size: int = 250,
    label: str = "sample", quiet: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sample one image per label: uint8 (N, C, H, W) and codes (N, L), both on the CPU.

    Image i depends on (seed, i, label, model, sampler) only: runs that are compared share their noise.
    """
    device = model.head.weight.device
    tokenizer = tokenizer.to(device).eval()
    images, codes, rng = [], [], Rng(seed)
    with bar(label, len(label_B), quiet) as running, torch.no_grad():
        for begin in range(0, len(label_B), batch_size):
            row_B = torch.arange(begin, min(begin + batch_size, len(label_B)), device=device)
            condition = Condition(label_B[row_B.cpu()].to(device))
            plan = sampler.plan(model, rng, row_B)
            uniform_BL = rng.uniform("sample", row_B, plan.order_BL.shape[1])
            codes_BL = rollout(model, condition, plan, sampler, uniform_BL).codes_BL
            images.append(tokenizer.to_uint8(tokenizer.decode(codes_BL)).cpu())
            codes.append(codes_BL.cpu())
            running.update(int(row_B[-1]) + 1)
    return torch.cat(images), torch.cat(codes)


def balanced_labels(num: int, num_classes: int) -> Tensor:
    """Labels 0, 1, .., K-1, 0, 1, ..: as many of each class as of any other, to within one."""
    return torch.arange(num) % num_classes


def sample_run(
    folder: Path, out: Path, num: int, *, seed: int | None = None, sampler: Sampler | None = None,
    labels: list[int] | None = None, batch_size: int = 250, device: str = "auto", quiet: bool = False,
) -> Path:  # fmt: skip
    """Write `num` images of a run to `out`: `samples.npz` (arr_0 uint8 NHWC, label), `grid.png`, `samples.json`.

    Labels are balanced unless given (then they repeat). Seed and sampler default to the run's own evaluation settings.

    Raises:
        VarkdError: no such run, or a label that it does not have.
    """
    run, codes, model = load_trained(folder, device)
    if num < 1 or batch_size < 1:
        raise VarkdError(f"num={num}, batch_size={batch_size}: ask for at least one sample at a time")
    wrong = [label for label in labels or [] if not 0 <= label < model.num_classes]
    if wrong:
        raise VarkdError(f"label {wrong[0]} is outside 0..{model.num_classes - 1} (the classes of this run)")
    label_B = (
        torch.tensor(labels).repeat(-(-num // len(labels)))[:num] if labels else balanced_labels(num, model.num_classes)
    )
    sampler, seed = sampler or run.evaluation.sampler, run.evaluation.seed if seed is None else seed
    images, codes_BL = generate(model, codes.tokenizer, label_B, sampler, seed, batch_size, "sample", quiet)
    images_NHWC = images.permute(0, 2, 3, 1).numpy()
    columns = min(model.num_classes, 10) if model.num_classes > 1 else 10
    about = {
        "run": str(folder),
        "num": num,
        "seed": seed,
        "sampler": vars(sampler),
        "class_names": codes.manifest["class_names"],
    }
    with atomic_folder(out) as temporary:
        np.savez(
            temporary / "samples.npz", images_NHWC, label=label_B.numpy(), codes=codes_BL.numpy().astype(np.uint16)
        )
        pictures.save_png(temporary / "grid.png", pictures.grid(images_NHWC[: columns * 10], columns))
        write_json(temporary / "samples.json", about)
    return out
