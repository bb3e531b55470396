"""Every way to come by sequences: exact laws on enumerated toys, and the same promises on all families.

A law is written down from its definition as probabilities of whole sequences, and compared with thousands of samples
and, exactly, with the log-probabilities that a context stores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from itertools import accumulate, product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reference import step_inputs
from varkd.backbones.protocol import Backbone
from varkd.backbones.store import FAMILIES, build
from varkd.distill import prefixes as module
from varkd.distill.inputs import Prefixes, StepInputs
from varkd.distill.mixture import Mixture, Share
from varkd.distill.prefixes import (
    Completions,
    Data,
    MixedRollout,
    MixtureSampling,
    ParallelSampling,
    Rollout,
    ScheduledSampling,
    SpeculativeSampling,
    leading,
)
from varkd.distill.replay import Replay
from varkd.distill.schedule import LinearSchedule
from varkd.errors import VarkdError
from varkd.rollout import Sampler, rollout
from varkd.types import Batch, Condition, Part, Plan
from varkd.world import Rng

# ---- toys: 3 codes, 3 positions, one class

EVERY_BL = torch.tensor(list(product(range(3), repeat=3)))
GOLD_L = (2, 0, 1)
MANY = 4000
SAMPLERS = {"plain": Sampler(), "tempered": Sampler(temperature=0.8), "guided": Sampler(guidance=1.5)}
CHI_SQUARE = 54.05  # 99.9 % quantile with 26 degrees of freedom


@pytest.fixture
def toys(make_model: Callable[..., Backbone]) -> tuple[Backbone, Backbone]:
    return make_model(1, 3, (1, 3), scale=0.3), make_model(2, 3, (1, 3), scale=0.3)


def toy_part(contexts: Prefixes, toys: tuple[Backbone, Backbone], step: int = 0) -> Part:
    """Many rows of the same image and class."""
    batch = Batch(torch.tensor([GOLD_L]).expand(MANY, -1), torch.ones(MANY, dtype=torch.long), torch.arange(MANY))
    return contexts(batch, step_inputs(*toys, {}, Rng(0, step))).parts[-1]


@torch.no_grad()
def steps(model: Backbone, sampler: Sampler = SAMPLERS["plain"]) -> Tensor:
    """The law of every step of every sequence, (27, 3, 3), by full forward passes and plain exponentials."""
    label_B = torch.ones(27, dtype=torch.long)
    logits = model.head(model(EVERY_BL, Condition(label_B), model.plan(27)))
    if sampler.guidance != 1:
        null = model.head(model(EVERY_BL, Condition(label_B * 0 + model.null_label), model.plan(27)))
        logits = null + sampler.guidance * (logits - null)
    weight = (logits / sampler.temperature).exp()
    return weight / weight.sum(-1, keepdim=True)


def number_of(codes_BL: Tensor) -> Tensor:
    """Which row of `EVERY_BL` each sequence is."""
    return codes_BL @ torch.tensor([9, 3, 1])


def codes_of(law_BLV: Tensor) -> Tensor:
    """The probability of each sequence's own codes, (27, 3)."""
    return law_BLV.gather(2, EVERY_BL.unsqueeze(2)).squeeze(2)


def chi_square(codes_BL: Tensor, probability_B: Tensor) -> float:
    torch.testing.assert_close(probability_B.sum(), torch.ones((), dtype=torch.float64))
    observed, expected = torch.bincount(number_of(codes_BL), minlength=27), len(codes_BL) * probability_B
    assert observed[expected == 0].sum() == 0
    likely = expected > 0
    return float(((observed - expected)[likely] ** 2 / expected[likely]).sum())


def assert_law(part: Part, law_BLV: Tensor) -> None:
    """The samples follow the law, and the stored log-probabilities are exactly those of the law."""
    torch.testing.assert_close(law_BLV.sum(2), torch.ones(27, 3, dtype=torch.float64))
    of_codes = codes_of(law_BLV)
    assert chi_square(part.codes_BL, of_codes.prod(1)) < CHI_SQUARE
    assert chi_square(part.codes_BL, torch.full((27,), 1 / 27, dtype=torch.float64)) > 200  # it has power
    number_B = number_of(part.codes_BL)
    assert part.behavior_logp_BL is not None and part.source in ("student", "teacher")
    torch.testing.assert_close(part.behavior_logp_BL, of_codes.log()[number_B].float(), rtol=1e-4, atol=1e-5)
    # What is stored is a probability of whole sequences: over those that were drawn (nearly all) it sums to 1.
    stored = torch.zeros(27).index_put((number_B,), part.behavior_logp_BL.sum(1).exp())
    assert len(number_B.unique()) >= 26 and 0.995 < float(stored.sum()) < 1 + 1e-5


