"""The multi-scale residual tokenizer of VAR (arXiv 2404.02905, section 3.2), under its official parameter names.

A convolutional encoder maps an image to a P x P map f, and f becomes S maps of codes, coarse to fine: each scale takes
the nearest codebook row to what the coarser scales left over, area-averaged to p_k x p_k (algorithm 1). The decoder
sees the sum of what all scales contribute (algorithm 2). That sum stands in `varkd.residual`, because VAR's backbone
reads it too. How one is trained stands in `train/fit_tokenizer.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from varkd.containers import count_numbered
from varkd.errors import VarkdError
from varkd.residual import Quantizer
from varkd.tokenizers.layers import (
    OFFICIAL_GROUPS,
    Downsample,
    ResidualBlock,
    Shapes,
    Upsample,
    attend_over_map,
    nearest,
    norm,
)
from varkd.tokenizers.protocol import Tokenizer, check_codes, check_images, truncate_to_uint8

OFFICIAL_SCALES: dict[int, tuple[int, ...]] = {
    256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
}
"""Image size -> sides of the maps; nothing in a checkpoint says them."""


@dataclass(frozen=True)
class MultiScaleConfig:
    """Sizes of the tokenizer; the defaults are the official ones for 256 x 256 images.

    Level l has `ch * ch_mult[l]` channels; there are `len(ch_mult) - 1` halvings of the resolution. `attention` stands
    at the lowest resolution only. `scales` are the sides of the maps of codes; `num_phi` convolutions serve them.
    """

    image_size: int = 256
    channels: int = 3
    ch: int = 160
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    z_channels: int = 32
    num_res_blocks: int = 2
    decoder_res_blocks: int = 3
    vocab_size: int = 4096
    scales: tuple[int, ...] = OFFICIAL_SCALES[256]
    num_phi: int = 4
    norm_groups: int = 32
    attention: bool = True

    def __post_init__(self) -> None:
        sizes = {name: value for name, value in vars(self).items() if name not in ("ch_mult", "scales", "attention")}
        too_small = [name for name, value in sizes.items() if value < 1]
        if too_small or not self.ch_mult or min(self.ch_mult) < 1:
            raise VarkdError(f"multiscale tokenizer: {(*too_small, 'ch_mult')[0]} must be at least 1, got {self}")
        if any(self.ch * mult % self.norm_groups for mult in (1, *self.ch_mult)):
            raise VarkdError(
                f"multiscale tokenizer: ch * ch_mult must be multiples of norm_groups = {self.norm_groups}, "
                f"got ch {self.ch} and ch_mult {self.ch_mult}"
            )
        rising = all(a < b for a, b in pairwise((0, *self.scales)))
        if not self.scales or not rising or self.scales[-1] * self.downsampling != self.image_size:
            raise VarkdError(
                f"multiscale tokenizer: scales must rise to image_size / downsampling = "
                f"{self.image_size / self.downsampling:g}, got {self.scales}: give others (--scales 1 2 4 8)"
            )

    @classmethod
    def small(
        cls,
        image_size: int = 32,
        channels: int = 3,
        vocab_size: int = 512,
        downsampling: int = 4,
        scales: Sequence[int] | None = None,
    ) -> Self:
        """Sizes that train in minutes on two CPU cores for images of about 32 x 32 pixels; scales double by default."""
        if downsampling < 1 or downsampling & (downsampling - 1):
            raise VarkdError(f"multiscale tokenizer: downsampling must be a power of 2, got {downsampling}")
        levels = downsampling.bit_length()
        scales = doubling(image_size // downsampling) if scales is None else tuple(scales)
        return cls(
            image_size,
            channels,
            ch=32,
            ch_mult=(*(1,) * (levels - 1), 2),
            z_channels=16,
            num_res_blocks=1,
            decoder_res_blocks=1,
            vocab_size=vocab_size,
            scales=scales,
            norm_groups=8,
        )

    @classmethod
    def infer(cls, shapes: Shapes, image_size: int, scales: Sequence[int] | None = None) -> Self:
        """The sizes of an official state dict. Raises KeyError for a tensor that is not there."""
        usage = shapes.get("quantize.ema_vocab_hit_SV")  # the one place that tells the number of scales
        if scales is None and image_size not in OFFICIAL_SCALES:
            number = "their sides" if usage is None else f"the sides of its {usage[0]} maps"
            raise VarkdError(
                f"multiscale tokenizer: nothing tells its scales for images of {image_size} pixels: "
                f"give {number} (--scales 1 2 ...), or --image-size 256 or 512"
            )
        scales = OFFICIAL_SCALES[image_size] if scales is None else tuple(scales)
        if usage is not None and usage[0] != len(scales):
            raise VarkdError(f"multiscale tokenizer: it has {usage[0]} scales, got {scales}: give --scales")
        ch, channels = shapes["encoder.conv_in.weight"][:2]
        levels = count_numbered(shapes, r"encoder\.down\.(\d+)\.")
        widths = [shapes[f"encoder.down.{level}.block.0.conv1.bias"][0] for level in range(levels)]
        vocab_size, z_channels = shapes["quantize.embedding.weight"]
        return cls(
            image_size,
            channels,
            ch,
            tuple(width // ch for width in widths),
            z_channels,
            count_numbered(shapes, r"encoder\.down\.0\.block\.(\d+)\."),
            count_numbered(shapes, r"decoder\.up\.0\.block\.(\d+)\."),
            vocab_size,
            scales,
            count_numbered(shapes, r"quantize\.quant_resi\.qresi_ls\.(\d+)\."),
            OFFICIAL_GROUPS,
            attention="encoder.mid.attn_1.qkv.weight" in shapes,
        )

    @property
    def downsampling(self) -> int:
        """Pixels per code along one side of the last scale."""
        return 2 ** (len(self.ch_mult) - 1)


def doubling(last: int) -> tuple[int, ...]:
    """1, 2, 4, ... up to `last`."""
    return (*(2**power for power in range(max(0, last - 1).bit_length())), last)


class Scale(NamedTuple):
    """One scale of an encoding, n = p * p: what the coarser scales left over, its codes, and f after them."""

    rows_BnE: Tensor
    codes_Bn: Tensor
    features_BEPP: Tensor


class MultiScale(Tokenizer):
    """Images (B, C, H, W) <-> codes of all scales, concatenated coarse to fine, each raster."""

    kind = "multiscale"

    def __init__(self, config: MultiScaleConfig) -> None:
        super().__init__()
        self.config: MultiScaleConfig = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = ResidualCodebook(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.z_channels, 3, padding=1)
        self.post_quant_conv = nn.Conv2d(config.z_channels, config.z_channels, 3, padding=1)

    @property
    def grid(self) -> tuple[int, int]:
        return self.config.scales[-1], self.config.scales[-1]

    @property
    def scales(self) -> tuple[int, ...]:
        return self.config.scales

    @property
    def entries_VE(self) -> Tensor:
        return self.quantize.embedding.weight

    @property
    def codebook_VE(self) -> Tensor:
        """The codebook as it is: rows are compared by their Euclidean distance, not normalized."""
        return self.quantize.embedding.weight

    @property
    def quantizer(self) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in self.residual.tensors().items()}

    @property
    def residual(self) -> Quantizer:
        """From codes to features; carries gradients into codebook and convolutions."""
        return self.quantize.residual(self.config.scales)

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Images in [-1, 1] -> codes: int64 (B, L).

        Raises:
            VarkdError: the images have another shape.
        """
        return torch.cat([scale.codes_Bn for scale in self.quantize_latents(self.latents(images_BCHW))], dim=1)

    def decode(self, codes_BL: Tensor) -> Tensor:
        """Codes -> images in [-1, 1], not clamped: (B, C, H, W).

        Raises:
            VarkdError: the codes have another length, or lie outside [0, V).
        """
        check_codes(codes_BL, self.sequence_length, self.vocab_size)
        *_, features = self.residual.features(codes_BL)
        return self.decode_features(features)

    def latents(self, images_BCHW: Tensor) -> Tensor:
        """What the encoder says, f in the paper: (B, E, P, P)."""
        check_images(images_BCHW, self.image_shape)
        return self.quant_conv(self.encoder(images_BCHW))

    def quantize_latents(self, latents_BEPP: Tensor) -> list[Scale]:
        """Algorithm 1. Always in the precision of the codebook: bfloat16 cannot tell neighbors apart.

        The features carry gradients into codebook and convolutions, not into the latents.
        """
        residual = self.residual
        with torch.autocast(latents_BEPP.device.type, enabled=False):
            rest = latents_BEPP.detach().to(self.codebook_VE.dtype)
            features, found = torch.zeros_like(rest), []
            for scale in range(len(self.scales)):
                rows_BnE = residual.next_input(rest, scale)
                codes_Bn = nearest(rows_BnE.flatten(0, 1), residual.codebook_VE).view(len(rest), -1)
                contribution = residual.contribution(residual.entries(codes_Bn, scale), scale)
                features, rest = features + contribution, rest - contribution.detach()
                found.append(Scale(rows_BnE, codes_Bn, features))
        return found

    def decode_features(self, features_BEPP: Tensor) -> Tensor:
        """The sum of all scales (B, E, P, P) -> images (B, C, H, W)."""
        return self.decoder(self.post_quant_conv(features_BEPP))

    def to_uint8(self, images: Tensor) -> Tensor:
        """VAR's rule: clamp to [-1, 1], then 255 (x + 1) / 2, truncated."""
        return truncate_to_uint8(images)


