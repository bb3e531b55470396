"""LlamaGen: next-token prediction in raster order (Sun et al. 2024, arXiv 2406.06525), class-conditional.

A Llama-style decoder: pre-norm RMSNorm, SwiGLU, 2-D rotary positions, no biases, untied output. Parameter names are
the official ones, so official state dicts load as they are. Slots are [class, code_0 .. code_{L-2}]; slot t predicts
code_t. Quirks kept: the class slot's query and key are multiplied by zero (its rotary cosine and sine are zero), and
RMSNorm casts back to the input dtype before it multiplies by the weight.
Left out: label dropping and guidance (they act on batches and logits, see `types.Context` and `rollout`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from varkd.backbones.layers import (
    SWIGLU_AXES,
    FeedForward,
    GuidanceEmbedding,
    LabelEmbedding,
    RMSNorm,
    attend,
    cache_dtype,
    rope_table,
    rotate,
    swiglu_width,
)
from varkd.backbones.protocol import SlotDecoder
from varkd.containers import count_numbered
from varkd.errors import VarkdError
from varkd.types import Condition, Plan
from varkd.world import Rng


@dataclass(frozen=True)
class LlamaGenConfig:
    """Sizes of a model. `ffn_dim=None` is the official rule: 8/3 of `dim`, rounded up to a multiple of 256."""

    vocab_size: int
    num_classes: int
    grid: tuple[int, int]
    num_layers: int
    dim: int
    num_heads: int
    ffn_dim: int | None = None
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    guidance_conditioned: bool = False

    def __post_init__(self) -> None:
        for name in ("vocab_size", "num_classes", "num_layers", "dim", "num_heads"):
            if getattr(self, name) < 1:
                raise VarkdError(f"llamagen: {name} must be at least 1, got {getattr(self, name)}")
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 4:
            raise VarkdError(
                f"llamagen: dim {self.dim} / num_heads {self.num_heads} must be a multiple of 4 (2-D rotary pairs)"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def ffn_width(self) -> int:
        return self.ffn_dim or swiglu_width(self.dim)


@dataclass
class LlamaGenState:
    """KV cache of one decode: `cache` is (layers, 2, B, heads, slots, head_dim); `filled` slots are valid."""

    cache: Tensor
    rope: Tensor
    filled: int = 0


@dataclass
class SlotState:
    """KV cache of a decode by slots: as `LlamaGenState`, with one more slot that padding is written to.

    The cache begins as zeros, for what attention gives no weight must still be finite. `written_BS` says which slots
    hold something; `class_B1D` is the input of slot 0.
    """

    cache: Tensor
    rope: Tensor
    class_B1D: Tensor
    written_BS: Tensor


class LlamaGen(SlotDecoder):
    """The model. `dropout` applies to embeddings, attention output and FFN output, in training mode only."""

    family: ClassVar[str] = "llamagen"
    config_class: ClassVar[type[Any]] = LlamaGenConfig
    official_extras: ClassVar[tuple[str, ...]] = ("freqs_cis", r"layers\.\d+\.attention\.kv_cache\..*", "causal_mask")
    axes: ClassVar[Mapping[str, tuple[str, ...]]] = SWIGLU_AXES | {
        r"cls_embedding\.embedding_table\.weight|tok_embeddings\.weight|output\.weight": ("", "D"),
        r"guidance_embedding\.linear\.weight": ("D", ""),
        r"(.+)\.wqkv\.weight": ("3H:{0}", "D"),
        r"(.+)\.wo\.weight": ("D", "H:{0}"),
    }

    def __init__(self, config: LlamaGenConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.cls_embedding = LabelEmbedding(config.num_classes + 1, config.dim)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.tok_dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(Block(config, dropout) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.guidance_embedding = GuidanceEmbedding(config.dim) if config.guidance_conditioned else None

    @property
    def transformer_blocks(self) -> Sequence[nn.Module]:
        return list(self.layers)

    def initialize(self, generator: torch.Generator) -> None:
        """The official start: normal(0, 0.02), unit norm gains, a zero output head.

        0.02 belongs to the published widths (768 and more). Narrower models get 0.55 / sqrt(dim), which keeps a layer's
        gain: at width 96 the same validation loss took 300 updates instead of 450 (docs/log.md).
        """
        std = max(0.02, 0.55 / self.config.dim**0.5)
        for parameter in self.parameters():
            if parameter.ndim < 2:
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(parameter, std=std, generator=generator)
        nn.init.zeros_(self.output.weight)
        self.zero_scale()

    @property
    def head(self) -> nn.Linear:
        return self.output

    def plan(
        self,
        batch_size: int,
        rng: Rng | None = None,
        row_B: Tensor | None = None,
        steps: int | None = None,
        order_BL: Tensor | None = None,
        schedule: str | None = None,
    ) -> Plan:
        """Raster order, one code a step: nothing is drawn.

        Raises:
            VarkdError: another number of steps or another order is asked for.
        """
        del rng, row_B, schedule
        length = self.sequence_length
        if steps not in (None, length):
            raise VarkdError(f"llamagen predicts one code a step ({length} steps); {steps} steps cannot be had")
        if order_BL is None:
            order_BL = torch.arange(length, device=self.output.weight.device).expand(batch_size, -1)
        plan = Plan(order_BL, (1,) * length)
        self.check(plan)
        return plan

    def check(self, plan: Plan) -> None:
        length, steps = self.sequence_length, len(plan.sizes)
        if plan.sizes != (1,) * length:
            raise VarkdError(
                f"llamagen predicts one code a step ({length} in all); this plan has {sum(plan.sizes)} in {steps} steps"
            )
        raster = torch.arange(self.sequence_length, device=plan.order_BL.device)
        if not torch.equal(plan.order_BL, raster.expand_as(plan.order_BL)):
            raise VarkdError("llamagen reads codes in raster order only; this plan has another order")

    def forward(self, codes_BL: Tensor, condition: Condition, plan: Plan) -> Tensor:
        del plan  # always raster: `check` refused everything else
        self.check_inputs(codes_BL, condition)
        x_BLD = torch.cat([self._class(condition), self.tok_embeddings(codes_BL[:, :-1])], dim=1)
        rope = _rope_of(self.config, x_BLD.device)[: x_BLD.shape[1]]
        return self._run(x_BLD, rope, cache=None)

    def start(
        self, condition: Condition, plan: Plan, prefix_codes_BL: Tensor | None = None, prefix_steps: int = 0
    ) -> tuple[LlamaGenState, Tensor]:
        x_BLD = self._class(condition)
        if prefix_steps:
            if prefix_codes_BL is None or prefix_codes_BL.shape[1] < prefix_steps:
                raise VarkdError(f"start: {prefix_steps} prefix steps need at least as many prefix codes")
            x_BLD = torch.cat([x_BLD, self.tok_embeddings(prefix_codes_BL[:, :prefix_steps])], dim=1)
        cache = self._new_cache(len(x_BLD), self.sequence_length)
        state = LlamaGenState(cache, _rope_of(self.config, cache.device))
        return state, self._extend(state, x_BLD)

    def _new_cache(self, batch_size: int, slots: int) -> Tensor:
        config, weight = self.config, self.output.weight
        shape = (config.num_layers, 2, batch_size, config.num_heads, slots, config.head_dim)
        return torch.empty(shape, device=weight.device, dtype=cache_dtype(weight))

    def step(self, state: LlamaGenState, codes_Bn: Tensor) -> Tensor:
        return self._extend(state, self.tok_embeddings(codes_Bn))

    def prefill(self, condition: Condition, codes_BL: Tensor, kept_B: Tensor, longest: int) -> SlotState:
        most = min(longest, self.sequence_length - 1)
        class_B1D = self._class(condition)
        x_BLD = torch.cat([class_B1D, self.tok_embeddings(codes_BL[:, :most])], dim=1)
        cache, rope = self._new_cache(len(x_BLD), self.sequence_length + 1).zero_(), _rope_of(self.config, x_BLD.device)
        self._run(x_BLD, rope[: most + 1], cache[..., : most + 1, :])
        slot_S = torch.arange(self.sequence_length + 1, device=cache.device)
        return SlotState(cache, rope, class_B1D, slot_S <= kept_B.clamp(max=most).unsqueeze(1))

    def run_slots(self, state: SlotState, slot_Bn: Tensor, code_Bn: Tensor, live_Bn: Tensor, end: int) -> Tensor:
        x_BnD = torch.where((slot_Bn == 0).unsqueeze(-1), state.class_B1D, self.tok_embeddings(code_Bn))
        written_Bn = torch.where(live_Bn, slot_Bn, self.sequence_length)
        state.written_BS = state.written_BS.scatter(1, written_Bn, True)
        end = min(end, self.sequence_length)
        slot_S = torch.arange(end, device=slot_Bn.device)
        seen_BnS = (slot_S <= slot_Bn.unsqueeze(-1)) & state.written_BS[:, None, :end]
        # The rotary table holds the class slot and L cells: slot p + 1 has the angles of cell p.
        rope_B1nF2 = state.rope[slot_Bn].unsqueeze(1)
        x_BnD = self.tok_dropout(x_BnD)
        for index, layer in enumerate(self.layers):
            x_BnD = layer(x_BnD, rope_B1nF2, Slots(state.cache[index], written_Bn, seen_BnS.unsqueeze(1)))
        return self.norm(x_BnD)

    @classmethod
    def infer(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """Everything but the number of heads and the grid (256 and 384 pixel models have the same shapes)."""
        vocab_size, dim = shapes["tok_embeddings.weight"]
        return {
            "vocab_size": vocab_size,
            "num_classes": shapes["cls_embedding.embedding_table.weight"][0] - 1,
            "num_layers": count_numbered(shapes, r"layers\.(\d+)\."),
            "dim": dim,
            "ffn_dim": shapes["layers.0.feed_forward.w1.weight"][0],
        }

    @classmethod
    def class_rows(cls, config: Any) -> tuple[str, int]:
        return "cls_embedding.embedding_table.weight", 0

    def _class(self, condition: Condition) -> Tensor:
        """The class slot: (B, 1, D)."""
        return self.with_scale(self.cls_embedding(condition.label_B), condition)

    def _extend(self, state: LlamaGenState, x_BnD: Tensor) -> Tensor:
        """Run new slots against the cache; the hidden state of the last slot predicts the next code."""
        end = state.filled + x_BnD.shape[1]
        rope, cache = state.rope[state.filled : end], state.cache[..., :end, :]
        state.filled = end
        return self._run(x_BnD, rope, cache)[:, -1:]

    def _run(self, x_BLD: Tensor, rope: Tensor, cache: Tensor | None) -> Tensor:
        x_BLD = self.tok_dropout(x_BLD)
        for index, layer in enumerate(self.layers):
            x_BLD = layer(x_BLD, rope, None if cache is None else cache[index])
        return self.norm(x_BLD)


class Block(nn.Module):
    def __init__(self, config: LlamaGenConfig, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(config, dropout)
        self.feed_forward = FeedForward(config.dim, config.ffn_width, dropout)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, x_BLD: Tensor, rope: Tensor, cache: Tensor | Slots | None) -> Tensor:
        x_BLD = x_BLD + self.attention(self.attention_norm(x_BLD), rope, cache)
        return x_BLD + self.feed_forward(self.ffn_norm(x_BLD))


@dataclass(frozen=True)
class Slots:
    """Where new keys and values go in `cache` (2, B, heads, slots, head_dim), and which slots each query sees."""

    cache: Tensor
    slot_Bn: Tensor
    seen_B1nS: Tensor

    def write(self, k_BHnd: Tensor, v_BHnd: Tensor) -> tuple[Tensor, Tensor]:
        row_B1 = torch.arange(len(self.slot_Bn), device=self.slot_Bn.device).unsqueeze(1)
        for cached, new in zip(self.cache, (k_BHnd, v_BHnd), strict=True):
            cached[row_B1, :, self.slot_Bn] = new.transpose(1, 2).to(cached.dtype)
        end = self.seen_B1nS.shape[-1]
        return self.cache[0, :, :, :end], self.cache[1, :, :, :end]


class Attention(nn.Module):
    def __init__(self, config: LlamaGenConfig, dropout: float) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.wqkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)
        self.resid_dropout = nn.Dropout(dropout)

    def forward(self, x_BLD: Tensor, rope: Tensor, cache: Tensor | Slots | None) -> Tensor:
        """`cache` (2, B, heads, slots so far, head_dim) takes new keys and values, last or at `Slots`."""
        num_new = x_BLD.shape[1]
        qkv = self.wqkv(x_BLD).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        (q, k), v = rotate(qkv[:2], rope), qkv[2]
        if isinstance(cache, Slots):
            k, v = (cached.to(q.dtype) for cached in cache.write(k, v))
            x = attend(q, k, v, mask=cache.seen_B1nS)
            return self.resid_dropout(self.wo(x.transpose(1, 2).flatten(2)))
        if cache is not None:
            cache[0, ..., -num_new:, :], cache[1, ..., -num_new:, :] = k, v
            k, v = cache[0].to(q.dtype), cache[1].to(q.dtype)
        # New slots arrive either all at once (causal among themselves) or one by one (they see every cached slot).
        x = attend(q, k, v, is_causal=num_new > 1)
        return self.resid_dropout(self.wo(x.transpose(1, 2).flatten(2)))


def _rope_of(config: LlamaGenConfig, device: torch.device) -> Tensor:
    return rope_table(tuple(config.grid), config.head_dim, config.rope_base, device)