def allowed_set(p_V: list[float], top_k: int, top_p: float) -> set[int]:
    """The k likeliest codes, and of these every code above which at most the mass p stands."""
    by_rank = sorted(range(len(p_V)), key=lambda code: -p_V[code])[: top_k or len(p_V)]
    total = sum(p_V[code] for code in by_rank)
    above = accumulate((p_V[code] / total for code in by_rank), initial=0.0)
    return {code for code, mass in zip(by_rank, above, strict=False) if mass <= top_p}


def interleaved_law(q_V: list[float], p_V: list[float], top_k: int, top_p: float) -> list[float]:
    """q(x) [x in A] + (1 - q(A)) p(x)."""
    inside = allowed_set(p_V, top_k, top_p)
    rejected = 1 - sum(q_V[code] for code in inside)
    return [(q if code in inside else 0) + rejected * p for code, (q, p) in enumerate(zip(q_V, p_V, strict=True))]


def by_step(function: Callable[..., Any], *laws: Tensor) -> Tensor:
    """`function` of the probabilities of every step."""
    found = [
        function(*(law.tolist() for law in rows)) for rows in zip(*(law.flatten(0, 1) for law in laws), strict=True)
    ]
    return torch.tensor(found, dtype=torch.float64).view(27, 3, -1)


# ---- laws of contexts in which two models decode together


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_token_mix_draws_from_the_mixture(toys, alpha: float, sampler: Sampler):
    q_BLV, p_BLV = (steps(model, sampler) for model in toys)
    assert_law(toy_part(MixtureSampling(sampler, alpha), toys), alpha * p_BLV + (1 - alpha) * q_BLV)


def test_token_mix_has_the_students_and_the_teachers_law_at_its_ends(toys):
    """With the same uniform numbers it makes the very codes of a plain rollout."""
    plan, condition = toys[0].plan(MANY), Condition(torch.ones(MANY, dtype=torch.long))
    uniform_BL = Rng(0, 0).uniform("propose", torch.arange(MANY), 3)
    for alpha, model in enumerate(toys):
        alone = rollout(model, condition, plan, Sampler(), uniform_BL)
        part = toy_part(MixtureSampling(alpha=float(alpha)), toys)
        assert torch.equal(part.codes_BL, alone.codes_BL) and part.accept_BL is None
        assert part.behavior_logp_BL is not None and torch.equal(part.behavior_logp_BL, alone.logp_BL)


SETS = [
    {"top_k": 1, "top_p": 1.0},
    {"top_k": 2, "top_p": 1.0},
    {"top_p": 0.35},
    {"top_p": 0.6},
    {"top_k": 2, "top_p": 0.45},
]


@pytest.mark.parametrize("how", SETS, ids=str)
@pytest.mark.parametrize("sampler", [SAMPLERS["plain"], SAMPLERS["guided"]], ids=["plain", "guided"])
def test_interleaved_draws_from_its_law(toys, how: dict[str, Any], sampler: Sampler):
    q_BLV, p_BLV = (steps(model, sampler) for model in toys)
    rule = lambda q, p: interleaved_law(q, p, how.get("top_k", 0), how["top_p"])
    assert_law(toy_part(SpeculativeSampling(sampler, **how), toys), by_step(rule, q_BLV, p_BLV))


