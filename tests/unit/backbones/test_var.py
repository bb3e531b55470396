"""What only VAR has: scales, the tokenizer's frozen tensors, a shared modulation, official buffers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from varkd.backbones.protocol import Layout
from varkd.backbones.store import build
from varkd.backbones.var import QUANTIZER, VAR, VARConfig, block_mask, scales_of
from varkd.errors import VarkdError
from varkd.rollout import Sampler, rollout
from varkd.types import Condition, Plan

GOLDEN = Path(__file__).parents[2] / "golden" / "var-s4d64.safetensors"
SIZES: dict[str, Any] = {"vocab_size": 12, "num_classes": 3, "scales": (1, 2, 3), "code_dim": 4, "num_layers": 2,
                         "dim": 16, "num_heads": 2}  # fmt: skip
CONDITION = Condition(torch.tensor([0, 3, 2]))


def var(**changes: Any) -> VAR:
    """Random float64 weights, the head included."""
    model = build("var", {**SIZES, **changes}).double().eval()
    assert isinstance(model, VAR)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4, generator=generator)
    return model


def codes_for(model: VAR) -> Tensor:
    shape = (3, model.sequence_length)
    return torch.randint(model.vocab_size, shape, generator=torch.Generator().manual_seed(1))


def decoded(model: VAR, codes_BL: Tensor, prefix_steps: int = 0) -> Tensor:
    plan = model.plan(len(codes_BL))
    state, hidden = model.start(CONDITION, plan, codes_BL, prefix_steps)
    found = [hidden]
    for codes_Bn in codes_BL.split(plan.sizes, dim=1)[prefix_steps:-1]:
        found.append(model.step(state, codes_Bn))
    return torch.cat(found, dim=1)


def tensors(vocab_size: int = 12, width: int = 4, num_phi: int = 4) -> dict[str, Tensor]:
    shapes = {
        "codebook": (vocab_size, width),
        "phi.weight": (num_phi, width, width, 3, 3),
        "phi.bias": (num_phi, width),
    }
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}


@torch.no_grad()
@pytest.mark.parametrize("changes", [{"shared_adaln": True}, {"scales": (2, 3, 5)}, {"scales": (3,)}, {"num_phi": 2}])
def test_decoding_sees_what_training_sees(changes: dict[str, Any]):
    model = var(**changes)
    codes_BL = codes_for(model)
    plan = model.plan(3)
    expected = model(codes_BL, CONDITION, plan)
    for steps in range(len(plan.sizes)):
        seen = expected[:, sum(plan.sizes[:steps]) :]
        torch.testing.assert_close(decoded(model, codes_BL, steps), seen, rtol=1e-9, atol=1e-11)


def test_every_weight_of_a_shared_modulation_learns():
    model = var(shared_adaln=True)
    model(codes_for(model), CONDITION, model.plan(3)).square().sum().backward()
    for name, parameter in model.named_parameters():
        if not name.startswith("head."):
            assert parameter.grad is not None and parameter.grad.abs().max() > 1e-6, name


def test_a_slot_sees_its_own_scale_and_the_earlier_ones():
    mask = block_mask((1, 2), torch.device("cpu"))
    assert mask.tolist() == [[True, False, False, False, False]] + [[True] * 5] * 4


@torch.no_grad()
def test_head_scales_are_clamped():
    model = var()
    codes_BL, plan = codes_for(model), model.plan(3)
    for name, parameter in model.named_parameters():
        if name.endswith("scale_mul_1H11"):
            parameter.fill_(torch.tensor(100.0).log())
    at_the_ceiling = model(codes_BL, CONDITION, plan)
    for name, parameter in model.named_parameters():
        if name.endswith("scale_mul_1H11"):
            parameter.fill_(9.0)
    torch.testing.assert_close(model(codes_BL, CONDITION, plan), at_the_ceiling, rtol=1e-6, atol=1e-6)


# ---- plans


def test_plans_are_the_scales():
    model = var()
    plan = model.plan(2, steps=3)
    assert plan.sizes == (1, 4, 9) and torch.equal(plan.order_BL, torch.arange(14).expand(2, -1))
    backwards = torch.arange(14).flip(0).expand(2, -1)
    with pytest.raises(VarkdError, match="4 steps cannot be had"):
        model.plan(2, steps=4)
    with pytest.raises(VarkdError, match="another order"):
        model.plan(2, order_BL=backwards)
    with pytest.raises(VarkdError, match="one scale a step"):
        model.check(Plan(torch.arange(14).expand(2, -1), (1,) * 14))
    with pytest.raises(VarkdError, match="one scale a step"):
        model.check(Plan(torch.arange(14).expand(3, -1), (1, 9, 4)))
    with pytest.raises(VarkdError, match="2 prefix steps need 5 prefix codes"):
        model.start(CONDITION, model.plan(3), codes_for(model)[:, :4], 2)


def test_a_guided_rollout():
    model = var()
    sampler = Sampler(guidance=2.5, top_k=6, top_p=0.9)
    uniform_BL = torch.rand(3, 14, generator=torch.Generator().manual_seed(2))
    samples = rollout(model, CONDITION, model.plan(3), sampler, uniform_BL)
    assert samples.codes_BL.shape == (3, 14) and samples.logp_BL.isfinite().all()
    coarse_BL = (torch.arange(14) < 5).expand(3, -1)
    kept = rollout(model, CONDITION, model.plan(3), sampler, uniform_BL, samples.codes_BL, coarse_BL)
    assert torch.equal(kept.codes_BL, samples.codes_BL)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scales": ()}, "scales must be"),
        ({"scales": (1, 3, 2)}, "scales must be"),
        ({"scales": (2, 2)}, "scales must be"),
        ({"scales": (0, 1)}, "scales must be"),
        ({"num_heads": 3}, "multiple of num_heads"),
        ({"code_dim": 0}, "code_dim must be at least 1"),
    ],
)
def test_impossible_sizes_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(VarkdError, match=message):
        VARConfig(**{**SIZES, **changes})


def test_sizes_come_from_the_tokenizer():
    layout = Layout(12, 3, (3, 3), (1, 2, 3), code_dim=4, num_phi=2)
    sizes = VAR.sizes_for(layout)
    assert sizes == {"vocab_size": 12, "num_classes": 3, "scales": (1, 2, 3), "code_dim": 4, "num_phi": 2}
    assert set(VAR.sizes_for(Layout(12, 3, (3, 3), (1, 2, 3)))) == {"vocab_size", "num_classes", "scales"}
    with pytest.raises(VarkdError, match="multiscale"):
        VAR.sizes_for(Layout(12, 3, (3, 3)))


# ---- the tokenizer's frozen tensors


def test_the_quantizer_is_given_and_saved_but_not_trained():
    given = tensors()
    model = build("var", SIZES, quantizer=given)
    assert not set(QUANTIZER.values()) & {name for name, _ in model.named_parameters()}
    for name, buffer in QUANTIZER.items():
        assert torch.equal(model.state_dict()[buffer], given[name])
    codes_BL = codes_for(var())
    with torch.no_grad():
        other = build("var", SIZES)
        assert not torch.equal(model(codes_BL, CONDITION, model.plan(3)), other(codes_BL, CONDITION, other.plan(3)))


@pytest.mark.parametrize(
    "quantizer", [{}, tensors(width=5), tensors(13), tensors(num_phi=3), {"codebook": torch.ones(12, 4)}]
)
def test_another_tokenizer_is_refused(quantizer: dict[str, Tensor]):
    with pytest.raises(VarkdError, match="use the tokenizer of its codes"):
        build("var", SIZES).set_quantizer(quantizer)


def test_bfloat16_weights_keep_an_exact_quantizer():
    model = build("var", SIZES, quantizer=tensors()).eval()
    assert isinstance(model, VAR)
    codes_BL = codes_for(model)
    exact, inputs = model(codes_BL, CONDITION, model.plan(3)), model.quantizer.inputs(codes_BL)
    model.to(torch.bfloat16)
    assert model.word_embed.weight.dtype == torch.bfloat16
    assert torch.equal(model.quantizer.inputs(codes_BL), inputs)
    with torch.no_grad():
        narrow, cached = model(codes_BL, CONDITION, model.plan(3)), decoded(model, codes_BL)
    assert narrow.dtype == cached.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), exact, rtol=0.1, atol=0.1)
    torch.testing.assert_close(cached.float(), exact, rtol=0.1, atol=0.1)
    assert model.double().quantizer_codebook.dtype == torch.float64


@torch.no_grad()
def test_autocast_leaves_the_features_exact():
    model = var().float()
    codes_BL, plan = codes_for(model), model.plan(3)
    states = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            state, _ = model.start(CONDITION, plan, codes_BL, 1)
            model.step(state, codes_BL[:, 1:5])
            states.append(state.features_BEPP)
    assert torch.equal(*states) and states[0].dtype == torch.float32


# ---- official files


def test_sizes_are_read_off_official_shapes():
    model = build("var", {**SIZES, "shared_adaln": True, "ffn_dim": 40})
    official = model.official_state()
    shapes = {name: tuple(value.shape) for name, value in official.items()}
    inferred = VAR.infer(shapes)
    scales = scales_of(official["lvl_1L"])
    assert VARConfig(**inferred, scales=scales) == model.config
    with pytest.raises(KeyError):
        VAR.infer({"tok_embeddings.weight": (3, 4)})
    with pytest.raises(VarkdError, match="attn_l2_norm"):
        VAR.infer({name: shape for name, shape in shapes.items() if "scale_mul" not in name})


def test_scales_are_read_off_the_level_buffer():
    assert scales_of(load_file(GOLDEN)["state.lvl_1L"]) == (1, 2, 3, 4)
    for wrong in ([0, 1, 1], [0, 1, 1, 1, 0], [1, 1, 1, 1]):
        with pytest.raises(VarkdError, match="lvl_1L"):
            scales_of(torch.tensor([wrong]))


# ---- learning


def test_a_new_model_learns_at_once():
    """Open gates: a few updates fit a few images, and every layer takes part."""
    model = build("var", {**SIZES, "dim": 32, "num_heads": 4})
    codes_BL, plan = codes_for(var()), model.plan(3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = F.cross_entropy(model.head(model(codes_BL, CONDITION, plan)).flatten(0, 1), codes_BL.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(12), abs=1e-4) and losses[-1] < 0.5
