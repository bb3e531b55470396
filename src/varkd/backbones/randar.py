"""RandAR: decoder-only generation in random orders (Pang et al. 2024, arXiv 2412.01827), class-conditional.

LlamaGen's decoder over an interleaved sequence [class, q_0, t_0, q_1, t_1, ..]: t_j is the j-th code in the order of
generation, and q_j, a position instruction, asks for it; the hidden state of q_j predicts t_j. An instruction is one
learned vector, turned by the rotary angles of the cell that it asks for; every layer turns the queries and keys of both
q_j and t_j by that cell's angles once more. Parameter names are the official ones; the class slot's query and key are
multiplied by zero, as in LlamaGen.

In a parallel step the instructions stand behind one another with no codes between them, and the next step reads the
step's codes in the interleaved layout again. So a code is predicted from the class, all pairs of earlier steps, and
the instructions of its own step up to itself. `forward` replays that in one pass: the main stream is the plain causal
sequence, and each instruction that is not its step's first is appended once more, seeing just that.
Left out: label dropping and guidance (they act on batches and logits, see `types.Context` and `rollout`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
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
from varkd.backbones.orders import KINDS, check_order, check_steps, choose_order, prefix_codes
from varkd.backbones.protocol import Backbone, GuidanceKind
from varkd.containers import count_numbered
from varkd.errors import VarkdError
from varkd.types import Condition, Plan
from varkd.world import Rng


def step_sizes(length: int, steps: int) -> tuple[int, ...]:
    """How many codes each step predicts: by a quarter of a cosine, never less than one.

    Raises:
        VarkdError: `steps` outside [1, length].
    """
    check_steps("randar", steps, length)
    sizes, done = [], 0
    for step in range(steps):
        target = min(int((1 - math.cos(math.pi / 2 * (step + 1) / steps)) * length + 1), length)
        sizes.append(max(1, target - done))
        done += sizes[-1]
    return tuple(sizes)


@dataclass(frozen=True)
class RandARConfig:
    """Sizes of a model. `order` is how a plan is made when none is asked for: "random" or "raster".

    `ffn_dim=None` is the official rule: 8/3 of `dim`, rounded up to a multiple of 256.
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
                raise VarkdError(f"randar: {name} must be at least 1, got {getattr(self, name)}")
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 4:
            raise VarkdError(
                f"randar: dim {self.dim} / num_heads {self.num_heads} must be a multiple of 4 (2-D rotary pairs)"
            )
        if self.order not in KINDS:
            raise VarkdError(f"randar: order must be one of {', '.join(KINDS)}, got '{self.order}'")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def ffn_width(self) -> int:
        return self.ffn_dim or swiglu_width(self.dim)


@dataclass(frozen=True)
class Replay:
    """The slots of one pass under a plan: the main stream up to the last step's first instruction, then duplicates.

    `rank_T` is the generation rank whose cell a slot stands for (of the slots behind the class), `slot_L` the slot that
    predicts each rank. `mask_TT` says which slots see which; None is plain causal.
    """

    rank_T: Tensor
    slot_L: Tensor
    duplicates: Tensor
    mask_TT: Tensor | None