@pytest.mark.parametrize("how", SETS, ids=str)
def test_interleaved_keeps_what_the_teacher_allows_and_redraws_the_rest(toys, how: dict[str, Any]):
    """The first step: all rows have the same two laws."""
    part = toy_part(SpeculativeSampling(**how), toys)
    (q_V, p_V), accept_B = (steps(model)[0, 0].tolist() for model in toys), part.accept_BL[:, 0]  # type: ignore[index]
    inside = allowed_set(p_V, how.get("top_k", 0), how["top_p"])
    assert 0 < len(inside) < 3
    accepted, redrawn = (part.codes_BL[rows, 0] for rows in (accept_B, ~accept_B))
    assert set(accepted.tolist()) <= inside and set(redrawn.tolist()) == {0, 1, 2}
    mass = sum(q_V[code] for code in inside)
    assert float(accept_B.double().mean()) == pytest.approx(mass, abs=4 * (mass * (1 - mass) / MANY) ** 0.5)
    for code in range(3):
        for found, expected in ((redrawn, p_V[code]), (accepted, q_V[code] / mass if code in inside else 0.0)):
            share, error = float((found == code).double().mean()), (expected * (1 - expected) / len(found)) ** 0.5
            assert share == pytest.approx(expected, abs=4 * error + 1e-12)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    size=st.integers(2, 6),
    scale=st.floats(0.1, 5),
    top_k=st.integers(0, 6),
    top_p=st.floats(0.05, 0.99),
)
def test_the_choice_of_two_models_covers_its_law(seed: int, size: int, scale: float, top_k: int, top_p: float):
    """A grid of uniform numbers visits every code as often as it is likely, up to the width of the grid."""
    logits = scale * torch.randn(2, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    student, teacher = logits.log_softmax(1).float()
    grid = (torch.arange(200) + 0.5) / 200
    uniform, spare = (values.reshape(1, -1) for values in torch.meshgrid(grid, grid, indexing="ij"))
    pairs = [law.expand(1, uniform.shape[1], -1) for law in (student, teacher)]
    codes, logp, accept = SpeculativeSampling(top_k=top_k, top_p=top_p).choose(*pairs, uniform, spare)
    assert accept is not None
    q_V, p_V = student.double().exp().tolist(), teacher.double().exp().tolist()
    expected = interleaved_law(q_V, p_V, top_k, top_p)
    inside = allowed_set(p_V, top_k, top_p)
    for code, probability in enumerate(expected):
        visits = codes == code
        assert float(visits.double().mean()) == pytest.approx(probability, abs=0.03)
        if visits.any():
            assert float(logp[visits].exp().max()) == pytest.approx(probability, rel=1e-4, abs=1e-6)
            assert float(logp[visits].exp().min()) == pytest.approx(probability, rel=1e-4, abs=1e-6)
        assert code in inside or not (accept & visits).any()
    assert float(accept.double().mean()) == pytest.approx(sum(q_V[code] for code in inside), abs=0.03)


# ---- laws of data sequences with student codes in them


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize("share", [0.4, 1.0])
def test_scheduled_sampling_follows_its_law(toys, share: float, sampler: Sampler):
    """At every step the data's code with probability 1 - share, else the student's, given all codes so far."""
    gold = torch.nn.functional.one_hot(torch.tensor(GOLD_L), 3).double()
    law_BLV = (1 - share) * gold + share * steps(toys[0], sampler)
    part = toy_part(ScheduledSampling(share, sampler), toys)
    assert chi_square(part.codes_BL, codes_of(law_BLV).prod(1)) < CHI_SQUARE
    assert part.behavior_logp_BL is None and part.supervision_BL.tolist() == [list(GOLD_L)] * MANY


def parallel_law(q_BLV: Tensor, share: float, rounds: int, greedy: bool) -> Tensor:
    """The probability of every sequence: each round splices predictions that see the sequence of the round before."""
    if greedy:
        q_BLV = torch.nn.functional.one_hot(q_BLV.argmax(2), 3).double()
    gold = torch.nn.functional.one_hot(torch.tensor(GOLD_L), 3).double()
    spliced_BLV = (1 - share) * gold + share * q_BLV
    # From every sequence (27) to every sequence (27): positions are independent within a round.
    next_BB = torch.stack([spliced_BLV[:, torch.arange(3), codes].prod(1) for codes in EVERY_BL], dim=1)
    law_B = torch.zeros(27, dtype=torch.float64)
    law_B[number_of(torch.tensor(GOLD_L))] = 1
    for _ in range(rounds):
        law_B = law_B @ next_BB
    return law_B


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize(("share", "rounds"), [(0.4, 1), (0.4, 2), (0.7, 3), (1.0, 1), (1.0, 2)])
def test_parallel_sampling_follows_its_law(toys, share: float, rounds: int, greedy: bool):
    law_B = parallel_law(steps(toys[0]), share, rounds, greedy)
    part = toy_part(ParallelSampling(share, rounds, greedy), toys)
    assert chi_square(part.codes_BL, law_B) < CHI_SQUARE
    assert part.behavior_logp_BL is None and part.supervision_BL.tolist() == [list(GOLD_L)] * MANY


def test_a_restart_follows_the_student_from_the_data(toys):
    """The kept share is uniform on [0, 1), so 0, 1 and 2 codes are kept equally often."""
    q_BLV = steps(toys[0])
    law_B = torch.zeros(27, dtype=torch.float64)
    for kept in range(3):
        fits_B = (EVERY_BL[:, :kept] == torch.tensor(GOLD_L[:kept])).all(1)
        law_B += codes_of(q_BLV)[:, kept:].prod(1) * fits_B / 3
    assert chi_square(toy_part(MixedRollout(0.0, 1.0), toys).codes_BL, law_B) < CHI_SQUARE


@pytest.mark.parametrize("prefix", [0.0, 0.4])
def test_completions_follow_the_teacher_nearest_to_the_data(toys, prefix: float):
    """Of `count` independent completions the nearest: P(max) from the enumerated law, ties in favor of none."""
    codebook_VE = torch.tensor([[0.0, 0.0], [1.0, 0.2], [0.3, 2.0]])
    contexts = Completions(3, prefix)
    batch = Batch(torch.tensor([GOLD_L]).expand(MANY, -1), torch.ones(MANY, dtype=torch.long), torch.arange(MANY))
    inputs = step_inputs(*toys, {}, Rng(0, 0), codebook_tables=contexts.prepare(codebook_VE))
    kept, of_codes = int(3 * prefix), codes_of(steps(toys[1]))
    fits_B = (EVERY_BL[:, :kept] == torch.tensor(GOLD_L[:kept])).all(1)
    one_B = of_codes[:, kept:].prod(1) * fits_B
    distance_B = (codebook_VE.double()[EVERY_BL] - codebook_VE.double()[list(GOLD_L)]).square().sum((1, 2))
    law_B = torch.zeros(27, dtype=torch.float64)
    for number in range(27):  # the first of three equally near ones, or of any that are farther
        nearer, as_near = (
            one_B[rows].sum()
            for rows in (distance_B < distance_B[number] - 1e-6, (distance_B - distance_B[number]).abs() <= 1e-6)
        )
        beyond = 1 - nearer - as_near
        law_B[number] = one_B[number] / as_near * ((as_near + beyond) ** 3 - beyond**3) if as_near > 0 else 0
    part = contexts(batch, inputs).parts[0]
    assert part.source == "teacher" and chi_square(part.codes_BL, law_B) < CHI_SQUARE
    assert chi_square(part.codes_BL, one_B.where(fits_B, 0.0)) > 200  # one completion has another law


# ---- all families

SIZES: dict[str, Any] = {
    "vocab_size": 12,
    "num_classes": 3,
    "grid": (2, 3),
    "num_layers": 2,
    "dim": 16,
    "num_heads": 2,
    "ffn_dim": 24,
}
KINDS: dict[str, tuple[str, dict[str, Any], int | None]] = {
    "llamagen": ("llamagen", {}, None),
    "var": ("var", {"grid": None, "scales": (1, 2, 3), "code_dim": 4}, None),
    "arpg": ("arpg", {"num_layers": 4, "order": "random"}, None),
    "arpg in 3 steps": ("arpg", {"num_layers": 4, "order": "random"}, 3),
    "randar in 4 steps": ("randar", {"order": "random"}, 4),
    "rar": ("rar", {"order": "random"}, None),
}


class Pair:
    """A student and a teacher of one family with random float64 weights, a batch, and a sampler of so many steps."""

    def __init__(self, kind: str) -> None:
        family, other, num_steps = KINDS[kind]
        sizes = {name: value for name, value in {**SIZES, **other}.items() if value is not None}
        self.student, self.teacher = (self._model(family, sizes, seed) for seed in (1, 2))
        self.teacher.eval().requires_grad_(False)
        self.sampler = Sampler(steps=num_steps)
        generator, length = torch.Generator().manual_seed(0), self.student.sequence_length
        codes_BL = torch.randint(12, (8, length), generator=generator)
        self.batch = Batch(codes_BL, torch.tensor([0, 1, 2, 0, 1, 2, 0, 1]), torch.arange(8))
        self.codebook_VE = torch.randn(12, 4, generator=generator)
        self.plan = self.sampler.plan(self.student, Rng(0, 0), torch.arange(8))

    @staticmethod
    def _model(family: str, sizes: dict[str, Any], seed: int) -> Backbone:
        model = build(family, sizes).double()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.3, generator=generator)
        return model

    def inputs(self, contexts: Prefixes, step: int = 0) -> StepInputs:
        codebook_tables = contexts.prepare(self.codebook_VE)
        return step_inputs(self.student, self.teacher, {}, Rng(0, step), chunk_rows=7, codebook_tables=codebook_tables)

    def parts(self, contexts: Prefixes, batch: Batch | None = None, step: int = 0) -> tuple[Part, ...]:
        return contexts(batch or self.batch, self.inputs(contexts, step)).parts


