"""Shrinking: nothing removed changes nothing, dead parts can go unnoticed, the rest is chosen by what it does."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from varkd.backbones.protocol import Backbone
from varkd.backbones.shrink import Sizes, blank, count, measure, shrink, sizes_for, sizes_of
from varkd.backbones.store import build
from varkd.errors import VarkdError
from varkd.types import Batch, Condition
from varkd.world import Rng

FAMILIES = ["llamagen", "var", "var-shared", "arpg", "randar", "rar"]
HEADS, WIDTH, LAYERS, FFN = 3, 8, 4, 24


def teacher(family: str, seed: int = 0, **sizes: Any) -> Backbone:
    """A model whose every weight is normal, so that nothing is zero, one or alike."""
    family, _, variant = family.partition("-")
    sizes = {"vocab_size": 16, "num_classes": 3, "num_layers": LAYERS, "dim": HEADS * WIDTH, "num_heads": HEADS,
             "ffn_dim": FFN} | sizes  # fmt: skip
    sizes |= {"scales": (1, 2, 4), "code_dim": 8} if family == "var" else {"grid": (4, 4)}
    sizes |= {"shared_adaln": True} if variant else {}
    model = build(family, sizes, seed=seed).double().requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


def batches(model: Backbone, rows: int = 6) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    codes_BL = torch.randint(0, 16, (rows, model.sequence_length), generator=generator)
    return [Batch(codes_BL, torch.arange(rows) % 3, torch.arange(rows))]


def logits(model: Backbone) -> Tensor:
    (batch,) = batches(model)
    with torch.no_grad():
        return model.head(model(batch.codes_BL, Condition(batch.label_B), model.plan(6, Rng(0), batch.row_B)))


def cut(model: Backbone, **sizes: int) -> Backbone:
    return shrink(model, replace(Sizes.of(model), **sizes), measure(model, batches(model)))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_says_what_its_axes_are(family: str):
    model = teacher(family, guidance_conditioned=True)
    for name, parameter in model.named_parameters():
        found = [pattern for pattern in model.axes if re.fullmatch(pattern, name)]
        assert len(found) == 1 and len(model.axes_of(name)) == parameter.ndim, name


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_removed_changes_nothing(family: str):
    model = teacher(family)
    same = cut(model)
    assert same.config == replace(model.config, ffn_dim=FFN)
    assert same.state_dict().keys() == model.state_dict().keys()
    assert all(value.equal(model.state_dict()[name]) for name, value in same.state_dict().items())
    assert logits(same).equal(logits(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_that_do_nothing_go_unnoticed(family: str):
    model = teacher(family)
    stacks = [model.get_submodule(stack) for stack in model.stacks]
    idle = [next(iter(blocks.children())) for blocks in stacks]  # the first of every stack
    for name, parameter in model.named_parameters():
        if any(name.startswith(f"{_path(model, block)}.") for block in idle) and _writes(model, name):
            parameter.zero_()
    small = cut(model, num_layers=LAYERS - len(stacks))
    assert logits(small).allclose(logits(model), rtol=0, atol=1e-10)


def _writes(model: Backbone, name: str) -> bool:
    """Whether a parameter of a block adds to the residual stream."""
    axes = model.axes_of(name)
    return axes[:1] == ("D",) and (len(axes) == 2 or "bias" in name) and "norm" not in name


def _path(model: Backbone, block: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is block)


@pytest.mark.parametrize("family", FAMILIES)
def test_neurons_that_do_nothing_go_unnoticed(family: str):
    """Dead ones stand at other places in every block."""
    model = teacher(family)
    for name, parameter in model.named_parameters():
        if model.axes_of(name)[:1] and model.axes_of(name)[0].startswith("F:") and parameter.ndim == 2:
            block = int(next(part for part in name.split(".") if part.isdigit()))
            dead = torch.randperm(FFN, generator=torch.Generator().manual_seed(block)) < 8
            parameter[dead] = 0
            bias = name.replace("weight", "bias")
            if bias in model.state_dict():
                model.get_parameter(bias)[dead] = 0
    small = cut(model, ffn_dim=FFN - 8)
    assert small.config.ffn_dim == FFN - 8
    assert logits(small).allclose(logits(model), rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", ["llamagen", "arpg", "randar"])
def test_dead_channels_and_heads_go_unnoticed(family: str):
    """Families with RMS norms: channels that are always zero, and in each block another head that says nothing."""
    model = teacher(family, norm_eps=1e-14)  # eps is the one thing that counts channels
    dead_D = torch.zeros(HEADS * WIDTH, dtype=torch.bool)
    dead_D[WIDTH : 2 * WIDTH] = True
    if family != "randar":  # which keeps channels in blocks
        dead_D = dead_D[torch.randperm(HEADS * WIDTH, generator=torch.Generator().manual_seed(5))]
    silent: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        axes = model.axes_of(name)
        reads = len(axes) == 2 and axes[1] == "D" and axes[0] != ""
        if "D" in axes and not reads and "norm" not in name:
            parameter.index_fill_(axes.index("D"), dead_D.nonzero().flatten(), 0)
        if len(axes) == 2 and axes[0].lstrip("3").startswith("H:"):
            head = silent.setdefault(axes[0].lstrip("3"), len(silent) % HEADS)
            values = 2 * HEADS * WIDTH if axes[0].startswith("3") else 0
            if values or name.endswith("to_v.weight"):
                parameter[values + head * WIDTH : values + (head + 1) * WIDTH] = 0
    small = cut(model, dim=(HEADS - 1) * WIDTH, num_heads=HEADS - 1)
    assert small.config.dim == (HEADS - 1) * WIDTH and len(set(silent.values())) > 1
    assert logits(small).allclose(logits(model), rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_shrinks_in_all_ways_at_once(family: str):
    model = teacher(family)
    small = cut(model, num_layers=2, dim=WIDTH, num_heads=1, ffn_dim=7)
    assert Sizes.of(small) == Sizes(2, 1, WIDTH, 7)
    assert logits(small).shape == logits(model).shape and bool(logits(small).isfinite().all())
    assert small.head.weight.dtype == torch.float64 and small.head.weight.requires_grad


def test_importance_is_what_it_says():
    """Written out for one block: cosine, magnitudes, norms."""
    model = teacher("llamagen")
    found = measure(model, batches(model))
    seen: dict[str, Tensor] = {}
    block: Any = model.get_submodule("layers.1")
    hooks = [
        block.register_forward_hook(lambda _, x, y: seen.update(x=x[0], y=y)),
        block.attention.wo.register_forward_pre_hook(lambda _, x: seen.update(heads=x[0])),
        block.feed_forward.w2.register_forward_pre_hook(lambda _, x: seen.update(neurons=x[0])),
        block.ffn_norm.register_forward_pre_hook(lambda _, x: seen.update(norm=x[0])),
    ]
    logits(model)
    for hook in hooks:
        hook.remove()
    x, y = seen["x"], seen["y"]
    cosine = (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))
    assert found.blocks["layers.1"] == pytest.approx(float(1 - cosine.mean()))
    heads = seen["heads"].unflatten(-1, (HEADS, WIDTH)).norm(dim=-1).mean((0, 1))
    assert found.heads["layers.1.attention"].allclose(heads)
    assert found.neurons["layers.1.feed_forward"].allclose(seen["neurons"].abs().mean((0, 1)))
    assert found.moment["layers.1.ffn_norm"].allclose(seen["norm"].square().mean((0, 1)))


def test_it_is_an_average_over_all_batches():
    model = teacher("llamagen")
    (batch,) = batches(model)
    halves = [batch.select(torch.arange(4)), batch.select(torch.arange(4, 6))]
    whole, parts = measure(model, [batch]), measure(model, halves)
    assert whole.channel_D.allclose(parts.channel_D) and whole.blocks == pytest.approx(parts.blocks)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 1.0])
def test_a_share_of_the_parameters(share: float):
    model = teacher("llamagen", num_layers=8, dim=64, num_heads=8, ffn_dim=128)
    sizes = sizes_for(model, share)
    assert count(blank(model, sizes)) == pytest.approx(share * count(model), rel=0.15)
    if share == 1.0:
        assert sizes == Sizes.of(model)


def test_heads_and_width_give_each_other():
    model = teacher("llamagen")
    assert sizes_of(model, dim=16) == sizes_of(model, num_heads=2) == Sizes(LAYERS, 2, 16, FFN)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"dim": 12}, "take a multiple of 8"), ({"dim": 16, "num_heads": 3}, "give one of the two"),
        ({"num_layers": 5}, "this model has 4"), ({"ffn_dim": 25}, "this model has 24"),
        ({"num_heads": 4}, "this model has 3"), ({"ffn_dim": -1}, "take 1 to 24"),
    ],
)  # fmt: skip
def test_sizes_that_are_no_smaller_model_are_refused(sizes: dict[str, int], words: str):
    with pytest.raises(VarkdError, match=words):
        sizes_of(teacher("llamagen"), **sizes)


def test_arpg_keeps_as_many_blocks_of_both_kinds():
    with pytest.raises(VarkdError, match="must be even"):
        sizes_of(teacher("arpg"), num_layers=3)
    small = cut(teacher("arpg"), num_layers=2)
    assert len(small.get_submodule("layers.self_dec")._modules) == 1


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5])
def test_a_share_lies_between_nothing_and_all(share: float):
    with pytest.raises(VarkdError, match="above 0 and at most 1"):
        sizes_for(teacher("llamagen"), share)
