"""Tokenizers: latents, codes, entries and pixels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from varkd.tokenizers.vq import VQ, VQConfig
from varkd.verify.golden import Check, Golden


@torch.no_grad()
def llamagen_vq(golden: Golden) -> Iterator[Check]:
    model, tolerance = VQ(_vq_config(golden.info["config"])).eval(), golden.info["tolerance"]
    model.load_state_dict(golden.state())
    latents = model.latents(golden["encode.images"])
    yield golden.compare("encode.latents", latents, tolerance["latents"])
    entries, codes_BL = model.quantise(latents)
    yield golden.compare("encode.codes", codes_BL, "exact")
    yield golden.compare("encode.quant", entries, tolerance["latents"])
    yield golden.compare("recon.images", model.decode(codes_BL), tolerance["images"])
    decode_codes = golden["decode.codes"]
    grid = golden["decode.entries"].shape[2:]
    entries = model.codebook_VE[decode_codes].transpose(1, 2).unflatten(2, grid)
    yield golden.compare("decode.entries", entries, tolerance["latents"])
    images = model.decode(decode_codes)
    yield golden.compare("decode.images", images, tolerance["images"])
    levels = (images * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).int()
    off = (levels - golden["decode.uint8"].int()).abs()
    few = int((off > 0).sum()) <= max(1, off.numel() // 1000)
    yield Check("decode.uint8", float(off.max()), int(off.max()) <= 1 and few)


def _vq_config(size: dict[str, Any]) -> VQConfig:
    return VQConfig(
        image_size=size["image"], ch=size["ch"], ch_mult=tuple(size["ch_mult"]), z_channels=size["z_channels"],
        num_res_blocks=size["num_res_blocks"], decoder_res_blocks=size["decoder_res_blocks"],
        vocab_size=size["codebook_size"], codebook_dim=size["codebook_embed_dim"],
    )  # fmt: skip
