"""The multi-scale tokenizer by itself; `tests/parity/test_golden.py` compares it with the official one."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from torch.nn import functional as F

from varkd.errors import VarkdError
from varkd.residual import Quantizer
from varkd.tokenizers import layers
from varkd.tokenizers.multiscale import MultiScale, MultiScaleConfig, doubling
from varkd.tokenizers.protocol import to_unit

TINY = MultiScaleConfig(image_size=8, ch=8, ch_mult=(1, 2), z_channels=4, num_res_blocks=1, decoder_res_blocks=1,
                        vocab_size=32, scales=(1, 2, 4), num_phi=2, norm_groups=4)  # fmt: skip


def build(config: MultiScaleConfig = TINY) -> MultiScale:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MultiScale(config).eval()


def draw(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_shapes_and_codes():
    model = build()
    images = draw(3, 3, 8, 8).clamp(-1, 1)
    codes = model.encode(images)
    assert codes.shape == (3, 21) and codes.dtype == torch.int64 and model.sequence_length == 21
    assert model.scales == (1, 2, 4) and model.grid == (4, 4) and model.vocab_size == 32
    assert model.decode(codes).shape == images.shape == (3, *model.image_shape)


@torch.no_grad()
def test_encoding_agrees_with_decoding():
    """The sum that the encoder builds up is the sum that the codes give."""
    model = build()
    scales = model.quantize_latents(model.latents(draw(2, 3, 8, 8)))
    codes = torch.cat([scale.codes_Bn for scale in scales], dim=1)
    for scale, features in zip(scales, model.residual.features(codes), strict=True):
        torch.testing.assert_close(scale.features_BEPP, features)
    torch.testing.assert_close(model.decode_features(scales[-1].features_BEPP), model.decode(codes))


@torch.no_grad()
def test_each_scale_takes_the_nearest_row_to_what_is_left():
    model = build()
    latents = draw(2, 4, 4, 4)
    scales = model.quantize_latents(latents)
    done = torch.zeros_like(latents)
    for side, scale in zip(TINY.scales, scales, strict=True):
        rows = F.adaptive_avg_pool2d(latents - done, side).flatten(2).transpose(1, 2)
        torch.testing.assert_close(scale.rows_BnE, rows)
        distances = torch.cdist(rows.double(), model.codebook_VE.double().expand(2, -1, -1))
        assert torch.equal(scale.codes_Bn, distances.argmin(dim=2))
        done = scale.features_BEPP


@torch.no_grad()
def test_search_in_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    model, vectors = build(), draw(100, 4)
    whole = layers.nearest(vectors, model.codebook_VE)
    monkeypatch.setattr(layers, "SIMILARITIES_AT_ONCE", 7 * 32)
    assert torch.equal(layers.nearest(vectors, model.codebook_VE), whole)


@torch.no_grad()
def test_autocast_does_not_reach_the_codes():
    model, latents = build(), draw(2, 4, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        scales = model.quantize_latents(latents)
    assert scales[-1].features_BEPP.dtype == torch.float32
    for ours, theirs in zip(scales, model.quantize_latents(latents), strict=True):
        assert torch.equal(ours.codes_Bn, theirs.codes_Bn)


def test_gradients_reach_codebook_and_convolutions_but_not_the_latents():
    model, latents = build(), draw(1, 4, 4, 4).requires_grad_()
    model.quantize_latents(latents)[-1].features_BEPP.sum().backward()
    assert latents.grad is None
    for parameter in model.quantize.parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0


@torch.no_grad()
def test_the_quantizer_reads_codes_without_the_tokenizer():
    model = build()
    codes = model.encode(draw(2, 3, 8, 8))
    alone = Quantizer.of(model.quantizer, model.scales)
    assert not any(tensor.requires_grad for tensor in model.quantizer.values())
    assert torch.equal(alone.inputs(codes), model.residual.inputs(codes))
    assert alone.inputs(codes).shape == (2, 20, 4)


def test_eight_bits_are_truncated():
    """255 (x + 1) / 2 cut off: unlike LlamaGen's rule, the round trip may lose a level to rounding, never more."""
    model, levels = build(), torch.arange(256, dtype=torch.uint8)
    assert model.to_uint8(torch.tensor([-7.0, -1.0, 0.0, 0.999, 1.0, 7.0])).tolist() == [0, 0, 127, 254, 255, 255]
    lost = levels.int() - model.to_uint8(to_unit(levels)).int()
    assert lost.min() >= 0 and lost.max() <= 1


