"""MaskGIT's VQGAN (arXiv 2202.04200) as RAR and RandAR use it, under its official (PyTorch) parameter names.

Convolutions only. A code names the codebook row at the smallest Euclidean distance. The network reads and writes
[0, 1]; ours is [-1, 1] everywhere, so `encode` and `decode` convert. Its padding "same" is the TensorFlow rule, which
at stride 1 with odd kernels is the ordinary one: resolutions are halved by average pooling instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from varkd.containers import count_numbered
from varkd.errors import VarkdError
from varkd.tokenizers.layers import OFFICIAL_GROUPS, Shapes, nearest, norm
from varkd.tokenizers.protocol import Tokenizer, check_codes, check_images, truncate_to_uint8


@dataclass(frozen=True)
class MaskGITConfig:
    """Sizes of the tokenizer; the defaults are the official ones for 256 x 256 images.

    Level l has `ch * ch_mult[l]` channels; there are `len(ch_mult) - 1` halvings of the resolution. A level, and the
    middle, has `num_res_blocks` blocks.
    """

    image_size: int = 256
    channels: int = 3
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    z_channels: int = 256
    num_res_blocks: int = 2
    vocab_size: int = 1024
    norm_groups: int = 32

    def __post_init__(self) -> None:
        sizes = {name: value for name, value in vars(self).items() if name != "ch_mult"}
        too_small = [name for name, value in sizes.items() if value < 1]
        if too_small or not self.ch_mult or min(self.ch_mult) < 1:
            raise VarkdError(f"maskgit tokenizer: {(*too_small, 'ch_mult')[0]} must be at least 1, got {self}")
        if self.image_size % self.downsampling:
            raise VarkdError(
                f"maskgit tokenizer: image_size {self.image_size} is not a multiple of {self.downsampling} "
                f"(one halving per entry of ch_mult after the first)"
            )
        if any(self.ch * mult % self.norm_groups for mult in (1, *self.ch_mult)):
            raise VarkdError(
                f"maskgit tokenizer: ch * ch_mult must be multiples of norm_groups = {self.norm_groups}, "
                f"got ch {self.ch} and ch_mult {self.ch_mult}"
            )

    @classmethod
    def infer(cls, shapes: Shapes, image_size: int) -> Self:
        """The sizes of an official state dict. Raises KeyError for a tensor that is not there."""
        ch, channels = shapes["encoder.conv_in.weight"][:2]
        levels = count_numbered(shapes, r"encoder\.down\.(\d+)\.")
        widths = [shapes[f"encoder.down.{level}.block.0.conv1.weight"][0] for level in range(levels)]
        vocab_size, z_channels = shapes["quantize.embedding.weight"]
        return cls(
            image_size,
            channels,
            ch,
            tuple(width // ch for width in widths),
            z_channels,
            count_numbered(shapes, r"encoder\.down\.0\.block\.(\d+)\."),
            vocab_size,
            OFFICIAL_GROUPS,
        )

    @property
    def downsampling(self) -> int:
        """Pixels per code along one side."""
        return 2 ** (len(self.ch_mult) - 1)


class MaskGIT(Tokenizer):
    """Images (B, C, H, W) <-> codes of an h x w grid, with h = H / downsampling."""

    kind = "maskgit"

    def __init__(self, config: MaskGITConfig) -> None:
        super().__init__()
        self.config: MaskGITConfig = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Codebook(config.vocab_size, config.z_channels)

    @property
    def grid(self) -> tuple[int, int]:
        side = self.config.image_size // self.config.downsampling
        return side, side

    @property
    def entries_VE(self) -> Tensor:
        return self.quantize.embedding.weight

    @property
    def codebook_VE(self) -> Tensor:
        """The codebook as it is: rows are compared by their Euclidean distance, not normalized."""
        return self.quantize.embedding.weight

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Images in [-1, 1] -> codes: int64 (B, L).

        Raises:
            VarkdError: the images have another shape.
        """
        return self.quantize_latents(self.latents(images_BCHW))

    def decode(self, codes_BL: Tensor) -> Tensor:
        """Codes -> images in [-1, 1], not clamped: (B, C, H, W).

        Raises:
            VarkdError: the codes have another length, or lie outside [0, V).
        """
        check_codes(codes_BL, self.sequence_length, self.vocab_size)
        entries_BEhw = F.embedding(codes_BL, self.codebook_VE).unflatten(1, self.grid).movedim(-1, 1)
        return self.decoder(entries_BEhw) * 2 - 1

    def latents(self, images_BCHW: Tensor) -> Tensor:
        """What the encoder says: (B, E, h, w)."""
        check_images(images_BCHW, self.image_shape)
        return self.encoder((images_BCHW + 1) / 2)

    def quantize_latents(self, latents_BEhw: Tensor) -> Tensor:
        """Latents -> the codes (B, L) nearest to them. Always in the precision of the codebook."""
        with torch.autocast(latents_BEhw.device.type, enabled=False):
            vectors_NE = latents_BEhw.to(self.codebook_VE.dtype).movedim(1, -1).flatten(0, 2)
            return nearest(vectors_NE, self.codebook_VE).view(len(latents_BEhw), -1)

    def to_uint8(self, images: Tensor) -> Tensor:
        """MaskGIT-VQGAN's rule: clamp to [0, 1], then times 255, truncated."""
        return truncate_to_uint8(images)