class ResidualCodebook(nn.Module):
    """V vectors, and the convolutions phi that smooth them once they are enlarged."""

    ema_vocab_hit_SV: Tensor

    def __init__(self, config: MultiScaleConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.z_channels)
        self.quant_resi = Phis(config.num_phi, config.z_channels)
        # The official usage statistics; they take no part in encoding or decoding.
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(len(config.scales), config.vocab_size))

    def residual(self, scales: tuple[int, ...]) -> Quantizer:
        phis: list[nn.Conv2d] = list(self.quant_resi.qresi_ls)  # pyright: ignore[reportAssignmentType]
        weight_KEE33 = torch.stack([phi.weight for phi in phis])
        bias_KE = torch.stack([phi.bias for phi in phis])  # pyright: ignore[reportArgumentType]
        return Quantizer(self.embedding.weight, weight_KEE33, bias_KE, scales)


class Phis(nn.Module):
    """The shared convolutions. A new one is the identity, so that the first scales explain what their codes say."""

    def __init__(self, number: int, width: int) -> None:
        super().__init__()
        convolutions = [nn.Conv2d(width, width, 3, padding=1) for _ in range(number)]
        for convolution in convolutions:
            nn.init.dirac_(convolution.weight)
            nn.init.zeros_(convolution.bias)  # pyright: ignore[reportArgumentType]
        self.qresi_ls = nn.ModuleList(convolutions)