def test_small_configs():
    config = MultiScaleConfig.small()
    assert config.scales == (1, 2, 4, 8) and config.vocab_size == 512 and MultiScale(config).sequence_length == 85
    assert MultiScaleConfig.small(24, 1, 64, 4).scales == (1, 2, 4, 6)
    assert MultiScaleConfig.small(8, 1, 64, 2, [1, 3, 4]).scales == (1, 3, 4)
    assert MultiScaleConfig.small(8, 1, 64, 1).downsampling == 1
    with pytest.raises(VarkdError, match="power of 2"):
        MultiScaleConfig.small(downsampling=3)


@pytest.mark.parametrize(
    ("last", "sides"), [(1, (1,)), (2, (1, 2)), (3, (1, 2, 3)), (5, (1, 2, 4, 5)), (8, (1, 2, 4, 8))]
)
def test_doubling(last: int, sides: tuple[int, ...]):
    assert doubling(last) == sides


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scales": (1, 2, 8)}, r"rise to image_size / downsampling = 4, got \(1, 2, 8\)"),
        ({"scales": (2, 1, 4)}, "rise to"),
        ({"scales": (1, 1, 4)}, "rise to"),
        ({"scales": (0, 4)}, "rise to"),
        ({"scales": ()}, "rise to"),
        ({"image_size": 9}, "downsampling = 4.5"),
        ({"ch": 6}, "norm_groups"),
        ({"vocab_size": 0}, "vocab_size must be at least 1"),
        ({"ch_mult": ()}, "ch_mult"),
    ],
)
def test_refuses_impossible_sizes(change: dict, words: str):
    with pytest.raises(VarkdError, match=words) as caught:
        MultiScaleConfig(**{**asdict(TINY), **change})
    assert "\n" not in str(caught.value)


def test_refuses_other_images_and_codes():
    with pytest.raises(VarkdError, match=r"takes images of shape \(batch, 3, 8, 8\)"):
        build().encode(torch.zeros(2, 1, 8, 8))
    for codes in (torch.zeros(1, 16).long(), torch.full((1, 21), 32)):
        with pytest.raises(VarkdError, match="codes"):
            build().decode(codes)


def test_attention_can_be_left_out():
    model = build(MultiScaleConfig(**{**asdict(TINY), "attention": False}))
    assert not any("attn" in name for name in model.state_dict())
    assert model.decode(torch.zeros(1, 21).long()).shape == (1, 3, 8, 8)


def test_full_size_has_the_official_state():
    with torch.device("meta"):
        model = MultiScale(MultiScaleConfig())
    state = model.state_dict()
    assert len(state) == 324 and sum(parameter.numel() for parameter in model.parameters()) == 108_948_355
    shapes = {
        "encoder.down.4.attn.1.qkv.weight": (1920, 640, 1, 1),
        "encoder.down.2.block.0.nin_shortcut.weight": (320, 160, 1, 1),
        "encoder.mid.attn_1.proj_out.bias": (640,),
        "decoder.up.4.upsample.conv.weight": (640, 640, 3, 3),
        "decoder.up.3.block.0.nin_shortcut.weight": (320, 640, 1, 1),
        "quantize.quant_resi.qresi_ls.3.weight": (32, 32, 3, 3),
        "quantize.ema_vocab_hit_SV": (10, 4096),
        "quantize.embedding.weight": (4096, 32),
        "post_quant_conv.weight": (32, 32, 3, 3),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes
    assert model.sequence_length == 680