@cache
def replay(sizes: tuple[int, ...], device: torch.device) -> Replay:
    """How `forward` lays out the slots of a plan with these step sizes."""
    with torch.inference_mode(False):
        length, first = sum(sizes), torch.tensor([0, *accumulate(sizes[:-1])])
        main = 2 * int(first[-1]) + 2  # the class, the pairs of all steps but the last, and one more instruction
        rank_L = torch.arange(length)
        first_L = first.repeat_interleave(torch.tensor(sizes))
        duplicates = rank_L[rank_L != first_L]
        slot_L = 1 + 2 * rank_L
        slot_L[duplicates] = main + torch.arange(len(duplicates))
        rank_T = torch.cat([torch.arange(main - 1) // 2, duplicates])
        mask_TT = None
        if len(duplicates):
            mask_TT = torch.ones(len(rank_T) + 1, len(rank_T) + 1, dtype=torch.bool).tril()
            step_first = first_L[duplicates].unsqueeze(1)
            mask_TT[main:, :main] = torch.arange(main) < 2 * step_first + 2
            mask_TT[main:, main:] &= step_first == step_first.T
            mask_TT = mask_TT.to(device)
        return Replay(rank_T.to(device), slot_L.to(device), duplicates.to(device), mask_TT)


@dataclass
class RandARState:
    """One decode: its plan's `sizes` and next `step`, the KV cache, and what the cells contribute, per row.

    `cache` is (layers, 2, B, heads, slots, head_dim). Its `filled` slots hold the interleaved sequence up to the first
    instruction of the step that is predicted; the step's further instructions stand behind them, to be overwritten.
    `rope` (B, 1, 2 L, ...) are the angles of the slots, `instruction_BLD` the instructions by generation rank.
    """

    cache: Tensor
    rope: Tensor
    instruction_BLD: Tensor
    sizes: tuple[int, ...]
    step: int
    filled: int = 0


class RandAR(Backbone):
    """The model. `dropout` applies to code embeddings, attention output and FFN output, in training mode only."""

    family: ClassVar[str] = "randar"
    config_class: ClassVar[type[Any]] = RandARConfig
    guidance: ClassVar[GuidanceKind] = "decoded_before"
    official_extras: ClassVar[tuple[str, ...]] = ("freqs_cis", r"layers\.\d+\.attention\.kv_cache\..*", "causal_mask")
    axes: ClassVar[Mapping[str, tuple[str, ...]]] = SWIGLU_AXES | {
        r"cls_embedding\.embedding_table\.weight|tok_embeddings\.weight|output\.weight|pos_instruct_embeddings": (
            "",
            "D",
        ),
        r"guidance_embedding\.linear\.weight": ("D", ""),
        r"(.+)\.wqkv\.weight": ("3H:{0}", "D"),
        r"(.+)\.wo\.weight": ("D", "H:{0}"),
    }

    def __init__(self, config: RandARConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.pos_instruct_embeddings = nn.Parameter(torch.zeros(1, config.dim))
        self.cls_embedding = LabelEmbedding(config.num_classes + 1, config.dim)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.tok_dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(Block(config, dropout) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.guidance_embedding = GuidanceEmbedding(config.dim) if config.guidance_conditioned else None

    @property
    def head(self) -> nn.Linear:
        return self.output

    @property
    def transformer_blocks(self) -> Sequence[nn.Module]:
        return list(self.layers)

    @property
    def channel_block(self) -> int:
        """Position instructions are rotated head by head."""
        return self.config.head_dim

    def initialize(self, generator: torch.Generator) -> None:
        """Normal weights of LlamaGen's width, unit norm gains, a zero output head."""
        std = max(0.02, 0.55 / self.config.dim**0.5)
        for parameter in self.parameters():
            if parameter.ndim < 2:
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(parameter, std=std, generator=generator)
        nn.init.zeros_(self.output.weight)
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
        """One code a step, or `steps` steps shared out by the one schedule there is ("cosine").

        Raises:
            VarkdError: impossible steps, schedule or order, or no way to draw a random order.
        """
        if schedule not in (None, "cosine"):
            raise VarkdError(f"randar: unknown step schedule '{schedule}': it knows only 'cosine'")
        length = self.sequence_length
        order_BL = choose_order(self.family, self.config.order, (batch_size, length), rng, row_B, order_BL)
        sizes = step_sizes(length, length if steps is None else steps)
        plan = Plan(order_BL.to(self.output.weight.device), sizes)
        self.check(plan)
        return plan

    def check(self, plan: Plan) -> None:
        check_order(self.family, plan, self.sequence_length)

    def forward(self, codes_BL: Tensor, condition: Condition, plan: Plan) -> Tensor:
        self.check_inputs(codes_BL, condition)
        layout, table_BLF2 = replay(plan.sizes, codes_BL.device), self._angles(plan)
        instruction_BLD = self._instructions(table_BLF2)
        done = plan.order_BL[:, : -plan.sizes[-1]]  # nothing reads the last step's codes
        slots = [
            self._class(condition),
            self._pairs(instruction_BLD[:, : done.shape[1]], codes_BL.gather(1, done)),
            instruction_BLD[:, done.shape[1] : done.shape[1] + 1],
            instruction_BLD[:, layout.duplicates],
        ]
        rope = _behind_class(table_BLF2[:, layout.rank_T])
        hidden = self.norm(self._run(torch.cat(slots, dim=1), rope, layout.mask_TT, cache=None))
        index_BL1 = layout.slot_L[plan.rank_BL].unsqueeze(-1)
        return hidden.gather(1, index_BL1.expand(-1, -1, hidden.shape[-1]))

    def start(
        self, condition: Condition, plan: Plan, prefix_codes_BL: Tensor | None = None, prefix_steps: int = 0
    ) -> tuple[RandARState, Tensor]:
        codes_Bn, table_BLF2 = prefix_codes(plan, prefix_codes_BL, prefix_steps), self._angles(plan)
        config, weight = self.config, self.output.weight
        shape = (config.num_layers, 2, len(codes_Bn), config.num_heads, 2 * self.sequence_length, config.head_dim)
        state = RandARState(
            torch.empty(shape, device=weight.device, dtype=cache_dtype(weight)),
            _behind_class(table_BLF2.repeat_interleave(2, dim=1)),
            self._instructions(table_BLF2),
            plan.sizes,
            prefix_steps,
        )
        pairs = self._pairs(state.instruction_BLD[:, : codes_Bn.shape[1]], codes_Bn)
        return state, self._advance(state, torch.cat([self._class(condition), pairs], dim=1))

    def step(self, state: RandARState, codes_Bn: Tensor) -> Tensor:
        done = state.filled // 2 - 1
        pairs = self._pairs(state.instruction_BLD[:, done : done + codes_Bn.shape[1]], codes_Bn)
        state.step += 1
        return self._advance(state, pairs[:, 1:])  # the step's first instruction is in the cache for good

    @classmethod
    def infer(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """Everything but the number of heads and the grid."""
        vocab_size, dim = shapes["tok_embeddings.weight"]
        if shapes["pos_instruct_embeddings"] != (1, dim):
            raise KeyError("pos_instruct_embeddings")
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

    def _angles(self, plan: Plan) -> Tensor:
        """Rotary cosines and sines of the cells by generation rank: (B, L, head_dim / 2, 2)."""
        config, order_BL = self.config, plan.order_BL
        return rope_table(tuple(config.grid), config.head_dim, config.rope_base, order_BL.device)[order_BL + 1]

    def _instructions(self, table_BLF2: Tensor) -> Tensor:
        """The position instructions of the cells: (B, L, D)."""
        vector = self.pos_instruct_embeddings.unflatten(1, (self.config.num_heads, 1, -1))
        return rotate(vector, table_BLF2.unsqueeze(1)).transpose(1, 2).flatten(2)

    def _pairs(self, instruction_BnD: Tensor, codes_Bn: Tensor) -> Tensor:
        """q, t, q, t, ..: (B, 2 n, D)."""
        return torch.stack([instruction_BnD, self.tok_dropout(self.tok_embeddings(codes_Bn))], dim=2).flatten(1, 2)

    def _advance(self, state: RandARState, x_BnD: Tensor) -> Tensor:
        """Read the slots that are new for good, then the instructions of the state's step, which predict its codes."""
        begin, solid, size = state.filled, state.filled + x_BnD.shape[1], state.sizes[state.step]
        done, end = solid // 2, solid + size
        asking = slice(solid, solid + 2 * size, 2)  # where these instructions stand in the interleaved sequence
        x_BnD = torch.cat([x_BnD, state.instruction_BLD[:, done : done + size]], dim=1)
        rope = torch.cat([state.rope[:, :, begin:solid], state.rope[:, :, asking]], dim=2)
        mask = torch.ones(end - begin, end, dtype=torch.bool, device=x_BnD.device).tril(begin) if begin else None
        state.filled = solid + 1
        return self.norm(self._run(x_BnD, rope, mask, state.cache[..., :end, :])[:, -size:])

    def _run(self, x_BnD: Tensor, rope: Tensor, mask: Tensor | None, cache: Tensor | None) -> Tensor:
        for index, layer in enumerate(self.layers):
            x_BnD = layer(x_BnD, rope, mask, None if cache is None else cache[index])
        return x_BnD


class Block(nn.Module):
    def __init__(self, config: RandARConfig, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(config, dropout)
        self.feed_forward = FeedForward(config.dim, config.ffn_width, dropout)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, x_BnD: Tensor, rope: Tensor, mask: Tensor | None, cache: Tensor | None) -> Tensor:
        x_BnD = x_BnD + self.attention(self.attention_norm(x_BnD), rope, mask, cache)
        return x_BnD + self.feed_forward(self.ffn_norm(x_BnD))


class Attention(nn.Module):
    def __init__(self, config: RandARConfig, dropout: float) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.wqkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)
        self.resid_dropout = nn.Dropout(dropout)

    def forward(self, x_BnD: Tensor, rope: Tensor, mask: Tensor | None, cache: Tensor | None) -> Tensor:
        """Causal unless there is a `mask`; `cache` (2, B, heads, slots so far, head_dim) receives the new slots."""
        num_new = x_BnD.shape[1]
        qkv = self.wqkv(x_BnD).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        (q, k), v = rotate(qkv[:2], rope), qkv[2]
        if cache is not None:
            cache[0, ..., -num_new:, :], cache[1, ..., -num_new:, :] = k, v
            k, v = cache[0].to(q.dtype), cache[1].to(q.dtype)
        x = attend(q, k, v, is_causal=mask is None, mask=mask)
        return self.resid_dropout(self.wo(x.transpose(1, 2).flatten(2)))


def _behind_class(table_BnF2: Tensor) -> Tensor:
    """The class slot's angles (zeros) in front, ready for all heads: (B, 1, 1 + n, head_dim / 2, 2)."""
    return nn.functional.pad(table_BnF2, (0, 0, 0, 0, 1, 0)).unsqueeze(1)
