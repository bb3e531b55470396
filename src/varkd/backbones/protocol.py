"""What every backbone offers: predict the next *set* of positions under a `Plan`.

A family differs from another only in its plans and in how its forward pass reads a prefix. Losses, samplers,
guidance and label dropping stand outside. The contract that makes "on-policy" true, tested for each family:
`start`/`step` give the same hidden states as `forward` under the plan that made the codes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from varkd.errors import VarkdError
from varkd.types import Condition, Plan
from varkd.world import Rng

State = Any
"""KV cache and running features of one decode: owned by the caller, opaque to everyone but the backbone."""


class Backbone(nn.Module, ABC):
    """Base of all families. Subclasses keep their sizes in `config`, a frozen dataclass."""

    family: ClassVar[str]
    config: Any

    @property
    @abstractmethod
    def head(self) -> nn.Linear:
        """The output layer D -> V, kept apart so that it can be applied in chunks."""

    @abstractmethod
    def initialise(self, generator: torch.Generator) -> None:
        """Draw all weights from `generator`."""

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """Classes without the null label."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """V: codes of the tokenizer."""

    @property
    @abstractmethod
    def sequence_length(self) -> int:
        """L: codes of one image."""

    @property
    def null_label(self) -> int:
        """The label of the unconditional branch."""
        return self.num_classes

    @abstractmethod
    def plan(
        self, batch_size: int, rng: Rng | None = None, row_B: Tensor | None = None, steps: int | None = None,
        order_BL: Tensor | None = None,
    ) -> Plan:  # fmt: skip
        """Draw the order and the step sizes of a batch, once. `steps` asks for parallel decoding where there is any."""

    @abstractmethod
    def check(self, plan: Plan) -> None:
        """Raise `VarkdError` with the reason when this family cannot honour `plan`."""

    @abstractmethod
    def forward(self, codes_BL: Tensor, condition: Condition, plan: Plan) -> Tensor:
        """Teacher forcing: hidden_BLD, raster-aligned, where `hidden[:, i]` predicts `codes[:, i]`.

        Pure: no label dropping, no loss, no device calls; train and eval agree when dropout is 0.
        """

    @abstractmethod
    def start(
        self, condition: Condition, plan: Plan, prefix_codes_BL: Tensor | None = None, prefix_steps: int = 0
    ) -> tuple[State, Tensor]:
        """Begin to decode, after `prefix_steps` steps of given codes: the state and the hidden_BnD of the next step."""

    @abstractmethod
    def step(self, state: State, codes_Bn: Tensor) -> Tensor:
        """Consume the codes just sampled (in order); return the hidden_BnD of the next step."""

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