@pytest.fixture(params=KINDS, scope="module")
def pair(request: pytest.FixtureRequest) -> Pair:
    return Pair(request.param)


def test_every_family_is_tried():
    assert {family for family, _, _ in KINDS.values()} == set(FAMILIES)


def every_context(sampler: Sampler) -> dict[str, Prefixes]:
    return {
        "data": Data(),
        "student": Rollout(sampler=sampler),
        "teacher": Rollout("teacher", sampler),
        "mixture_sampling": MixtureSampling(sampler, 0.3),
        "speculative_sampling by mass": SpeculativeSampling(sampler, top_p=0.5),
        "speculative_sampling by count": SpeculativeSampling(sampler, top_k=3, top_p=1.0),
        "mixed_rollout": MixedRollout(0.2, 0.8, sampler),
        "scheduled_sampling": ScheduledSampling(0.5, sampler),
        "parallel_sampling": ParallelSampling(0.5),
        "greedy, two rounds": ParallelSampling(0.5, 2, greedy=True),
        "data and two rounds": ParallelSampling(0.5, 2, with_data=True),
        "completions": Completions(3, 0.5, sampler),
    }


NAMES = list(every_context(Sampler()))


@torch.no_grad()
def law(model: Backbone, part: Part, sampler: Sampler = SAMPLERS["plain"]) -> Tensor:
    """The model's probabilities at every position of `part`, (B, L, V) float64, from one full forward pass."""
    logits = model.eval().head(model(part.codes_BL, part.condition, part.plan)) / sampler.temperature
    return logits.exp() / logits.exp().sum(-1, keepdim=True)


