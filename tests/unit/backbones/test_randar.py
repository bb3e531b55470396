"""RandAR beyond the contract: step sizes, instructions, the replay of parallel steps, a cache that is overwritten."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from varkd.backbones.randar import RandAR, RandARConfig, replay, step_sizes
from varkd.backbones.store import build
from varkd.errors import VarkdError
from varkd.types import Condition, Plan
from varkd.world import Rng

SIZES: dict[str, Any] = {
    "vocab_size": 12, "num_classes": 3, "grid": (2, 3), "num_layers": 2, "dim": 16, "num_heads": 2, "ffn_dim": 24,
}  # fmt: skip
LENGTH = 6
CONDITION = Condition(torch.tensor([0, 3, 2]))
CODES = torch.randint(12, (3, LENGTH), generator=torch.Generator().manual_seed(1))
CPU = torch.device("cpu")


@pytest.fixture
def model() -> RandAR:
    generator = torch.Generator().manual_seed(0)
    built = RandAR(RandARConfig(**SIZES)).double().eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_(std=0.4, generator=generator)
    return built


def drawn(model: RandAR, steps: int | None = None) -> Plan:
    return model.plan(3, Rng(0), torch.arange(3), steps=steps)


def ranked(values: Tensor, plan: Plan) -> Tensor:
    return values.gather(1, plan.order_BL.unsqueeze(-1).expand_as(values))


# ---- step sizes


def test_published_step_sizes():
    sizes = step_sizes(256, 88)
    assert sizes[:25] == (1,) * 24 + (2,) and set(sizes[24:]) == {2, 3, 4, 5} and sum(sizes) == 256
    assert step_sizes(256, 256) == (1,) * 256 and step_sizes(256, 1) == (256,)


def test_every_number_of_steps_shares_out_every_code():
    for length in (1, 2, 3, 16, 36, 100, 256):
        for steps in range(1, length + 1):
            sizes = step_sizes(length, steps)
            assert len(sizes) == steps and sum(sizes) == length and min(sizes) >= 1
        assert step_sizes(length, length) == (1,) * length


def test_impossible_steps_and_configs_are_refused(model: RandAR):
    for steps in (-1, 0, 17):
        with pytest.raises(VarkdError, match="1 to 16 steps"):
            step_sizes(16, steps)
    with pytest.raises(VarkdError, match="only 'cosine'"):
        model.plan(3, Rng(0), torch.arange(3), schedule="arccos")
    for change, message in [({"order": "spiral"}, "raster"), ({"num_heads": 3}, "multiple of 4"), ({"dim": 0}, "dim")]:
        with pytest.raises(VarkdError, match=message):
            RandARConfig(**{**SIZES, **change})


def test_plans_follow_the_config(model: RandAR):
    assert drawn(model).sizes == (1,) * LENGTH and drawn(model, 4).sizes == step_sizes(LENGTH, 4)
    raster = RandAR(RandARConfig(**SIZES, order="raster")).plan(2, steps=2)
    assert torch.equal(raster.order_BL, torch.arange(LENGTH).expand(2, -1)) and len(raster.sizes) == 2


# ---- the mathematics


@torch.no_grad()
def test_an_instruction_is_one_vector_turned_to_its_cell(model: RandAR):
    """Against complex numbers: 4 lane pairs a head, two turn with the row, two with the column."""
    plan = drawn(model)
    found = model._instructions(model._angles(plan))
    vector = torch.view_as_complex(model.pos_instruct_embeddings.view(2, 4, 2))
    speed = torch.tensor([1.0, 0.01], dtype=torch.float64)
    row, column = plan.order_BL // 3, plan.order_BL % 3
    angle = torch.cat([row.unsqueeze(-1) * speed, column.unsqueeze(-1) * speed], dim=-1)
    turned = vector * torch.polar(torch.ones_like(angle), angle).unsqueeze(2)
    torch.testing.assert_close(found, torch.view_as_real(turned).flatten(2), rtol=1e-5, atol=1e-6)


def test_replay_by_hand():
    """Steps of 1, 3 and 2: c q0 t0 q1 t1 q2 t2 q3 t3 q4, then q2, q3 and q5 once more."""
    layout = replay((1, 3, 2), CPU)
    assert layout.rank_T.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 2, 3, 5]
    assert layout.duplicates.tolist() == [2, 3, 5] and layout.slot_L.tolist() == [1, 3, 10, 11, 9, 12]
    assert layout.mask_TT is not None
    seen = [row.nonzero().flatten().tolist() for row in layout.mask_TT]
    assert seen[:10] == [list(range(slot + 1)) for slot in range(10)]
    assert seen[10:] == [[0, 1, 2, 3, 10], [0, 1, 2, 3, 10, 11], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12]]


def test_one_code_a_step_needs_neither_mask_nor_duplicates():
    layout = replay((1,) * 256, CPU)
    assert layout.mask_TT is None and len(layout.duplicates) == 0 and len(layout.rank_T) + 1 == 512
    assert layout.slot_L.tolist() == list(range(1, 512, 2))


@torch.no_grad()
def test_only_the_first_code_of_a_step_is_as_if_alone(model: RandAR):
    alone, together = drawn(model), Plan(drawn(model).order_BL, (1, 3, 2))
    moved = ranked(model(CODES, CONDITION, alone) - model(CODES, CONDITION, together), alone).abs().amax(-1)
    firsts = torch.tensor([True, True, False, False, True, False])
    assert (moved[:, firsts] < 1e-11).all() and (moved[:, ~firsts] > 1e-3).all()


@torch.no_grad()
def test_instructions_of_a_step_see_the_ones_before(model: RandAR):
    """Exchanging the cells of the last two ranks of a step leaves the first alone and moves the others."""
    plan = Plan(drawn(model).order_BL, (LENGTH,))
    other = Plan(plan.order_BL[:, [0, 1, 2, 3, 5, 4]], plan.sizes)
    moved = ranked(model(CODES, CONDITION, plan) - model(CODES, CONDITION, other), plan).abs().amax(-1)
    assert (moved[:, :4] < 1e-11).all() and (moved[:, 4:] > 1e-3).all()


@torch.no_grad()
def test_provisional_slots_are_overwritten(model: RandAR):
    """After any steps the cache is what one interleaved pass over the same codes leaves."""
    plan = Plan(drawn(model).order_BL, (1, 3, 1, 1))
    by_rank = CODES.gather(1, plan.order_BL)
    state, _ = model.start(CONDITION, plan)
    done = 0
    for steps, size in enumerate(plan.sizes[:-1], start=1):
        model.step(state, by_rank[:, done : done + size])
        done += size
        whole, _ = model.start(CONDITION, plan, by_rank, steps)
        assert state.filled == whole.filled == 2 * done + 2 and state.step == whole.step == steps
        ours, theirs = state.cache[..., : state.filled, :], whole.cache[..., : state.filled, :]
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@torch.no_grad()
def test_a_step_reads_the_new_slots_only(model: RandAR):
    read: list[int] = []
    model.layers[0].register_forward_hook(lambda _, args, __: read.append(args[0].shape[1]))
    plan = Plan(drawn(model).order_BL, (1, 3, 2))
    state, _ = model.start(CONDITION, plan)
    model.step(state, CODES[:, :1])
    model.step(state, CODES[:, 1:4])
    assert read == [1 + 1, 1 + 3, 5 + 2]
    read.clear()
    model(CODES, CONDITION, plan)
    assert read == [13]


@torch.no_grad()
def test_dropout_acts_on_codes_only(model: RandAR):
    plan, quiet = drawn(model), model(CODES, CONDITION, drawn(model))
    model.tok_dropout.p = 1.0
    moved = ranked(model.train()(CODES, CONDITION, plan) - quiet, plan).abs().amax(-1)
    assert (moved[:, 0] == 0).all() and (moved[:, 1:] > 1e-6).all()


# ---- weights


def test_sizes_are_read_from_shapes():
    model = build("randar", SIZES)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert RandARConfig(**RandAR.infer(shapes), grid=(2, 3), num_heads=2) == model.config
    with pytest.raises(KeyError):
        RandAR.infer({name: shape for name, shape in shapes.items() if name != "pos_instruct_embeddings"})
    assert RandAR.class_rows(model.config) == ("cls_embedding.embedding_table.weight", 0)


def test_extras_of_official_files_are_known():
    extras = ["freqs_cis", "causal_mask", "layers.3.attention.kv_cache.k_cache"]

    def is_extra(name: str) -> bool:
        return any(re.fullmatch(pattern, name) for pattern in RandAR.official_extras)

    assert all(map(is_extra, extras)) and not any(map(is_extra, build("randar", SIZES).state_dict()))
