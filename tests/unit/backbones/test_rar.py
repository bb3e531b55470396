"""RAR beyond the contract: any order, slots that know their target, tables with unused rows, sizes from shapes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from varkd.backbones.rar import RAR, RARConfig
from varkd.backbones.store import build
from varkd.errors import VarkdError
from varkd.types import Condition, Plan
from varkd.world import Rng

CONFIG = RARConfig(vocab_size=12, num_classes=3, grid=(2, 3), num_layers=2, dim=16, num_heads=2, ffn_dim=24)
LENGTH = 6
CONDITION = Condition(torch.tensor([0, 3, 2]))
CODES = torch.randint(12, (3, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model() -> RAR:
    generator = torch.Generator().manual_seed(0)
    built = RAR(CONFIG).double().eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_(std=0.4, generator=generator)
    return built


def plan_of(*rows: list[int]) -> Plan:
    return Plan(torch.tensor(rows), (1,) * len(rows[0]))


# ---- plans


def test_the_config_says_which_order_a_plan_has():
    rng, rows = Rng(3), torch.tensor([4, 9])
    raster, random = RAR(CONFIG), RAR(replace(CONFIG, order="random"))
    assert torch.equal(raster.plan(2, rng, rows).order_BL, torch.arange(LENGTH).expand(2, -1))
    drawn = random.plan(2, rng, rows)
    assert torch.equal(drawn.order_BL, rng.uniform("order", rows, LENGTH).argsort(1)) and drawn.sizes == (1,) * LENGTH
    assert torch.equal(random.plan(1, rng, rows[1:]).order_BL[0], drawn.order_BL[1])  # a row's order is its own
    for model in (raster, random):  # both honor any order
        assert torch.equal(model.plan(2, order_BL=drawn.order_BL).order_BL, drawn.order_BL)
        model.check(drawn)
    with pytest.raises(VarkdError, match="give rng"):
        random.plan(2)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan(torch.arange(6).expand(2, -1), (2, 2, 2)), "one code a step"),
        (Plan(torch.arange(12).expand(2, -1), (1,) * 12), "one code a step"),
        (plan_of([0, 1, 2, 3, 4, 4]), "exactly once"),
        (plan_of([0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6]), "exactly once"),
    ],
)
def test_plans_that_cannot_be_honored(model: RAR, plan: Plan, message: str):
    with pytest.raises(VarkdError, match=message):
        model.check(plan)


def test_impossible_requests_for_a_plan(model: RAR):
    for request, message in [
        ({"steps": 3}, "3 steps cannot be had"),
        ({"order_BL": torch.arange(5).expand(2, -1)}, "order"),
        ({"order_BL": torch.zeros(2, 6).long()}, "exactly once"),
    ]:
        with pytest.raises(VarkdError, match=message):
            model.plan(2, **request)


# ---- what a slot knows


@torch.no_grad()
def test_a_slot_knows_which_position_it_predicts_but_none_after_it(model: RAR):
    """Two orders that agree on the first three positions, and two that differ in the third alone."""
    first = model(CODES[:1], Condition(torch.tensor([1])), plan_of([4, 0, 2, 1, 3, 5]))[0]
    later = model(CODES[:1], Condition(torch.tensor([1])), plan_of([4, 0, 2, 5, 1, 3]))[0]
    other = model(CODES[:1], Condition(torch.tensor([1])), plan_of([4, 0, 3, 1, 2, 5]))[0]
    assert torch.equal(first[[4, 0, 2]], later[[4, 0, 2]])
    assert (first[5] != later[5]).any()
    assert torch.equal(first[[4, 0]], other[[4, 0]]) and (first[2] != other[3]).any()


@torch.no_grad()
def test_only_the_rows_that_belong_to_slots_are_read(model: RAR):
    plan = model.plan(3, order_BL=torch.stack([torch.randperm(LENGTH) for _ in range(3)]))
    before = model(CODES, CONDITION, plan)

    def moved(table: Tensor, row: int) -> bool:
        old = table[row].clone()
        table[row] += 1
        after = model(CODES, CONDITION, plan)
        table[row] = old
        return not torch.equal(before, after)

    reads = {
        "embeddings": [row for row in range(len(model.embeddings.weight)) if moved(model.embeddings.weight, row)],
        "pos_embed": [row for row in range(40) if moved(model.pos_embed[0], row)],
        "target": [row for row in range(40) if moved(model.target_aware_pos_embed[0], row)],
        "timesteps": [row for row in range(40) if moved(model.timesteps_embeddings[0], row)],
    }
    name, first = RAR.class_rows(CONFIG)
    fed = {int(code) for row, order in zip(CODES, plan.order_BL, strict=True) for code in row[order[:-1]]}
    assert name == "embeddings.weight"
    assert reads["embeddings"] == sorted(fed) + [first + label for label in (0, 2, 3)]  # never the mask row, 12
    assert first + model.null_label == len(model.embeddings.weight) - 1
    assert reads["pos_embed"] == list(range(2 + LENGTH))
    assert reads["target"] == list(range(2, 2 + LENGTH))  # 0 and 1 are no positions
    assert reads["timesteps"] == list(range(1 + LENGTH))  # one a slot; the last code has none


@torch.no_grad()
def test_decoding_embeds_only_the_new_slot(model: RAR):
    seen: list[int] = []
    model.blocks[0].register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    plan = model.plan(3)
    state, hidden = model.start(CONDITION, plan)
    while state.filled < LENGTH + 1:
        hidden = model.step(state, hidden[..., :1].argmax(-1))
    assert seen == [2] + [1] * (LENGTH - 1)
    seen.clear()
    model.start(CONDITION, plan, CODES, 3)
    assert seen == [5]


@torch.no_grad()
def test_a_prefix_of_everything_is_refused(model: RAR):
    with pytest.raises(VarkdError, match="prefix_steps"):
        model.start(CONDITION, model.plan(3), CODES, LENGTH)


@torch.no_grad()
def test_the_cache_is_kept_in_the_autocast_type(model: RAR):
    with torch.autocast("cpu", torch.bfloat16):
        narrow, _ = model.float().start(CONDITION, model.plan(3))
    wide, _ = model.double().start(CONDITION, model.plan(3))
    assert (narrow.cache.dtype, wide.cache.dtype) == (torch.bfloat16, torch.float64)
    assert narrow.cache.shape == (2, 2, 3, 2, LENGTH + 1, 8)


# ---- weights


@pytest.mark.parametrize(
    ("config", "num_parameters"),  # the official RAR-B and RAR-XXL
    [
        (RARConfig(1024, 1000, (16, 16), 24, 768, 16, 3072), 260_923_648),
        (RARConfig(1024, 1000, (16, 16), 40, 1408, 16, 6144), 1_498_520_704),
    ],
)
def test_published_sizes(config: RARConfig, num_parameters: int):
    with torch.device("meta"):
        model = RAR(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert shapes["pos_embed"] == (1, 1280, config.dim) == shapes["target_aware_pos_embed"]
    assert shapes["timesteps_embeddings"] == (1, 356, config.dim)
    assert RARConfig(grid=(16, 16), **RAR.infer(shapes)) == config


def test_shapes_of_another_family_are_no_rar():
    with pytest.raises(KeyError):
        RAR.infer({"output.weight": (16384, 768)})


def test_a_model_learns_from_its_first_weights():
    """Sixty updates on eight sequences: they are known by heart, in any order."""
    sizes = {"vocab_size": 12, "num_classes": 3, "grid": (2, 3), "num_layers": 2, "dim": 32, "num_heads": 2}
    model = build("rar", {**sizes, "order": "random"})
    generator = torch.Generator().manual_seed(0)
    codes_BL = torch.randint(12, (8, LENGTH), generator=generator)
    condition = Condition(torch.arange(8) % 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for step in range(60):
        plan = model.plan(8, Rng(0, step), torch.arange(8))
        logits = model.head(model(codes_BL, condition, plan))
        loss = F.cross_entropy(logits.flatten(0, 1), codes_BL.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(torch.tensor(12.0).log().item(), rel=0.05)
    assert sum(losses[-5:]) / 5 < 1.2, losses[-5:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "num_layers must be at least 1"),
        ({"dim": 15}, "whole number"),
        ({"num_heads": 16}, "at least 2"),
        ({"order": "spiral"}, "raster or random"),
    ],
)
def test_impossible_sizes(change: dict, message: str):
    with pytest.raises(VarkdError, match=message):
        replace(CONFIG, **change)