def of_codes(law_BLV: Tensor, part: Part) -> Tensor:
    return law_BLV.gather(2, part.codes_BL.unsqueeze(2)).squeeze(2)


@pytest.mark.parametrize("name", NAMES)
def test_parts_say_what_they_are(pair: Pair, name: str):
    contexts = every_context(pair.sampler)[name]
    pair.student.train()
    parts = pair.parts(contexts)
    assert pair.student.training and not pair.teacher.training
    assert {part.source for part in parts} == set(contexts.sources)
    alone = name.startswith(("data", "parallel", "greedy"))  # these read whole sequences: the family's own plan
    plan = pair.student.plan(8, Rng(0, 0), torch.arange(8)) if alone else pair.plan
    for part in parts:
        assert torch.equal(part.row_B, pair.batch.row_B) and torch.equal(part.condition.label_B, pair.batch.label_B)
        assert torch.equal(part.plan.order_BL, plan.order_BL) and part.plan.sizes == plan.sizes
        assert (part.weight_B == 1).all() and (part.age_B == 0).all()
        assert part.codes_BL.dtype == torch.int64 and 0 <= part.codes_BL.min() <= part.codes_BL.max() < 12
        spliced = contexts.splices and part.source == "student"
        assert torch.equal(part.supervision_BL, pair.batch.codes_BL if spliced else part.codes_BL)
        tensors = [getattr(part, field.name) for field in fields(Part)]
        assert not any(value.requires_grad for value in tensors if isinstance(value, Tensor))
    assert contexts.samplers == (() if alone else (pair.sampler,))
    assert contexts.needs_teacher == (
        name in ("teacher", "mixture_sampling", "completions") or "speculative_sampling" in name
    )


@pytest.mark.parametrize("name", NAMES)
def test_nobody_samples_with_dropout(name: str):
    pair, contexts = Pair("llamagen"), every_context(Sampler())[name]
    calm = pair.parts(contexts)
    pair.student = build("llamagen", SIZES, dropout=0.5).double()
    pair.student.load_state_dict(Pair("llamagen").student.state_dict())
    assert pair.student.training
    for part, other in zip(pair.parts(contexts), calm, strict=True):
        assert torch.equal(part.codes_BL, other.codes_BL)


@pytest.mark.parametrize("name", NAMES)
def test_a_row_does_not_depend_on_its_neighbors(pair: Pair, name: str):
    contexts = every_context(pair.sampler)[name]
    whole = pair.parts(contexts)
    for rows in (torch.tensor([5]), torch.tensor([7, 0, 3]), torch.arange(4, 8)):
        for piece, all_rows in zip(pair.parts(contexts, pair.batch.select(rows)), whole, strict=True):
            expected = all_rows.select(rows)
            for field in ("codes_BL", "supervision_BL", "row_B", "accept_BL"):
                one, other = getattr(piece, field), getattr(expected, field)
                assert (one is None) == (other is None) and (one is None or torch.equal(one, other)), field
            assert torch.equal(piece.plan.order_BL, expected.plan.order_BL)
            if expected.behavior_logp_BL is not None:
                torch.testing.assert_close(piece.behavior_logp_BL, expected.behavior_logp_BL)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "data"])
