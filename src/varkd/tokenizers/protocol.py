"""What every tokenizer offers: images <-> codes, a codebook, and a hash that names it.

Images are float tensors (B, C, H, W) in [-1, 1]; codes are int64 (B, L) in raster order.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from varkd.errors import VarkdError
from varkd.hub import OnHub
from varkd.types import state_hash


class Tokenizer(nn.Module, OnHub, ABC):
    """Base of all tokenizers; `config` is a frozen dataclass that rebuilds the module."""

    hub_folder: ClassVar[str] = "tokenizer"
    kind: ClassVar[str]
    config: Any

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.config.vocab_size

    @property
    @abstractmethod
    def grid(self) -> tuple[int, int]:
        """Codes per column and per row; their product is L."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images."""
        return self.config.channels, self.config.image_size, self.config.image_size

    @property
    @abstractmethod
    def codebook_VE(self) -> Tensor:
        """The codebook as it is compared (l2-normalized where the quantizer does): the metric space of the codes."""

    @abstractmethod
    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Images in [-1, 1] -> codes_BL."""

    @abstractmethod
    def decode(self, codes_BL: Tensor) -> Tensor:
        """Codes -> images in [-1, 1] (not clamped)."""

    @property
    @abstractmethod
    def entries_VE(self) -> Tensor:
        """The stored vectors that codes are decoded from, to be changed in place by `merged`."""

    @torch.no_grad()
    def merged(self, group_V: Tensor) -> Tokenizer:
        """A copy whose codes decode to the mean codebook vector of their group; `group_V` is int64 (V,)."""
        twin = copy.deepcopy(self)
        vectors_VE, group_V = self.codebook_VE.double(), group_V.to(self.codebook_VE.device)
        sums_KE = vectors_VE.new_zeros(int(group_V.max()) + 1, vectors_VE.shape[1]).index_add_(0, group_V, vectors_VE)
        means_KE = sums_KE / torch.bincount(group_V).unsqueeze(1)
        twin.entries_VE.copy_(means_KE[group_V])
        return twin

    @property
    def scales(self) -> tuple[int, ...] | None:
        """The sides of the maps of a multi-scale tokenizer, coarse to fine (codes concatenated); None for one grid."""
        return None

    @property
    def sequence_length(self) -> int:
        return sum(side * side for side in self.scales) if self.scales else self.grid[0] * self.grid[1]

    def to_uint8(self, images: Tensor) -> Tensor:
        """Decoded images in [-1, 1] -> uint8 by this tokenizer's official rule. LlamaGen's unless overridden."""
        return to_uint8(images)

    @property
    def quantizer(self) -> dict[str, Tensor]:
        """What a next-scale backbone needs to read its own codes (`residual.py`); empty for one grid."""
        return {}

    def save_pretrained(self, folder: str | Path) -> None:
        from varkd.tokenizers.store import save_tokenizer  # which knows all kinds, each of which is a Tokenizer

        save_tokenizer(self, folder)

    @classmethod
    def _from_folder(cls, folder: Path) -> Tokenizer:
        from varkd.tokenizers.store import load_tokenizer

        return load_tokenizer(folder)

    @cached_property
    def hash(self) -> str:
        """SHA-256 over kind, config and weights: codes of two tokenizers must not be mixed."""
        return state_hash(f"{self.kind} {sorted(asdict(self.config).items())}", self.state_dict())


def to_unit(images_uint8: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return images_uint8.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] -> uint8 by LlamaGen's rule: clamp(127.5 x + 128, 0, 255), truncated. Inverts `to_unit` exactly."""
    return (images * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def truncate_to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] -> uint8 by the rule of VAR and MaskGIT-VQGAN: clamp, then 255 (x + 1) / 2, truncated."""
    return (images.clamp(-1, 1) + 1).div(2).mul(255).to(torch.uint8)


def check_images(images_BCHW: Tensor, image_shape: tuple[int, int, int]) -> None:
    """Refuse images of another shape than (B, *image_shape) with one line."""
    if images_BCHW.ndim != 4 or tuple(images_BCHW.shape[1:]) != image_shape:
        raise VarkdError(
            f"the tokenizer takes images of shape (batch, {', '.join(map(str, image_shape))}), "
            f"got {tuple(images_BCHW.shape)}: choose a tokenizer for these images, or resize them"
        )


def check_codes(codes_BL: Tensor, length: int, vocab_size: int) -> None:
    """Refuse codes of another length than `length`, or outside [0, vocab_size), with one line."""
    if codes_BL.ndim != 2 or codes_BL.shape[1] != length:
        raise VarkdError(f"the tokenizer takes codes of shape (batch, {length}), got {tuple(codes_BL.shape)}")
    if torch.compiler.is_compiling():  # an exported graph has no values to look at
        return
    if codes_BL.numel() and (int(codes_BL.min()) < 0 or int(codes_BL.max()) >= vocab_size):
        raise VarkdError(f"codes must lie in [0, {vocab_size}): they come from another tokenizer")
