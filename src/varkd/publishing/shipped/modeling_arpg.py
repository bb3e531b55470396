"""ARPG (Li et al. 2025, arXiv 2503.10568), for sampling only: several codes a step, in random (or raster) order.

Self-attention layers read the class and the codes known so far, in the order of generation, and end in one key and
value per slot. Cross-attention layers predict the next cells: every query is the same mask embedding, turned by the
rotary angles of the cell that it asks for. Parameter names are the official ones.
Needs torch and safetensors only. B images, L codes, n codes of a step, D width, d head width.
"""

from __future__ import annotations

import json
import math
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
    """One decode: the caches (self layers + 1, 2, B, heads, slots, d) of which `filled` slots are valid.

    The last one holds the keys and values that all cross-attention layers share. `rope` are the slots' angles per row.
    """

    cache: Tensor
    rope: Tensor
    sizes: list[int]
    step: int = 0
    filled: int = 0


class ARPG(nn.Module):
    guidance, nucleus = "decoded_after", "descending"

    def __init__(self, **fields: Any) -> None:
        super().__init__()
        self.config = config = SimpleNamespace(**{"guidance_conditioned": False, **fields})
        self.embeddings = nn.Embedding(config.vocab_size + config.num_classes + 3, config.dim)
        self.layers = Decoder(config)
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.guidance_embedding = GuidanceEmbedding(config.dim) if config.guidance_conditioned else None

    @classmethod
    def from_pretrained(cls, folder: str, torch_dtype: torch.dtype | None = None, **unused: Any) -> ARPG:
        """Read `config.json` and `model.safetensors`."""
        with torch.device("meta"):
            model = cls(**json.loads(Path(folder, "config.json").read_text(encoding="utf-8")))
        model.load_state_dict(load_file(Path(folder, "model.safetensors")), assign=True)
        return model.eval().to(torch_dtype or model.dtype)

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.head.weight.dtype

    @property
    def null_label(self) -> int:
        return self.config.num_classes

    @property
    def guidance_conditioned(self) -> bool:
        return self.guidance_embedding is not None

    @property
    def random_order(self) -> bool:
        return self.config.order == "random"

    def step_sizes(self, steps: int | None, schedule: str | None) -> list[int]:
        """How many codes each step predicts: by the share of codes that is still unknown after it."""
        length = self.config.grid[0] * self.config.grid[1]
        count = length if steps is None else steps
        if not 1 <= count <= length or schedule not in (None, "arccos", "cosine"):
            raise ValueError(f"ARPG decodes in 1 to {length} steps by arccos or cosine, not {steps} by {schedule}")
        sizes, left = [], length
        for step in range(1, count):
            done = step / count
            share = math.cos(math.pi / 2 * done) if schedule == "cosine" else math.acos(done) / (math.pi / 2)
            unknown = max(1, min(left - 1, int(length * share)))
            sizes.append(left - unknown)
            left = unknown
        return [*sizes, left]

    def start(
        self, label_B: Tensor, order_BL: Tensor, sizes: list[int], guidance_B: Tensor | None = None
    ) -> tuple[State, Tensor]:
        """Begin to decode: the state, and the hidden states (B, n, D) of the first step."""
        config, head_dim = self.config, self.config.dim // self.config.num_heads
        x_B1D = self.embeddings(label_B.unsqueeze(1) + config.vocab_size + 1)
        if self.guidance_embedding is not None and guidance_B is not None:
            x_B1D = x_B1D + self.guidance_embedding(guidance_B).unsqueeze(1)
        slots = order_BL.shape[1] - sizes[-1] + 1  # nothing reads the codes of the last step
        shape = (len(self.layers.self_dec) + 1, 2, len(x_B1D), config.num_heads, slots, head_dim)
        table = rope_table(config.grid, head_dim, config.rope_base).to(self.device)
        rope = table[F.pad(order_BL + 1, (1, 0))].unsqueeze(1)
        state = State(torch.empty(shape, device=self.device, dtype=self.dtype), rope, sizes)
        return state, self._advance(state, x_B1D)

    def step(self, state: State, codes_Bn: Tensor) -> Tensor:
        """Consume the codes just drawn, in order; the hidden states (B, n, D) of the next step."""
        state.step += 1
        return self._advance(state, self.embeddings(codes_Bn))

    def _advance(self, state: State, x_BnD: Tensor) -> Tensor:
        begin, end = state.filled, state.filled + x_BnD.shape[1]
        state.filled, cache, rope = end, state.cache[..., :end, :], state.rope[:, :, begin:end]
        for index, layer in enumerate(self.layers.self_dec):
            x_BnD = layer(x_BnD, rope, cache[index])
        x_BnD, heads = self.layers.norm(x_BnD), self.config.num_heads
        keys = rotate(split(self.layers.to_k(x_BnD), heads), rope)
        keys, values = remember(keys, split(self.layers.to_v(x_BnD), heads), cache[-1])
        # Slot j holds the code of rank j - 1, so the next ranks' angles stand right behind the slots read so far.
        asked = state.rope[:, :, end : end + state.sizes[state.step]]
        q_BnD = self.embeddings.weight[self.config.vocab_size].expand(len(asked), asked.shape[2], -1)
        for layer in self.layers.cross_dec:
            q_BnD = layer(q_BnD, asked, keys, values)
        return self.norm(q_BnD)


