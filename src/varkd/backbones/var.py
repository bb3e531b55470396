"""VAR: next-scale prediction (Tian et al. 2024, arXiv 2404.02905), class-conditional.

A step predicts all p x p codes of one scale at once, from the residual features that the codes of the earlier scales
add up to (`residual.py`). Slot t reads the features, area-averaged to its own scale, and predicts code_t; the slots of
the first scale read the class instead. A slot sees its own scale and the earlier ones. Parameter names are the official
ones; the buffers `lvl_1L`, `attn_bias_for_masking` and `zero_k_bias` of official files follow from the sizes.

Quirks kept: queries and keys have unit length, each head scales its scores by exp(min(learned, ln 100)); the key has no
bias; AdaLN yields (gate, gate, scale, scale, shift, shift) in a block but (scale, shift) before the head; layer norms
have no weights. Departures: the residual stream stays in float32 under autocast (official: the autocast type), and the
word embedding does so in decoding as in training (official: in training only).
Left out: label dropping, guidance, drop path, and `more_smooth`, whose context is not the sampled codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varkd.backbones.layers import GuidanceEmbedding, attend, cache_dtype
from varkd.backbones.protocol import Backbone, GuidanceKind, Layout, Nucleus
from varkd.containers import count_numbered
from varkd.errors import VarkdError
from varkd.residual import Quantizer
from varkd.types import Condition, Plan
from varkd.world import Rng

QUANTIZER = {
    "codebook": "quantizer_codebook",
    "phi.weight": "quantizer_phi_weight",
    "phi.bias": "quantizer_phi_bias",
}
"""The tokenizer's frozen tensors -> the buffers that hold them here."""


@dataclass(frozen=True)
class VARConfig:
    """Sizes of a model. `ffn_dim=None` is the official 4 `dim`.

    `scales` are the sides of the maps, coarse to fine; `code_dim` and `num_phi` are the tokenizer's (`residual.py`).
    `shared_adaln` shares one modulation among the blocks, which then only add an offset (official for 512 pixels).
    """

    vocab_size: int
    num_classes: int
    scales: tuple[int, ...]
    code_dim: int
    num_layers: int
    dim: int
    num_heads: int
    ffn_dim: int | None = None
    shared_adaln: bool = False
    num_phi: int = 4
    norm_eps: float = 1e-6
    guidance_conditioned: bool = False

    def __post_init__(self) -> None:
        for name in ("vocab_size", "num_classes", "code_dim", "num_layers", "dim", "num_heads", "num_phi"):
            if getattr(self, name) < 1:
                raise VarkdError(f"var: {name} must be at least 1, got {getattr(self, name)}")
        if self.dim % self.num_heads:
            raise VarkdError(f"var: dim {self.dim} must be a multiple of num_heads {self.num_heads}")
        if not self.scales or self.scales[0] < 1 or list(self.scales) != sorted(set(self.scales)):
            raise VarkdError(f"var: scales must be sides of growing maps such as (1, 2, 4), got {self.scales}")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def ffn_width(self) -> int:
        return self.ffn_dim or 4 * self.dim

    @property
    def sizes(self) -> tuple[int, ...]:
        """Codes of each scale."""
        return tuple(side * side for side in self.scales)


@dataclass
class VARState:
    """One decode: normalized keys and values, and the residual features of the codes so far.

    `cache` is (layers, 2, B, heads, L, head_dim), of which `filled` slots are valid; `scale` is the one predicted next.
    """

    cache: Tensor
    class_BD: Tensor
    features_BEPP: Tensor
    scale: int
    filled: int = 0


