"""Weight-only quantization: torchao's values, files that give them back, and training that sees them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from varkd.backbones.protocol import Backbone
from varkd.backbones.quantized import (
    Bits,
    _pack,
    _unpack,
    dequantized,
    group_size,
    quantized_state,
    round_weights_,
    rounded_weights,
)
from varkd.backbones.store import build, load_backbone
from varkd.errors import VarkdError
from varkd.rollout import Sampler, rollout
from varkd.types import Condition
from varkd.world import Rng

BITS: list[Bits] = ["int8", "int4"]
LEVELS = {"int8": 127.5, "int4": 7.5}


def closed_form(weight_NK: Tensor, bits: Bits) -> Tensor:
    """Symmetric rounding written out: scale = max |w| / levels in bfloat16, integers clamped to the range."""
    exact = weight_NK.to(torch.bfloat16)
    grouped = exact.unflatten(1, (-1, group_size(weight_NK.shape[1], bits)))
    scale = (grouped.abs().amax(-1, keepdim=True).float() / LEVELS[bits]).to(torch.bfloat16)
    low, high = (-128, 127) if bits == "int8" else (-8, 7)
    integers = torch.round(grouped * (1.0 / scale)).clamp(low, high)
    return (integers.to(torch.bfloat16) * scale).flatten(1)


def small(family: str) -> Backbone:
    sizes = {"vocab_size": 16, "num_classes": 3, "num_layers": 2, "dim": 32, "num_heads": 2}
    sizes |= {"scales": (1, 2, 4), "code_dim": 8} if family == "var" else {"grid": (4, 4)}
    model = build(family, sizes, seed=1)
    nn.init.normal_(model.head.weight, std=0.2, generator=torch.Generator().manual_seed(2))
    return model.eval()


def linear(rows: int, columns: int, seed: int = 0) -> nn.Sequential:
    layer = nn.Linear(columns, rows, bias=False)
    layer.weight.data = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return nn.Sequential(layer)


@given(st.integers(1, 5), st.sampled_from([8, 24, 32, 48, 96]), st.sampled_from(BITS), st.integers(0, 99))
def test_a_weight_comes_back_as_its_rounded_value(rows: int, columns: int, bits: Bits, seed: int):
    model = linear(rows, columns, seed)
    expected = closed_form(model[0].weight.detach(), bits)
    state = dequantized(quantized_state(model, bits), "here")
    assert state["0.weight"].dtype == torch.bfloat16
    assert state["0.weight"].equal(expected)
    round_weights_(model, bits)
    assert model[0].weight.equal(expected.float())


def test_two_integers_fit_a_byte():
    integers = torch.arange(-8, 8, dtype=torch.int8).repeat(3, 1)
    assert _pack(integers).shape == (3, 8)
    assert _unpack(_pack(integers)).equal(integers)


@pytest.mark.parametrize(("bits", "most"), [("int8", 0.01), ("int4", 0.12)])
def test_the_error_is_that_of_so_many_bits(bits: Bits, most: float):
    weight = torch.randn(64, 96)
    assert 0 < float((closed_form(weight, bits) - weight).norm() / weight.norm()) < most


def test_rows_of_odd_lengths_stay_as_they_are():
    state = quantized_state(linear(3, 12), "int4")  # groups of 4 would cost more than they save
    assert list(state) == ["0.weight"] and state["0.weight"].dtype == torch.bfloat16
    assert "0.weight:int8" in quantized_state(linear(3, 12), "int8")


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("family", ["llamagen", "var", "arpg", "randar", "rar"])
def test_every_family_decodes_from_the_file_as_with_rounded_weights(family: str, bits: Bits, tmp_path: Path):
    model = small(family)
    model.save(tmp_path / "exact")
    model.save(tmp_path / "small")
    save_file(quantized_state(model, bits), tmp_path / "small" / "model.safetensors")
    loaded, _ = load_backbone(tmp_path / "small")
    round_weights_(model, bits)
    model = model.to(torch.bfloat16)

    row_B = torch.arange(4)
    sampler, condition = Sampler(guidance=2.0), Condition(torch.tensor([0, 1, 2, 1]))
    plan = sampler.plan(model, Rng(0), row_B)
    uniform_BL = Rng(0).uniform("sample", row_B, plan.order_BL.shape[1])
    expected = rollout(model, condition, plan, sampler, uniform_BL)
    samples = rollout(loaded, condition, plan, sampler, uniform_BL)
    assert samples.codes_BL.equal(expected.codes_BL) and samples.logp_BL.equal(expected.logp_BL)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("exact", "small")]
    assert sizes[1] < sizes[0] / 2


@pytest.mark.parametrize("bits", BITS)
def test_training_sees_rounded_weights_and_moves_the_exact_ones(bits: Bits):
    model = small("llamagen")
    exact = {name: value.clone() for name, value in model.state_dict().items()}
    condition = Condition(torch.tensor([0, 1]))
    codes_BL = torch.randint(0, 16, (2, 16), generator=torch.Generator().manual_seed(0))
    plan = model.plan(2)
    with rounded_weights(model, bits):
        loss = model.head(model(codes_BL, condition, plan)).square().mean()
        loss.backward()
    assert all(value.equal(exact[name]) for name, value in model.state_dict().items())
    gradient = {name: parameter.grad for name, parameter in model.named_parameters()}

    model.zero_grad()
    round_weights_(model, bits)
    assert not model.head.weight.equal(exact["output.weight"])
    expected = model.head(model(codes_BL, condition, plan)).square().mean()
    expected.backward()
    assert loss.equal(expected)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.equal(gradient[name]), name


def test_none_rounds_nothing():
    model = small("llamagen")
    exact = model.head.weight.clone()
    with rounded_weights(model, None):
        assert model.head.weight.equal(exact)


@pytest.mark.parametrize("damage", ["missing", "rows", "columns"])
def test_scales_that_do_not_fit_are_one_line(damage: str, tmp_path: Path):
    model = small("llamagen")
    model.save(tmp_path)
    state = quantized_state(model, "int4")
    scale = state.pop("output.weight:scale")
    if damage != "missing":
        state["output.weight:scale"] = scale[:-1].clone() if damage == "rows" else torch.ones(len(scale), 3).bfloat16()
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(VarkdError, match=r"scales of 'output\.weight' are missing or do not fit"):
        load_backbone(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == state.keys()
