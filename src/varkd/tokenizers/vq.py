"""The VQ tokenizer of LlamaGen (arXiv 2406.06525, section 3.1), under its official parameter names.

A convolutional encoder halves the resolution once per level after the first, a 1x1 convolution maps to vectors
of `codebook_dim`, and each l2-normalized vector becomes the code of the nearest l2-normalized codebook row; the
decoder mirrors the encoder. How one is trained (without the paper's adversarial and perceptual losses) stands in
`train/fit_tokenizer.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from varkd.containers import count_numbered
from varkd.errors import VarkdError
from varkd.tokenizers.layers import (
    OFFICIAL_GROUPS,
    SIMILARITIES_AT_ONCE,
    Downsample,
    ResidualBlock,
    Shapes,
    Upsample,
    attend_over_map,
    norm,
)
from varkd.tokenizers.protocol import Tokenizer, check_codes, check_images

_USAGE_LENGTH = 65536  # the official usage buffer; it takes no part in encoding or decoding


@dataclass(frozen=True)
class VQConfig:
    """Sizes of the tokenizer; the defaults are the official VQ-16 for 256 x 256 images.

    Level l has `ch * ch_mult[l]` channels; there are `len(ch_mult) - 1` halvings of the resolution. `attention`
    stands at the lowest resolution only.
    """

    image_size: int = 256
    channels: int = 3
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    z_channels: int = 256
    num_res_blocks: int = 2
    decoder_res_blocks: int = 3
    vocab_size: int = 16384
    codebook_dim: int = 8
    norm_groups: int = 32
    attention: bool = True

    def __post_init__(self) -> None:
        sizes = {name: value for name, value in vars(self).items() if name not in ("ch_mult", "attention")}
        too_small = [name for name, value in sizes.items() if value < 1]
        if too_small or not self.ch_mult or min(self.ch_mult) < 1:
            raise VarkdError(f"vq tokenizer: {(*too_small, 'ch_mult')[0]} must be at least 1, got {self}")
        if self.image_size % self.downsampling:
            raise VarkdError(
                f"vq tokenizer: image_size {self.image_size} is not a multiple of {self.downsampling} "
                f"(one halving per entry of ch_mult after the first)"
            )
        if any(self.ch * mult % self.norm_groups for mult in (1, *self.ch_mult)):
            raise VarkdError(
                f"vq tokenizer: ch * ch_mult must be multiples of norm_groups = {self.norm_groups}, "
                f"got ch {self.ch} and ch_mult {self.ch_mult}"
            )

    @classmethod
    def small(cls, image_size: int = 32, channels: int = 3, vocab_size: int = 512, downsampling: int = 4) -> Self:
        """Sizes that train in minutes on two CPU cores for images of about 32 x 32 pixels."""
        if downsampling < 1 or downsampling & (downsampling - 1):
            raise VarkdError(f"vq tokenizer: downsampling must be a power of 2, got {downsampling}")
        levels = downsampling.bit_length()
        return cls(
            image_size,
            channels,
            ch=32,
            ch_mult=(*(1,) * (levels - 1), 2),
            z_channels=64,
            num_res_blocks=1,
            decoder_res_blocks=1,
            vocab_size=vocab_size,
            norm_groups=8,
        )

    @classmethod
    def infer(cls, shapes: Shapes, image_size: int) -> Self:
        """The sizes of an official state dict. Raises KeyError for a tensor that is not there."""
        ch, channels = shapes["encoder.conv_in.weight"][:2]
        levels = count_numbered(shapes, r"encoder\.conv_blocks\.(\d+)\.")
        widths = [shapes[f"encoder.conv_blocks.{level}.res.0.conv1.bias"][0] for level in range(levels)]
        vocab_size, codebook_dim = shapes["quantize.embedding.weight"]
        return cls(
            image_size,
            channels,
            ch,
            tuple(width // ch for width in widths),
            shapes["encoder.conv_out.bias"][0],
            count_numbered(shapes, r"encoder\.conv_blocks\.0\.res\.(\d+)\."),
            count_numbered(shapes, r"decoder\.conv_blocks\.0\.res\.(\d+)\."),
            vocab_size,
            codebook_dim,
            OFFICIAL_GROUPS,
            attention="encoder.mid.1.q.weight" in shapes,
        )

    @property
    def downsampling(self) -> int:
        """Pixels per code along one side."""
        return 2 ** (len(self.ch_mult) - 1)


class VQ(Tokenizer):
    """Images (B, C, H, W) <-> codes of an h x w grid, with h = H / downsampling."""

    kind = "vq"

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config: VQConfig = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Codebook(config.vocab_size, config.codebook_dim)
        self.quant_conv = nn.Conv2d(config.z_channels, config.codebook_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.z_channels, 1)

    @property
    def grid(self) -> tuple[int, int]:
        side = self.config.image_size // self.config.downsampling
        return side, side

    @property
    def entries_VE(self) -> Tensor:
        return self.quantize.embedding.weight

    @property
    def codebook_VE(self) -> Tensor:
        """The l2-normalized codebook: float32 (V, E)."""
        return F.normalize(self.quantize.embedding.weight, dim=1)

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Images in [-1, 1] -> codes: int64 (B, L).

        Raises:
            VarkdError: the images have another shape.
        """
        return self.quantize_latents(self.latents(images_BCHW))[1]

    def decode(self, codes_BL: Tensor) -> Tensor:
        """Codes -> images in [-1, 1], not clamped: (B, C, H, W).

        Raises:
            VarkdError: the codes have another length, or lie outside [0, V).
        """
        check_codes(codes_BL, self.sequence_length, self.vocab_size)
        return self.decode_entries(self._entries(codes_BL))

    def latents(self, images_BCHW: Tensor) -> Tensor:
        """What the encoder says, before normalization: (B, E, h, w)."""
        check_images(images_BCHW, self.image_shape)
        return self.quant_conv(self.encoder(images_BCHW))

    def quantize_latents(self, latents_BEhw: Tensor) -> tuple[Tensor, Tensor]:
        """Latents -> (the normalized codebook rows (B, E, h, w) nearest to them, their codes (B, L)).

        The rows carry gradients into the codebook. Always float32: bfloat16 cannot tell neighbors apart.
        """
        with torch.autocast(latents_BEhw.device.type, enabled=False):
            vectors_NE = latents_BEhw.float().movedim(1, -1).flatten(0, 2)
            codes_BL = self.quantize.nearest(vectors_NE).view(len(latents_BEhw), -1)
            return self._entries(codes_BL), codes_BL

    def decode_entries(self, entries_BEhw: Tensor) -> Tensor:
        """Normalized codebook rows (B, E, h, w) -> images (B, C, H, W)."""
        return self.decoder(self.post_quant_conv(entries_BEhw))

    def _entries(self, codes_BL: Tensor) -> Tensor:
        return F.embedding(codes_BL, self.codebook_VE).unflatten(1, self.grid).movedim(-1, 1)


