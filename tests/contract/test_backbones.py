"""What every backbone must do. A new family is one more entry of `SIZES` (and its golden file)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from varkd.backbones.protocol import Backbone
from varkd.backbones.store import FAMILIES, build, load_backbone, save_backbone, weights_hash
from varkd.errors import VarkdError
from varkd.rollout import Sampler, rollout
from varkd.types import Condition, Plan
from varkd.world import Rng

GOLDEN = Path(__file__).parents[1] / "golden"
SIZES: dict[str, dict[str, Any]] = {
    "llamagen": {
        "vocab_size": 12,
        "num_classes": 3,
        "grid": (2, 3),
        "num_layers": 2,
        "dim": 16,
        "num_heads": 2,
        "ffn_dim": 24,
    },
    "arpg": {"vocab_size": 12, "num_classes": 3, "grid": (2, 3), "num_layers": 4, "dim": 16, "num_heads": 2,
             "ffn_dim": 24},
    "randar": {"vocab_size": 12, "num_classes": 3, "grid": (2, 3), "num_layers": 2, "dim": 16, "num_heads": 2,
               "ffn_dim": 24},
    "rar": {"vocab_size": 12, "num_classes": 3, "grid": (2, 3), "num_layers": 2, "dim": 16, "num_heads": 2,
            "ffn_dim": 24, "order": "random"},
    "var": {"vocab_size": 12, "num_classes": 3, "scales": (1, 2, 3), "code_dim": 4, "num_layers": 2, "dim": 16,
            "num_heads": 2, "ffn_dim": 24},
}  # fmt: skip
RASTER_ONLY = {"llamagen"}
PARALLEL = {"arpg", "randar"}
"""Families that decode any order, one per row, in any number of steps."""
WITHOUT_GRADIENT: dict[str, tuple[str, ...]] = {
    # A key's bias adds the same number to all logits of a query, and a softmax does not see that.
    "rar": (r"blocks\.\d+\.attn\.k_norm\.bias",),
}
CONDITION = Condition(torch.tensor([0, 3, 2]))
SCALES = Condition(CONDITION.label_B, torch.tensor([1.0, 2.5, 7.0]))
"""The same rows for a model that reads the guidance scale."""


def test_every_family_is_under_contract():
    assert set(SIZES) == set(FAMILIES)


@pytest.fixture(params=SIZES)
def model(request: pytest.FixtureRequest) -> Backbone:
    """Random float64 weights, the head included."""
    return randomized(build(request.param, SIZES[request.param]))


@pytest.fixture(params=SIZES)
def scaled(request: pytest.FixtureRequest) -> Backbone:
    """The same weights in a model that reads the guidance scale, whose embedding is drawn last."""
    return randomized(build(request.param, {**SIZES[request.param], "guidance_conditioned": True}))


def randomized(model: Backbone) -> Backbone:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.double().parameters():
            parameter.normal_(std=0.4, generator=generator)
    return model.eval()


def codes_for(model: Backbone, num_rows: int = 3, seed: int = 1) -> Tensor:
    shape = (num_rows, model.sequence_length)
    return torch.randint(model.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def plan_for(model: Backbone, num_rows: int = 3) -> Plan:
    return model.plan(num_rows, Rng(0), torch.arange(num_rows))


def decoded(model: Backbone, codes_BL: Tensor, condition: Condition, plan: Plan, prefix_steps: int = 0) -> Tensor:
    """The hidden states of the decode loop with given codes, (B, L - prefix, D) by generation rank."""
    by_rank = codes_BL.gather(1, plan.order_BL)
    state, hidden = model.start(condition, plan, by_rank, prefix_steps)
    found, done = [hidden], sum(plan.sizes[:prefix_steps])
    for size in plan.sizes[prefix_steps:-1]:
        found.append(model.step(state, by_rank[:, done : done + size]))
        done += size
    return torch.cat(found, dim=1)


def ranked(hidden_BLD: Tensor, plan: Plan) -> Tensor:
    return hidden_BLD.gather(1, plan.order_BL.unsqueeze(2).expand_as(hidden_BLD))


# ---- the mathematics


def assert_decodes_as_trained(model: Backbone, plan: Plan, condition: Condition = CONDITION) -> None:
    codes_BL = codes_for(model)
    expected = ranked(model(codes_BL, condition, plan), plan)
    for steps in range(len(plan.sizes)):
        found = decoded(model, codes_BL, condition, plan, steps)
        torch.testing.assert_close(found, expected[:, sum(plan.sizes[:steps]) :], rtol=1e-9, atol=1e-11)


@torch.no_grad()
def test_decoding_sees_what_training_sees(model: Backbone):
    assert_decodes_as_trained(model, plan_for(model))


@torch.no_grad()
def test_two_decodes_do_not_disturb_each_other(model: Backbone):
    codes_BL, plan = codes_for(model), plan_for(model)
    alone = decoded(model, codes_BL, CONDITION, plan)
    first, _ = model.start(CONDITION, plan)
    model.step(first, codes_BL[:, : plan.sizes[0]])
    torch.testing.assert_close(decoded(model, codes_BL, CONDITION, plan), alone, rtol=0, atol=0)


def assert_sees_earlier_steps(model: Backbone, plan: Plan) -> None:
    codes_BL = codes_for(model)
    hidden_BLD = model(codes_BL, CONDITION, plan)
    assert hidden_BLD.shape == (3, model.sequence_length, model.head.in_features)
    for position in range(model.sequence_length):
        changed_BL = codes_BL.clone()
        changed_BL[:, position] = (changed_BL[:, position] + 1) % model.vocab_size
        moved = (model(changed_BL, CONDITION, plan) != hidden_BLD).any(-1)
        seen = plan.step_BL > plan.step_BL[:, [position]]
        assert not moved[~seen].any(), f"code {position} reaches a step that it should not"
        assert moved[seen].all(), f"code {position} is ignored by a later step"


@torch.no_grad()
def test_hidden_states_look_back_only(model: Backbone):
    assert_sees_earlier_steps(model, plan_for(model))


def parallel_plans(model: Backbone) -> list[Plan]:
    """Every number of steps in drawn orders, one per row, then orders and sizes that no schedule makes."""
    length, row_B = model.sequence_length, torch.arange(3)
    plans = [model.plan(3, Rng(1), row_B, steps=steps) for steps in range(1, length + 1)]
    assert [len(plan.sizes) for plan in plans] == list(range(1, length + 1))
    raster = torch.arange(length)
    mixed_BL = torch.stack([raster, raster.flip(0), torch.randperm(length, generator=torch.Generator().manual_seed(2))])
    return [*plans, *(Plan(mixed_BL, sizes) for sizes in [(3, 1, length - 4), (1, 2, length - 4, 1), (length - 1, 1)])]


@torch.no_grad()
@pytest.mark.parametrize("model", sorted(PARALLEL), indirect=True)
def test_parallel_plans_decode_as_they_train(model: Backbone):
    for plan in parallel_plans(model):
        model.check(plan)
        assert_decodes_as_trained(model, plan)


@torch.no_grad()
@pytest.mark.parametrize("model", sorted(PARALLEL), indirect=True)
def test_parallel_plans_look_back_only(model: Backbone):
    for plan in parallel_plans(model):
        assert_sees_earlier_steps(model, plan)


@torch.no_grad()
@pytest.mark.parametrize("model", sorted(PARALLEL), indirect=True)
def test_one_batch_holds_many_orders(model: Backbone):
    """A row under its own order is what it is alone."""
    codes_BL = codes_for(model)
    for plan in parallel_plans(model):
        hidden_BLD = model(codes_BL, CONDITION, plan)
        for row in range(3):
            only = slice(row, row + 1)
            alone = model(codes_BL[only], CONDITION.select(only), plan.select(only))
            torch.testing.assert_close(alone, hidden_BLD[only], rtol=1e-9, atol=1e-11)


@torch.no_grad()
def test_rows_are_independent_and_labels_matter(model: Backbone):
    codes_BL, plan = codes_for(model), plan_for(model)
    hidden_BLD = model(codes_BL, CONDITION, plan)
    alone = model(codes_BL[1:2], CONDITION.select(slice(1, 2)), plan.select(slice(1, 2)))
    torch.testing.assert_close(alone, hidden_BLD[1:2], rtol=1e-9, atol=1e-11)
    other = model(codes_BL, Condition(torch.tensor([1, 3, 2])), plan)
    assert (other[0] != hidden_BLD[0]).any(-1).all() and torch.equal(other[1:], hidden_BLD[1:])
    assert (model(codes_BL, CONDITION.null(model.null_label), plan)[0] != hidden_BLD[0]).any()


@torch.no_grad()
def test_forward_is_pure(model: Backbone):
    codes_BL, plan = codes_for(model), plan_for(model)
    before, random_state = codes_BL.clone(), torch.random.get_rng_state()
    evaluated = model(codes_BL, CONDITION, plan)
    assert torch.equal(model.train()(codes_BL, CONDITION, plan), evaluated)
    assert torch.equal(codes_BL, before) and torch.equal(torch.random.get_rng_state(), random_state)


def test_dropout_acts_in_training_only():
    for family, sizes in SIZES.items():
        model = build(family, sizes, dropout=0.5)
        codes_BL, plan = codes_for(model), plan_for(model)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            assert not torch.equal(model.train()(codes_BL, CONDITION, plan), model(codes_BL, CONDITION, plan))
        assert torch.equal(model.eval()(codes_BL, CONDITION, plan), model(codes_BL, CONDITION, plan))


def assert_survives_bfloat16(model: Backbone, condition: Condition) -> None:
    model.float()
    codes_BL, plan = codes_for(model), plan_for(model)
    exact = model(codes_BL, condition, plan)
    with torch.autocast("cpu", torch.bfloat16):
        narrow, cached = model(codes_BL, condition, plan), decoded(model, codes_BL, condition, plan)
    scale = exact.square().mean().sqrt()
    assert (narrow.float() - exact).square().mean().sqrt() < 0.03 * scale
    assert (cached.float() - ranked(exact, plan)).square().mean().sqrt() < 0.03 * scale
    assert not torch.equal(narrow.float(), exact)


@torch.no_grad()
def test_bfloat16_error_is_bounded(model: Backbone):
    """Under autocast: within 3 % of the typical size of a hidden state, decoding and training alike."""
    assert_survives_bfloat16(model, CONDITION)


def assert_all_weights_move(model: Backbone, condition: Condition) -> None:
    logits = model.head(model(codes_for(model), condition, plan_for(model)))
    logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if any(re.fullmatch(pattern, name) for pattern in WITHOUT_GRADIENT.get(model.family, ())):
            assert parameter.grad.abs().max() < 1e-9, f"{name} has a gradient after all"
        else:
            assert parameter.grad.abs().max() > 1e-6, name


def test_every_weight_gets_a_gradient(model: Backbone):
    assert_all_weights_move(model, CONDITION)


# ---- the guidance scale as an input


@torch.no_grad()
def test_decoding_sees_the_scale_as_training_does(scaled: Backbone):
    assert scaled.guidance_conditioned
    for plan in parallel_plans(scaled) if scaled.family in PARALLEL else [plan_for(scaled)]:
        assert_decodes_as_trained(scaled, plan, SCALES)
    assert_decodes_as_trained(scaled, plan_for(scaled), SCALES.null(scaled.null_label))


@torch.no_grad()
def test_each_row_reads_its_own_scale(scaled: Backbone):
    codes_BL, plan = codes_for(scaled), plan_for(scaled)
    hidden_BLD = scaled(codes_BL, SCALES, plan)
    for other in (2.4, 0.0, 40.0):
        moved = scaled(codes_BL, Condition(SCALES.label_B, torch.tensor([1.0, other, 7.0])), plan)
        assert (moved[1] != hidden_BLD[1]).any(-1).all(), "a position ignores the scale"
        assert torch.equal(moved[[0, 2]], hidden_BLD[[0, 2]])
    alone = scaled(codes_BL[1:2], SCALES.select(slice(1, 2)), plan.select(slice(1, 2)))
    torch.testing.assert_close(alone, hidden_BLD[1:2], rtol=1e-9, atol=1e-11)


@torch.no_grad()
@pytest.mark.parametrize("family", SIZES)
def test_scale_1_is_the_model_without_scales(family: str):
    """And no scale is scale 1, in training and decoding alike."""
    plain = randomized(build(family, SIZES[family]))
    scaled = randomized(build(family, {**SIZES[family], "guidance_conditioned": True}))
    scaled.load_state_dict(plain.state_dict(), strict=False)
    codes_BL, plan, one = codes_for(plain), plan_for(plain), Condition(CONDITION.label_B, torch.ones(3))
    expected = plain(codes_BL, CONDITION, plan)
    assert torch.equal(scaled(codes_BL, CONDITION, plan), expected)
    assert torch.equal(scaled(codes_BL, one, plan), expected)
    assert torch.equal(decoded(scaled, codes_BL, one, plan), decoded(plain, codes_BL, CONDITION, plan))
    assert not plain.guidance_conditioned and torch.equal(plain(codes_BL, SCALES, plan), expected)
    assert not torch.equal(scaled(codes_BL, SCALES, plan), expected)


@torch.no_grad()
def test_scales_survive_bfloat16(scaled: Backbone):
    assert_survives_bfloat16(scaled, SCALES)


def test_every_weight_gets_a_gradient_under_scales(scaled: Backbone):
    assert_all_weights_move(scaled, SCALES)


def test_a_scale_for_every_sequence(scaled: Backbone):
    with pytest.raises(VarkdError, match="scales of shape") as error:
        scaled(codes_for(scaled), Condition(CONDITION.label_B, torch.ones(2)), plan_for(scaled))
    assert one_line(error)


# ---- plans and refusals


def one_line(error: pytest.ExceptionInfo[VarkdError]) -> bool:
    return "\n" not in str(error.value) and len(str(error.value)) > 10


@pytest.mark.parametrize("family", sorted(RASTER_ONLY))
def test_raster_families_refuse_other_plans(family: str):
    model = build(family, SIZES[family])
    length = model.sequence_length
    model.check(Plan(torch.arange(length).expand(2, -1), (1,) * length))
    refused = [
        Plan(torch.arange(length).flip(0).expand(2, -1), (1,) * length),
        Plan(torch.stack([torch.arange(length), torch.arange(length).roll(1)]), (1,) * length),
        Plan(torch.arange(length).expand(2, -1), (2,) * (length // 2)),
        Plan(torch.arange(2 * length).expand(2, -1), (2,) * length),
        Plan(torch.arange(length - 1).expand(2, -1), (1,) * (length - 1)),
    ]
    for plan in refused:
        with pytest.raises(VarkdError) as error:
            model.check(plan)
        assert one_line(error)
        with pytest.raises(VarkdError):
            rollout(
                model, Condition(torch.zeros(2, dtype=torch.long)), plan, Sampler(), torch.rand(plan.order_BL.shape)
            )
    with pytest.raises(VarkdError):
        model.plan(2, steps=2)
    with pytest.raises(VarkdError):
        model.plan(2, order_BL=torch.arange(length).flip(0).expand(2, -1))


@pytest.mark.parametrize("model", sorted(PARALLEL), indirect=True)
def test_parallel_families_refuse_impossible_plans(model: Backbone):
    length, row_B = model.sequence_length, torch.arange(2)
    order_BL, ones = torch.arange(length).expand(2, -1), (1,) * length
    repeated, shifted = order_BL.clone(), order_BL + 1
    repeated[1, 0] = 1
    for plan in [Plan(repeated, ones), Plan(shifted, ones), Plan(order_BL[:, 1:] - 1, ones[1:])]:
        with pytest.raises(VarkdError) as error:
            model.check(plan)
        assert one_line(error)
        with pytest.raises(VarkdError):
            rollout(
                model, Condition(torch.zeros(2, dtype=torch.long)), plan, Sampler(), torch.rand(plan.order_BL.shape)
            )
    asked: list[tuple[dict[str, Any], str]] = [
        ({"steps": 0}, "steps"), ({"steps": length + 1}, "steps"), ({"steps": -1}, "steps"),
        ({"schedule": "nonsense"}, "schedule"), ({"order_BL": order_BL[:1]}, "shape"),
        ({"order_BL": order_BL[:, 1:]}, "shape"), ({"order_BL": repeated}, "exactly once"),
    ]  # fmt: skip
    for arguments, message in asked:
        with pytest.raises(VarkdError, match=message) as error:
            model.plan(2, Rng(0), row_B, **arguments)
        assert one_line(error)
    with pytest.raises(VarkdError, match="give rng"):
        model.plan(2)


@pytest.mark.parametrize("model", sorted(PARALLEL), indirect=True)
def test_drawn_orders_depend_on_seed_and_row(model: Backbone):
    both = model.plan(2, Rng(0), torch.tensor([5, 9])).order_BL
    assert torch.equal(model.plan(1, Rng(0), torch.tensor([9])).order_BL, both[1:])
    many = model.plan(40, Rng(0), torch.arange(40)).order_BL
    assert len(many.unique(dim=0)) > 30 and not torch.equal(many, model.plan(40, Rng(1), torch.arange(40)).order_BL)


def test_a_drawn_plan_is_accepted(model: Backbone):
    plan = plan_for(model)
    model.check(plan)
    assert torch.equal(plan.order_BL.sort(1).values, torch.arange(model.sequence_length).expand(3, -1))


def test_bad_inputs_have_one_clear_line(model: Backbone):
    codes_BL, plan = codes_for(model), plan_for(model)
    bad = [
        (codes_BL[:, :-1], CONDITION, "expects codes of shape"),
        (codes_BL[0], CONDITION, "expects codes of shape"),
        (codes_BL.float(), CONDITION, "codes must be integers"),
        (codes_BL, Condition(torch.zeros(2, dtype=torch.long)), "labels of shape"),
        (codes_BL, Condition(torch.zeros(3)), "labels must be integers"),
    ]
    for codes, condition, message in bad:
        with pytest.raises(VarkdError, match=message) as error:
            model(codes, condition, plan)
        assert one_line(error)


def test_a_prefix_without_codes_is_refused(model: Backbone):
    with pytest.raises(VarkdError, match="prefix"):
        model.start(CONDITION, plan_for(model), None, 2)


@pytest.mark.parametrize(
    ("family", "sizes", "message"),
    [
        ("lamagen", SIZES["llamagen"], "did you mean 'llamagen'"),
        ("llamagen", {**SIZES["llamagen"], "depth": 2}, "depth"),
        ("llamagen", {"vocab_size": 12}, "num_classes"),
        ("llamagen", {**SIZES["llamagen"], "num_heads": 3}, "multiple of 4"),
    ],
)
def test_impossible_models_are_refused(family: str, sizes: dict[str, Any], message: str):
    with pytest.raises(VarkdError, match=message) as error:
        build(family, sizes)
    assert one_line(error)


# ---- weights


@pytest.mark.parametrize("family", SIZES)
def test_weights_depend_on_the_seed_alone(family: str):
    first, again, other = (build(family, SIZES[family], seed=seed) for seed in (0, 0, 1))
    assert weights_hash(first) == weights_hash(again) != weights_hash(other)
    assert all(parameter.isfinite().all() for parameter in first.parameters())
    logits = first.head(first(codes_for(first), CONDITION, plan_for(first)))
    torch.testing.assert_close(logits.softmax(-1), torch.full_like(logits, 1 / first.vocab_size), rtol=0.2, atol=0)


@pytest.mark.parametrize("family", SIZES)
def test_names_are_the_official_ones(family: str):
    files = sorted(GOLDEN.glob(f"{family}-*.safetensors"))
    assert files, f"no golden file for {family}"
    shapes = {name: tuple(value.shape) for name, value in load_file(files[0]).items()}
    official = {name.removeprefix("state."): shape for name, shape in shapes.items() if name.startswith("state.")}
    num_layers = FAMILIES[family].infer(official)["num_layers"]
    assert set(build(family, {**SIZES[family], "num_layers": num_layers}).official_state()) == set(official)


def test_save_and_load(model: Backbone, tmp_path: Path):
    model.float()
    save_backbone(model, tmp_path / "m", tokenizer_hash="abc")
    loaded, info = load_backbone(tmp_path / "m")
    assert info["tokenizer_hash"] == "abc" and info["family"] == model.family
    assert loaded.config == model.config and not loaded.training and weights_hash(loaded) == weights_hash(model)
    codes_BL, plan = codes_for(model), plan_for(model)
    assert torch.equal(loaded(codes_BL, CONDITION, plan), model(codes_BL, CONDITION, plan))


def test_save_and_load_with_scales(scaled: Backbone, tmp_path: Path):
    save_backbone(scaled.float(), tmp_path / "m")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["guidance_conditioned"] is True
    loaded, _ = load_backbone(tmp_path / "m")
    assert loaded.guidance_conditioned and weights_hash(loaded) == weights_hash(scaled)
    codes_BL, plan = codes_for(scaled), plan_for(scaled)
    assert torch.equal(loaded(codes_BL, SCALES, plan), scaled(codes_BL, SCALES, plan))


def test_folders_from_before_there_were_scales(model: Backbone, tmp_path: Path):
    save_backbone(model.float(), tmp_path / "m")
    config = tmp_path / "m" / "config.json"
    info = json.loads(config.read_text())
    assert info.pop("guidance_conditioned") is False
    config.write_text(json.dumps(info))
    assert weights_hash(load_backbone(tmp_path / "m")[0]) == weights_hash(model)


def test_a_run_folder_loads_its_selected_weights(model: Backbone, tmp_path: Path):
    save_backbone(model.float(), tmp_path / "export")
    run = tmp_path / "run"
    checkpoint = run / "checkpoints" / "step-00000002"
    checkpoint.mkdir(parents=True)
    (run / "config.json").write_bytes((tmp_path / "export" / "config.json").read_bytes())
    with pytest.raises(VarkdError, match="train it first"):
        load_backbone(run)
    (checkpoint / "ema.safetensors").write_bytes((tmp_path / "export" / "model.safetensors").read_bytes())
    selected = {"checkpoint": checkpoint.name, "weights": "ema"}
    (run / "checkpoints" / "selected.json").write_text(json.dumps(selected))
    assert weights_hash(load_backbone(run)[0]) == weights_hash(model)


def damage(folder: Path, how: str) -> None:
    weights, config = folder / "model.safetensors", folder / "config.json"
    state = load_file(weights)
    name = sorted(state)[0]
    info = json.loads(config.read_text())
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "empty":
        weights.write_bytes(b"")
    elif how == "no weights":
        weights.unlink()
    elif how == "no config":
        config.unlink()
    elif how == "broken config":
        config.write_text("{")
    elif how == "unknown family":
        config.write_text(json.dumps({**info, "family": "nonsense"}))
    elif how == "other shape":
        save_file({**state, name: state[name][:1].contiguous()}, weights)
    elif how == "missing tensor":
        save_file({key: value for key, value in state.items() if key != name}, weights)
    elif how == "extra tensor":
        save_file({**state, "nonsense": torch.zeros(1)}, weights)
    else:
        config.write_text(json.dumps({**info, "vocab_size": info["vocab_size"] + 1}))


KINDS = ["truncated", "empty", "no weights", "no config", "broken config", "unknown family", "other shape",
         "missing tensor", "extra tensor", "other size"]  # fmt: skip


@pytest.mark.parametrize("how", KINDS)
def test_damaged_folders_have_one_clear_line(model: Backbone, tmp_path: Path, how: str):
    save_backbone(model.float(), tmp_path / "m")
    damage(tmp_path / "m", how)
    with pytest.raises(VarkdError) as error:
        load_backbone(tmp_path / "m")
    assert one_line(error)


def test_a_missing_folder_is_named(tmp_path: Path):
    with pytest.raises(VarkdError, match="nowhere"):
        load_backbone(tmp_path / "nowhere")
