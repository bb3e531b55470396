"""Two pictures of `varkd analyze` (VarKD, figures 4 and 5): what groups of codes lose, how models continue an image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from varkd import pictures
from varkd.backbones.protocol import Layout
from varkd.data.images import Split
from varkd.distill.spaces import Clusters
from varkd.evaluate.diagnostics import Sequences, completed, measure
from varkd.run.subject import Subject, chosen_images
from varkd.train.encode import psnr
from varkd.types import Plan

CODEBOOK, CONTINUATIONS = "codebook.png", "continuations.png"
GROUPS = Clusters(factor=4, within=0.0, assignment="plain")
"""VarKD's groups: a quarter as many as codes, by k-means."""
KEPT = (0.0, 0.25, 0.5, 0.75)
_SHOWN, _MEASURED = 8, 256


def codebook_panel(subject: Subject, data: Sequences, split: Split, num: int, out: Path) -> dict[str, Any]:
    """Images, and what their codes and the means of groups of codes decode to, into `out`; numbers for the page."""
    tokenizer = subject.codes.tokenizer.to(subject.device)
    group_V = GROUPS.prepare(tokenizer.codebook_VE.cpu())[GROUPS.key]
    codes_BL = data.codes_BL[:_MEASURED]
    full_BCHW = _decoded(tokenizer, codes_BL)
    merged_BCHW = _decoded(tokenizer.merged(group_V), codes_BL)
    shown = slice(_SHOWN)
    difference_BCHW = (full_BCHW[shown].int() - merged_BCHW[shown].int()).abs().mul(4).clamp(max=255).to(torch.uint8)
    images = subject.codes.images(split)
    originals_BCHW = images.batch(chosen_images(subject, len(images), num)[shown])
    rows = {
        "original": originals_BCHW,
        "full codebook": full_BCHW[shown],
        f"{int(group_V.max()) + 1} groups": merged_BCHW[shown],
        "|difference| x 4": difference_BCHW,
    }
    pictures.save_png(out / CODEBOOK, pictures.labeled({name: _pixels(images) for name, images in rows.items()}))
    return {
        "codes": tokenizer.vocab_size,
        "groups": int(group_V.max()) + 1,
        "largest_group": int(torch.bincount(group_V).max()),
        "psnr": float(psnr(full_BCHW, merged_BCHW).mean()),
    }


def continuations_panel(subject: Subject, data: Sequences, out: Path) -> dict[str, Any]:
    """Images that both models continue from a share of their codes, into `out`; what the teacher thinks of them."""
    few = data.split(_MEASURED)[0]
    tokenizer = subject.codes.tokenizer.to(subject.device)
    rows = {"data": _pixels(_decoded(tokenizer, few.codes_BL[:_SHOWN]))}
    found = []
    for name, model in (("student", subject.student), ("teacher", subject.teacher)):
        for share in reversed(KEPT):
            kept_BL = kept_positions(few.plan, share)
            made = completed(model, few, kept_BL, subject.sampler, subject.seed)
            images = _pixels(_decoded(tokenizer, made.codes_BL[:_SHOWN]))
            mask = kept_mask(kept_BL[:_SHOWN], subject.codes.layout, images.shape)
            rows[f"{name}, {share:.0%} kept"] = pictures.tinted(images, mask)
            found.append({"model": name, "kept": share, **_of_the_teacher(subject, made, ~kept_BL)})
    pictures.save_png(out / CONTINUATIONS, pictures.labeled(rows))
    return {"num": len(few), "rows": found}


def kept_positions(plan: Plan, share: float) -> Tensor:
    """The positions of the leading steps that hold at most `share` of the codes: bool (B, L), raster-aligned."""
    before_S = torch.tensor(plan.sizes).cumsum(0)
    steps = int((before_S <= share * plan.order_BL.shape[1] + 1e-9).sum())
    return plan.step_BL < steps


def _of_the_teacher(subject: Subject, made: Sequences, generated_BL: Tensor) -> dict[str, float]:
    """Means over generated codes: the teacher's confidence 1 - H / log V, and its -log p of the codes (nats)."""
    values = measure(subject.student, subject.teacher, made, subject.space, ("teacher_entropy", "ce_teacher"))
    where_BL = generated_BL.cpu()
    entropy = float(values["teacher_entropy"][where_BL].double().mean())
    log_v = float(np.log(subject.teacher.vocab_size))
    return {"confidence": 1 - entropy / log_v, "teacher_nll": float(values["ce_teacher"][where_BL].double().mean())}


def kept_mask(kept_BL: Tensor, layout: Layout, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Where images (B, H, W, C) show kept codes, bool (B, H, W). Scales cover the whole image: nothing is marked."""
    if layout.scales:
        return np.zeros(shape[:3], dtype=bool)
    cells = kept_BL.cpu().numpy().reshape(len(kept_BL), *layout.grid)
    return cells.repeat(shape[1] // layout.grid[0], axis=1).repeat(shape[2] // layout.grid[1], axis=2)


@torch.no_grad()
def _decoded(tokenizer: Any, codes_BL: Tensor) -> Tensor:
    """uint8 images (B, C, H, W) on the CPU."""
    parts = [tokenizer.to_uint8(tokenizer.decode(part)).cpu() for part in codes_BL.split(64)]
    return torch.cat(parts)


def _pixels(images_BCHW: Tensor) -> NDArray[np.uint8]:
    return images_BCHW.permute(0, 2, 3, 1).numpy()