class Codebook(nn.Module):
    """V vectors, compared by their direction."""

    codebook_used: Tensor

    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, dim)
        self.register_buffer("codebook_used", torch.zeros(_USAGE_LENGTH))

    @torch.no_grad()
    def nearest(self, vectors_NE: Tensor) -> Tensor:
        """The code whose direction is nearest to each vector's: int64 (N,).

        Between unit vectors |z - e|^2 = 2 - 2 z.e, so the nearest row is the most similar one. In chunks, so
        that memory does not grow with N x V.
        """
        rows_EV = F.normalize(self.embedding.weight, dim=1).T
        chunks = F.normalize(vectors_NE, dim=1).split(max(1, SIMILARITIES_AT_ONCE // rows_EV.shape[1]))
        return torch.cat([(chunk @ rows_EV).argmax(dim=1) for chunk in chunks])


class Encoder(nn.Module):
    """Images (B, C, H, W) -> features (B, z_channels, h, w)."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths = [config.ch * mult for mult in (1, *config.ch_mult)]
        last = len(config.ch_mult) - 1
        self.conv_in = nn.Conv2d(config.channels, widths[0], 3, padding=1)
        self.conv_blocks = nn.ModuleList(
            Level(
                widths[level],
                widths[level + 1],
                config.num_res_blocks,
                config.norm_groups,
                attention=config.attention and level == last,
                downsample=Downsample(widths[level + 1]) if level < last else None,
            )
            for level in range(last + 1)
        )
        self.mid = _middle(widths[-1], config)
        self.norm_out = norm(widths[-1], config.norm_groups)
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels, 3, padding=1)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        hidden = self.conv_in(images_BCHW)
        for module in (*self.conv_blocks, *self.mid):
            hidden = module(hidden)
        return self.conv_out(F.silu(self.norm_out(hidden)))


class Decoder(nn.Module):
    """Features (B, z_channels, h, w) -> images (B, C, H, W). Its first level has the lowest resolution."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths = [config.ch * mult for mult in reversed(config.ch_mult)]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.z_channels, widths[0], 3, padding=1)
        self.mid = _middle(widths[0], config)
        self.conv_blocks = nn.ModuleList(
            Level(
                widths[max(0, level - 1)],
                widths[level],
                config.decoder_res_blocks,
                config.norm_groups,
                attention=config.attention and level == 0,
                upsample=Upsample(widths[level]) if level < last else None,
            )
            for level in range(last + 1)
        )
        self.norm_out = norm(widths[-1], config.norm_groups)
        self.conv_out = nn.Conv2d(widths[-1], config.channels, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.conv_in(features)
        for module in (*self.mid, *self.conv_blocks):
            hidden = module(hidden)
        return self.conv_out(F.silu(self.norm_out(hidden)))


class Level(nn.Module):
    """Residual blocks (each followed by attention, if any) at one resolution, then the way to the next."""

    def __init__(
        self,
        width_in: int,
        width: int,
        num_blocks: int,
        groups: int,
        *,
        attention: bool,
        downsample: Downsample | None = None,
        upsample: Upsample | None = None,
    ) -> None:
        super().__init__()
        self.res = nn.ModuleList(
            ResidualBlock(width if index else width_in, width, groups) for index in range(num_blocks)
        )
        self.attn = nn.ModuleList(Attention(width, groups) for _ in range(num_blocks * attention))
        self.downsample, self.upsample = downsample, upsample

    def forward(self, hidden: Tensor) -> Tensor:
        for index, block in enumerate(self.res):
            hidden = block(hidden)
            if len(self.attn):
                hidden = self.attn[index](hidden)
        for resample in (self.downsample, self.upsample):
            hidden = hidden if resample is None else resample(hidden)
        return hidden


class Attention(nn.Module):
    """Single-head attention over all positions of a feature map, with a residual."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = norm(width, groups)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, hidden: Tensor) -> Tensor:
        normed = self.norm(hidden)
        return hidden + self.proj_out(attend_over_map(self.q(normed), self.k(normed), self.v(normed)))


def _middle(width: int, config: VQConfig) -> nn.ModuleList:
    blocks: list[nn.Module] = [ResidualBlock(width, width, config.norm_groups) for _ in range(2)]
    if config.attention:
        blocks.insert(1, Attention(width, config.norm_groups))
    return nn.ModuleList(blocks)