def test_another_step_makes_other_sequences(pair: Pair, name: str):
    contexts = every_context(pair.sampler)[name]
    assert torch.equal(pair.parts(contexts)[-1].codes_BL, pair.parts(contexts)[-1].codes_BL)
    assert not torch.equal(pair.parts(contexts)[-1].codes_BL, pair.parts(contexts, step=1)[-1].codes_BL)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_stored_log_probabilities_come_from_full_forward_passes(pair: Pair, temperature: float):
    """Two caches in lock-step say what two whole passes over the finished codes say."""
    sampler = replace(pair.sampler, temperature=temperature)

    def stored(contexts: Prefixes) -> tuple[Part, Tensor, Tensor, Tensor]:
        (part,) = pair.parts(contexts)
        assert part.behavior_logp_BL is not None
        return part, part.behavior_logp_BL, law(pair.student, part, sampler), law(pair.teacher, part, sampler)

    part, logp_BL, q_BLV, p_BLV = stored(MixtureSampling(sampler, 0.3))
    expected = of_codes(0.3 * p_BLV + 0.7 * q_BLV, part).log()
    torch.testing.assert_close(logp_BL, expected.float(), rtol=1e-4, atol=1e-5)

    for top_k, top_p in ((0, 0.5), (3, 1.0)):
        part, logp_BL, q_BLV, p_BLV = stored(SpeculativeSampling(sampler, top_k, top_p))
        laws, inside = torch.zeros_like(q_BLV), torch.zeros_like(q_BLV, dtype=torch.bool)
        for row, position in product(range(8), range(pair.student.sequence_length)):
            q_V, p_V = q_BLV[row, position].tolist(), p_BLV[row, position].tolist()
            laws[row, position] = torch.tensor(interleaved_law(q_V, p_V, top_k, top_p), dtype=torch.float64)
            inside[row, position, list(allowed_set(p_V, top_k, top_p))] = True
        torch.testing.assert_close(logp_BL, of_codes(laws, part).log().float(), rtol=1e-4, atol=1e-5)
        assert part.accept_BL is not None and 0 < part.accept_BL.double().mean() < 1
        assert of_codes(inside, part)[part.accept_BL].all()  # what was accepted is what the teacher allows


# ---- prefixes of the data


def kept_counts(sizes: tuple[int, ...]) -> list[int]:
    """How many codes whole leading steps can hold."""
    return list(accumulate(sizes, initial=0))


@settings(max_examples=60)
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=6), seed=st.integers(0, 10**6), data=st.data())
def test_leading_steps_by_brute_force(sizes: list[int], seed: int, data: st.DataObject):
    length, generator = sum(sizes), torch.Generator().manual_seed(seed)
    order_BL = torch.stack([torch.randperm(length, generator=generator) for _ in range(3)])
    shares = [
        data.draw(st.one_of(st.floats(0, 1, width=32), st.integers(0, length).map(lambda n: n / length)))
        for _ in range(3)
    ]
    found_BL = leading(Plan(order_BL, tuple(sizes)), torch.tensor(shares).unsqueeze(1))
    for row, share in enumerate(torch.tensor(shares).tolist()):
        kept = max(count for count in kept_counts(tuple(sizes)) if count <= share * length + 1e-5 * length)
        assert sorted(order_BL[row, :kept].tolist()) == found_BL[row].nonzero().flatten().tolist()


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.0), (0.5, 0.5), (0.2, 0.8), (0.0, 1.0), (1.0, 1.0)])
def test_restarts_keep_whole_steps_of_the_data(pair: Pair, low: float, high: float):
    contexts, length = MixedRollout(low, high, pair.sampler), pair.student.sequence_length
    (part,) = pair.parts(contexts)
    law_BLV, seen = law(pair.student, part), set()
    assert part.behavior_logp_BL is not None
    for row in range(8):
        order_L = pair.plan.order_BL[row]
        sampled_L = part.behavior_logp_BL[row, order_L] != 0
        kept = length - int(sampled_L.sum())
        assert not sampled_L[:kept].any() and kept in kept_counts(pair.plan.sizes)
        at_most = [max(n for n in kept_counts(pair.plan.sizes) if n <= share * length + 1e-4) for share in (low, high)]
        assert at_most[0] <= kept <= at_most[1]
        assert torch.equal(part.codes_BL[row, order_L[:kept]], pair.batch.codes_BL[row, order_L[:kept]])
        sampled = order_L[kept:]
        expected = of_codes(law_BLV, part)[row, sampled].log().float()
        torch.testing.assert_close(part.behavior_logp_BL[row, sampled], expected, rtol=1e-4, atol=1e-5)
        seen.add(kept)
    assert len(seen) > 1 or low == high or len(pair.plan.sizes) == 3
    assert low < 1 or seen == {length}


def test_restarts_read_no_code_behind_their_prefix(pair: Pair):
    contexts = MixedRollout(0.5, 0.5, pair.sampler)
    behind_BL = ~leading(pair.plan, torch.full((8, 1), 0.5))
    assert behind_BL.any()
    garbage = replace(pair.batch, codes_BL=pair.batch.codes_BL.masked_fill(behind_BL, 10**9))
    assert torch.equal(pair.parts(contexts, garbage)[0].codes_BL, pair.parts(contexts)[0].codes_BL)


