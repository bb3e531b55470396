"""The decoder of MaskGIT's VQGAN (arXiv 2202.04200), as RAR and RandAR use it: codes -> images.

Official (PyTorch) parameter names. The folder's `model.safetensors` holds the encoder too, which is not read here.
Needs torch and safetensors only. B images, L = h w codes, E codebook width.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn


class MaskGIT(nn.Module):
    def __init__(self, **fields: Any) -> None:
        super().__init__()
        self.config = config = SimpleNamespace(**fields)
        self.decoder = Decoder(config)
        self.quantize = Codebook(config.vocab_size, config.z_channels)

    @classmethod
    def from_pretrained(cls, folder: str, torch_dtype: torch.dtype | None = None, **unused: Any) -> MaskGIT:
        """Read `config.json` and, of `model.safetensors`, what decoding needs."""
        with torch.device("meta"):
            decoder = cls(**json.loads(Path(folder, "config.json").read_text(encoding="utf-8")))
        with safe_open(Path(folder, "model.safetensors"), framework="pt") as file:
            decoder.load_state_dict({name: file.get_tensor(name) for name in decoder.state_dict()}, assign=True)
        return decoder.eval().requires_grad_(False).to(torch_dtype or decoder.dtype)

    @property
    def device(self) -> torch.device:
        return self.quantize.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.quantize.embedding.weight.dtype

    def decode(self, codes_BL: Tensor) -> Tensor:
        """Codes -> images in [-1, 1], not clamped: (B, C, H, W). The network itself writes [0, 1]."""
        side = self.config.image_size // 2 ** (len(self.config.ch_mult) - 1)
        entries = F.embedding(codes_BL, self.quantize.embedding.weight).unflatten(1, (side, side)).movedim(-1, 1)
        return self.decoder(entries) * 2 - 1

    def to_uint8(self, images: Tensor) -> Tensor:
        """The official rule: clamp to [-1, 1], then 255 (x + 1) / 2, truncated."""
        return (images.float().clamp(-1, 1) + 1).div(2).mul(255).to(torch.uint8)


class Codebook(nn.Module):
    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, dim)


class Decoder(nn.Module):
    """Codebook rows (B, E, h, w) -> images. Its first level has the highest resolution."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        widths = [config.ch * mult for mult in (*config.ch_mult, config.ch_mult[-1])]
        groups, blocks = config.norm_groups, config.num_res_blocks
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = nn.ModuleList(ResidualBlock(widths[-1], widths[-1], groups) for _ in range(blocks))
        self.up = nn.ModuleList(
            Level(widths[level + 1], widths[level], blocks, groups, upsample=level > 0)
            for level in range(len(config.ch_mult))
        )
        self.norm_out = nn.GroupNorm(groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], config.channels, 3, padding=1)

    def forward(self, entries_BEhw: Tensor) -> Tensor:
        hidden = self.conv_in(entries_BEhw)
        for module in (*self.mid, *reversed(self.up)):
            hidden = module(hidden)
        return self.conv_out(F.silu(self.norm_out(hidden)))


class Level(nn.Module):
    """Residual blocks at one resolution, then the way to the next."""

    def __init__(self, width_in: int, width: int, blocks: int, groups: int, upsample: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResidualBlock(width if index else width_in, width, groups) for index in range(blocks)
        )
        self.upsample_conv = nn.Conv2d(width, width, 3, padding=1) if upsample else None

    def forward(self, hidden: Tensor) -> Tensor:
        for block in self.block:
            hidden = block(hidden)
        if self.upsample_conv is None:
            return hidden
        return self.upsample_conv(F.interpolate(hidden, scale_factor=2.0, mode="nearest"))


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut.

    Where the width changes, the published weights were trained with a slip that must stay: the 1x1 "shortcut" reads
    the convolutions' result instead of the block's input.
    """

    def __init__(self, width_in: int, width: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, width_in, eps=1e-6)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(groups, width, eps=1e-6)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.nin_shortcut = nn.Conv2d(width, width, 1, bias=False) if width_in != width else None

    def forward(self, hidden: Tensor) -> Tensor:
        inner = self.conv1(F.silu(self.norm1(hidden)))
        inner = self.conv2(F.silu(self.norm2(inner)))
        return inner + (hidden if self.nin_shortcut is None else self.nin_shortcut(inner))