class Codebook(nn.Module):
    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, dim)


class Encoder(nn.Module):
    """Images in [0, 1] (B, C, H, W) -> latents (B, z_channels, h, w)."""

    def __init__(self, config: MaskGITConfig) -> None:
        super().__init__()
        widths = [config.ch * mult for mult in (1, *config.ch_mult)]
        groups, blocks = config.norm_groups, config.num_res_blocks
        self.conv_in = nn.Conv2d(config.channels, widths[0], 3, padding=1, bias=False)
        self.down = nn.ModuleList(Level(width_in, width, blocks, groups) for width_in, width in pairwise(widths))
        self.mid = nn.ModuleList(ResidualBlock(widths[-1], widths[-1], groups) for _ in range(blocks))
        self.norm_out = norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels, 1)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        hidden = self.conv_in(images_BCHW)
        for index, level in enumerate(self.down):
            hidden = level(F.avg_pool2d(hidden, 2) if index else hidden)
        for block in self.mid:
            hidden = block(hidden)
        return self.conv_out(F.silu(self.norm_out(hidden)))


class Decoder(nn.Module):
    """Codebook rows (B, z_channels, h, w) -> images (B, C, H, W). Its first level has the highest resolution."""

    def __init__(self, config: MaskGITConfig) -> None:
        super().__init__()
        widths = [config.ch * mult for mult in (*config.ch_mult, config.ch_mult[-1])]
        groups, blocks = config.norm_groups, config.num_res_blocks
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = nn.ModuleList(ResidualBlock(widths[-1], widths[-1], groups) for _ in range(blocks))
        self.up = nn.ModuleList(
            Level(widths[level + 1], widths[level], blocks, groups, upsample=level > 0)
            for level in range(len(config.ch_mult))
        )
        self.norm_out = norm(widths[0], groups)
        self.conv_out = nn.Conv2d(widths[0], config.channels, 3, padding=1)

    def forward(self, entries_BEhw: Tensor) -> Tensor:
        hidden = self.conv_in(entries_BEhw)
        for module in (*self.mid, *reversed(self.up)):
            hidden = module(hidden)
        return self.conv_out(F.silu(self.norm_out(hidden)))


class Level(nn.Module):
    """Residual blocks at one resolution; in the decoder, the way to the next follows."""

    def __init__(self, width_in: int, width: int, num_blocks: int, groups: int, upsample: bool = False) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResidualBlock(width if index else width_in, width, groups) for index in range(num_blocks)
        )
        self.upsample_conv = nn.Conv2d(width, width, 3, padding=1) if upsample else None

    def forward(self, hidden: Tensor) -> Tensor:
        for block in self.block:
            hidden = block(hidden)
        if self.upsample_conv is None:
            return hidden
        return self.upsample_conv(F.interpolate(hidden, scale_factor=2.0, mode="nearest"))


class ResidualBlock(nn.Module):
    """Two convolutions h beside a shortcut: x + h.

    Where the width changes, the published weights were trained with a slip that must stay: the 1x1 "shortcut" W reads
    h instead of x, so the block is h + W h and passes nothing by.
    """

    def __init__(self, width_in: int, width: int, groups: int) -> None:
        super().__init__()
        self.norm1 = norm(width_in, groups)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1, bias=False)
        self.norm2 = norm(width, groups)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.nin_shortcut = nn.Conv2d(width, width, 1, bias=False) if width_in != width else None

    def forward(self, hidden: Tensor) -> Tensor:
        inner = self.conv1(F.silu(self.norm1(hidden)))
        inner = self.conv2(F.silu(self.norm2(inner)))
        return inner + (hidden if self.nin_shortcut is None else self.nin_shortcut(inner))
