"""The decoder of LlamaGen's VQ tokenizer (arXiv 2406.06525), under its official parameter names: codes -> images.

The folder's `model.safetensors` holds the encoder too, which is not read here. Needs torch and safetensors only.
B images, L = h w codes, E codebook width.
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


class VQ(nn.Module):
    def __init__(self, **fields: Any) -> None:
        super().__init__()
        self.config = config = SimpleNamespace(**fields)
        self.decoder = Decoder(config)
        self.quantize = Codebook(config.vocab_size, config.codebook_dim)
        self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.z_channels, 1)

    @classmethod
    def from_pretrained(cls, folder: str, torch_dtype: torch.dtype | None = None, **unused: Any) -> VQ:
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
        side = self.config.image_size // 2 ** (len(self.config.ch_mult) - 1)
        codebook_VE = F.normalize(self.quantize.embedding.weight, dim=1)
        entries = F.embedding(codes_BL, codebook_VE).unflatten(1, (side, side)).movedim(-1, 1)
        return self.decoder(self.post_quant_conv(entries))

    def to_uint8(self, images: Tensor) -> Tensor:
        """LlamaGen's rule: 127.5 x + 128, truncated."""
        return (images.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)


class Codebook(nn.Module):
    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, dim)


class Decoder(nn.Module):
    """Features (B, z_channels, h, w) -> images. Its first level has the lowest resolution."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        widths = [config.ch * mult for mult in reversed(config.ch_mult)]
        last, groups = len(widths) - 1, config.norm_groups
        self.conv_in = nn.Conv2d(config.z_channels, widths[0], 3, padding=1)
        middle: list[nn.Module] = [ResidualBlock(widths[0], widths[0], groups) for _ in range(2)]
        if config.attention:
            middle.insert(1, Attention(widths[0], groups))
        self.mid = nn.ModuleList(middle)
        self.conv_blocks = nn.ModuleList(
            Level(
                widths[max(0, level - 1)],
                widths[level],
                config.decoder_res_blocks,
                groups,
                attention=config.attention and level == 0,
                upsample=level < last,
            )
            for level in range(last + 1)
        )
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], config.channels, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.conv_in(features)
        for module in (*self.mid, *self.conv_blocks):
            hidden = module(hidden)
        return self.conv_out(F.silu(self.norm_out(hidden)))


class Level(nn.Module):
    """Residual blocks (each followed by attention, if any) at one resolution, then the way to the next."""

    def __init__(self, width_in: int, width: int, blocks: int, groups: int, attention: bool, upsample: bool) -> None:
        super().__init__()
        self.res = nn.ModuleList(ResidualBlock(width if index else width_in, width, groups) for index in range(blocks))
        self.attn = nn.ModuleList(Attention(width, groups) for _ in range(blocks * attention))
        self.upsample = Upsample(width) if upsample else None

    def forward(self, hidden: Tensor) -> Tensor:
        for index, block in enumerate(self.res):
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
    """Single-head attention over all positions of a feature map, with a residual."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, hidden: Tensor) -> Tensor:
        normed = self.norm(hidden)
        q, k, v = (layer(normed).flatten(2).transpose(1, 2).unsqueeze(1) for layer in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).reshape(hidden.shape)
        return hidden + self.proj_out(mixed)


class Upsample(nn.Module):
    """Twice the resolution: nearest neighbor, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.conv(F.interpolate(hidden, scale_factor=2.0, mode="nearest"))
