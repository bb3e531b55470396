"""RAR (Yu et al. 2024, arXiv 2411.00776), for sampling only: one code a step, in raster (or random) order.

A ViT-style decoder with adaLN under its official parameter names. Slots are [cls, class, code, code, ..]; a slot holds
its content, the position that it comes from and the position that it is to predict, which makes any order possible.
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
    """One decode: the KV cache (layers, 2, B, heads, L + 1, d), of which `filled` slots are valid."""

    cache: Tensor
    class_B1D: Tensor
    order_BL: Tensor
    filled: int = 0


class RAR(nn.Module):
    guidance, nucleus = "power_cosine", "descending"

    def __init__(self, **fields: Any) -> None:
        super().__init__()
        self.config = config = SimpleNamespace(**{"guidance_conditioned": False, **fields})
        dim, length = config.dim, config.grid[0] * config.grid[1]
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.embeddings = nn.Embedding(config.vocab_size + 1 + config.num_classes + 1, dim)
        # The official tables have more rows than any slot reads.
        self.pos_embed = nn.Parameter(torch.zeros(1, length + 1024, dim))
        self.target_aware_pos_embed = nn.Parameter(torch.zeros(1, length + 1024, dim))
        self.timesteps_embeddings = nn.Parameter(torch.zeros(1, length + 100, dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.adaln_before_head = FinalNorm(config)
        self.lm_head = nn.Linear(dim, config.vocab_size)
        self.guidance_embedding = GuidanceEmbedding(dim) if config.guidance_conditioned else None

    @classmethod
    def from_pretrained(cls, folder: str, torch_dtype: torch.dtype | None = None, **unused: Any) -> RAR:
        """Read `config.json` and `model.safetensors`."""
        with torch.device("meta"):
            model = cls(**json.loads(Path(folder, "config.json").read_text(encoding="utf-8")))
        model.load_state_dict(load_file(Path(folder, "model.safetensors")), assign=True)
        return model.eval().to(torch_dtype or model.dtype)

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.lm_head.weight.dtype

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
        """How many codes each step predicts."""
        del schedule
        length = self.config.grid[0] * self.config.grid[1]
        if steps not in (None, length):
            raise ValueError(f"RAR predicts one code a step: {length} steps, not {steps}")
        return [1] * length

    def start(
        self, label_B: Tensor, order_BL: Tensor, sizes: list[int], guidance_B: Tensor | None = None
    ) -> tuple[State, Tensor]:
        """Begin to decode: the state, and the hidden states (B, n, D) of the first step."""
        config, class_BD = self.config, self.embeddings(self.config.vocab_size + 1 + label_B)
        if self.guidance_embedding is not None and guidance_B is not None:
            class_BD = class_BD + self.guidance_embedding(guidance_B)
        class_B1D = class_BD.unsqueeze(1)
        content = torch.cat([self.cls_token.expand_as(class_B1D), class_B1D], dim=1) + self.pos_embed[:, :2]
        target = F.embedding(2 + order_BL[:, :1], self.target_aware_pos_embed[0])
        head_dim = config.dim // config.num_heads
        shape = (config.num_layers, 2, len(class_B1D), config.num_heads, len(sizes) + 1, head_dim)
        state = State(torch.empty(shape, device=self.device, dtype=self.dtype), class_B1D, order_BL)
        return state, self._extend(state, content + F.pad(target, (0, 0, 1, 0)))

    def step(self, state: State, codes_Bn: Tensor) -> Tensor:
        """Consume the code just drawn; the hidden states (B, n, D) of the next step."""
        rank = state.filled - 2
        here = F.embedding(2 + state.order_BL[:, rank : rank + 1], self.pos_embed[0])
        target = F.embedding(2 + state.order_BL[:, rank + 1 : rank + 2], self.target_aware_pos_embed[0])
        return self._extend(state, self.embeddings(codes_Bn) + here + target)

    def head(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden)

    def _extend(self, state: State, x_BnD: Tensor) -> Tensor:
        first, state.filled = state.filled, state.filled + x_BnD.shape[1]
        condition_BnD = state.class_B1D + self.timesteps_embeddings[:, first : state.filled]
        cache = state.cache[..., : state.filled, :]
        for index, block in enumerate(self.blocks):
            x_BnD = block(x_BnD, condition_BnD, cache[index])
        return self.adaln_before_head(x_BnD[:, -1:], condition_BnD[:, -1:])


class Block(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, config.norm_eps)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.dim, config.norm_eps)
        self.mlp = FeedForward(config.dim, config.ffn_dim or 4 * config.dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.dim, 6 * config.dim))

    def forward(self, x_BnD: Tensor, condition_BnD: Tensor, cache: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = self.adaLN_modulation(condition_BnD).chunk(6, dim=-1)
        x_BnD = x_BnD + gate_a * self.attn(self.norm1(x_BnD) * (1 + scale_a) + shift_a, cache)
        return x_BnD + gate_f * self.mlp(self.norm2(x_BnD) * (1 + scale_f) + shift_f)


class Attention(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.num_heads, head_dim = config.num_heads, config.dim // config.num_heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.q_norm = nn.LayerNorm(head_dim, config.norm_eps)
        self.k_norm = nn.LayerNorm(head_dim, config.norm_eps)
        self.proj = nn.Linear(config.dim, config.dim)

    def forward(self, x_BnD: Tensor, cache: Tensor) -> Tensor:
        """`cache` (2, B, heads, slots so far, d) takes the new keys and values in its last slots."""
        num_new = x_BnD.shape[1]
        q, k, v = self.qkv(x_BnD).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        cache[0, ..., -num_new:, :], cache[1, ..., -num_new:, :] = k, v
        # The first two slots come together (causal between them), the others one by one (they see every slot).
        x = F.scaled_dot_product_attention(q, cache[0], cache[1], is_causal=num_new > 1)
        return self.proj(x.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, width)
        self.fc2 = nn.Linear(width, dim)

    def forward(self, x_BnD: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_BnD)))


class FinalNorm(nn.Module):
    """LayerNorm without gains, then scale and shift by the condition."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.dim, config.norm_eps, elementwise_affine=False)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.dim, 2 * config.dim))

    def forward(self, x_BnD: Tensor, condition_BnD: Tensor) -> Tensor:
        scale, shift = self.adaLN_modulation(condition_BnD).chunk(2, dim=-1)
        return self.norm(x_BnD) * (1 + scale) + shift


class GuidanceEmbedding(nn.Module):
    """A guidance scale, float (B,) -> what it adds to the class vector, (B, D)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(16, dim, bias=False)

    def forward(self, guidance_B: Tensor) -> Tensor:
        frequency_F = torch.exp2(torch.arange(-6, 2, device=guidance_B.device, dtype=torch.float32))
        angle_BF = (guidance_B.float() - 1).unsqueeze(1) * frequency_F
        return self.linear(torch.cat([angle_BF.sin(), 1 - angle_BF.cos()], dim=1).to(self.linear.weight.dtype))
