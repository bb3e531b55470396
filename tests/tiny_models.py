"""Tiny models of every family with random weights (heads included, so that nothing is uniform) and their tokenizers."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from varkd.backbones.protocol import Backbone
from varkd.backbones.store import build
from varkd.tokenizers.maskgit import MaskGIT, MaskGITConfig
from varkd.tokenizers.multiscale import MultiScale, MultiScaleConfig
from varkd.tokenizers.pixels import Pixels, PixelsConfig
from varkd.tokenizers.protocol import Tokenizer
from varkd.tokenizers.vq import VQ, VQConfig

CLASS_NAMES = ("cat", "dog", "a | bird", "fish", "*star*")
_NETWORK: dict[str, Any] = {"image_size": 8, "ch": 8, "ch_mult": (1, 2), "num_res_blocks": 1, "norm_groups": 4}
_TOKENIZERS = {
    "llamagen": lambda: VQ(VQConfig(**_NETWORK, z_channels=8, decoder_res_blocks=1, vocab_size=32, codebook_dim=4)),
    "var": lambda: MultiScale(MultiScaleConfig(**_NETWORK, z_channels=6, decoder_res_blocks=2, vocab_size=32,
                                               scales=(1, 2, 4))),
    "arpg": lambda: Pixels(PixelsConfig(levels=17, height=4, width=4)),
    "randar": lambda: MaskGIT(MaskGITConfig(**_NETWORK, z_channels=8, vocab_size=32)),
    "rar": lambda: VQ(VQConfig(**_NETWORK, channels=1, z_channels=8, decoder_res_blocks=1, vocab_size=32,
                               codebook_dim=4, attention=False)),
}  # fmt: skip
FAMILIES = tuple(_TOKENIZERS)


def tiny_tokenizer(family: str) -> Tokenizer:
    """The tokenizer of `tiny_model`: every kind serves some family."""
    torch.manual_seed(1)
    return _TOKENIZERS[family]().eval().requires_grad_(False)


def tiny_model(family: str, tokenizer: Tokenizer, **sizes: Any) -> Backbone:
    """Five classes, 4 x 4 codes (VAR: scales 1, 2, 4)."""
    grid: dict[str, Any] = {"grid": tokenizer.grid}
    if tokenizer.scales:
        grid = {"scales": tokenizer.scales, "code_dim": tokenizer.codebook_VE.shape[1]}
    common = {"vocab_size": tokenizer.vocab_size, "num_classes": 5, "num_layers": 2, "dim": 16, "num_heads": 2}
    model = build(family, {**common, **grid, **sizes}, quantizer=tokenizer.quantizer)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4, generator=generator)
    model.tokenizer_hash, model.class_names = tokenizer.hash, CLASS_NAMES
    assert asdict(model.config)["num_classes"] == len(CLASS_NAMES)
    return model.eval()
