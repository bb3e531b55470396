"""VAR (Tian et al. 2024, arXiv 2404.02905), for sampling only: one scale a step, coarse to fine.

A step predicts all p x p codes of a scale from the residual features that the codes of the earlier scales add up to,
area-averaged to its own side; the slots of the first scale read the class. Cosine attention, AdaLN; parameter names are
the official ones, and three buffers hold the tokenizer's codebook and convolutions.
Needs torch, numpy and safetensors only. B images, n codes of a step, D width, E codebook width, P last side.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

_QUANTIZER = ("quantizer_codebook", "quantizer_phi_weight", "quantizer_phi_bias")


@dataclass
class State:
    """One decode: keys and values (layers, 2, B, heads, L, d) of which `filled` slots are valid, and the features."""

    cache: Tensor
    class_BD: Tensor
    features_BEPP: Tensor
    scale: int = 0
    filled: int = 0


class VAR(nn.Module):
    guidance, nucleus, random_order = "scales", "ascending", False
    quantizer_codebook: Tensor
    quantizer_phi_weight: Tensor
    quantizer_phi_bias: Tensor

    def __init__(self, **fields: Any) -> None:
        super().__init__()
        self.config = config = SimpleNamespace(**{"guidance_conditioned": False, **fields})
        dim, code_dim, sizes = config.dim, config.code_dim, self.step_sizes(None, None)
        self.pos_start = nn.Parameter(torch.empty(1, sizes[0], dim))
        self.pos_1LC = nn.Parameter(torch.empty(1, sum(sizes), dim))
        self.lvl_embed = nn.Embedding(len(sizes), dim)
        self.class_emb = nn.Embedding(config.num_classes + 1, dim)
        self.word_embed = nn.Linear(code_dim, dim)
        self.shared_ada_lin = modulation(dim, 6) if config.shared_adaln else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head_nm = HeadNorm(config)
        self.head = nn.Linear(dim, config.vocab_size)
        self.guidance_embedding = GuidanceEmbedding(dim) if config.guidance_conditioned else None
        self.register_buffer("quantizer_codebook", torch.empty(config.vocab_size, code_dim))
        self.register_buffer("quantizer_phi_weight", torch.empty(config.num_phi, code_dim, code_dim, 3, 3))
        self.register_buffer("quantizer_phi_bias", torch.empty(config.num_phi, code_dim))

    @classmethod
    def from_pretrained(cls, folder: str, torch_dtype: torch.dtype | None = None, **unused: Any) -> VAR:
        """Read `config.json` and `model.safetensors`."""
        with torch.device("meta"):
            model = cls(**json.loads(Path(folder, "config.json").read_text(encoding="utf-8")))
        model.load_state_dict(load_file(Path(folder, "model.safetensors")), assign=True)
        # Not frozen: PyTorch sums frozen weights in another order, and varkd's do not come frozen.
        return model.eval().to(torch_dtype or model.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VAR:
        """Move or convert the model; the quantizer stays in float32, its sums do not survive half precision."""
        before = {name: getattr(self, name) for name in _QUANTIZER}
        super()._apply(fn, recurse)
        for name, value in before.items():
            setattr(self, name, value.to(getattr(self, name).device))
        return self

    @property
    def device(self) -> torch.device:
        return self.pos_1LC.device

    @property
    def dtype(self) -> torch.dtype:
        return self.pos_1LC.dtype

    @property
    def null_label(self) -> int:
        return self.config.num_classes

    @property
    def guidance_conditioned(self) -> bool:
        return self.guidance_embedding is not None

    def step_sizes(self, steps: int | None, schedule: str | None) -> list[int]:
        """How many codes each step predicts."""
        del schedule
        if steps not in (None, len(self.config.scales)):
            raise ValueError(f"VAR predicts one scale a step: {len(self.config.scales)} steps, not {steps}")
        return [side * side for side in self.config.scales]

    def start(
        self, label_B: Tensor, order_BL: Tensor, sizes: list[int], guidance_B: Tensor | None = None
    ) -> tuple[State, Tensor]:
        """Begin to decode: the state, and the hidden states (B, n, D) of the first scale."""
        del order_BL
        config, class_BD, last = self.config, self.class_emb(label_B), self.config.scales[-1]
        if self.guidance_embedding is not None and guidance_B is not None:
            class_BD = class_BD + self.guidance_embedding(guidance_B)
        features = self.quantizer_codebook.new_zeros(len(class_BD), config.code_dim, last, last)
        shape = (config.num_layers, 2, len(class_BD), config.num_heads, sum(sizes), config.dim // config.num_heads)
        state = State(torch.empty(shape, device=self.device, dtype=self.dtype), class_BD, features)
        return state, self._extend(state, class_BD.unsqueeze(1) + self.pos_start)

    def step(self, state: State, codes_Bn: Tensor) -> Tensor:
        """Consume the codes of a scale; the hidden states (B, n, D) of the next one."""
        state.features_BEPP = state.features_BEPP + self._contribution(codes_Bn, state.scale)
        state.scale += 1
        side, words = self.config.scales[state.scale], state.features_BEPP
        if side != words.shape[-1]:
            words = F.interpolate(words, size=(side, side), mode="area")
        return self._extend(state, self.word_embed(words.flatten(2).transpose(1, 2).to(self.dtype)))

    def _contribution(self, codes_Bn: Tensor, scale: int) -> Tensor:
        """What the codes of a scale add to the features: enlarged, then half smoothed by a convolution."""
        scales, num_phi = self.config.scales, len(self.quantizer_phi_weight)
        side, last = scales[scale], scales[-1]
        rows = F.embedding(codes_Bn, self.quantizer_codebook).transpose(1, 2).unflatten(2, (side, side))
        if side != last:
            rows = F.interpolate(rows, size=(last, last), mode="bicubic")
        # The convolution of the nearest tick; float64, because two of the official distances are ties but for rounding.
        ticks = np.linspace(1 / 3 / num_phi, 1 - 1 / 3 / num_phi, num_phi)
        phi = int(np.argmin(np.abs(ticks - scale / max(1, len(scales) - 1))))
        convolved = F.conv2d(rows, self.quantizer_phi_weight[phi], self.quantizer_phi_bias[phi], padding=1)
        return rows * 0.5 + convolved * 0.5

    def _extend(self, state: State, x_BnD: Tensor) -> Tensor:
        end = state.filled + x_BnD.shape[1]
        level = self.lvl_embed.weight[state.scale]
        x_BnD = x_BnD + (level + self.pos_1LC[:, state.filled : end])
        state.filled, cache = end, state.cache[..., :end, :]
        shared = None if self.shared_ada_lin is None else self.shared_ada_lin(state.class_BD)
        for index, block in enumerate(self.blocks):
            x_BnD = block(x_BnD, state.class_BD if shared is None else shared, cache[index])
        return self.head_nm(x_BnD, state.class_BD)


class Block(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.norm_eps = config.norm_eps
        self.attn = Attention(config)
        self.ffn = FeedForward(config)
        self.ada_lin = None if config.shared_adaln else modulation(config.dim, 6)
        self.ada_gss = nn.Parameter(torch.empty(1, 1, 6, config.dim)) if config.shared_adaln else None

    def forward(self, x_BnD: Tensor, condition: Tensor, cache: Tensor) -> Tensor:
        """`condition` is the class vector (B, D), or with a shared modulation its result (B, 6 D)."""
        parts = (condition if self.ada_lin is None else self.ada_lin(condition)).view(len(x_BnD), 1, 6, -1)
        parts = parts if self.ada_gss is None else parts + self.ada_gss
        gate_1, gate_2, scale_1, scale_2, shift_1, shift_2 = parts.unbind(2)
        x_BnD = x_BnD + self.attn(modulated(x_BnD, scale_1, shift_1, self.norm_eps), cache) * gate_1
        return x_BnD + self.ffn(modulated(x_BnD, scale_2, shift_2, self.norm_eps)) * gate_2


class Attention(nn.Module):
    """Cosine attention: unit queries and keys, one learned scale per head."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.scale_mul_1H11 = nn.Parameter(torch.empty(1, config.num_heads, 1, 1))
        self.q_bias = nn.Parameter(torch.empty(config.dim))
        self.v_bias = nn.Parameter(torch.empty(config.dim))
        self.mat_qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.proj = nn.Linear(config.dim, config.dim)

    def forward(self, x_BnD: Tensor, cache: Tensor) -> Tensor:
        """`cache` (2, B, heads, slots so far, d) takes the new keys and values in its last slots."""
        num_new = x_BnD.shape[1]
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x_BnD, self.mat_qkv.weight, bias)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        scale = self.scale_mul_1H11.clamp(max=math.log(100)).exp()
        q, k = (F.normalize(q.float(), dim=-1) * scale).to(v.dtype), F.normalize(k.float(), dim=-1).to(v.dtype)
        cache[0, ..., -num_new:, :], cache[1, ..., -num_new:, :] = k, v
        x = F.scaled_dot_product_attention(q, cache[0], cache[1], scale=1.0)
        return self.proj(x.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        width = config.ffn_dim or 4 * config.dim
        self.fc1 = nn.Linear(config.dim, width)
        self.fc2 = nn.Linear(width, config.dim)

    def forward(self, x_BnD: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_BnD), approximate="tanh"))


class HeadNorm(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.norm_eps = config.norm_eps
        self.ada_lin = modulation(config.dim, 2)

    def forward(self, x_BnD: Tensor, class_BD: Tensor) -> Tensor:
        scale, shift = self.ada_lin(class_BD).view(len(x_BnD), 1, 2, -1).unbind(2)
        return modulated(x_BnD, scale, shift, self.norm_eps)


class GuidanceEmbedding(nn.Module):
    """A guidance scale, float (B,) -> what it adds to the class vector, (B, D)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(16, dim, bias=False)

    def forward(self, guidance_B: Tensor) -> Tensor:
        frequency_F = torch.exp2(torch.arange(-6, 2, device=guidance_B.device, dtype=torch.float32))
        angle_BF = (guidance_B.float() - 1).unsqueeze(1) * frequency_F
        return self.linear(torch.cat([angle_BF.sin(), 1 - angle_BF.cos()], dim=1).to(self.linear.weight.dtype))


def modulation(dim: int, parts: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(dim, parts * dim))


def modulated(x_BnD: Tensor, scale_B1D: Tensor, shift_B1D: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x_BnD, x_BnD.shape[-1:], eps=eps) * (1 + scale_B1D) + shift_B1D
