"""What every backbone offers: predict the next *set* of positions under a `Plan`.

A family differs from another only in its plans and in how its forward pass reads a prefix. Losses, samplers,
guidance and label dropping stand outside. The contract that makes "on-policy" true, tested for each family:
`start`/`step` give the same hidden states as `forward` under the plan that made the codes.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from varkd.backbones.layers import GuidanceEmbedding
from varkd.errors import VarkdError
from varkd.files import atomic_folder, write_json
from varkd.folders import Own, json_with
from varkd.hub import OnHub
from varkd.types import Condition, Plan
from varkd.world import Rng

MODEL = Own("a model", ("config.json",), json_with("family", "tokenizer_hash"), ("model.safetensors",))
State = Any
"""KV cache and running features of one decode: owned by the caller, opaque to everyone but the backbone."""

GuidanceKind = Literal["constant", "scales", "decoded_before", "decoded_after", "power_cosine"]
"""How the guidance scale moves while an image is decoded; the formulas stand in `rollout.guidance_per_step`."""
Nucleus = Literal["descending", "ascending"]
"""Which of the two official top-p rules a family samples with, see `rollout.filter_logits`."""


@dataclass(frozen=True)
class Layout:
    """What a codes folder says about its codes: enough to size a backbone for them.

    `scales` are the sides of a multi-scale tokenizer's maps, coarse to fine, or None where the codes are one grid.
    `code_dim` and `num_phi` are the width of its codebook and the number of its convolutions.
    """

    vocab_size: int
    num_classes: int
    grid: tuple[int, int]
    scales: tuple[int, ...] | None = None
    code_dim: int | None = None
    num_phi: int | None = None

    def __str__(self) -> str:
        return f"scales {self.scales}" if self.scales else f"a {self.grid[0]}x{self.grid[1]} grid"


class Backbone(nn.Module, OnHub, ABC):
    """Base of all families. Subclasses keep their sizes in `config`, a frozen dataclass."""

    hub_folder: ClassVar[str] = "model"
    family: ClassVar[str]
    config_class: ClassVar[type[Any]]
    guidance: ClassVar[GuidanceKind] = "constant"
    nucleus: ClassVar[Nucleus] = "descending"
    official_extras: ClassVar[tuple[str, ...]] = ()
    """Regular expressions (full match) of tensors in official files that we recompute or do not need."""
    residual_codes: ClassVar[bool] = False
    """Whether later codes encode what earlier ones left over (next scale): then no code can be exchanged alone."""
    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """What the axes of parameters are (regular expressions, full match), for whoever cuts a model down (`shrink`).

    "D" residual channels, "H:group" lanes of heads, "N:group" heads, "F:group" FFN neurons; "3H:group" three of them
    stacked; "" anything else. Parameters with one group keep the same heads or neurons; "{0}" is the first match group.
    """
    stacks: ClassVar[tuple[str, ...]] = ("layers",)
    """Paths of the lists of blocks, each with its share of `num_layers`."""
    config: Any
    guidance_embedding: GuidanceEmbedding | None
    tokenizer_hash: str | None = None
    """The tokenizer whose codes the model was trained on, where it is known (`Tokenizer.hash`)."""
    class_names: tuple[str, ...] | None = None
    """The classes that the model was trained on, in the order of their labels, where they are known."""

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def channel_block(self) -> int:
        """How many residual channels in a row must stay together."""
        return 1

    def axes_of(self, name: str) -> tuple[str, ...]:
        """The entry of `axes` for a tensor, its groups filled in; nothing for a tensor that has none."""
        for pattern, labels in self.axes.items():
            if match := re.fullmatch(pattern, name):
                return tuple(label.format(*match.groups()) for label in labels)
        return ()

    def describe(self) -> dict[str, Any]:
        """The `config.json` of a model folder: family, sizes, tokenizer and class names."""
        names = None if self.class_names is None else list(self.class_names)
        return {
            "family": self.family,
            **asdict(self.config),
            "tokenizer_hash": self.tokenizer_hash,
            "class_names": names,
        }

    def save(self, folder: str | Path) -> None:
        """Write a model folder (replaced as a whole) that `varkd.load` reads: `config.json`, `model.safetensors`."""
        with atomic_folder(Path(folder), MODEL) as temporary:
            write_json(temporary / "config.json", self.describe())
            tensors = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
            save_file(tensors, temporary / "model.safetensors")

    def save_pretrained(self, folder: str | Path) -> None:
        self.save(folder)

    @classmethod
    def _from_folder(cls, folder: Path) -> Backbone:
        from varkd.backbones.store import load_backbone  # which knows all families, each of which is a Backbone

        return load_backbone(folder)[0]

    @property
    def guidance_conditioned(self) -> bool:
        """Whether the model reads `Condition.guidance_B`: one pass where guidance takes two."""
        return getattr(self.config, "guidance_conditioned", False)

    @property
    @abstractmethod
    def head(self) -> nn.Linear:
        """The output layer D -> V, kept apart so that it can be applied in chunks."""

    @property
    @abstractmethod
    def transformer_blocks(self) -> Sequence[nn.Module]:
        """The transformer blocks, in order: what is sharded one by one."""

    @abstractmethod
    def initialize(self, generator: torch.Generator) -> None:
        """Draw all weights from `generator`."""

    def with_scale(self, class_vector: Tensor, condition: Condition) -> Tensor:
        """The class vectors, (B, D) or (B, 1, D), moved by the guidance scales if the model reads them; None is 1."""
        if self.guidance_embedding is None:
            return class_vector
        guidance_B = condition.guidance_B
        guidance_B = torch.ones(len(condition), device=class_vector.device) if guidance_B is None else guidance_B
        return class_vector + self.guidance_embedding(guidance_B).view_as(class_vector)

    def zero_scale(self) -> None:
        """Let the guidance scale change nothing: for the end of `initialize`."""
        if self.guidance_embedding is not None:
            nn.init.zeros_(self.guidance_embedding.linear.weight)

    @property
    def num_classes(self) -> int:
        """Classes without the null label."""
        return self.config.num_classes

    @property
    def vocab_size(self) -> int:
        """V: codes of the tokenizer."""
        return self.config.vocab_size

    @property
    def sequence_length(self) -> int:
        """L: codes of one image."""
        return self.config.grid[0] * self.config.grid[1]

    @property
    def null_label(self) -> int:
        """The label of the unconditional branch."""
        return self.num_classes

    @abstractmethod
    def plan(
        self,
        batch_size: int,
        rng: Rng | None = None,
        row_B: Tensor | None = None,
        steps: int | None = None,
        order_BL: Tensor | None = None,
        schedule: str | None = None,
    ) -> Plan:
        """Fix the order and the step sizes of a batch, once.

        Args:
            rng, row_B: where random orders are drawn from (stream "order"); families without them ignore both.
            steps: parallel decoding in this many steps, where there is any; None is the family's own way (one code a
                step, or one scale a step).
            order_BL: an order to use instead of the family's own (`Plan.order_BL`).
            schedule: how `steps` share the codes, where a family knows several ways.

        Raises:
            VarkdError: this family cannot decode like that.
        """

    @abstractmethod
    def check(self, plan: Plan) -> None:
        """Raise `VarkdError` with the reason when this family cannot honor `plan`."""

    @abstractmethod
    def forward(self, codes_BL: Tensor, condition: Condition, plan: Plan) -> Tensor:
        """Teacher forcing: hidden_BLD, raster-aligned, where `hidden[:, i]` predicts `codes[:, i]`.

        Pure: no label dropping, no loss, no device calls; train and eval agree when dropout is 0.
        """

    @abstractmethod
    def start(
        self, condition: Condition, plan: Plan, prefix_codes_BL: Tensor | None = None, prefix_steps: int = 0
    ) -> tuple[State, Tensor]:
        """Begin to decode, after `prefix_steps` steps of given codes: the state and the hidden_BnD of the next step.

        The caller has asked `check` about the plan: from here on nothing waits for the device, so that a decode can be
        captured as a CUDA graph (`graphs`).
        """

    @abstractmethod
    def step(self, state: State, codes_Bn: Tensor) -> Tensor:
        """Consume the codes just sampled (in order); return the hidden_BnD of the next step."""

    @classmethod
    def sizes_for(cls, layout: Layout) -> dict[str, Any]:
        """The config fields that the codes determine.

        Raises:
            VarkdError: the family cannot model such codes.
        """
        if layout.scales:
            raise VarkdError(
                f"{cls.family} models one grid of codes, but these come from a multi-scale tokenizer ({layout}): "
                "use model.family=var, or encode with a vq tokenizer"
            )
        return {"vocab_size": layout.vocab_size, "num_classes": layout.num_classes, "grid": layout.grid}

    @classmethod
    @abstractmethod
    def infer(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """The config fields that the shapes of an official state dict determine (never a guess).

        Raises:
            KeyError: it is not a state dict of this family.
        """

    def set_quantizer(self, quantizer: Mapping[str, Tensor]) -> None:
        """Give a next-scale backbone the frozen tensors of its tokenizer; other families read codes without them."""
        del quantizer

    def official_state(self) -> dict[str, Tensor]:
        """The weights under the official key layout: what the official code loads strictly."""
        return dict(self.state_dict())

    @classmethod
    @abstractmethod
    def class_rows(cls, config: Any) -> tuple[str, int]:
        """(name of the tensor, first row) of the class table: `num_classes` rows, then the null label's row."""

    def check_inputs(self, codes_BL: Tensor, condition: Condition) -> None:
        """Shapes and dtypes of a batch, with one clear line each."""
        if codes_BL.ndim != 2 or codes_BL.shape[1] != self.sequence_length:
            raise VarkdError(
                f"{self.family} expects codes of shape (B, {self.sequence_length}), got {tuple(codes_BL.shape)}"
            )
        if codes_BL.is_floating_point():
            raise VarkdError(f"codes must be integers, got {codes_BL.dtype}")
        if condition.label_B.is_floating_point():
            raise VarkdError(f"labels must be integers, got {condition.label_B.dtype}")
        if condition.label_B.shape != codes_BL.shape[:1]:
            raise VarkdError(f"{len(codes_BL)} sequences but labels of shape {tuple(condition.label_B.shape)}")
        if condition.guidance_B is not None and condition.guidance_B.shape != codes_BL.shape[:1]:
            raise VarkdError(f"{len(codes_BL)} sequences but scales of shape {tuple(condition.guidance_B.shape)}")


class SlotDecoder(Backbone):
    """A raster model that also decodes at any positions of its cache: what ZipAR needs (`rollout`)."""

    @abstractmethod
    def prefill(self, condition: Condition, codes_BL: Tensor, kept_B: Tensor, longest: int) -> State:
        """Begin to decode by slots after `kept_B` leading codes of each row, at most `longest` of them."""

    @abstractmethod
    def run_slots(self, state: State, slot_Bn: Tensor, code_Bn: Tensor, live_Bn: Tensor, end: int) -> Tensor:
        """Write codes into slots of the cache and return the hidden_BnD that they predict with.

        Slot p + 1 holds the code of raster position p and predicts position p + 1; slot 0 holds the class, whatever its
        code. Every query sees the slots at or before its own that were ever written; rows that are not `live_Bn` are
        written nowhere, and their hidden states mean nothing. All slots asked for lie before `end`.
        """
