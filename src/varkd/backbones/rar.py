"""RAR: next-token prediction in any order (Yu et al. 2024, arXiv 2411.00776), class-conditional.

A ViT-style decoder: pre-norm LayerNorm with shift, scale and gate from adaLN, per-head LayerNorm on queries and keys,
GELU, learned positions. Parameter names are the official ones, so official state dicts load as they are.

With the order o_0 .. o_{L-1}, slots are [cls, class, code of o_0, .., code of o_{L-2}]; slot 1 + j predicts the code of
o_j. A slot holds its content, plus the position it comes from (row 2 + o_j of `pos_embed`), plus the position it is to
predict (row 2 + o_j of `target_aware_pos_embed`): that is what makes any order possible. The adaLN condition differs
from slot to slot: class embedding + `timesteps_embeddings[slot]`.
Quirks kept: the tables have more rows than any slot reads, `embeddings` holds codes, an unused mask row, classes and
the null label in one table, and the final modulation is (scale, shift) where the blocks' are (shift, scale, gate).
Quirks fixed: the official sampler knows raster order only and embeds the whole prefix anew in every step.
Left out: label dropping, guidance and the annealing of random to raster order (they act on batches, logits and plans).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varkd.backbones.layers import GuidanceEmbedding, attend, cache_dtype
from varkd.backbones.orders import KINDS, check_order, choose_order, prefix_codes
from varkd.backbones.protocol import Backbone, GuidanceKind, Nucleus
from varkd.containers import count_numbered
from varkd.errors import VarkdError
from varkd.types import Condition, Plan
from varkd.world import Rng

_SPARE_POSITIONS = 1024
"""Rows of the official position tables beyond L, whatever L is."""
_SPARE_TIMESTEPS = 100
"""Rows of the official timestep table beyond L."""


@dataclass(frozen=True)
class RARConfig:
    """Sizes of a model. `ffn_dim=None` is 4 * `dim`; `order` is what `RAR.plan` gives when no order is asked for."""

    vocab_size: int
    num_classes: int
    grid: tuple[int, int]
    num_layers: int
    dim: int
    num_heads: int
    ffn_dim: int | None = None
    order: Literal["raster", "random"] = "raster"
    norm_eps: float = 1e-6
    guidance_conditioned: bool = False

    def __post_init__(self) -> None:
        for name in ("vocab_size", "num_classes", "num_layers", "dim", "num_heads"):
            if getattr(self, name) < 1:
                raise VarkdError(f"rar: {name} must be at least 1, got {getattr(self, name)}")
        if self.dim % self.num_heads or self.dim == self.num_heads:
            raise VarkdError(f"rar: dim {self.dim} / num_heads {self.num_heads} must be a whole number, at least 2")
        if self.order not in KINDS:
            raise VarkdError(f"rar: order must be raster or random, got '{self.order}'")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def ffn_width(self) -> int:
        return self.ffn_dim or 4 * self.dim


@dataclass
class RARState:
    """One decode: `cache` is (layers, 2, B, heads, slots, head_dim), `filled` of its slots are valid."""

    cache: Tensor
    class_B1D: Tensor
    order_BL: Tensor
    filled: int = 0


class RAR(Backbone):
    """The model. `dropout` applies to slots, attention output and FFN output, in training mode only."""

    family: ClassVar[str] = "rar"
    config_class: ClassVar[type[Any]] = RARConfig
    guidance: ClassVar[GuidanceKind] = "power_cosine"
    nucleus: ClassVar[Nucleus] = "descending"
    official_extras: ClassVar[tuple[str, ...]] = (r"(.*\.)?attn_mask",)
    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        r"cls_token|pos_embed|target_aware_pos_embed|timesteps_embeddings": ("", "", "D"),
        r"embeddings\.weight|lm_head\.weight": ("", "D"),
        r"lm_head\.bias|.+\.[qk]_norm\.(?:weight|bias)": ("",),
        r"guidance_embedding\.linear\.weight": ("D", ""),
        r".+\.norm[12]\.(?:weight|bias)|.+\.(?:proj|fc2)\.bias": ("D",),
        r"blocks\.\d+\.adaLN_modulation\.1\.weight": ("6D", "D"),
        r"blocks\.\d+\.adaLN_modulation\.1\.bias": ("6D",),
        r"adaln_before_head\.adaLN_modulation\.1\.weight": ("2D", "D"),
        r"adaln_before_head\.adaLN_modulation\.1\.bias": ("2D",),
        r"(.+)\.qkv\.weight": ("3H:{0}", "D"),
        r"(.+)\.qkv\.bias": ("3H:{0}",),
        r"(.+)\.proj\.weight": ("D", "H:{0}"),
        r"(.+)\.fc1\.weight": ("F:{0}", "D"),
        r"(.+)\.fc1\.bias": ("F:{0}",),
        r"(.+)\.fc2\.weight": ("D", "F:{0}"),
    }
    stacks: ClassVar[tuple[str, ...]] = ("blocks",)

    def __init__(self, config: RARConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        dim, length = config.dim, self.sequence_length
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.embeddings = nn.Embedding(config.vocab_size + 1 + config.num_classes + 1, dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, length + _SPARE_POSITIONS, dim))
        self.target_aware_pos_embed = nn.Parameter(torch.zeros(1, length + _SPARE_POSITIONS, dim))
        self.timesteps_embeddings = nn.Parameter(torch.zeros(1, length + _SPARE_TIMESTEPS, dim))
        self.slot_dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(config, dropout) for _ in range(config.num_layers))
        self.adaln_before_head = FinalNorm(config)
        self.lm_head = nn.Linear(dim, config.vocab_size)
        self.guidance_embedding = GuidanceEmbedding(config.dim) if config.guidance_conditioned else None

    @property
    def transformer_blocks(self) -> Sequence[nn.Module]:
        return list(self.blocks)

    def initialize(self, generator: torch.Generator) -> None:
        """Normal weights of LlamaGen's width, unit norm gains, zero biases and head.

        Embeddings of this width leave the adaLN layers close to zero, so that a block starts close to the identity; the
        official start sets them to zero and trains equally fast. Open gates (a bias of 1) were slower: validation loss
        5.35 instead of 5.28 after 300 updates at width 64.
        """
        std = max(0.02, 0.55 / self.config.dim**0.5)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 1:
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(parameter, std=std, generator=generator)
        nn.init.zeros_(self.lm_head.weight)
        self.zero_scale()

    @property
    def head(self) -> nn.Linear:
        return self.lm_head

    def plan(
        self,
        batch_size: int,
        rng: Rng | None = None,
        row_B: Tensor | None = None,
        steps: int | None = None,
        order_BL: Tensor | None = None,
        schedule: str | None = None,
    ) -> Plan:
        """One code a step, in `order_BL`, or else in raster order or one random order per row (`config.order`).

        Raises:
            VarkdError: another number of steps is asked for, `order_BL` is not one permutation per row, or there is
                nothing to draw random orders from.
        """
        del schedule
        length = self.sequence_length
        if steps not in (None, length):
            raise VarkdError(f"rar predicts one code a step ({length} steps); {steps} steps cannot be had")
        order_BL = choose_order("rar", self.config.order, (batch_size, length), rng, row_B, order_BL)
        plan = Plan(order_BL.to(self.cls_token.device), (1,) * length)
        self.check(plan)
        return plan

    def check(self, plan: Plan) -> None:
        length = self.sequence_length
        if plan.sizes != (1,) * length:
            raise VarkdError(
                f"rar predicts one code a step ({length} in all), since a slot knows one position to predict; "
                f"this plan has {sum(plan.sizes)} in {len(plan.sizes)} steps"
            )
        check_order("rar", plan, length)

    def forward(self, codes_BL: Tensor, condition: Condition, plan: Plan) -> Tensor:
        self.check_inputs(codes_BL, condition)
        class_B1D, order_BL = self._class(condition), plan.order_BL
        by_rank = codes_BL.gather(1, order_BL)
        x_BTD = torch.cat([self._opening(class_B1D, order_BL), self._code_slots(by_rank[:, :-1], order_BL, 0)], dim=1)
        hidden_BLD = self._run(x_BTD, class_B1D, first=0, keep=self.sequence_length)
        return hidden_BLD.gather(1, plan.rank_BL.unsqueeze(-1).expand_as(hidden_BLD))

    def start(
        self, condition: Condition, plan: Plan, prefix_codes_BL: Tensor | None = None, prefix_steps: int = 0
    ) -> tuple[RARState, Tensor]:
        class_B1D, order_BL = self._class(condition), plan.order_BL
        x_BTD = self._opening(class_B1D, order_BL)
        if prefix_steps:
            prefix_Bn = prefix_codes(plan, prefix_codes_BL, prefix_steps)
            x_BTD = torch.cat([x_BTD, self._code_slots(prefix_Bn, order_BL, 0)], dim=1)
        config, weight = self.config, self.lm_head.weight
        shape = (config.num_layers, 2, len(x_BTD), config.num_heads, self.sequence_length + 1, config.head_dim)
        state = RARState(torch.empty(shape, device=weight.device, dtype=cache_dtype(weight)), class_B1D, order_BL)
        return state, self._extend(state, x_BTD)

    def step(self, state: RARState, codes_Bn: Tensor) -> Tensor:
        return self._extend(state, self._code_slots(codes_Bn, state.order_BL, state.filled - 2))

    @classmethod
    def infer(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """Everything but the grid: the tables tell the number of codes, not the sides."""
        vocab_size, dim = shapes["lm_head.weight"]
        return {
            "vocab_size": vocab_size,
            "num_classes": shapes["embeddings.weight"][0] - vocab_size - 2,
            "num_layers": count_numbered(shapes, r"blocks\.(\d+)\."),
            "dim": dim,
            "num_heads": dim // shapes["blocks.0.attn.q_norm.weight"][0],
            "ffn_dim": shapes["blocks.0.mlp.fc1.weight"][0],
        }

    @classmethod
    def class_rows(cls, config: Any) -> tuple[str, int]:
        return "embeddings.weight", config.vocab_size + 1

    def _class(self, condition: Condition) -> Tensor:
        """The class embedding (B, 1, D): content of slot 1 and part of every slot's adaLN condition."""
        class_BD = self.embeddings(self.config.vocab_size + 1 + condition.label_B)
        return self.with_scale(class_BD, condition).unsqueeze(1)

    def _opening(self, class_B1D: Tensor, order_BL: Tensor) -> Tensor:
        """The slots before any code, (B, 2, D): cls, and the class that predicts the first position."""
        content = torch.cat([self.cls_token.expand_as(class_B1D), class_B1D], dim=1) + self.pos_embed[:, :2]
        target = F.embedding(2 + order_BL[:, :1], self.target_aware_pos_embed[0])
        return content + F.pad(target, (0, 0, 1, 0))

    def _code_slots(self, codes_Bn: Tensor, order_BL: Tensor, rank: int) -> Tensor:
        """The slots (B, n, D) of the codes generated `rank`-th and later; each predicts the position after its own."""
        last = rank + codes_Bn.shape[1]
        here = F.embedding(2 + order_BL[:, rank:last], self.pos_embed[0])
        target = F.embedding(2 + order_BL[:, rank + 1 : last + 1], self.target_aware_pos_embed[0])
        return self.embeddings(codes_Bn) + here + target

    def _extend(self, state: RARState, x_BnD: Tensor) -> Tensor:
        """Run new slots against the cache; the hidden state of the last slot predicts the next code."""
        first, state.filled = state.filled, state.filled + x_BnD.shape[1]
        return self._run(x_BnD, state.class_B1D, first, keep=1, cache=state.cache[..., : state.filled, :])

    def _run(self, x_BnD: Tensor, class_B1D: Tensor, first: int, keep: int, cache: Tensor | None = None) -> Tensor:
        """The hidden states of the last `keep` of the slots `first`, `first` + 1, .."""
        time_nD = self.timesteps_embeddings[:, first : first + x_BnD.shape[1]]
        condition_BnD, x_BnD = class_B1D + time_nD, self.slot_dropout(x_BnD)
        for index, block in enumerate(self.blocks):
            x_BnD = block(x_BnD, condition_BnD, None if cache is None else cache[index])
        return self.adaln_before_head(x_BnD[:, -keep:], condition_BnD[:, -keep:])


