"""Gray levels as codes: a tokenizer without weights, for images small enough to model pixel by pixel.

Every pixel is one code, so a digit of 8 x 8 pixels is a sequence of 64 codes; nothing is lost on images that use
no more than `levels` evenly spaced gray levels (scikit-learn's digits have 17).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from varkd.errors import VarkdError
from varkd.tokenizers.protocol import Tokenizer, check_codes, check_images

_RANGE_SLACK = 1e-3  # rounding of a float image; far below half the distance of two levels


@dataclass(frozen=True)
class PixelsConfig:
    """`levels` gray levels from black (-1) to white (+1) on images of `height` x `width` pixels."""

    levels: int = 17
    height: int = 8
    width: int = 8

    def __post_init__(self) -> None:
        if not (2 <= self.levels <= 256 and self.height > 0 and self.width > 0):
            raise VarkdError(f"pixels tokenizer: need 2 to 256 levels and positive sides, got {self}")


class Pixels(Tokenizer):
    """Gray images (B, 1, H, W) <-> level ids (B, H * W)."""

    kind = "pixels"
    levels_V: Tensor

    def __init__(self, config: PixelsConfig) -> None:
        super().__init__()
        self.config: PixelsConfig = config
        # Not part of the state: the config says it all.
        self.register_buffer("levels_V", torch.linspace(-1, 1, config.levels), persistent=False)

    @property
    def vocab_size(self) -> int:
        return self.config.levels

    @property
    def grid(self) -> tuple[int, int]:
        return self.config.height, self.config.width

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return 1, self.config.height, self.config.width

    @property
    def entries_VE(self) -> Tensor:
        return self.levels_V[:, None]

    @property
    def codebook_VE(self) -> Tensor:
        """The gray level of each code in [-1, 1]: float32 (V, 1)."""
        return self.levels_V[:, None]

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Images in [-1, 1] -> the nearest level of every pixel: int64 (B, L).

        Raises:
            VarkdError: the images have another shape, or values outside [-1, 1].
        """
        check_images(images_BCHW, self.image_shape)
        if not bool((images_BCHW.abs() <= 1 + _RANGE_SLACK).all()):
            raise VarkdError("pixels tokenizer: image values lie outside [-1, 1]: scale them first")
        levels = (images_BCHW.float() + 1) / 2 * (self.config.levels - 1)
        return levels.round().long().flatten(1)

    def decode(self, codes_BL: Tensor) -> Tensor:
        """Level ids -> images in [-1, 1]: float32 (B, 1, H, W). The exact inverse of `encode` on levels.

        Raises:
            VarkdError: the codes have another length, or lie outside [0, V).
        """
        check_codes(codes_BL, self.sequence_length, self.vocab_size)
        return self.levels_V[codes_BL].unflatten(1, self.image_shape)
