"""ZipAR: the schedule's laws, and a decode that equals a naive one without any cache."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from varkd.backbones.layers import rope_table, rotate
from varkd.backbones.llamagen import LlamaGen
from varkd.backbones.protocol import Backbone
from varkd.backbones.store import build
from varkd.distill.prefixes import MixtureSampling, SpeculativeSampling
from varkd.errors import VarkdError
from varkd.rollout import JointDecoding, Sampler, rollout, sample_inverse_cdf
from varkd.types import Condition
from varkd.world import Rng
from varkd.zipar import NONE, Waves, schedule

GRID, VOCAB, CLASSES, ROWS = (4, 5), 11, 3, 6
LENGTH = GRID[0] * GRID[1]


def toy(guidance_conditioned: bool = False) -> LlamaGen:
    sizes = {"vocab_size": VOCAB, "num_classes": CLASSES, "grid": GRID, "num_layers": 2, "dim": 16, "num_heads": 2,
             "guidance_conditioned": guidance_conditioned}  # fmt: skip
    model = build("llamagen", sizes, seed=0).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5, generator=generator)
    assert isinstance(model, LlamaGen)
    return model


def numbers(seed: int = 2) -> tuple[Condition, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    condition = Condition(torch.randint(CLASSES, (ROWS,), generator=draw))
    return condition, torch.rand(ROWS, LENGTH, generator=draw), torch.randint(VOCAB, (ROWS, LENGTH), generator=draw)


def prefix(*kept: int) -> Tensor:
    return torch.arange(LENGTH) < torch.tensor(kept).unsqueeze(1)


class Naive:
    """One branch of one row, slot by slot: keys and values in dictionaries, as they were when they were written."""

    def __init__(self, model: LlamaGen, label: int) -> None:
        self.model, self.label = model, torch.tensor([label])
        self.cached: list[dict[int, tuple[Tensor, Tensor]]] = [{} for _ in model.layers]

    def run(self, codes: dict[int, int]) -> dict[int, Tensor]:
        """Write {slot: code} (slot 0: the class) and return the logits at each slot."""
        model = self.model
        x = {slot: model.cls_embedding(self.label)[0, 0] if slot == 0 else model.tok_embeddings.weight[code]
             for slot, code in codes.items()}  # fmt: skip
        for layer, cached in zip(model.layers, self.cached, strict=True):
            queries = {}
            for slot in x:
                parts = layer.attention.wqkv(layer.attention_norm(x[slot])).unflatten(
                    0, (3, model.config.num_heads, -1)
                )
                rope = rope_table(GRID, model.config.head_dim, 10000.0, torch.device("cpu"))[slot : slot + 1]
                queries[slot], key = rotate(parts[:2].unsqueeze(2), rope)[:, :, 0]
                cached[slot] = (key, parts[2])
            for slot in x:
                keys, values = zip(*(cached[seen] for seen in sorted(cached) if seen <= slot), strict=True)
                scores = torch.stack([(queries[slot] * key).sum(-1) for key in keys]) / model.config.head_dim**0.5
                mixed = (scores.softmax(0).unsqueeze(-1) * torch.stack(values)).sum(0)
                middle = x[slot] + layer.attention.wo(mixed.flatten())
                x[slot] = middle + layer.feed_forward(layer.ffn_norm(middle))
        return {slot: model.output(model.norm(value)) for slot, value in x.items()}


def naive(model: LlamaGen, condition: Condition, uniform_BL: Tensor, codes_BL: Tensor, kept_BL: Tensor, window: int,
          scale: float) -> Tensor:  # fmt: skip
    """ZipAR row by row, from the words of the paper."""
    out = codes_BL.clone()
    for b in range(len(out)):
        start = int(kept_BL[b].int().cumprod(0).sum())
        branches = [Naive(model, int(condition.label_B[b])), Naive(model, model.null_label)]
        given = {p + 1: int(out[b, p]) for p in range(min(start, LENGTH - 1))}
        for branch in branches:
            branch.run({0: 0} | given)
        for step in schedule(*GRID, window, start):
            inputs = {p: 0 if source == NONE else int(out[b, source])
                      for p, source in zip(step.positions, step.inputs, strict=True)}  # fmt: skip
            if step.refresh != NONE:
                inputs[step.refresh + 1] = int(out[b, step.refresh])
            conditional, null = (branch.run(inputs) for branch in branches)
            for p in (p for p in step.positions if not kept_BL[b, p]):
                logits = null[p] + scale * (conditional[p] - null[p])
                code, _ = sample_inverse_cdf(logits.log_softmax(-1)[None, None], uniform_BL[b, p].view(1, 1))
                out[b, p] = code.item()
    return out


# ---- the schedule


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 8), st.data())
def test_the_schedule_keeps_its_laws(height: int, width: int, window: int, data: st.DataObject):
    kept = data.draw(st.integers(0, height * width))
    steps = schedule(height, width, window, kept)
    when = dict.fromkeys(range(kept), -1) | {p: i for i, step in enumerate(steps) for p in step.positions}
    assert sorted(when) == list(range(height * width))
    assert sum(len(step.positions) for step in steps) == height * width - kept
    for index, step in enumerate(steps):
        for position, source in zip(step.positions, step.inputs, strict=True):
            assert source == NONE if position == 0 else when[source] < index
            row, column = divmod(position, width)
            if column:
                assert source == position - 1
            elif row:  # the row above holds its window, and its most recent code is the input
                above = [p for p in range((row - 1) * width, row * width) if when[p] < index]
                assert len(above) >= min(window, width) and source == above[-1]
        if step.refresh != NONE:
            assert when[step.refresh] == index - 1 and when[step.refresh + 1] < index
    refreshed = {step.refresh for step in steps} - {NONE}
    early = {p - 1 for p in when if p % width == 0 and p > kept and when[p] <= when[p - 1]}
    # Every stand-in is replaced, but for one whose true code comes last of all.
    assert early - refreshed <= {max(when, key=lambda p: (when[p], p))}


@pytest.mark.parametrize(
    ("grid", "window", "steps"), [((16, 16), 4, 76), ((24, 24), 4, 116), ((7, 7), 4, 31), ((7, 7), 7, 49)]
)
def test_the_number_of_steps(grid: tuple[int, int], window: int, steps: int):
    assert len(schedule(*grid, window)) == grid[1] + (grid[0] - 1) * window == steps


def test_a_window_of_a_row_is_raster_order():
    for window in (5, 9):
        assert [step.positions for step in schedule(*GRID, window)] == [(p,) for p in range(LENGTH)]


def test_rows_of_a_batch_keep_their_own_schedules():
    waves = Waves.of(GRID, 2, [0, 7, LENGTH])
    assert not waves.live_BSn[2].any()
    for row, kept in enumerate((0, 7)):
        found = [tuple(step[step != NONE].tolist()) for step in waves.position_BSn[row]]
        assert [step for step in found if step] == [step.positions for step in schedule(*GRID, 2, kept)]
    longer = Waves.of(GRID, 2, [0, 7, LENGTH], multiple=7)
    assert longer.position_BSn.shape[1] % 7 == 0 and longer.live_BSn.sum() == waves.live_BSn.sum()
    assert all(end > int(step.max()) for end, step in zip(waves.end_S, waves.position_BSn.unbind(1), strict=True))


# ---- decoding


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("window", [1, 2, 4])
@pytest.mark.parametrize("kept_BL", [prefix(*[0] * ROWS), prefix(0, 3, 5, 9, 17, LENGTH),
                                     prefix(0, 3, 5, 9, 17, 2) | (torch.arange(LENGTH) % 7 == 3)])  # fmt: skip
def test_a_decode_equals_the_naive_one(window: int, scale: float, kept_BL: Tensor):
    """Without, with and with scattered kept codes; in float64, so that rounding decides no code."""
    model, (condition, uniform_BL, codes_BL) = toy(), numbers()
    plan = model.plan(ROWS)
    sampler = Sampler(guidance=scale, parallel="zipar", window=window)
    samples = rollout(model, condition, plan, sampler, uniform_BL, codes_BL, kept_BL)
    with torch.no_grad():
        expected = naive(model, condition, uniform_BL, codes_BL, kept_BL, window, scale)
    assert samples.codes_BL.equal(expected)
    assert (samples.logp_BL[kept_BL] == 0).all() and (samples.logp_BL[~kept_BL] < 0).all()
    if window < 4:
        sequential = rollout(model, condition, plan, replace(sampler, parallel="off"), uniform_BL, codes_BL, kept_BL)
        assert not samples.codes_BL.equal(sequential.codes_BL)


@pytest.mark.parametrize("sampler", [Sampler(), Sampler(guidance=2.0, guidance_interval=3), Sampler(0.7, top_k=4),
                                     Sampler(temperature=0)], ids=str)  # fmt: skip
def test_a_full_window_draws_the_sequential_codes(sampler: Sampler, monkeypatch: pytest.MonkeyPatch):
    """By the ordinary path, and in float64 also by waves of one code."""
    model, (condition, uniform_BL, codes_BL) = toy(), numbers()
    kept_BL, plan = prefix(0, 3, 5, 9, 17, 2), model.plan(ROWS)
    expected = rollout(model, condition, plan, sampler, uniform_BL, codes_BL, kept_BL)
    zipar = replace(sampler, parallel="zipar", window=GRID[1])
    samples = rollout(model, condition, plan, zipar, uniform_BL, codes_BL, kept_BL)
    assert samples.codes_BL.equal(expected.codes_BL) and samples.logp_BL.equal(expected.logp_BL)
    monkeypatch.setattr(Sampler, "decodes_rows_at_once", lambda *_: True)
    waves = rollout(model, condition, plan, zipar, uniform_BL, codes_BL, kept_BL)
    assert waves.codes_BL.equal(expected.codes_BL)
    torch.testing.assert_close(waves.logp_BL, expected.logp_BL, rtol=1e-6, atol=1e-7)


def test_no_row_depends_on_another():
    """A batch in parts is the batch, whatever the prefixes of the other rows."""
    model, (condition, uniform_BL, codes_BL) = toy(), numbers()
    kept_BL, sampler = prefix(0, 3, 5, 9, 17, 2), Sampler(guidance=1.5, parallel="auto", window=2)
    whole = rollout(model, condition, model.plan(ROWS), sampler, uniform_BL, codes_BL, kept_BL)
    for row in range(ROWS):
        one = slice(row, row + 1)
        part = rollout(model, Condition(condition.label_B[one]), model.plan(1), sampler, uniform_BL[one], codes_BL[one],
                       kept_BL[one])  # fmt: skip
        assert part.codes_BL.equal(whole.codes_BL[one])


def test_slots_that_were_never_written_are_not_seen(monkeypatch: pytest.MonkeyPatch):
    """Whatever finite values stand there."""
    model, (condition, uniform_BL, codes_BL) = toy(), numbers()
    sampler, plan = Sampler(parallel="zipar", window=2), model.plan(ROWS)
    kept_BL = prefix(0, 3, 5, 9, 17, 2)
    expected = rollout(model, condition, plan, sampler, uniform_BL, codes_BL, kept_BL)
    monkeypatch.setattr(torch.Tensor, "zero_", lambda cache: cache.fill_(1e6))
    spoilt = rollout(model, condition, plan, sampler, uniform_BL, codes_BL, kept_BL)
    assert spoilt.codes_BL.equal(expected.codes_BL)


def test_a_model_that_reads_its_guidance_decodes_in_one_branch():
    model, (condition, uniform_BL, _) = toy(guidance_conditioned=True), numbers()
    sampler = Sampler(guidance=2.0, parallel="zipar", window=2)
    samples = rollout(model, condition, model.plan(ROWS), sampler, uniform_BL)
    explicit = Condition(condition.label_B, torch.full((ROWS,), 2.0))
    again = rollout(model, explicit, model.plan(ROWS), sampler, uniform_BL)
    assert samples.codes_BL.equal(again.codes_BL)


# ---- refusals


OTHER_SIZES = {"vocab_size": VOCAB, "num_classes": CLASSES, "grid": (4, 4), "num_layers": 2, "dim": 16, "num_heads": 2}


def other(family: str) -> Backbone:
    return build(family, OTHER_SIZES, seed=0)


@pytest.mark.parametrize("family", ["arpg", "randar", "rar"])
def test_families_with_their_own_way_refuse_it_and_take_auto(family: str):
    model, row_B = other(family), torch.arange(2)
    with pytest.raises(VarkdError, match=f"parallel=zipar is for llamagen; {family} decodes"):
        Sampler(parallel="zipar").plan(model, Rng(0), row_B)
    plan = Sampler(parallel="auto").plan(model, Rng(0), row_B)
    condition, uniform_BL = Condition(torch.zeros(2, dtype=torch.long)), torch.rand(2, 16)
    auto, off = (rollout(model, condition, plan, Sampler(parallel=way), uniform_BL) for way in ("auto", "off"))
    assert auto.codes_BL.equal(off.codes_BL)


def test_two_models_do_not_decode_together_by_waves():
    model, (condition, uniform_BL, _) = toy(), numbers()
    joint = JointDecoding(model, lambda *_: pytest.fail("decoded"), uniform_BL)
    with pytest.raises(VarkdError, match="parallel=off where two decode together"):
        rollout(model, condition, model.plan(ROWS), Sampler(parallel="zipar"), uniform_BL, joint=joint)


@pytest.mark.parametrize("kind", [MixtureSampling, SpeculativeSampling])
def test_methods_of_two_models_refuse_it_before_anything_runs(kind: type):
    with pytest.raises(VarkdError, match=r"use sampler\.parallel=off"):
        kind(sampler=Sampler(parallel="auto"))


def test_a_teacher_of_another_family_is_not_decoded_in_silence():
    """The plan is the student's, so that only the decode itself meets the teacher."""
    teacher, plan = other("randar"), build("llamagen", OTHER_SIZES, seed=0).plan(2)
    with pytest.raises(VarkdError, match="randar decodes in parallel in its own way"):
        rollout(
            teacher, Condition(torch.zeros(2, dtype=torch.long)), plan, Sampler(parallel="zipar"), torch.rand(2, 16)
        )


def test_a_window_holds_a_code():
    with pytest.raises(VarkdError, match="window must be at least 1 code, got 0"):
        Sampler(parallel="zipar", window=0)