class Encoder(nn.Module):
    """Images (B, C, H, W) -> features (B, z_channels, P, P)."""

    def __init__(self, config: MultiScaleConfig) -> None:
        super().__init__()
        widths = [config.ch * mult for mult in (1, *config.ch_mult)]
        last = len(config.ch_mult) - 1
        self.conv_in = nn.Conv2d(config.channels, widths[0], 3, padding=1)
        self.down = nn.ModuleList(
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
        self.mid = Middle(widths[-1], config)
        self.norm_out = norm(widths[-1], config.norm_groups)
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels, 3, padding=1)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        hidden = self.conv_in(images_BCHW)
        for module in (*self.down, self.mid):
            hidden = module(hidden)
        return self.conv_out(F.silu(self.norm_out(hidden)))


class Decoder(nn.Module):
    """Features (B, z_channels, P, P) -> images (B, C, H, W). Its first level has the highest resolution."""

    def __init__(self, config: MultiScaleConfig) -> None:
        super().__init__()
        widths = [config.ch * mult for mult in (*config.ch_mult, config.ch_mult[-1])]
        last = len(config.ch_mult) - 1
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], config)
        self.up = nn.ModuleList(
            Level(
                widths[level + 1],
                widths[level],
                config.decoder_res_blocks,
                config.norm_groups,
                attention=config.attention and level == last,
                upsample=Upsample(widths[level]) if level else None,
            )
            for level in range(last + 1)
        )
        self.norm_out = norm(widths[0], config.norm_groups)
        self.conv_out = nn.Conv2d(widths[0], config.channels, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.mid(self.conv_in(features))
        for level in reversed(self.up):
            hidden = level(hidden)
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
        self.block = nn.ModuleList(
            ResidualBlock(width if index else width_in, width, groups) for index in range(num_blocks)
        )
        self.attn = nn.ModuleList(Attention(width, groups) for _ in range(num_blocks * attention))
        self.downsample, self.upsample = downsample, upsample

    def forward(self, hidden: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            hidden = block(hidden)
            if len(self.attn):
                hidden = self.attn[index](hidden)
        for resample in (self.downsample, self.upsample):
            hidden = hidden if resample is None else resample(hidden)
        return hidden


class Middle(nn.Module):
    """Two residual blocks with attention between them."""

    def __init__(self, width: int, config: MultiScaleConfig) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(width, width, config.norm_groups)
        self.attn_1 = Attention(width, config.norm_groups) if config.attention else nn.Identity()
        self.block_2 = ResidualBlock(width, width, config.norm_groups)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(hidden)))


class Attention(nn.Module):
    """Single-head attention over all positions of a feature map, with a residual; one convolution makes q, k and v."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = norm(width, groups)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.proj_out(attend_over_map(*self.qkv(self.norm(hidden)).chunk(3, dim=1)))