def brute_distance(codes_L: list[int], gold_L: list[int], codebook: list[list[float]]) -> float:
    return sum(
        (a - b) ** 2
        for code, gold in zip(codes_L, gold_L, strict=True)
        for a, b in zip(codebook[code], codebook[gold], strict=True)
    )


@pytest.mark.parametrize("prefix", [0.0, 0.5, 0.8])
def test_completions_are_the_nearest_continuations(pair: Pair, prefix: float):
    contexts, gold_BL = Completions(4, prefix, pair.sampler), pair.batch.codes_BL
    (part,) = pair.parts(contexts)
    kept = max(n for n in kept_counts(pair.plan.sizes) if n <= prefix * pair.student.sequence_length + 1e-4)
    kept_BL = torch.zeros_like(gold_BL, dtype=torch.bool).scatter(1, pair.plan.order_BL[:, :kept], True)
    assert torch.equal(part.codes_BL[kept_BL], gold_BL[kept_BL])
    candidates, codebook = [], pair.codebook_VE.double().tolist()
    for nth in range(4):
        uniform_BL = Rng(0, 0).uniform(f"complete/{nth}", torch.arange(8), gold_BL.shape[1])
        candidates.append(
            rollout(
                pair.teacher, pair.batch.condition, pair.plan, pair.sampler, uniform_BL, gold_BL, kept_BL
            ).codes_BL.tolist()
        )
    places = set()
    for row in range(8):
        distances = [brute_distance(codes[row], gold_BL[row].tolist(), codebook) for codes in candidates]
        places.add(distances.index(min(distances)))
        assert part.codes_BL[row].tolist() == candidates[distances.index(min(distances))][row]
    assert len(places) > 1 or kept >= kept_counts(pair.plan.sizes)[-2]
    everything = Completions(2, 1.0, pair.sampler)
    assert torch.equal(pair.parts(everything)[0].codes_BL, gold_BL)  # the whole image is its own prefix


# ---- spliced data


def picked(law_BLV: Tensor, uniform_BL: Tensor) -> Tensor:
    """The inverse CDF, code by code in plain Python."""
    found = torch.zeros(uniform_BL.shape, dtype=torch.int64)
    for row, position in product(*map(range, uniform_BL.shape)):
        mass = accumulate(law_BLV[row, position].tolist())
        target = float(uniform_BL[row, position])
        found[row, position] = next(code for code, upto in enumerate(mass) if upto > target)
    return found


@pytest.mark.parametrize("greedy", [False, True])
def test_parallel_predictions_are_those_of_one_pass(pair: Pair, greedy: bool):
    """Three rounds, every code replaced: each round is the argmax or the inverse CDF over the round before."""
    contexts = ParallelSampling(1.0, 3, greedy, with_data=True)
    data, *rounds = pair.parts(contexts)
    assert [part.source for part in (data, *rounds)] == ["data", "student", "student", "student"]
    assert torch.equal(data.codes_BL, pair.batch.codes_BL)
    for turn, (former, part) in enumerate(zip((data, *rounds), rounds, strict=False)):
        law_BLV = law(pair.student, former)
        uniform_BL = Rng(0, 0).uniform(f"propose/{turn}", torch.arange(8), part.codes_BL.shape[1])
        assert torch.equal(part.codes_BL, law_BLV.argmax(2) if greedy else picked(law_BLV, uniform_BL))
        assert torch.equal(part.supervision_BL, pair.batch.codes_BL)
    (last,) = pair.parts(replace(contexts, with_data=False))
    assert torch.equal(last.codes_BL, rounds[-1].codes_BL) and last.source == "student"


def test_parallel_sampling_splices_predictions_into_the_data(pair: Pair):
    """Also in later rounds it is the data that a share of the predictions replaces."""
    data, *rounds = pair.parts(ParallelSampling(0.3, 3, greedy=True, with_data=True))
    for former, part in zip((data, *rounds), rounds, strict=False):
        predicted_BL, changed_BL = law(pair.student, former).argmax(2), part.codes_BL != pair.batch.codes_BL
        assert torch.equal(part.codes_BL[changed_BL], predicted_BL[changed_BL])
        share = float(changed_BL.double().mean())
        assert 0 < share < 0.6


def test_scheduled_sampling_with_every_code_is_a_rollout(pair: Pair):
    (part,) = pair.parts(ScheduledSampling(1.0, pair.sampler))
    uniform_BL = Rng(0, 0).uniform("rollout/scheduled", torch.arange(8), part.codes_BL.shape[1])
    expected = picked(law(pair.student, part), uniform_BL.gather(1, pair.plan.rank_BL))
    assert torch.equal(part.codes_BL, expected)


