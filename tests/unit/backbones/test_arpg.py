"""ARPG beyond the contract: step sizes, blocks as sets, the table with classes inside, what a step costs."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from varkd.backbones.arpg import ARPG, ARPGConfig, step_sizes
from varkd.backbones.store import build
from varkd.errors import VarkdError
from varkd.types import Condition, Plan
from varkd.verify import verify
from varkd.world import Rng

SIZES: dict[str, Any] = {
    "vocab_size": 12, "num_classes": 3, "grid": (2, 3), "num_layers": 4, "dim": 16, "num_heads": 2, "ffn_dim": 24,
}  # fmt: skip
LENGTH = 6
CONDITION = Condition(torch.tensor([0, 3, 2]))
CODES = torch.randint(12, (3, LENGTH), generator=torch.Generator().manual_seed(1))
GOLDEN = Path(__file__).parents[2] / "golden" / "arpg-l4d64n16.safetensors"


@pytest.fixture
def model() -> ARPG:
    generator = torch.Generator().manual_seed(0)
    built = ARPG(ARPGConfig(**SIZES)).double().eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_(std=0.4, generator=generator)
    return built


def drawn(model: ARPG, steps: int | None = None) -> Plan:
    return model.plan(3, Rng(0), torch.arange(3), steps=steps)


# ---- step sizes


def test_published_step_sizes():
    arccos, cosine = step_sizes(256, 64), step_sizes(256, 64, "cosine")
    assert arccos[:4] == (3, 3, 2, 3) and arccos[-4:] == (7, 10, 12, 28)
    assert cosine[:14] == (1,) * 13 + (2,) and cosine[-4:] == (7, 6, 6, 6)
    assert step_sizes(256, 256) == step_sizes(256, 256, "cosine") == (1,) * 256


@pytest.mark.parametrize("schedule", ["arccos", "cosine"])
def test_every_number_of_steps_shares_out_every_code(schedule: str):
    for length in (1, 2, 3, 16, 36, 100, 256):
        for steps in range(1, length + 1):
            sizes = step_sizes(length, steps, schedule)
            assert len(sizes) == steps and sum(sizes) == length and min(sizes) >= 1
        assert step_sizes(length, length, schedule) == (1,) * length


def test_impossible_step_sizes_are_refused():
    for steps in (-1, 0, 17):
        with pytest.raises(VarkdError, match="1 to 16 steps"):
            step_sizes(16, steps)
    with pytest.raises(VarkdError, match="did you mean 'arccos'"):
        step_sizes(16, 4, "arcos")


def test_plans_follow_the_schedule_and_the_config(model: ARPG):
    assert drawn(model).sizes == (1,) * LENGTH
    large = build("arpg", {**SIZES, "grid": (4, 4)})
    plans = [large.plan(3, Rng(0), torch.arange(3), steps=6, schedule=schedule) for schedule in (None, "cosine")]
    assert [plan.sizes for plan in plans] == [(2, 2, 2, 2, 3, 5), step_sizes(16, 6, "cosine")]
    assert plans[0].sizes != plans[1].sizes
    raster = ARPG(ARPGConfig(**SIZES, order="raster")).plan(2, steps=2)
    assert torch.equal(raster.order_BL, torch.arange(LENGTH).expand(2, -1)) and len(raster.sizes) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 3}, "even"),
        ({"order": "spiral"}, "raster"),
        ({"num_heads": 3}, "multiple of 4"),
        ({"dim": 0}, "dim"),
    ],
)
def test_impossible_configs_are_refused(change: dict[str, Any], message: str):
    with pytest.raises(VarkdError, match=message):
        ARPGConfig(**{**SIZES, **change})


# ---- the mathematics


@torch.no_grad()
def test_a_single_step_predicts_every_cell_as_if_it_came_first(model: ARPG):
    at_once = model(CODES, CONDITION, drawn(model, 1))
    for cell in range(LENGTH):
        order_BL = torch.arange(LENGTH).roll(-cell).expand(3, -1)
        first = model(CODES, CONDITION, model.plan(3, order_BL=order_BL))[:, cell]
        torch.testing.assert_close(at_once[:, cell], first, rtol=1e-9, atol=1e-11)


@torch.no_grad()
def test_a_step_is_a_set(model: ARPG):
    """Positions are cells, and masks go by step: the order inside a step means nothing, that between steps does."""
    plan = Plan(drawn(model).order_BL, (1, 3, 2))
    inside = Plan(plan.order_BL[:, [0, 3, 1, 2, 5, 4]], plan.sizes)
    across = Plan(plan.order_BL[:, [1, 0, 2, 3, 4, 5]], plan.sizes)
    hidden_BLD = model(CODES, CONDITION, plan)
    torch.testing.assert_close(model(CODES, CONDITION, inside), hidden_BLD, rtol=1e-9, atol=1e-11)
    assert not torch.allclose(model(CODES, CONDITION, across), hidden_BLD)


@torch.no_grad()
def test_codes_of_one_step_see_each_other(model: ARPG):
    """After a step of two codes the third depends on how they were read: together, or one after the other."""
    order_BL = drawn(model).order_BL
    one, two = Plan(order_BL, (1,) * LENGTH), Plan(order_BL, (2, 1, 1, 1, 1))
    moved = (model(CODES, CONDITION, one) - model(CODES, CONDITION, two)).abs().amax(-1).gather(1, order_BL)
    assert (moved[:, 0] < 1e-11).all() and (moved[:, 1:] > 1e-3).all()


@torch.no_grad()
def test_the_table_holds_codes_mask_classes_null_and_a_spare_row(model: ARPG):
    name, first = ARPG.class_rows(model.config)
    table = model.state_dict()[name]
    assert (name, first, len(table)) == ("embeddings.weight", 13, 12 + 3 + 3)
    plan, before = drawn(model), model(CODES, CONDITION, drawn(model))

    def moved_rows(row: int) -> list[bool]:
        table[row] += 1
        after = model(CODES, CONDITION, plan)
        table[row] -= 1
        return ((after - before).abs().amax((1, 2)) > 1e-6).tolist()

    assert moved_rows(12) == [True] * 3  # the mask asks for every code
    assert [moved_rows(first + label) for label in (0, 1, 2, 3)] == [
        [True, False, False], [False] * 3, [False, False, True], [False, True, False]
    ]  # fmt: skip
    assert moved_rows(17) == [False] * 3


@torch.no_grad()
def test_a_step_reads_the_new_codes_only(model: ARPG):
    read, asked = [], []
    model.layers.self_dec[0].register_forward_hook(lambda _, args, __: read.append(args[0].shape[1]))
    model.layers.cross_dec[0].register_forward_hook(lambda _, args, __: asked.append(args[0].shape[1]))
    plan = Plan(drawn(model).order_BL, (1, 2, 3))
    state, _ = model.start(CONDITION, plan)
    model.step(state, CODES[:, :1])
    model.step(state, CODES[:, 1:3])
    assert read == [1, 1, 2] and asked == [1, 2, 3]
    assert state.cache.shape[4] == 4 == state.filled  # the class and all codes but the last step's
    read.clear()
    model(CODES, CONDITION, plan)
    assert read == [4]


@torch.no_grad()
def test_dropout_acts_on_the_class_but_never_on_the_question(model: ARPG):
    plan, quiet = drawn(model), model(CODES, CONDITION, drawn(model))
    model.tok_dropout.p = 1.0
    dropped = model.train()(CODES, CONDITION, plan)
    assert dropped.isfinite().all() and ((dropped - quiet).abs().amax(-1) > 1e-6).all()
    asked: list[Tensor] = []
    model.layers.cross_dec[0].register_forward_hook(lambda _, args, __: asked.append(args[0]))
    model(CODES, CONDITION, plan)
    assert torch.equal(asked[0], model.embeddings.weight[12].expand(3, LENGTH, -1))


# ---- weights


def test_sizes_are_read_from_shapes():
    model = build("arpg", SIZES)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    given = {"grid": (2, 3), "num_heads": 2}
    assert ARPGConfig(**ARPG.infer(shapes), **given) == model.config
    with pytest.raises(KeyError):
        ARPG.infer({"tok_embeddings.weight": (12, 16), "output.weight": (12, 16)})


def test_extras_of_official_files_are_known():
    extras = ["freqs_cis", "causal_mask", "layers.self_dec.3.attn.k_cache", "layers.v_cache", "layers.kv_cache.k_cache"]
    weights = build("arpg", SIZES).state_dict()

    def is_extra(name: str) -> bool:
        return any(re.fullmatch(pattern, name) for pattern in ARPG.official_extras)

    assert all(map(is_extra, extras)) and not any(map(is_extra, weights))


@pytest.mark.parametrize("key", ["order", "sample.order", "tf_block.order", "greedy.order"])
def test_another_order_is_noticed(key: str, tmp_path: Path):
    tensors = load_file(GOLDEN)
    path = tmp_path / GOLDEN.name
    shutil.copy(GOLDEN.with_suffix(".json"), path.with_suffix(".json"))
    save_file({**tensors, key: tensors[key].flip(-1).contiguous()}, path)
    assert [check.key for check in verify(path) if not check.passed]
