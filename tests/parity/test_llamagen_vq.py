"""Our VQ tokenizer against numbers of the official LlamaGen implementation (see the golden file's sidecar)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from varkd.tokenizers.protocol import to_uint8
from varkd.tokenizers.vq import VQ, VQConfig

GOLDEN = Path(__file__).parents[1] / "golden"


def build(sizes: dict) -> VQ:
    config = VQConfig(
        image_size=sizes["image"], ch=sizes["ch"], ch_mult=tuple(sizes["ch_mult"]), z_channels=sizes["z_channels"],
        num_res_blocks=sizes["num_res_blocks"], decoder_res_blocks=sizes["decoder_res_blocks"],
        vocab_size=sizes["codebook_size"], codebook_dim=sizes["codebook_embed_dim"],
        norm_groups=sizes["group_norm_groups"],
    )  # fmt: skip
    return VQ(config).eval()


@pytest.fixture(scope="module", params=sorted(GOLDEN.glob("llamagen_vq-*.json")), ids=lambda path: path.stem)
def golden(request) -> tuple[VQ, dict[str, Tensor], dict]:
    sidecar = json.loads(request.param.read_text())
    tensors = load_file(request.param.with_suffix(".safetensors"))
    model = build(sidecar["config"])
    state = {name.removeprefix("state."): tensors[name] for name in tensors if name.startswith("state.")}
    assert len(state) == sidecar["n_state_tensors"]
    model.load_state_dict(state, strict=True)
    return model, tensors, sidecar["tolerance"]


def test_there_is_a_golden_case():
    assert list(GOLDEN.glob("llamagen_vq-*.safetensors"))


@torch.no_grad()
def test_encode(golden):
    model, tensors, tolerance = golden
    latents = model.latents(tensors["encode.images"])
    torch.testing.assert_close(latents, tensors["encode.latents"], **tolerance["latents"])
    entries, codes = model.quantize_latents(latents)
    assert torch.equal(codes, tensors["encode.codes"])
    assert torch.equal(model.encode(tensors["encode.images"]), tensors["encode.codes"])
    torch.testing.assert_close(entries, tensors["encode.quant"], **tolerance["latents"])


@torch.no_grad()
def test_decode(golden):
    model, tensors, tolerance = golden
    images = model.decode(tensors["decode.codes"])
    torch.testing.assert_close(images, tensors["decode.images"], **tolerance["images"])
    torch.testing.assert_close(model.decode(tensors["encode.codes"]), tensors["recon.images"], **tolerance["images"])
    difference = (to_uint8(images).movedim(1, -1).int() - tensors["decode.uint8"].int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.01


@torch.no_grad()
def test_codes_name_normalized_rows(golden):
    model, tensors, _ = golden
    rows = model.codebook_VE[tensors["decode.codes"]].unflatten(1, model.grid).movedim(-1, 1)
    torch.testing.assert_close(rows, tensors["decode.entries"])


def test_full_size_has_the_official_state():
    with torch.device("meta"):
        model = VQ(VQConfig())
    state = model.state_dict()
    assert len(state) == 344
    assert sum(parameter.numel() for parameter in model.parameters()) == 71_883_403
    shapes = {
        "encoder.conv_blocks.4.attn.1.proj_out.weight": (512, 512, 1, 1),
        "encoder.conv_blocks.2.res.0.nin_shortcut.weight": (256, 128, 1, 1),
        "decoder.conv_blocks.0.res.2.conv2.weight": (512, 512, 3, 3),
        "decoder.conv_blocks.3.upsample.conv.weight": (128, 128, 3, 3),
        "decoder.mid.1.q.weight": (512, 512, 1, 1),
        "quantize.codebook_used": (65536,),
        "quantize.embedding.weight": (16384, 8),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes
    assert model.grid == (16, 16)
