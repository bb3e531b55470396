"""Convolutional blocks that the tokenizers of LlamaGen and VAR share (both descend from VQGAN, arXiv 2012.09841).

Parameter names are the official ones of both. Feature maps are (B, width, h, w).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Shapes = Mapping[str, tuple[int, ...]]
OFFICIAL_GROUPS = 32  # of every published tokenizer; no shape tells it
NORM_EPS = 1e-6
SIMILARITIES_AT_ONCE = 1 << 24  # 64 MiB of float32


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut, which is a 1x1 convolution where the width changes."""

    def __init__(self, width_in: int, width: int, groups: int) -> None:
        super().__init__()
        self.norm1 = norm(width_in, groups)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.norm2 = norm(width, groups)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(width_in, width, 1) if width_in != width else None

    def forward(self, hidden: Tensor) -> Tensor:
        inner = self.conv1(F.silu(self.norm1(hidden)))
        inner = self.conv2(F.silu(self.norm2(inner)))
        return inner + (hidden if self.nin_shortcut is None else self.nin_shortcut(hidden))


class Downsample(nn.Module):
    """Half the resolution: pad on the right and below only, then a stride-2 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.conv(F.pad(hidden, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the resolution: nearest neighbor, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.conv(F.interpolate(hidden, scale_factor=2.0, mode="nearest"))


def norm(width: int, groups: int) -> nn.GroupNorm:
    """Group normalization with the official epsilon."""
    return nn.GroupNorm(groups, width, eps=NORM_EPS)


def attend_over_map(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Single-head attention over all positions of a map: three (B, width, h, w) -> (B, width, h, w)."""
    query_rows, key_rows, value_rows = (layer.flatten(2).transpose(1, 2).unsqueeze(1) for layer in (query, key, value))
    mixed = F.scaled_dot_product_attention(query_rows, key_rows, value_rows)
    return mixed.squeeze(1).transpose(1, 2).reshape(query.shape)


@torch.no_grad()
def nearest(vectors_NE: Tensor, codebook_VE: Tensor) -> Tensor:
    """The codebook row at the smallest Euclidean distance from each vector: int64 (N,).

    |z - e|^2 without |z|^2, which no row changes. In chunks, so that memory does not grow with N x V.
    """
    square_V, rows_EV = codebook_VE.square().sum(dim=1), codebook_VE.T
    chunks = vectors_NE.split(max(1, SIMILARITIES_AT_ONCE // len(codebook_VE)))
    return torch.cat([torch.addmm(square_V, chunk, rows_EV, alpha=-2).argmin(dim=1) for chunk in chunks])
