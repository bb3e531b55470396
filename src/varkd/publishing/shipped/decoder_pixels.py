"""Gray levels as codes: one code a pixel, no weights. Needs torch only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class Pixels(nn.Module):
    """Codes (B, H * W) -> gray images (B, 1, H, W)."""

    levels_V: Tensor

    def __init__(self, levels: int, height: int, width: int, **unused: Any) -> None:
        super().__init__()
        self.height, self.width = height, width
        self.register_buffer("levels_V", torch.linspace(-1, 1, levels), persistent=False)

    @classmethod
    def from_pretrained(cls, folder: str, torch_dtype: torch.dtype | None = None, **unused: Any) -> Pixels:
        """Read `config.json`."""
        decoder = cls(**json.loads(Path(folder, "config.json").read_text(encoding="utf-8")))
        return decoder.to(torch_dtype or decoder.dtype)

    @property
    def device(self) -> torch.device:
        return self.levels_V.device

    @property
    def dtype(self) -> torch.dtype:
        return self.levels_V.dtype

    def decode(self, codes_BL: Tensor) -> Tensor:
        """Codes -> images in [-1, 1]."""
        return self.levels_V[codes_BL].unflatten(1, (1, self.height, self.width))

    def to_uint8(self, images: Tensor) -> Tensor:
        return (images.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)