class Decoder(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        half = config.num_layers // 2
        self.self_dec = nn.ModuleList(SelfBlock(config) for _ in range(half))
        self.cross_dec = nn.ModuleList(CrossBlock(config) for _ in range(half))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.to_k = nn.Linear(config.dim, config.dim, bias=False)
        self.to_v = nn.Linear(config.dim, config.dim, bias=False)


class SelfBlock(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.attn = SelfAttention(config)
        self.ffn = FeedForward(config.dim, config.ffn_dim)
        self.attn_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, x_BnD: Tensor, rope: Tensor, cache: Tensor) -> Tensor:
        x_BnD = x_BnD + self.attn(self.attn_norm(x_BnD), rope, cache)
        return x_BnD + self.ffn(self.ffn_norm(x_BnD))


class CrossBlock(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.attn = CrossAttention(config)
        self.ffn = FeedForward(config.dim, config.ffn_dim)
        self.attn_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, q_BnD: Tensor, rope: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        q_BnD = q_BnD + self.attn(self.attn_norm(q_BnD), rope, keys, values)
        return q_BnD + self.ffn(self.ffn_norm(q_BnD))


class SelfAttention(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.to_q = nn.Linear(config.dim, config.dim, bias=False)
        self.to_k = nn.Linear(config.dim, config.dim, bias=False)
        self.to_v = nn.Linear(config.dim, config.dim, bias=False)
        self.proj = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x_BnD: Tensor, rope: Tensor, cache: Tensor) -> Tensor:
        q, k, v = (split(linear(x_BnD), self.num_heads) for linear in (self.to_q, self.to_k, self.to_v))
        k, v = remember(rotate(k, rope), v, cache)
        x = F.scaled_dot_product_attention(rotate(q, rope), k, v)  # slots of one step see each other
        return self.proj(x.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.to_q = nn.Linear(config.dim, config.dim, bias=False)
        self.proj = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, q_BnD: Tensor, rope: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        q = rotate(split(self.to_q(q_BnD), self.num_heads), rope)
        return self.proj(F.scaled_dot_product_attention(q, keys, values).transpose(1, 2).flatten(2))


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


def split(x_BnD: Tensor, num_heads: int) -> Tensor:
    """(B, n, D) -> (B, heads, n, d)."""
    return x_BnD.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def remember(k: Tensor, v: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
    """All keys and values so far: `cache` (2, B, heads, slots so far, d) takes the new ones in its last slots."""
    num_new = k.shape[2]
    cache[0, ..., -num_new:, :], cache[1, ..., -num_new:, :] = k, v
    return cache[0], cache[1]


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
