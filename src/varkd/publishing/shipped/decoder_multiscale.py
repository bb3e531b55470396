"""The decoder of VAR's multi-scale tokenizer (arXiv 2404.02905), under its official parameter names: codes -> images.

The codes of all scales stand one behind the other, coarse to fine. Each scale's codebook rows are enlarged to the last
side, half smoothed by a convolution, and added up; a convolutional decoder sees the sum. The folder's
`model.safetensors` holds the encoder too, which is not read here. Needs torch, numpy and safetensors only.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn


class MultiScale(nn.Module):
    def __init__(self, **fields: Any) -> None:
        super().__init__()
        self.config = config = SimpleNamespace(**fields)
        width = config.z_channels
        self.decoder = Decoder(config)
        self.quantize = Codebook(config.vocab_size, width, config.num_phi)
        self.post_quant_conv = nn.Conv2d(width, width, 3, padding=1)

    @classmethod
    def from_pretrained(cls, folder: str, torch_dtype: torch.dtype | None = None, **unused: Any) -> MultiScale:
        """Read `config.json` and, of `model.safetensors`, what decoding needs."""
        with torch.device("meta"):
            decoder = cls(**json.loads(Path(folder, "config.json").read_text(encoding="utf-8")))
        with safe_open(Path(folder, "model.safetensors"), framework="pt") as file:
            decoder.load_state_dict({name: file.get_tensor(name) for name in decoder.state_dict()}, assign=True)
        return decoder.eval().requires_grad_(False).to(torch_dtype or decoder.dtype)

    @property
    def device(self) -> torch.device:
        return self.post_quant_conv.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.post_quant_conv.weight.dtype

    def decode(self, codes_BL: Tensor) -> Tensor:
        """Codes -> images in [-1, 1], not clamped: (B, C, H, W)."""
        scales = self.config.scales
        features = self.quantize.embedding.weight.new_zeros(
            len(codes_BL), self.config.z_channels, scales[-1], scales[-1]
        )
        for scale, codes_Bn in enumerate(codes_BL.split([side * side for side in scales], dim=1)):
            features = features + self.quantize(codes_Bn, scale, scales)
        return self.decoder(self.post_quant_conv(features))

    def to_uint8(self, images: Tensor) -> Tensor:
        """VAR's rule: clamp to [-1, 1], then 255 (x + 1) / 2, truncated."""
        return (images.float().clamp(-1, 1) + 1).div(2).mul(255).to(torch.uint8)


class Codebook(nn.Module):
    """V vectors, and the convolutions that smooth them once they are enlarged."""

    def __init__(self, vocab_size: int, width: int, num_phi: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.quant_resi = Phis(width, num_phi)

    def forward(self, codes_Bn: Tensor, scale: int, scales: list[int]) -> Tensor:
        """What the codes of one scale add to the features (B, E, P, P)."""
        side, last, phis = scales[scale], scales[-1], self.quant_resi.qresi_ls
        rows = F.embedding(codes_Bn, self.embedding.weight).transpose(1, 2).unflatten(2, (side, side))
        if side != last:
            rows = F.interpolate(rows, size=(last, last), mode="bicubic")
        # The convolution of the nearest tick; float64, because two of the official distances are ties but for rounding.
        ticks = np.linspace(1 / 3 / len(phis), 1 - 1 / 3 / len(phis), len(phis))
        phi = phis[int(np.argmin(np.abs(ticks - scale / max(1, len(scales) - 1))))]
        return rows * 0.5 + phi(rows) * 0.5


class Phis(nn.Module):
    def __init__(self, width: int, num_phi: int) -> None:
        super().__init__()
        self.qresi_ls = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(num_phi))


class Decoder(nn.Module):
    """Features (B, z_channels, P, P) -> images. Its first level has the highest resolution."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        widths = [config.ch * mult for mult in (*config.ch_mult, config.ch_mult[-1])]
        last, groups = len(config.ch_mult) - 1, config.norm_groups
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], groups, config.attention)
        self.up = nn.ModuleList(
            Level(
                widths[level + 1],
                widths[level],
                config.decoder_res_blocks,
                groups,
                attention=config.attention and level == last,
                upsample=level > 0,
            )
            for level in range(last + 1)
        )
        self.norm_out = nn.GroupNorm(groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], config.channels, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.mid(self.conv_in(features))
        for level in reversed(self.up):
            hidden = level(hidden)
        return self.conv_out(F.silu(self.norm_out(hidden)))


class Middle(nn.Module):
    def __init__(self, width: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(width, width, groups)
        self.attn_1 = Attention(width, groups) if attention else nn.Identity()
        self.block_2 = ResidualBlock(width, width, groups)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(hidden)))


class Level(nn.Module):
    """Residual blocks (each followed by attention, if any) at one resolution, then the way to the next."""

    def __init__(self, width_in: int, width: int, blocks: int, groups: int, attention: bool, upsample: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResidualBlock(width if index else width_in, width, groups) for index in range(blocks)
        )
        self.attn = nn.ModuleList(Attention(width, groups) for _ in range(blocks * attention))
        self.upsample = Upsample(width) if upsample else None

    def forward(self, hidden: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            hidden = block(hidden)
            if len(self.attn):
                hidden = self.attn[index](hidden)
        return hidden if self.upsample is None else self.upsample(hidden)


class ResidualBlock(nn.Module):
    def __init__(self, width_in: int, width: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, width_in, eps=1e-6)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, width, eps=1e-6)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(width_in, width, 1) if width_in != width else None

    def forward(self, hidden: Tensor) -> Tensor:
        inner = self.conv1(F.silu(self.norm1(hidden)))
        inner = self.conv2(F.silu(self.norm2(inner)))
        return inner + (hidden if self.nin_shortcut is None else self.nin_shortcut(hidden))


class Attention(nn.Module):
    """Single-head attention over all positions of a feature map, with a residual; one convolution makes q, k and v."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        q, k, v = (part.flatten(2).transpose(1, 2).unsqueeze(1) for part in self.qkv(self.norm(hidden)).chunk(3, dim=1))
        mixed = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).reshape(hidden.shape)
        return hidden + self.proj_out(mixed)


class Upsample(nn.Module):
    """Twice the resolution: nearest neighbor, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.conv(F.interpolate(hidden, scale_factor=2.0, mode="nearest"))
