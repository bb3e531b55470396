"""LlamaGen (Sun et al. 2024, arXiv 2406.06525), for sampling only: one code a step, in raster order.

A Llama-style decoder with 2-D rotary positions under its official parameter names. Slots are [class, code_0, ..]; slot
t predicts code_t. The class slot's query and key are multiplied by zero: its rotary cosine and sine are zero.
Needs torch and safetensors only. B images, L codes, n codes of a step, D width, d head width.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn


@dataclass
class State:
    """KV cache of one decode, (layers, 2, B, heads, L, d); `filled` slots are valid."""

    cache: Tensor
    rope: Tensor
    filled: int = 0


class LlamaGen(nn.Module):
    guidance, nucleus, random_order = "constant", "descending", False

    def __init__(self, **fields: Any) -> None:
        super().__init__()
        self.config = config = SimpleNamespace(**{"guidance_conditioned": False, **fields})
        self.cls_embedding = LabelEmbedding(config.num_classes + 1, config.dim)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.guidance_embedding = GuidanceEmbedding(config.dim) if config.guidance_conditioned else None

    @classmethod
    def from_pretrained(cls, folder: str, torch_dtype: torch.dtype | None = None, **unused: Any) -> LlamaGen:
        """Read `config.json` and `model.safetensors`."""
        with torch.device("meta"):
            model = cls(**json.loads(Path(folder, "config.json").read_text(encoding="utf-8")))
        model.load_state_dict(load_file(Path(folder, "model.safetensors")), assign=True)
        return model.eval().to(torch_dtype or model.dtype)

    @property
    def device(self) -> torch.device:
        return self.output.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.output.weight.dtype

    @property
    def null_label(self) -> int:
        return self.config.num_classes

    @property
    def guidance_conditioned(self) -> bool:
        return self.guidance_embedding is not None

    def step_sizes(self, steps: int | None, schedule: str | None) -> list[int]:
        """How many codes each step predicts."""
        del schedule
        length = self.config.grid[0] * self.config.grid[1]
        if steps not in (None, length):
            raise ValueError(f"LlamaGen predicts one code a step: {length} steps, not {steps}")
        return [1] * length

    def start(
        self, label_B: Tensor, order_BL: Tensor, sizes: list[int], guidance_B: Tensor | None = None
    ) -> tuple[State, Tensor]:
        """Begin to decode: the state, and the hidden states (B, n, D) of the first step."""
        del order_BL
        config, x_B1D = self.config, self.cls_embedding(label_B)
        if self.guidance_embedding is not None and guidance_B is not None:
            x_B1D = x_B1D + self.guidance_embedding(guidance_B).unsqueeze(1)
        shape = (config.num_layers, 2, len(x_B1D), config.num_heads, len(sizes), config.dim // config.num_heads)
        cache = torch.empty(shape, device=self.device, dtype=self.dtype)
        rope = rope_table(config.grid, config.dim // config.num_heads, config.rope_base).to(self.device)
        state = State(cache, rope)
        return state, self._extend(state, x_B1D)

    def step(self, state: State, codes_Bn: Tensor) -> Tensor:
        """Consume the codes just drawn; the hidden states (B, n, D) of the next step."""
        return self._extend(state, self.tok_embeddings(codes_Bn))

    def head(self, hidden: Tensor) -> Tensor:
        return self.output(hidden)

    def _extend(self, state: State, x_B1D: Tensor) -> Tensor:
        end = state.filled + 1
        rope, cache = state.rope[state.filled : end], state.cache[..., :end, :]
        state.filled = end
        for index, layer in enumerate(self.layers):
            x_B1D = layer(x_B1D, rope, cache[index])
        return self.norm(x_B1D)


class Block(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config.dim, config.ffn_dim)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, x_B1D: Tensor, rope: Tensor, cache: Tensor) -> Tensor:
        x_B1D = x_B1D + self.attention(self.attention_norm(x_B1D), rope, cache)
        return x_B1D + self.feed_forward(self.ffn_norm(x_B1D))


class Attention(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.wqkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x_B1D: Tensor, rope: Tensor, cache: Tensor) -> Tensor:
        """`cache` (2, B, heads, slots so far, d) takes the new key and value in its last slot."""
        qkv = self.wqkv(x_B1D).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        (q, k), v = rotate(qkv[:2], rope), qkv[2]
        cache[0, ..., -1:, :], cache[1, ..., -1:, :] = k, v
        x = F.scaled_dot_product_attention(q, cache[0], cache[1])
        return self.wo(x.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU; `width=None` is the official 8/3 of `dim`, rounded up to a multiple of 256."""

    def __init__(self, dim: int, width: int | None) -> None:
        super().__init__()
        width = width or -(-int(2 * (4 * dim) / 3) // 256) * 256
        self.w1 = nn.Linear(dim, width, bias=False)
        self.w3 = nn.Linear(dim, width, bias=False)
        self.w2 = nn.Linear(width, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class LabelEmbedding(nn.Module):
    def __init__(self, num_labels: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_labels, dim)

    def forward(self, label_B: Tensor) -> Tensor:
        return self.embedding_table(label_B).unsqueeze(1)


class GuidanceEmbedding(nn.Module):
    """A guidance scale, float (B,) -> what it adds to the class vector, (B, D)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(16, dim, bias=False)

    def forward(self, guidance_B: Tensor) -> Tensor:
        frequency_F = torch.exp2(torch.arange(-6, 2, device=guidance_B.device, dtype=torch.float32))
        angle_BF = (guidance_B.float() - 1).unsqueeze(1) * frequency_F
        return self.linear(torch.cat([angle_BF.sin(), 1 - angle_BF.cos()], dim=1).to(self.linear.weight.dtype))


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype == torch.float32:
            return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
        return F.rms_norm(x.float(), (x.shape[-1],), None, self.eps).to(x.dtype) * self.weight


def rotate(x_BHLd: Tensor, rope: Tensor) -> Tensor:
    """Rotate adjacent lane pairs by their slot's angles."""
    pairs = torch.view_as_complex(x_BHLd.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.view_as_complex(rope.float())).flatten(-2).to(x_BHLd.dtype)


def rope_table(grid: list[int], head_dim: int, base: float) -> Tensor:
    """2-D rotary cosines and sines, float32 (1 + L, d / 2, 2): the class slot (zeros), then cells in raster order."""
    half = head_dim // 2
    frequency = base ** (-torch.arange(0, half, 2).float() / half)
    row, column = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    angle = torch.cat([row.reshape(-1, 1) * frequency, column.reshape(-1, 1) * frequency], dim=1)
    table = torch.stack([angle.cos(), angle.sin()], dim=-1)
    return torch.cat([torch.zeros_like(table[:1]), table])