class VAR(Backbone):
    """The model. `dropout` applies to attention output and FFN output, in training mode only (official: none)."""

    family: ClassVar[str] = "var"
    residual_codes: ClassVar[bool] = True
    config_class: ClassVar[type[Any]] = VARConfig
    guidance: ClassVar[GuidanceKind] = "scales"
    nucleus: ClassVar[Nucleus] = "ascending"
    official_extras: ClassVar[tuple[str, ...]] = (
        "lvl_1L", "attn_bias_for_masking", r"blocks\.\d+\.attn\.zero_k_bias",
    )  # fmt: skip

    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        r"pos_start|pos_1LC": ("", "", "D"),
        r"lvl_embed\.weight|class_emb\.weight|head\.weight": ("", "D"),
        r"head\.bias": ("",),
        r"word_embed\.weight|guidance_embedding\.linear\.weight": ("D", ""),
        r"word_embed\.bias|(?:.+)\.(?:proj|fc2)\.bias": ("D",),
        r"(?:shared_ada_lin|.+\.\d+\.ada_lin)\.1\.weight": ("6D", "D"),
        r"(?:shared_ada_lin|.+\.\d+\.ada_lin)\.1\.bias": ("6D",),
        r".+\.ada_gss": ("", "", "", "D"),
        r"head_nm\.ada_lin\.1\.weight": ("2D", "D"),
        r"head_nm\.ada_lin\.1\.bias": ("2D",),
        r"(.+)\.scale_mul_1H11": ("", "N:{0}", "", ""),
        r"(.+)\.[qv]_bias": ("H:{0}",),
        r"(.+)\.mat_qkv\.weight": ("3H:{0}", "D"),
        r"(.+)\.proj\.weight": ("D", "H:{0}"),
        r"(.+)\.fc1\.weight": ("F:{0}", "D"),
        r"(.+)\.fc1\.bias": ("F:{0}",),
        r"(.+)\.fc2\.weight": ("D", "F:{0}"),
    }
    stacks: ClassVar[tuple[str, ...]] = ("blocks",)

    quantizer_codebook: Tensor
    quantizer_phi_weight: Tensor
    quantizer_phi_bias: Tensor

    def __init__(self, config: VARConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        dim, code_dim = config.dim, config.code_dim
        self.pos_start = nn.Parameter(torch.empty(1, config.sizes[0], dim))
        self.pos_1LC = nn.Parameter(torch.empty(1, sum(config.sizes), dim))
        self.lvl_embed = nn.Embedding(len(config.scales), dim)
        self.class_emb = nn.Embedding(config.num_classes + 1, dim)
        self.word_embed = nn.Linear(code_dim, dim)
        self.shared_ada_lin = _modulation(dim, 6) if config.shared_adaln else None
        self.blocks = nn.ModuleList(Block(config, dropout) for _ in range(config.num_layers))
        self.head_nm = HeadNorm(config)
        self.add_module("head", nn.Linear(dim, config.vocab_size))
        self.guidance_embedding = GuidanceEmbedding(config.dim) if config.guidance_conditioned else None
        self.register_buffer("quantizer_codebook", torch.empty(config.vocab_size, code_dim))
        self.register_buffer("quantizer_phi_weight", torch.empty(config.num_phi, code_dim, code_dim, 3, 3))
        self.register_buffer("quantizer_phi_bias", torch.empty(config.num_phi, code_dim))

    def initialize(self, generator: torch.Generator) -> None:
        """Normal weights of LlamaGen's width, zero biases and head, head scales of 4, gates of GATE.

        The official gates start near zero (1e-3 times a small number). From scratch in a few hundred updates that and
        anything up to 0.3 train alike, wide open gates (1) clearly slower; GATE is small, yet lets every layer take
        part from the first update. The stand-in for a quantizer is a normal codebook under convolutions that keep the
        size of their input.
        """
        std = max(0.02, 0.55 / self.config.dim**0.5)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.endswith("scale_mul_1H11"):
                nn.init.constant_(parameter, math.log(4))
            else:
                nn.init.normal_(parameter, std=std, generator=generator)
        nn.init.zeros_(self.head.weight)
        self.zero_scale()
        if self.shared_ada_lin is not None:
            _open_gates(self.shared_ada_lin)
        for block in self.blocks:
            if isinstance(block, Block) and block.ada_lin is not None:
                _open_gates(block.ada_lin)
        nn.init.normal_(self.quantizer_codebook, generator=generator)
        nn.init.normal_(self.quantizer_phi_weight, std=(9 * self.config.code_dim) ** -0.5, generator=generator)
        nn.init.zeros_(self.quantizer_phi_bias)

    # `head` is an official name: a property by contract, and a module of the same name.

    @property
    def head(self) -> nn.Linear:
        head: Any = self.__getattr__("head")
        return head

    @property
    def transformer_blocks(self) -> Sequence[nn.Module]:
        return list(self.blocks)

    @property
    def sequence_length(self) -> int:
        return sum(self.config.sizes)

    @property
    def quantizer(self) -> Quantizer:
        tensors = {name: getattr(self, buffer) for name, buffer in QUANTIZER.items()}
        return Quantizer.of(tensors, self.config.scales)

    def set_quantizer(self, quantizer: Mapping[str, Tensor]) -> None:
        """Copy the tokenizer's frozen tensors: codebook (V, E), phi.weight (K, E, E, 3, 3), phi.bias (K, E).

        Raises:
            VarkdError: they belong to another kind or size of tokenizer.
        """
        wanted = {name: tuple(getattr(self, buffer).shape) for name, buffer in QUANTIZER.items()}
        found = {name: tuple(value.shape) for name, value in quantizer.items()}
        if found != wanted:
            raise VarkdError(
                f"var was built for the multi-scale tokenizer tensors {wanted}, this tokenizer has {found}: use the "
                "tokenizer of its codes"
            )
        for name, buffer in QUANTIZER.items():
            getattr(self, buffer).copy_(quantizer[name].detach())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VAR:
        """Move or convert the model; the quantizer stays in float32 at least, its sums do not survive bfloat16."""
        before = {buffer: getattr(self, buffer) for buffer in QUANTIZER.values()}
        super()._apply(fn, recurse)
        for buffer, value in before.items():
            after = getattr(self, buffer)
            wide = torch.promote_types(after.dtype, torch.float32)
            if after.dtype != wide:
                setattr(self, buffer, value.to(after.device, wide))
        return self

    def plan(
        self,
        batch_size: int,
        rng: Rng | None = None,
        row_B: Tensor | None = None,
        steps: int | None = None,
        order_BL: Tensor | None = None,
        schedule: str | None = None,
    ) -> Plan:
        """Coarse to fine, one scale a step: nothing is drawn.

        Raises:
            VarkdError: another number of steps or another order is asked for.
        """
        del rng, row_B, schedule
        if steps not in (None, len(self.config.scales)):
            raise VarkdError(
                f"var predicts one scale a step ({len(self.config.scales)} steps); {steps} steps cannot be had"
            )
        if order_BL is None:
            order_BL = torch.arange(self.sequence_length, device=self.pos_1LC.device).expand(batch_size, -1)
        plan = Plan(order_BL, self.config.sizes)
        self.check(plan)
        return plan

    def check(self, plan: Plan) -> None:
        if plan.sizes != self.config.sizes:
            raise VarkdError(
                f"var predicts one scale a step, {self.config.sizes} codes; this plan has {sum(plan.sizes)} codes in "
                f"{len(plan.sizes)} other steps"
            )
        given = torch.arange(self.sequence_length, device=plan.order_BL.device)
        if not torch.equal(plan.order_BL, given.expand_as(plan.order_BL)):
            raise VarkdError("var decodes its scales coarse to fine, in raster order; this plan has another order")

    def forward(self, codes_BL: Tensor, condition: Condition, plan: Plan) -> Tensor:
        del plan  # always coarse to fine: `check` refused everything else
        self.check_inputs(codes_BL, condition)
        class_BD = self._class(condition)
        x_BLD = torch.cat([self._first(class_BD), self._words(self.quantizer.inputs(codes_BL))], dim=1)
        mask = block_mask(tuple(self.config.scales), x_BLD.device)
        return self._run(self._place(x_BLD, 0), class_BD, mask, cache=None)

    def start(
        self, condition: Condition, plan: Plan, prefix_codes_BL: Tensor | None = None, prefix_steps: int = 0
    ) -> tuple[VARState, Tensor]:
        config, quantizer = self.config, self.quantizer
        class_BD, known = self._class(condition), sum(config.sizes[:prefix_steps])
        features, slots = quantizer.zeros(len(class_BD)), [self._first(class_BD)]
        if prefix_steps:
            if prefix_codes_BL is None or prefix_codes_BL.shape[1] < known:
                raise VarkdError(f"start: {prefix_steps} prefix steps need {known} prefix codes")
            for scale, codes_Bn in enumerate(prefix_codes_BL[:, :known].split(config.sizes[:prefix_steps], dim=1)):
                features = quantizer.add(features, codes_Bn, scale)
                slots.append(self._words(quantizer.next_input(features, scale + 1)))
        shape = (config.num_layers, 2, len(class_BD), config.num_heads, self.sequence_length, config.head_dim)
        weight = self.pos_1LC
        cache = torch.empty(shape, device=weight.device, dtype=cache_dtype(weight))
        state = VARState(cache, class_BD, features, prefix_steps)
        return state, self._extend(state, torch.cat(slots, dim=1))

    def step(self, state: VARState, codes_Bn: Tensor) -> Tensor:
        quantizer = self.quantizer
        state.features_BEPP = quantizer.add(state.features_BEPP, codes_Bn, state.scale)
        state.scale += 1
        return self._extend(state, self._words(quantizer.next_input(state.features_BEPP, state.scale)))

    @classmethod
    def sizes_for(cls, layout: Layout) -> dict[str, Any]:
        """The sizes of the tokenizer: `code_dim` and `num_phi` where the layout knows them."""
        if not layout.scales:
            raise VarkdError(
                f"var needs codes of a multi-scale tokenizer, these are {layout}: `varkd tokenizer fit --kind "
                "multiscale`, then encode with it"
            )
        sizes = {"vocab_size": layout.vocab_size, "num_classes": layout.num_classes, "scales": layout.scales}
        known = {"code_dim": layout.code_dim, "num_phi": layout.num_phi}
        return sizes | {name: value for name, value in known.items() if value is not None}

    @classmethod
    def infer(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """Everything but the scales (see `scales_of`) and the tokenizer's number of convolutions.

        Raises:
            VarkdError: a VAR without normalized queries and keys, which no released model is.
        """
        dim, code_dim = shapes["word_embed.weight"]
        vocab_size, num_labels = shapes["head.weight"][0], shapes["class_emb.weight"][0]
        ffn_dim = shapes["blocks.0.ffn.fc1.weight"][0]
        if "blocks.0.attn.scale_mul_1H11" not in shapes:
            shapes["blocks.0.attn.mat_qkv.weight"]  # KeyError: not a VAR at all
            raise VarkdError("this VAR file has no scale_mul_1H11 (attn_l2_norm=False): only attn_l2_norm=True is read")
        return {
            "vocab_size": vocab_size,
            "num_classes": num_labels - 1,
            "code_dim": code_dim,
            "num_layers": count_numbered(shapes, r"blocks\.(\d+)\."),
            "dim": dim,
            "num_heads": shapes["blocks.0.attn.scale_mul_1H11"][1],
            "ffn_dim": ffn_dim,
            "shared_adaln": "shared_ada_lin.1.weight" in shapes,
        }

    def official_state(self) -> dict[str, Tensor]:
        """Without the quantizer, which official files keep in the tokenizer's, and with the buffers."""
        state = {name: value for name, value in self.state_dict().items() if name not in QUANTIZER.values()}
        scales, device = tuple(self.config.scales), self.pos_1LC.device
        mask = block_mask(scales, device)
        state["lvl_1L"] = levels(scales, device).unsqueeze(0).clone()
        bias = self.pos_1LC.new_zeros(mask.shape).masked_fill(~mask, -torch.inf)
        state["attn_bias_for_masking"] = bias.unsqueeze(0).unsqueeze(0)
        for index in range(self.config.num_layers):
            state[f"blocks.{index}.attn.zero_k_bias"] = self.pos_1LC.new_zeros(self.config.dim)
        return state

    @classmethod
    def class_rows(cls, config: Any) -> tuple[str, int]:
        return "class_emb.weight", 0

    def _class(self, condition: Condition) -> Tensor:
        """What every modulation and the first scale's slots read: (B, D)."""
        return self.with_scale(self.class_emb(condition.label_B), condition)

    def _first(self, class_BD: Tensor) -> Tensor:
        return class_BD.unsqueeze(1) + self.pos_start

    def _words(self, features_BnE: Tensor) -> Tensor:
        """Residual features -> slots, in the precision of the weights: bfloat16 would blur neighboring codes."""
        with torch.autocast(features_BnE.device.type, enabled=False):
            return self.word_embed(features_BnE.to(self.word_embed.weight.dtype))

    def _place(self, x_BnD: Tensor, begin: int) -> Tensor:
        """Tell the slots from `begin` on their position and their scale."""
        rank = slice(begin, begin + x_BnD.shape[1])
        level_n = levels(tuple(self.config.scales), x_BnD.device)[rank]
        return x_BnD + (self.lvl_embed(level_n) + self.pos_1LC[:, rank])

    def _extend(self, state: VARState, x_BnD: Tensor) -> Tensor:
        """Run new slots against the cache; those of the last scale are what the step predicts."""
        begin, end = state.filled, state.filled + x_BnD.shape[1]
        first = begin == 0 and state.scale > 0  # the slots of several scales, which must not look ahead
        mask = block_mask(tuple(self.config.scales), x_BnD.device)[:end, :end] if first else None
        state.filled = end
        x_BnD = self._run(self._place(x_BnD, begin), state.class_BD, mask, state.cache[..., :end, :])
        return x_BnD[:, -self.config.sizes[state.scale] :]

    def _run(self, x_BLD: Tensor, class_BD: Tensor, mask: Tensor | None, cache: Tensor | None) -> Tensor:
        shared = None if self.shared_ada_lin is None else self.shared_ada_lin(class_BD)
        for index, block in enumerate(self.blocks):
            x_BLD = block(x_BLD, class_BD if shared is None else shared, mask, None if cache is None else cache[index])
        return self.head_nm(x_BLD, class_BD)


class Block(nn.Module):
    """Attention and FFN, each `x + gate * f(norm(x) * (1 + scale) + shift)`."""

    def __init__(self, config: VARConfig, dropout: float) -> None:
        super().__init__()
        self.norm_eps = config.norm_eps
        self.attn = Attention(config, dropout)
        self.ffn = FeedForward(config, dropout)
        self.ada_lin = None if config.shared_adaln else _modulation(config.dim, 6)
        self.ada_gss = nn.Parameter(torch.empty(1, 1, 6, config.dim)) if config.shared_adaln else None

    def forward(self, x_BLD: Tensor, condition: Tensor, mask: Tensor | None, cache: Tensor | None) -> Tensor:
        """`condition` is the class embedding (B, D), or with a shared modulation its result (B, 6 D)."""
        modulation = condition if self.ada_lin is None else self.ada_lin(condition)
        modulation_B16D = modulation.view(len(x_BLD), 1, 6, -1)
        if self.ada_gss is not None:
            modulation_B16D = modulation_B16D + self.ada_gss
        gate_1, gate_2, scale_1, scale_2, shift_1, shift_2 = modulation_B16D.unbind(2)
        attended = self.attn(_modulated(x_BLD, scale_1, shift_1, self.norm_eps), mask, cache)
        x_BLD = x_BLD + attended * gate_1
        return x_BLD + self.ffn(_modulated(x_BLD, scale_2, shift_2, self.norm_eps)) * gate_2


class Attention(nn.Module):
    """Cosine attention: unit queries and keys, one learned scale per head."""

    def __init__(self, config: VARConfig, dropout: float) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.scale_mul_1H11 = nn.Parameter(torch.empty(1, config.num_heads, 1, 1))
        self.q_bias = nn.Parameter(torch.empty(config.dim))
        self.v_bias = nn.Parameter(torch.empty(config.dim))
        self.mat_qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.proj = nn.Linear(config.dim, config.dim)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, x_BLD: Tensor, mask: Tensor | None, cache: Tensor | None) -> Tensor:
        """`cache` (2, B, heads, slots so far, head_dim) receives the new keys and values in its last slots.

        Without a `mask` every slot so far is seen: they are the scales before, and the one to predict.
        """
        num_new = x_BLD.shape[1]
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x_BLD, self.mat_qkv.weight, bias)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        scale = self.scale_mul_1H11.clamp(max=math.log(100)).exp()
        q, k = (_unit(q) * scale).to(v.dtype), _unit(k).to(v.dtype)
        if cache is not None:
            cache[0, ..., -num_new:, :], cache[1, ..., -num_new:, :] = k, v
            k, v = cache[0].to(q.dtype), cache[1].to(q.dtype)
        x = attend(q, k, v, mask=mask, scale=1.0)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


