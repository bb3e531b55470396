"""ARPG: randomized parallel decoding (Li et al. 2025, arXiv 2503.10568), class-conditional.

Two passes. Self-attention layers read the class and the codes known so far, in the order of generation, and end in one
key and value per slot. Cross-attention layers then predict the next cells: every query is the same mask embedding and
differs only by the rotary position of the cell that it asks for; all of them share those keys and values. Parameter
names are the official ones; norms, SwiGLU and rotary positions are LlamaGen's, with the class slot's query and key
multiplied by zero. One table holds the codes, the mask (row V), the classes, the null class and an unused row.

A plan's steps are blocks: slots of one step see each other, a query sees the blocks before its own. With one code a
step that is the strictly causal mask of the official training; with more, it is what the official sampler computes.
Left out: label dropping and guidance (they act on batches and logits, see `types.Context` and `rollout`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from varkd.backbones.layers import (
    SWIGLU_AXES,
    FeedForward,
    GuidanceEmbedding,
    RMSNorm,
    attend,
    cache_dtype,
    rope_table,
    rotate,
    swiglu_width,
)
from varkd.backbones.orders import KINDS, check_order, check_steps, choose_order, prefix_codes
from varkd.backbones.protocol import Backbone, GuidanceKind
from varkd.containers import count_numbered
from varkd.errors import VarkdError, did_you_mean
from varkd.types import Condition, Plan
from varkd.world import Rng

SCHEDULES: dict[str, Callable[[float], float]] = {
    "arccos": lambda done: math.acos(done) / (math.pi / 2),
    "cosine": lambda done: math.cos(math.pi / 2 * done),
}
"""The share of codes still unknown after the share `done` of all steps."""


def step_sizes(length: int, steps: int, schedule: str = "arccos") -> tuple[int, ...]:
    """How many codes each step predicts; the last step takes the rest.

    Raises:
        VarkdError: `steps` outside [1, length], or an unknown schedule.
    """
    check_steps("arpg", steps, length)
    if schedule not in SCHEDULES:
        raise VarkdError(f"arpg: unknown step schedule '{schedule}': {did_you_mean(schedule, SCHEDULES)}")
    sizes, left = [], length
    for step in range(steps - 1):
        unknown = max(1, min(left - 1, int(length * SCHEDULES[schedule]((step + 1) / steps))))
        sizes.append(left - unknown)
        left = unknown
    return (*sizes, left)


@dataclass(frozen=True)
class AttentionMask:
    """Which keys a query sees: all of them, those up to its own place, or those of a boolean `mask`."""

    is_causal: bool = False
    mask: Tensor | None = None

    def first(self, slots: int) -> AttentionMask:
        """The same among the first `slots` slots."""
        return self if self.mask is None else AttentionMask(mask=self.mask[:slots, :slots])


ALL = AttentionMask()


@cache
def sights(sizes: tuple[int, ...], device: torch.device) -> tuple[AttentionMask, AttentionMask]:
    """What the slots (class, codes before the last step) see of each other, and what the L queries see of them."""
    if max(sizes) == 1:
        return AttentionMask(is_causal=True), AttentionMask(is_causal=True)
    with torch.inference_mode(False):
        step_L = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        slot = torch.cat([torch.tensor([-1]), step_L[: -sizes[-1]]])
        reading, asking = slot <= slot.unsqueeze(1), slot < step_L.unsqueeze(1)
        return AttentionMask(mask=reading.to(device)), AttentionMask(mask=asking.to(device))


@dataclass(frozen=True)
class ARPGConfig:
    """Sizes of a model. Half of `num_layers` reads (self-attention), half predicts (cross-attention).

    `order` is how a plan is made when none is asked for: "random" or "raster". `ffn_dim=None` is the official rule:
    8/3 of `dim`, rounded up to a multiple of 256.
    """

    vocab_size: int
    num_classes: int
    grid: tuple[int, int]
    num_layers: int
    dim: int
    num_heads: int
    ffn_dim: int | None = None
    order: str = "random"
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    guidance_conditioned: bool = False

    def __post_init__(self) -> None:
        for name in ("vocab_size", "num_classes", "num_layers", "dim", "num_heads"):
            if getattr(self, name) < 1:
                raise VarkdError(f"arpg: {name} must be at least 1, got {getattr(self, name)}")
        if self.num_layers % 2:
            raise VarkdError(f"arpg: num_layers must be even (half self, half cross attention), got {self.num_layers}")
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 4:
            raise VarkdError(
                f"arpg: dim {self.dim} / num_heads {self.num_heads} must be a multiple of 4 (2-D rotary pairs)"
            )
        if self.order not in KINDS:
            raise VarkdError(f"arpg: order must be one of {', '.join(KINDS)}, got '{self.order}'")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def ffn_width(self) -> int:
        return self.ffn_dim or swiglu_width(self.dim)


@dataclass
class ARPGState:
    """One decode: its plan's `sizes`, the next `step`, and the caches.

    `cache` is (self layers + 1, 2, B, heads, slots, head_dim): the keys and values of each self-attention layer, then
    those that the cross-attention layers share; `filled` slots are valid. `rope` holds the slots' angles, per row.
    """

    cache: Tensor
    rope: Tensor
    sizes: tuple[int, ...]
    step: int
    filled: int = 0


class ARPG(Backbone):
    """The model. `dropout` applies to input embeddings, attention output and FFN output, in training mode only."""

    family: ClassVar[str] = "arpg"
    config_class: ClassVar[type[Any]] = ARPGConfig
    guidance: ClassVar[GuidanceKind] = "decoded_after"
    official_extras: ClassVar[tuple[str, ...]] = ("freqs_cis", r"layers\.(.*\.)?(k|v|kv)_cache(\..*)?", "causal_mask")
    axes: ClassVar[Mapping[str, tuple[str, ...]]] = SWIGLU_AXES | {
        r"embeddings\.weight|head\.weight": ("", "D"),
        r"guidance_embedding\.linear\.weight": ("D", ""),
        # All cross-attention layers look at the same keys and values, so they keep the same heads.
        r"layers\.to_[kv]\.weight|layers\.cross_dec\.\d+\.attn\.to_q\.weight": ("H:cross", "D"),
        r"layers\.cross_dec\.\d+\.attn\.proj\.weight": ("D", "H:cross"),
        r"(layers\.self_dec\.\d+)\.attn\.to_[qkv]\.weight": ("H:{0}", "D"),
        r"(layers\.self_dec\.\d+)\.attn\.proj\.weight": ("D", "H:{0}"),
    }
    stacks: ClassVar[tuple[str, ...]] = ("layers.self_dec", "layers.cross_dec")

    def __init__(self, config: ARPGConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.embeddings = nn.Embedding(config.vocab_size + config.num_classes + 3, config.dim)
        self.tok_dropout = nn.Dropout(dropout)
        self.layers = Decoder(config, dropout)
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.add_module("head", nn.Linear(config.dim, config.vocab_size, bias=False))
        self.guidance_embedding = GuidanceEmbedding(config.dim) if config.guidance_conditioned else None

    @property
    def head(self) -> nn.Linear:
        head: Any = self.__getattr__("head")  # a property by contract, and a module of the same, official, name
        return head

    @property
    def transformer_blocks(self) -> Sequence[nn.Module]:
        return [*self.layers.self_dec, *self.layers.cross_dec]

    def initialize(self, generator: torch.Generator) -> None:
        """Normal weights of LlamaGen's width, unit norm gains, a zero output head."""
        std = max(0.02, 0.55 / self.config.dim**0.5)
        for parameter in self.parameters():
            if parameter.ndim < 2:
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(parameter, std=std, generator=generator)
        nn.init.zeros_(self.head.weight)
        self.zero_scale()

    def plan(
        self,
        batch_size: int,
        rng: Rng | None = None,
        row_B: Tensor | None = None,
        steps: int | None = None,
        order_BL: Tensor | None = None,
        schedule: str | None = None,
    ) -> Plan:
        """One code a step, or `steps` steps shared out by `schedule` ("arccos" by default, or "cosine").

        Raises:
            VarkdError: impossible steps, schedule or order, or no way to draw a random order.
        """
        length = self.sequence_length
        sizes = step_sizes(length, length if steps is None else steps, schedule or "arccos")
        order_BL = choose_order(self.family, self.config.order, (batch_size, length), rng, row_B, order_BL)
        plan = Plan(order_BL.to(self.head.weight.device), sizes)
        self.check(plan)
        return plan

    def check(self, plan: Plan) -> None:
        check_order(self.family, plan, self.sequence_length)

    def forward(self, codes_BL: Tensor, condition: Condition, plan: Plan) -> Tensor:
        self.check_inputs(codes_BL, condition)
        seen = codes_BL.gather(1, plan.order_BL)[:, : -plan.sizes[-1]]  # nothing reads the last step's codes
        x_BnD, rope = self._embed(condition, seen), self._rope(plan)
        reading, asking = sights(plan.sizes, x_BnD.device)
        keys, values = self._read(x_BnD, rope[:, :, : x_BnD.shape[1]], reading, None)
        hidden = self._predict(rope[:, :, 1:], keys, values, asking)
        return hidden.gather(1, plan.rank_BL.unsqueeze(-1).expand_as(hidden))

    def start(
        self, condition: Condition, plan: Plan, prefix_codes_BL: Tensor | None = None, prefix_steps: int = 0
    ) -> tuple[ARPGState, Tensor]:
        x_BnD = self._embed(condition, prefix_codes(plan, prefix_codes_BL, prefix_steps))
        config, weight, slots = self.config, self.head.weight, self.sequence_length - plan.sizes[-1] + 1
        shape = (len(self.layers.self_dec) + 1, 2, len(x_BnD), config.num_heads, slots, config.head_dim)
        cache = torch.empty(shape, device=weight.device, dtype=cache_dtype(weight))
        state = ARPGState(cache, self._rope(plan), plan.sizes, prefix_steps)
        reading, _ = sights(plan.sizes, weight.device)
        return state, self._advance(state, x_BnD, reading.first(x_BnD.shape[1]))

    def step(self, state: ARPGState, codes_Bn: Tensor) -> Tensor:
        state.step += 1
        return self._advance(state, self.tok_dropout(self.embeddings(codes_Bn)), ALL)

    @classmethod
    def infer(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """Everything but the number of heads and the grid."""
        vocab_size, dim = shapes["head.weight"]
        return {
            "vocab_size": vocab_size,
            "num_classes": shapes["embeddings.weight"][0] - vocab_size - 3,
            "num_layers": count_numbered(shapes, r"layers\.self_dec\.(\d+)\.")
            + count_numbered(shapes, r"layers\.cross_dec\.(\d+)\."),
            "dim": dim,
            "ffn_dim": shapes["layers.self_dec.0.ffn.w1.weight"][0],
        }

    @classmethod
    def class_rows(cls, config: Any) -> tuple[str, int]:
        return "embeddings.weight", config.vocab_size + 1

    def _embed(self, condition: Condition, codes_Bn: Tensor) -> Tensor:
        """The class and codes by generation rank: (B, 1 + n, D)."""
        label_B1 = condition.label_B.unsqueeze(1) + self.vocab_size + 1
        class_B1D = self.with_scale(self.embeddings(label_B1), condition)
        return self.tok_dropout(torch.cat([class_B1D, self.embeddings(codes_Bn)], dim=1))

    def _rope(self, plan: Plan) -> Tensor:
        """Angles of the class slot and of the codes by generation rank: (B, 1, 1 + L, head_dim / 2, 2)."""
        config, order_BL = self.config, plan.order_BL
        table = rope_table(tuple(config.grid), config.head_dim, config.rope_base, order_BL.device)
        return table[nn.functional.pad(order_BL + 1, (1, 0))].unsqueeze(1)

    def _advance(self, state: ARPGState, x_BnD: Tensor, reading: AttentionMask) -> Tensor:
        """Read new slots, then predict the codes of the state's step."""
        begin, end = state.filled, state.filled + x_BnD.shape[1]
        state.filled = end
        keys, values = self._read(x_BnD, state.rope[:, :, begin:end], reading, state.cache[..., :end, :])
        # Slot j holds the code of rank j - 1, so the next ranks' angles stand right behind the slots read so far.
        return self._predict(state.rope[:, :, end : end + state.sizes[state.step]], keys, values, ALL)

    def _read(self, x_BnD: Tensor, rope: Tensor, reading: AttentionMask, cache: Tensor | None) -> tuple[Tensor, Tensor]:
        """The keys and values (B, heads, slots so far, head_dim) that every cross-attention layer looks at."""
        for index, layer in enumerate(self.layers.self_dec):
            x_BnD = layer(x_BnD, rope, reading, None if cache is None else cache[index])
        x_BnD, heads = self.layers.norm(x_BnD), self.config.num_heads
        keys = rotate(_split(self.layers.to_k(x_BnD), heads), rope)
        return _remember(keys, _split(self.layers.to_v(x_BnD), heads), None if cache is None else cache[-1])

    def _predict(self, rope: Tensor, keys: Tensor, values: Tensor, asking: AttentionMask) -> Tensor:
        """Hidden states (B, n, D) of the cells with angles `rope` (B, 1, n, ..): all else of a query is the same."""
        q_BnD = self.embeddings.weight[self.vocab_size].expand(len(rope), rope.shape[2], -1)
        for layer in self.layers.cross_dec:
            q_BnD = layer(q_BnD, rope, keys, values, asking)
        return self.norm(q_BnD)


class Decoder(nn.Module):
    """The layers under their official names. `to_k` and `to_v` make the one cache of all cross-attention layers."""

    def __init__(self, config: ARPGConfig, dropout: float) -> None:
        super().__init__()
        half = config.num_layers // 2
        self.self_dec = nn.ModuleList(SelfBlock(config, dropout) for _ in range(half))
        self.cross_dec = nn.ModuleList(CrossBlock(config, dropout) for _ in range(half))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.to_k = nn.Linear(config.dim, config.dim, bias=False)
        self.to_v = nn.Linear(config.dim, config.dim, bias=False)


class SelfBlock(nn.Module):
    def __init__(self, config: ARPGConfig, dropout: float) -> None:
        super().__init__()
        self.attn = SelfAttention(config, dropout)
        self.ffn = FeedForward(config.dim, config.ffn_width, dropout)
        self.attn_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, x_BnD: Tensor, rope: Tensor, reading: AttentionMask, cache: Tensor | None) -> Tensor:
        x_BnD = x_BnD + self.attn(self.attn_norm(x_BnD), rope, reading, cache)
        return x_BnD + self.ffn(self.ffn_norm(x_BnD))