class Block(nn.Module):
    def __init__(self, config: RARConfig, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, config.norm_eps)
        self.attn = Attention(config, dropout)
        self.norm2 = nn.LayerNorm(config.dim, config.norm_eps)
        self.mlp = FeedForward(config.dim, config.ffn_width, dropout)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.dim, 6 * config.dim))

    def forward(self, x_BnD: Tensor, condition_BnD: Tensor, cache: Tensor | None) -> Tensor:
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = self.adaLN_modulation(condition_BnD).chunk(6, dim=-1)
        x_BnD = x_BnD + gate_a * self.attn(self.norm1(x_BnD) * (1 + scale_a) + shift_a, cache)
        return x_BnD + gate_f * self.mlp(self.norm2(x_BnD) * (1 + scale_f) + shift_f)


class Attention(nn.Module):
    def __init__(self, config: RARConfig, dropout: float) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.q_norm = nn.LayerNorm(config.head_dim, config.norm_eps)
        self.k_norm = nn.LayerNorm(config.head_dim, config.norm_eps)
        self.proj = nn.Linear(config.dim, config.dim)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, x_BnD: Tensor, cache: Tensor | None) -> Tensor:
        """`cache` (2, B, heads, slots so far, head_dim) receives the new keys and values in its last slots."""
        num_new = x_BnD.shape[1]
        q, k, v = self.qkv(x_BnD).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if cache is not None:
            cache[0, ..., -num_new:, :], cache[1, ..., -num_new:, :] = k, v
            k, v = cache[0].to(q.dtype), cache[1].to(q.dtype)
        # New slots arrive either all at once (causal among themselves) or one by one (they see every cached slot).
        x = attend(q, k, v, is_causal=num_new > 1)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


class FeedForward(nn.Module):
    def __init__(self, dim: int, width: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, width)
        self.fc2 = nn.Linear(width, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x_BnD: Tensor) -> Tensor:
        return self.drop(self.fc2(F.gelu(self.fc1(x_BnD))))


class FinalNorm(nn.Module):
    """LayerNorm without gains, then scale and shift by the condition."""

    def __init__(self, config: RARConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.dim, config.norm_eps, elementwise_affine=False)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.dim, 2 * config.dim))

    def forward(self, x_BnD: Tensor, condition_BnD: Tensor) -> Tensor:
        scale, shift = self.adaLN_modulation(condition_BnD).chunk(2, dim=-1)
        return self.norm(x_BnD) * (1 + scale) + shift