class FeedForward(nn.Module):
    def __init__(self, config: VARConfig, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.dim, config.ffn_width)
        self.fc2 = nn.Linear(config.ffn_width, config.dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.drop(self.fc2(F.gelu(self.fc1(x_BLD), approximate="tanh")))


class HeadNorm(nn.Module):
    """The norm before the head, modulated by the class."""

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        self.norm_eps = config.norm_eps
        self.ada_lin = _modulation(config.dim, 2)

    def forward(self, x_BLD: Tensor, class_BD: Tensor) -> Tensor:
        scale, shift = self.ada_lin(class_BD).view(len(x_BLD), 1, 2, -1).unbind(2)
        return _modulated(x_BLD, scale, shift, self.norm_eps)


GATE = 0.1
"""How far the gates of a new model are open, see `VAR.initialize`."""


def scales_of(lvl_1L: Tensor) -> tuple[int, ...]:
    """The sides of the maps, from the official buffer that holds each slot's scale.

    Raises:
        VarkdError: it does not describe square maps, coarse to fine.
    """
    level_L = lvl_1L.flatten().long()
    sides = tuple(math.isqrt(count) for count in torch.bincount(level_L).tolist())
    if 0 in sides or not torch.equal(levels(sides, level_L.device), level_L):
        raise VarkdError("lvl_1L does not count square maps, coarse to fine: this is not an official VAR file")
    return sides


@cache
def levels(scales: tuple[int, ...], device: torch.device) -> Tensor:
    """The scale of each slot, int64 (L,)."""
    with torch.inference_mode(False):
        sizes = torch.tensor([side * side for side in scales])
        return torch.arange(len(scales)).repeat_interleave(sizes).to(device)


@cache
def block_mask(scales: tuple[int, ...], device: torch.device) -> Tensor:
    """Which slots a slot sees, bool (L, L): its own scale and the earlier ones."""
    with torch.inference_mode(False):
        level_L = levels(scales, device)
        return level_L.unsqueeze(1) >= level_L.unsqueeze(0)


def _modulation(dim: int, parts: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(dim, parts * dim))


def _open_gates(modulation: nn.Module) -> None:
    """Bias of the two gates, the first of six parts."""
    bias = modulation.get_parameter("1.bias")
    nn.init.constant_(bias.detach()[: len(bias) // 3], GATE)


def _modulated(x_BLD: Tensor, scale_B1D: Tensor, shift_B1D: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x_BLD, x_BLD.shape[-1:], eps=eps) * (1 + scale_B1D) + shift_B1D


def _unit(x_BHLd: Tensor) -> Tensor:
    """Unit length along the last axis, in float32 at least."""
    return F.normalize(x_BHLd if x_BHLd.dtype == torch.float64 else x_BHLd.float(), dim=-1)