class CrossBlock(nn.Module):
    def __init__(self, config: ARPGConfig, dropout: float) -> None:
        super().__init__()
        self.attn = CrossAttention(config, dropout)
        self.ffn = FeedForward(config.dim, config.ffn_width, dropout)
        self.attn_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, q_BnD: Tensor, rope: Tensor, keys: Tensor, values: Tensor, asking: AttentionMask) -> Tensor:
        q_BnD = q_BnD + self.attn(self.attn_norm(q_BnD), rope, keys, values, asking)
        return q_BnD + self.ffn(self.ffn_norm(q_BnD))


class SelfAttention(nn.Module):
    def __init__(self, config: ARPGConfig, dropout: float) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.to_q = nn.Linear(config.dim, config.dim, bias=False)
        self.to_k = nn.Linear(config.dim, config.dim, bias=False)
        self.to_v = nn.Linear(config.dim, config.dim, bias=False)
        self.proj = nn.Linear(config.dim, config.dim, bias=False)
        self.resid_dropout = nn.Dropout(dropout)

    def forward(self, x_BnD: Tensor, rope: Tensor, reading: AttentionMask, cache: Tensor | None) -> Tensor:
        q, k, v = (_split(linear(x_BnD), self.num_heads) for linear in (self.to_q, self.to_k, self.to_v))
        k, v = _remember(rotate(k, rope), v, cache)
        x = attend(rotate(q, rope), k, v, reading.is_causal, reading.mask)
        return self.resid_dropout(self.proj(x.transpose(1, 2).flatten(2)))


