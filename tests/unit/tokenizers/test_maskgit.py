"""MaskGIT-VQGAN by itself; `tests/parity/test_golden.py` compares it with the official one."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch

from varkd.errors import VarkdError
from varkd.tokenizers.maskgit import MaskGIT, MaskGITConfig, ResidualBlock

TINY = MaskGITConfig(image_size=8, ch=8, ch_mult=(1, 2), z_channels=4, num_res_blocks=1, vocab_size=32, norm_groups=4)


def build() -> MaskGIT:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MaskGIT(TINY).eval()


@torch.no_grad()
def test_shapes_and_codes():
    model = build()
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    codes = model.encode(images)
    assert codes.shape == (3, 16) and codes.dtype == torch.int64 and model.sequence_length == 16
    assert model.decode(codes).shape == images.shape
    latents = model.latents(images).movedim(1, -1).flatten(1, 2)
    distances = torch.cdist(latents.double(), model.codebook_VE.double().expand(3, -1, -1))
    assert torch.equal(codes, distances.argmin(dim=2))


@torch.no_grad()
def test_the_network_itself_works_in_the_unit_range():
    model, codes = build(), torch.arange(32).view(2, 16)
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model.latents(images * 2 - 1), model.encoder(images))
    entries = model.codebook_VE[codes].transpose(1, 2).unflatten(2, (4, 4))
    torch.testing.assert_close(model.decode(codes), model.decoder(entries) * 2 - 1)
    assert model.to_uint8(torch.tensor([-7.0, -1.0, 0.0, 0.999, 1.0, 7.0])).tolist() == [0, 0, 127, 254, 255, 255]


@torch.no_grad()
def test_a_change_of_width_passes_nothing_by():
    """The official slip: with the branch switched off, the block gives zero instead of a projection of its input."""
    block = ResidualBlock(4, 8, 4)
    block.conv2.weight.zero_()
    assert not block(torch.randn(1, 4, 3, 3)).any()
    same = ResidualBlock(4, 4, 4)
    same.conv2.weight.zero_()
    hidden = torch.randn(1, 4, 3, 3)
    assert torch.equal(same(hidden), hidden)


@torch.no_grad()
def test_autocast_does_not_reach_the_search():
    model = build()
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    with torch.autocast("cpu", torch.bfloat16):
        codes = model.quantize_latents(latents)
    assert torch.equal(codes, model.quantize_latents(latents))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_size": 9}, "multiple of 2"),
        ({"ch": 6}, "norm_groups"),
        ({"vocab_size": 0}, "vocab_size must be at least 1"),
        ({"ch_mult": ()}, "ch_mult"),
    ],
)
def test_refuses_impossible_sizes(change: dict, words: str):
    with pytest.raises(VarkdError, match=words):
        MaskGITConfig(**{**asdict(TINY), **change})


def test_refuses_other_images_and_codes():
    with pytest.raises(VarkdError, match=r"takes images of shape \(batch, 3, 8, 8\)"):
        build().encode(torch.zeros(2, 1, 8, 8))
    for codes in (torch.zeros(1, 15).long(), torch.full((1, 16), 32)):
        with pytest.raises(VarkdError, match="codes"):
            build().decode(codes)


def test_full_size_has_the_official_state():
    with torch.device("meta"):
        model = MaskGIT(MaskGITConfig())
    state = model.state_dict()
    assert len(state) == 168 and sum(parameter.numel() for parameter in model.parameters()) == 54_515_587
    shapes = {
        "encoder.conv_in.weight": (128, 3, 3, 3),
        "encoder.down.2.block.0.nin_shortcut.weight": (256, 256, 1, 1),
        "encoder.conv_out.weight": (256, 512, 1, 1),
        "decoder.up.3.block.0.nin_shortcut.weight": (256, 256, 1, 1),
        "decoder.up.1.upsample_conv.bias": (128,),
        "quantize.embedding.weight": (1024, 256),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes
    assert not {"encoder.conv_in.bias", "decoder.up.0.upsample_conv.weight"} & state.keys()
