"""RandAR (Pang et al. 2024, arXiv 2412.01827), for sampling only: several codes a step, in random (or raster) order.

LlamaGen's decoder over [class, q_0, t_0, q_1, t_1, ..]: t_j is the j-th code in the order of generation, and q_j, one
learned vector turned by the rotary angles of the cell that it asks for, predicts it. In a parallel step the q's stand
behind one another; the next step reads the step's codes in the interleaved layout again.
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
    """One decode: the KV cache (layers, 2, B, heads, 2 L, d), and what the cells contribute, per row.

    `filled` slots hold the interleaved sequence up to the first instruction of the step that is predicted; the step's
    further instructions stand behind them, to be overwritten. `rope` (B, 1, 2 L, d / 2, 2) are the slots' angles.
    """

    cache: Tensor
    rope: Tensor
    instruction_BLD: Tensor
    sizes: list[int]
    step: int = 0
    filled: int = 0


class RandAR(nn.Module):
    guidance, nucleus = "decoded_before", "descending"

    def __init__(self, **fields: Any) -> None:
        super().__init__()
        self.config = config = SimpleNamespace(**{"guidance_conditioned": False, **fields})
        self.pos_instruct_embeddings = nn.Parameter(torch.zeros(1, config.dim))
        self.cls_embedding = LabelEmbedding(config.num_classes + 1, config.dim)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.guidance_embedding = GuidanceEmbedding(config.dim) if config.guidance_conditioned else None

    @classmethod
    def from_pretrained(cls, folder: str, torch_dtype: torch.dtype | None = None, **unused: Any) -> RandAR:
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

    @property
    def random_order(self) -> bool:
        return self.config.order == "random"

    def step_sizes(self, steps: int | None, schedule: str | None) -> list[int]:
        """How many codes each step predicts: by a quarter of a cosine, never less than one."""
        length = self.config.grid[0] * self.config.grid[1]
        count = length if steps is None else steps
        if not 1 <= count <= length or schedule not in (None, "cosine"):
            raise ValueError(f"RandAR decodes in 1 to {length} steps by cosine, not {steps} by {schedule}")
        sizes, done = [], 0
        for step in range(1, count + 1):
            target = min(int((1 - math.cos(math.pi / 2 * step / count)) * length + 1), length)
            sizes.append(max(1, target - done))
            done += sizes[-1]
        return sizes

    def start(
        self, label_B: Tensor, order_BL: Tensor, sizes: list[int], guidance_B: Tensor | None = None
    ) -> tuple[State, Tensor]:
        """Begin to decode: the state, and the hidden states (B, n, D) of the first step."""
        config, x_B1D, head_dim = self.config, self.cls_embedding(label_B), self.config.dim // self.config.num_heads
        if self.guidance_embedding is not None and guidance_B is not None:
            x_B1D = x_B1D + self.guidance_embedding(guidance_B).unsqueeze(1)
        shape = (config.num_layers, 2, len(x_B1D), config.num_heads, 2 * order_BL.shape[1], head_dim)
        cache = torch.empty(shape, device=self.device, dtype=self.dtype)
        cells = rope_table(config.grid, head_dim, config.rope_base).to(self.device)[order_BL + 1]
        vector = self.pos_instruct_embeddings.unflatten(1, (config.num_heads, 1, -1))
        instruction_BLD = rotate(vector, cells.unsqueeze(1)).transpose(1, 2).flatten(2)
        rope = F.pad(cells.repeat_interleave(2, dim=1), (0, 0, 0, 0, 1, 0)).unsqueeze(1)
        state = State(cache, rope, instruction_BLD, sizes)
        return state, self._advance(state, x_B1D)

    def step(self, state: State, codes_Bn: Tensor) -> Tensor:
        """Consume the codes just drawn, in order; the hidden states (B, n, D) of the next step."""
        done = state.filled // 2 - 1
        instruction_BnD = state.instruction_BLD[:, done : done + codes_Bn.shape[1]]
        pairs = torch.stack([instruction_BnD, self.tok_embeddings(codes_Bn)], dim=2).flatten(1, 2)
        state.step += 1
        return self._advance(state, pairs[:, 1:])  # the step's first instruction is in the cache for good

    def head(self, hidden: Tensor) -> Tensor:
        return self.output(hidden)

    def _advance(self, state: State, x_BnD: Tensor) -> Tensor:
        """Read the slots that are new for good, then the instructions of the step, which predict its codes."""
        begin, solid, size = state.filled, state.filled + x_BnD.shape[1], state.sizes[state.step]
        done, end = solid // 2, solid + size
        asking = slice(solid, solid + 2 * size, 2)  # where these instructions stand in the interleaved sequence
        x_BnD = torch.cat([x_BnD, state.instruction_BLD[:, done : done + size]], dim=1)
        rope = torch.cat([state.rope[:, :, begin:solid], state.rope[:, :, asking]], dim=2)
        mask = torch.ones(end - begin, end, dtype=torch.bool, device=x_BnD.device).tril(begin) if begin else None
        state.filled, cache = solid + 1, state.cache[..., :end, :]
        for index, layer in enumerate(self.layers):
            x_BnD = layer(x_BnD, rope, mask, cache[index])
        return self.norm(x_BnD[:, -size:])


class Block(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config.dim, config.ffn_dim)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, x_BnD: Tensor, rope: Tensor, mask: Tensor | None, cache: Tensor) -> Tensor:
        x_BnD = x_BnD + self.attention(self.attention_norm(x_BnD), rope, mask, cache)
        return x_BnD + self.feed_forward(self.ffn_norm(x_BnD))


class Attention(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.wqkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x_BnD: Tensor, rope: Tensor, mask: Tensor | None, cache: Tensor) -> Tensor:
        """Causal unless there is a `mask`; `cache` (2, B, heads, slots so far, d) takes the new slots."""
        num_new = x_BnD.shape[1]
        qkv = self.wqkv(x_BnD).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        (q, k), v = rotate(qkv[:2], rope), qkv[2]
        cache[0, ..., -num_new:, :], cache[1, ..., -num_new:, :] = k, v
        x = F.scaled_dot_product_attention(q, cache[0], cache[1], mask, is_causal=mask is None)
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
