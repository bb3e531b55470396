"""Tokenizers: latents, codes, entries and pixels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from varkd.tokenizers.maskgit import MaskGIT, MaskGITConfig
from varkd.tokenizers.multiscale import MultiScale, MultiScaleConfig
from varkd.tokenizers.protocol import Tokenizer
from varkd.tokenizers.vq import VQ, VQConfig
from varkd.verify.golden import Check, Golden


@torch.no_grad()
def llamagen_vq(golden: Golden) -> Iterator[Check]:
    model, tolerance = VQ(_vq_config(golden.info["config"])).eval(), golden.info["tolerance"]
    model.load_state_dict(golden.state())
    latents = model.latents(golden["encode.images"])
    yield golden.compare("encode.latents", latents, tolerance["latents"])
    entries, codes_BL = model.quantize_latents(latents)
    yield golden.compare("encode.codes", codes_BL, "exact")
    yield golden.compare("encode.quant", entries, tolerance["latents"])
    yield golden.compare("recon.images", model.decode(codes_BL), tolerance["images"])
    yield golden.compare("decode.entries", _entries(model, golden["decode.codes"]), tolerance["latents"])
    images = model.decode(golden["decode.codes"])
    yield golden.compare("decode.images", images, tolerance["images"])
    yield _uint8(golden, model, images)


@torch.no_grad()
def var_vqvae(golden: Golden) -> Iterator[Check]:
    model, tolerance = MultiScale(_multiscale_config(golden.info["config"])).eval(), golden.info["tolerance"]
    model.load_state_dict(golden.state())
    latents = model.latents(golden["encode.images"])
    yield golden.compare("encode.latents", latents, tolerance["latents"])
    scales = model.quantize_latents(latents)
    codes_BL = torch.cat([scale.codes_Bn for scale in scales], dim=1)
    yield golden.compare("encode.codes", codes_BL, "exact")
    features = torch.stack([scale.features_BEPP for scale in scales], dim=1)
    yield golden.compare("encode.f_hat", features, tolerance["f_hat"])
    yield golden.compare("encode.var_input", model.residual.inputs(codes_BL), tolerance["f_hat"])
    decode_codes = golden["decode.codes"]
    features = torch.stack(list(model.residual.features(decode_codes)), dim=1)
    yield golden.compare("decode.f_hat", features, tolerance["f_hat"])
    yield golden.compare("decode.var_input", model.residual.inputs(decode_codes), tolerance["f_hat"])
    images = model.decode(decode_codes)
    yield golden.compare("decode.raw", images, tolerance["images"])
    yield golden.compare("decode.images", images.clamp(-1, 1), tolerance["images"])
    yield _uint8(golden, model, images)


@torch.no_grad()
def maskgit_vqgan(golden: Golden) -> Iterator[Check]:
    """Its golden pixels lie in [0, 1], ours in [-1, 1]."""
    model, tolerance = MaskGIT(_maskgit_config(golden.info["config"])).eval(), golden.info["tolerance"]
    model.load_state_dict(golden.state())
    latents = model.latents(golden["encode.images"] * 2 - 1)
    yield golden.compare("encode.latents", latents, tolerance["latents"])
    codes_BL = model.quantize_latents(latents)
    yield golden.compare("encode.codes", codes_BL, "exact")
    yield golden.compare("encode.quant", _entries(model, codes_BL).view_as(latents), tolerance["latents"])
    yield golden.compare("decode.entries", _entries(model, golden["decode.codes"]), tolerance["latents"])
    images = model.decode(golden["decode.codes"])
    unit = (images + 1) / 2
    yield golden.compare("decode.raw", unit, tolerance["images"])
    yield golden.compare("decode.images", unit.clamp(0, 1), tolerance["images"])
    yield _uint8(golden, model, images)


def _entries(model: Tokenizer, codes_BL: Tensor) -> Tensor:
    """The codebook rows of codes on one grid: (B, E, h, w)."""
    return F.embedding(codes_BL, model.codebook_VE).transpose(1, 2).unflatten(2, model.grid)


def _uint8(golden: Golden, model: Tokenizer, images: Tensor) -> Check:
    """8-bit pixels may differ by one level where rounding decides, on few of them."""
    levels = model.to_uint8(images).permute(0, 2, 3, 1).int()
    off = (levels - golden["decode.uint8"].int()).abs()
    few = int((off > 0).sum()) <= max(1, off.numel() // 1000)
    return Check("decode.uint8", float(off.max()), int(off.max()) <= 1 and few)


def _vq_config(size: dict[str, Any]) -> VQConfig:
    return VQConfig(
        image_size=size["image"],
        ch=size["ch"],
        ch_mult=tuple(size["ch_mult"]),
        z_channels=size["z_channels"],
        num_res_blocks=size["num_res_blocks"],
        decoder_res_blocks=size["decoder_res_blocks"],
        vocab_size=size["codebook_size"],
        codebook_dim=size["codebook_embed_dim"],
    )


def _multiscale_config(size: dict[str, Any]) -> MultiScaleConfig:
    return MultiScaleConfig(
        image_size=size["image"],
        ch=size["ch"],
        ch_mult=tuple(size["ch_mult"]),
        z_channels=size["z_channels"],
        num_res_blocks=size["num_res_blocks"],
        decoder_res_blocks=size["decoder_res_blocks"],
        vocab_size=size["vocab_size"],
        scales=tuple(size["patch_nums"]),
        num_phi=size["share_quant_resi"],
        norm_groups=size["group_norm_groups"],
    )


def _maskgit_config(size: dict[str, Any]) -> MaskGITConfig:
    return MaskGITConfig(
        image_size=size["resolution"],
        ch=size["hidden_channels"],
        ch_mult=tuple(size["channel_mult"]),
        z_channels=size["z_channels"],
        num_res_blocks=size["num_res_blocks"],
        vocab_size=size["codebook_size"],
        norm_groups=size["group_norm_groups"],
    )