class CrossAttention(nn.Module):
    """Queries of its own; keys and values are those that `Decoder.to_k` and `to_v` made once."""

    def __init__(self, config: ARPGConfig, dropout: float) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.to_q = nn.Linear(config.dim, config.dim, bias=False)
        self.proj = nn.Linear(config.dim, config.dim, bias=False)
        self.resid_dropout = nn.Dropout(dropout)

    def forward(self, q_BnD: Tensor, rope: Tensor, keys: Tensor, values: Tensor, asking: AttentionMask) -> Tensor:
        q = rotate(_split(self.to_q(q_BnD), self.num_heads), rope)
        x = attend(q, keys, values, asking.is_causal, asking.mask)
        return self.resid_dropout(self.proj(x.transpose(1, 2).flatten(2)))


def _split(x_BnD: Tensor, num_heads: int) -> Tensor:
    """(B, n, D) -> (B, heads, n, head_dim)."""
    return x_BnD.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _remember(k: Tensor, v: Tensor, cache: Tensor | None) -> tuple[Tensor, Tensor]:
    """All keys and values so far; `cache` (2, B, heads, slots so far, head_dim) gets the new ones in its last slots."""
    if cache is None:
        return k, v
    num_new = k.shape[2]
    cache[0, ..., -num_new:, :], cache[1, ..., -num_new:, :] = k, v
    return cache[0].to(k.dtype), cache[1].to(v.dtype)
