"""How large the problems are: tiny for tests, small for a minute or two of CPU, full as the models are published."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from varkd.backbones import zoo
from varkd.backbones.protocol import Backbone
from varkd.backbones.store import family_class

SizeName = Literal["tiny", "small", "full"]


@dataclass(frozen=True)
class Sizes:
    """Config fields of the models, rows of the loss, batches of rollouts and of a training step."""

    student: Mapping[str, Any]
    teacher: Mapping[str, Any]
    var: Mapping[str, Any]
    arpg: Mapping[str, Any]
    arpg_steps: int
    loss_rows: int
    batches: tuple[int, ...]
    step_batch: int
    copied_bytes: int
    matrix_side: int


def sizes_for(name: SizeName, device: torch.device) -> Sizes:
    """The sizes of that name; a CPU gets fewer rows and smaller batches of the same models."""
    cuda = device.type == "cuda"
    copied, side = (2**30, 8192) if cuda else (2**28, 1024)
    if name == "full":
        rows, batches, step_batch = (16_384, (1, 32, 256), 32) if cuda else (4096, (1, 8), 10)
        return Sizes(
            *map(_published, ("LlamaGen-B-256", "LlamaGen-L-256", "VAR-d16", "ARPG-L")),
            arpg_steps=64,
            loss_rows=rows,
            batches=batches,
            step_batch=step_batch,
            copied_bytes=copied,
            matrix_side=side,
        )
    if name == "small":
        return Sizes(
            *_family_of(2048, (8, 8), (4, 256), (8, 320), (1, 2, 3, 4, 5, 6, 8)),
            arpg_steps=16,
            loss_rows=2048,
            batches=(1, 8),
            step_batch=10,
            copied_bytes=copied,
            matrix_side=side,
        )
    return Sizes(
        *_family_of(64, (4, 4), (2, 32), (3, 48), (1, 2, 4)),
        arpg_steps=4,
        loss_rows=64,
        batches=(1, 2),
        step_batch=10,
        copied_bytes=2**24,
        matrix_side=256,
    )


def random_model(family: str, sizes: Mapping[str, Any], device: torch.device) -> Backbone:
    """A model with random weights, the head's too (a new model's is zero), made on the device itself."""
    model_class: Any = family_class(family)
    with torch.device(device):
        model = model_class(model_class.config_class(**sizes), 0.0)
    generator = torch.Generator(device=device).manual_seed(0)
    model.initialize(generator)
    torch.nn.init.normal_(model.head.weight, std=0.05, generator=generator)
    return model.eval().requires_grad_(False)


def _published(name: str) -> dict[str, Any]:
    return dict(zoo.entry(name).config)


def _family_of(
    vocab_size: int,
    grid: tuple[int, int],
    student: tuple[int, int],
    teacher: tuple[int, int],
    scales: tuple[int, ...],
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Student, teacher, VAR and ARPG of a few layers and a small width (layers, dim)."""

    def model(layers: int, dim: int, **layout: Any) -> dict[str, Any]:
        heads = max(2, dim // 64)
        sizes = {"num_layers": layers, "dim": dim, "num_heads": heads, "num_classes": 10}
        return {"vocab_size": vocab_size, **sizes, **layout}

    even = (student[0] // 2 * 2, student[1])
    return (
        model(*student, grid=grid),
        model(*teacher, grid=grid),
        model(*student, scales=scales, code_dim=32 if student[1] > 64 else 8),
        model(*even, grid=grid),
    )
