"""Layers that several backbones share, under the parameter names that they share.

RMSNorm, SwiGLU and the 2-D rotary table are LlamaGen's (arXiv 2406.06525), taken over unchanged by ARPG and RandAR.
Quirks kept: RMSNorm casts back to the input dtype before it multiplies by the weight, and the class slot's rotary
cosine and sine are both zero, which multiplies its query and key by zero.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SWIGLU_AXES = {
    r"(.+)\.w[13]\.weight": ("F:{0}", "D"),
    r"(.+)\.w2\.weight": ("D", "F:{0}"),
    r"(.+\.)?(attention_norm|attn_norm|ffn_norm|norm)\.weight": ("D",),
}
"""`Backbone.axes` of the feed-forward layers and norms below."""


def swiglu_width(dim: int) -> int:
    """The official FFN width: 8/3 of `dim`, rounded up to a multiple of 256."""
    return -(-int(2 * (4 * dim) / 3) // 256) * 256


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x), no biases."""

    def __init__(self, dim: int, width: int, dropout: float) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, width, bias=False)
        self.w3 = nn.Linear(dim, width, bias=False)
        self.w2 = nn.Linear(width, dim, bias=False)
        self.ffn_dropout = nn.Dropout(dropout)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.ffn_dropout(self.w2(F.silu(self.w1(x_BLD)) * self.w3(x_BLD)))


class LabelEmbedding(nn.Module):
    """Class labels, with the null label in the last row -> one slot (B, 1, D)."""

    def __init__(self, num_labels: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_labels, dim)

    def forward(self, label_B: Tensor) -> Tensor:
        return self.embedding_table(label_B).unsqueeze(1)


class GuidanceEmbedding(nn.Module):
    """A guidance scale s, float (B,) -> what it adds to the class vector: (B, D).

    W [sin f (s - 1), 1 - cos f (s - 1)] with f = 1/64, 1/32, .., 2: Fourier features, after Meng et al. (2210.03142).
    Counted from s = 1, where nothing is ever added; a W of zeros, the start of every model, adds nothing anywhere.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(16, dim, bias=False)

    def forward(self, guidance_B: Tensor) -> Tensor:
        weight = self.linear.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        frequency_F = torch.exp2(torch.arange(-6, 2, device=weight.device, dtype=wide))
        angle_BF = (guidance_B.to(wide) - 1).unsqueeze(1) * frequency_F
        return self.linear(torch.cat([angle_BF.sin(), 1 - angle_BF.cos()], dim=1).to(weight.dtype))


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        shape = (x.shape[-1],)
        if x.dtype == self.weight.dtype and x.dtype in (torch.float32, torch.float64):
            return F.rms_norm(x, shape, self.weight, self.eps)  # no cast to come back from: one kernel on a GPU
        wide = x if x.dtype == torch.float64 else x.float()
        return F.rms_norm(wide, shape, None, self.eps).to(x.dtype) * self.weight


def attend(
    q_BHLd: Tensor,
    k_BHLd: Tensor,
    v_BHLd: Tensor,
    is_causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Scaled dot-product attention, in float32 where a CPU would differentiate it in bfloat16 (2.5 times slower).

    `mask` is boolean and broadcasts to (B, heads, queries, keys): True where a query sees a key.
    """
    if q_BHLd.device.type != "cpu" or not q_BHLd.requires_grad:
        return F.scaled_dot_product_attention(q_BHLd, k_BHLd, v_BHLd, mask, is_causal=is_causal, scale=scale)
    with torch.autocast("cpu", enabled=False):
        q, k, v = (x if x.dtype == torch.float64 else x.float() for x in (q_BHLd, k_BHLd, v_BHLd))
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale).to(v_BHLd.dtype)


def rotate(x_BHLd: Tensor, rope: Tensor) -> Tensor:
    """Rotate adjacent lane pairs by the slot's angles: `rope` is (L, head_dim / 2, 2) of cosines and sines.

    Pairs are complex numbers: one kernel instead of seven, and 1.5 to 7 times faster on a CPU (docs/performance.md).
    torch.compile fuses the seven and does not know complex numbers.
    """
    wide = (x_BHLd if x_BHLd.dtype == torch.float64 else x_BHLd.float()).unflatten(-1, (-1, 2))
    rope = rope.to(wide.dtype)
    if torch.compiler.is_compiling():
        (even, odd), (cos, sin) = wide.unbind(-1), rope.unbind(-1)
        turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(wide) * torch.view_as_complex(rope))
    return turned.flatten(-2).to(x_BHLd.dtype)


@cache
def rope_table(grid: tuple[int, int], head_dim: int, base: float, device: torch.device) -> Tensor:
    """2-D rotary cosines and sines, float32 (1 + L, head_dim / 2, 2): class slot (zeros), then cells in raster order.

    The first half of the pairs turns with the row, the second with the column.
    """
    with torch.inference_mode(False):
        half = head_dim // 2
        frequency = base ** (-torch.arange(0, half, 2).float() / half)
        row, column = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
        angle = torch.cat([row.reshape(-1, 1) * frequency, column.reshape(-1, 1) * frequency], dim=1)
        table = torch.stack([angle.cos(), angle.sin()], dim=-1)
        return torch.cat([torch.zeros_like(table[:1]), table]).to(device)


def cache_dtype(weight: Tensor) -> torch.dtype:
    """What a KV cache is kept in: the autocast dtype where autocast is on, else the dtype of the weights."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
