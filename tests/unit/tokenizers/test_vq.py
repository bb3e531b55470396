"""The VQ tokenizer by itself; `tests/parity/test_llamagen_vq.py` compares it with the official one."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from varkd.errors import VarkdError
from varkd.tokenizers import vq
from varkd.tokenizers.vq import VQ, VQConfig

TINY = VQConfig(image_size=8, ch=8, ch_mult=(1, 2), z_channels=8, num_res_blocks=1, decoder_res_blocks=1,
                vocab_size=32, codebook_dim=4, norm_groups=4)  # fmt: skip


def build(config: VQConfig = TINY) -> VQ:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VQ(config).eval()


@torch.no_grad()
def test_shapes_and_codes():
    model = build()
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    codes = model.encode(images)
    assert codes.shape == (3, 16) and codes.dtype == torch.int64 and model.sequence_length == 16
    assert model.decode(codes).shape == images.shape
    entries, again = model.quantize_latents(model.latents(images))
    assert torch.equal(again, codes)
    assert torch.equal(model.decode_entries(entries), model.decode(codes))


@torch.no_grad()
def test_every_codebook_row_is_its_own_code_whatever_its_length():
    model = build()
    latents = (model.codebook_VE * torch.linspace(0.1, 9, 32)[:, None]).view(2, 4, 4, 4).movedim(-1, 1)
    entries, codes = model.quantize_latents(latents)
    assert torch.equal(codes, torch.arange(32).view(2, 16))
    torch.testing.assert_close(entries, F.normalize(latents, dim=1))


@torch.no_grad()
def test_search_in_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    model = build()
    vectors = torch.randn(100, 4, generator=torch.Generator().manual_seed(2))
    whole = model.quantize.nearest(vectors)
    distances = torch.cdist(F.normalize(vectors, dim=1).double(), model.codebook_VE.double())
    assert torch.equal(whole, distances.argmin(dim=1))
    monkeypatch.setattr(vq, "SIMILARITIES_AT_ONCE", 7 * 32)
    assert torch.equal(model.quantize.nearest(vectors), whole)


@torch.no_grad()
def test_autocast_does_not_reach_the_search():
    model = build()
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    with torch.autocast("cpu", torch.bfloat16):
        entries, codes = model.quantize_latents(latents)
    assert entries.dtype == torch.float32
    assert torch.equal(codes, model.quantize_latents(latents)[1])


def test_gradient_reaches_the_used_rows_only():
    model = build()
    entries, codes = model.quantize_latents(torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(4)))
    (entries * torch.arange(4.0)[None, :, None, None]).sum().backward()
    gradient = model.quantize.embedding.weight.grad
    assert gradient is not None
    assert set(gradient.abs().sum(dim=1).nonzero().flatten().tolist()) == set(codes.flatten().tolist())


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 3, 16, 16), (3, 8, 8)])
def test_refuses_other_image_shapes(shape: tuple[int, ...]):
    with pytest.raises(VarkdError, match=r"takes images of shape \(batch, 3, 8, 8\)") as caught:
        build().encode(torch.zeros(shape))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("codes", [torch.zeros(1, 15).long(), torch.full((1, 16), 32)])
def test_refuses_other_codes(codes: torch.Tensor):
    with pytest.raises(VarkdError, match="codes"):
        build().decode(codes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_size": 250}, "multiple of 16"),
        ({"ch": 100}, "norm_groups"),
        ({"vocab_size": 0}, "vocab_size must be at least 1"),
        ({"ch_mult": ()}, "ch_mult"),
    ],
)
def test_refuses_impossible_sizes(change: dict, words: str):
    with pytest.raises(VarkdError, match=words):
        VQConfig(**change)


def test_small_configs():
    assert VQ(VQConfig.small(32, 3, 512)).grid == (8, 8)
    assert VQ(VQConfig.small(16, 1, 64, downsampling=2)).grid == (8, 8)
    assert VQ(VQConfig.small(8, 1, 64, downsampling=1)).grid == (8, 8)
    with pytest.raises(VarkdError, match="power of 2"):
        VQConfig.small(downsampling=3)


def test_attention_can_be_left_out():
    model = build(VQConfig(**{**vars(TINY), "attention": False}))
    assert not any("attn" in name or ".q." in name for name in model.state_dict())
    assert model.decode(torch.zeros(1, 16).long()).shape == (1, 3, 8, 8)