def test_scheduled_sampling_keeps_about_the_share_that_it_should(pair: Pair):
    (part,) = pair.parts(ScheduledSampling(0.25, pair.sampler))
    uniform_BL = Rng(0, 0).uniform("rollout/scheduled", torch.arange(8), part.codes_BL.shape[1])
    own_BL = picked(law(pair.student, part), uniform_BL.gather(1, pair.plan.rank_BL))
    changed_BL = part.codes_BL != pair.batch.codes_BL
    assert 0 < float(changed_BL.double().mean()) < 0.5
    assert torch.equal(part.codes_BL[changed_BL], own_BL[changed_BL])  # given the codes strewn in before


@pytest.mark.parametrize("contexts", [ScheduledSampling(0.0), ParallelSampling(0.0, 2)])
def test_a_share_of_nothing_is_the_data(pair: Pair, contexts: ScheduledSampling | ParallelSampling):
    if isinstance(contexts, ScheduledSampling):
        contexts = replace(contexts, sampler=pair.sampler)
    (part,) = pair.parts(contexts)
    assert torch.equal(part.codes_BL, pair.batch.codes_BL) and torch.equal(part.supervision_BL, pair.batch.codes_BL)


# ---- who is called, who is read


@pytest.mark.parametrize("name", [name for name in NAMES if name != "data"])
def test_a_fraction_of_nothing_calls_nobody(student, teacher, batch, monkeypatch, name: str):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model was called")

    monkeypatch.setattr(module, "rollout", refuse)
    monkeypatch.setattr(type(student), "forward", refuse)
    contexts = every_context(Sampler())[name]
    mixture = Mixture((Share(Data(), "rest"), Share(contexts, 0.0)))  # type: ignore[arg-type]
    (part,) = mixture(batch, step_inputs(student, teacher, {}, Rng(0, 0))).parts
    assert part.source == "data" and torch.equal(part.codes_BL, batch.codes_BL)


SAMPLED = [
    Rollout(),
    Rollout("teacher"),
    MixtureSampling(),
    SpeculativeSampling(),
    MixedRollout(0.0, 0.0),
    Replay(),
    Replay(MixtureSampling()),
    Completions(2, 0.0),
]


@pytest.mark.parametrize("contexts", SAMPLED)
def test_without_a_share_of_data_its_codes_are_never_read(student, teacher, batch, contexts):
    mixture = Mixture((Share(Data(), 0.0), Share(contexts, 1.0)))
    codebook_tables = mixture.prepare(torch.randn(12, 3, generator=torch.Generator().manual_seed(0)))
    inputs = step_inputs(student, teacher, {}, Rng(0, 0), codebook_tables=codebook_tables)
    garbage = replace(batch, codes_BL=torch.full_like(batch.codes_BL, 10**9))
    if isinstance(contexts, Completions):  # it compares with the image by design
        with pytest.raises(IndexError):
            mixture(garbage, inputs)
        return
    (poisoned,), (clean,) = mixture(garbage, inputs).parts, mixture(batch, inputs).parts
    assert torch.equal(poisoned.codes_BL, clean.codes_BL) and poisoned.codes_BL.max() < student.vocab_size


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MixtureSampling(alpha=1.2), "mixture_sampling: alpha must lie in"),
        (lambda: MixtureSampling(alpha=LinearSchedule(0.5, -0.5)), "mixture_sampling: alpha must lie in"),
        (lambda: SpeculativeSampling(top_k=0, top_p=1.0), "speculative_sampling: need top_k > 0 or top_p in"),
        (lambda: SpeculativeSampling(top_k=-1), "speculative_sampling: need"),
        (lambda: SpeculativeSampling(top_p=0.0), "speculative_sampling: need"),
        (lambda: MixedRollout(low=-0.1), "mixed_rollout: low must lie in"),
        (lambda: MixedRollout(high=1.1), "mixed_rollout: high must lie in"),
        (lambda: ScheduledSampling(2.0), "scheduled_sampling: share must lie in"),
        (lambda: ParallelSampling(-1.0), "parallel_sampling: share must lie in"),
        (lambda: ParallelSampling(rounds=0), "parallel_sampling: rounds must be at least 1"),
        (lambda: Completions(count=0), "completions: count must be at least 1"),
        (lambda: Completions(prefix=1.5), "completions: prefix must lie in"),
    ],
)
def test_nonsense_is_refused(make: Callable[[], Prefixes], message: str):
    with pytest.raises(VarkdError, match=message):
        make()


@pytest.mark.parametrize("contexts", [MixtureSampling(), SpeculativeSampling(), Completions()])
def test_a_missing_teacher_is_named(student, batch, contexts):
    inputs = step_inputs(student, None, {}, Rng(0, 0), codebook_tables=contexts.prepare(torch.randn(12, 3)))
    with pytest.raises(VarkdError, match="teacher=RUN"):
        contexts(batch, inputs)
