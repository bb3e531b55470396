"""The chunked loss against the plain one: every preset, every split into chunks, micro-batches and ranks."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from reference import FirstHalf, Weighed, plain_loss, step_inputs
from varkd.backbones.protocol import Backbone
from varkd.distill import loss as module
from varkd.distill.bestof import BestOf
from varkd.distill.divergences import JSD, CrossEntropy, Decoupled, ForwardKL, ReverseKL, SequenceSkew, SkewKL
from varkd.distill.inputs import State, StepInputs
from varkd.distill.loss import Stats, chunked_head_loss, denominators, distill_loss
from varkd.distill.method import Method, Term
from varkd.distill.mixture import Mixture, Share
from varkd.distill.prefixes import Data, MixedRollout, Rollout
from varkd.distill.replay import Replay
from varkd.distill.schedule import TaidTime, adaptives
from varkd.distill.selection import Accepted, Confidence, EntropyWeight, Random
from varkd.distill.spaces import Clusters, Full, TopK
from varkd.distill.teachers import LiveRows
from varkd.errors import VarkdError
from varkd.methods import METHODS
from varkd.types import Batch, Context
from varkd.world import Rng, World

PROGRESS, STEP = 0.8, 3
SELECTED = Method(
    (
        Term("kd", ForwardKL(), selection=Confidence(0.5, "max_prob"), normalizer="selected"),
        Term("student", JSD(0.3), ("student",), Random(0.4), Clusters(3, 0.2), 0.7, normalizer="selected"),
        Term("ce", CrossEntropy(), ("data",), weight=0.5),
    ),
    Mixture((Share(Data(), 0.5), Share(Weighed(), 0.5))),  # type: ignore[arg-type]
)
GATED = Method(
    (
        Term("anchor", ForwardKL(), ("data",)),
        Term("student", ForwardKL(), ("student",), Confidence(0.5, "cluster_mass"), Clusters(within=0.3)),
    ),
    Mixture((Share(Data(), 0.5), Share(Replay(), 0.5))),
)
PREFIXES = Method(
    (
        Term("student", SkewKL(SequenceSkew()), ("student",), EntropyWeight(0.3), TopK(4)),
        Term("code", Decoupled("target"), selection=Accepted("neighbors", neighbors=3), weight=0.5),
        Term("ce", CrossEntropy(), ("data",), FirstHalf(0.2), weight=0.5, normalizer="selected"),  # type: ignore[arg-type]
    ),
    Mixture((Share(Data(), 0.5), Share(Replay(BestOf(count=2)), 0.5))),
)
SURE = Method(
    (
        Term("kd", JSD(0.3), selection=Accepted("nucleus", floor=0.0), normalizer="selected", generated_only=True),
        Term("soft", ReverseKL(), ("student",), Accepted("speculative"), Clusters(3, 0.2, "plain")),
        Term("code", ForwardKL(), ("student",), Accepted("code", floor=0.0), Full(1.7)),
    ),
    Mixture((Share(Data(), 0.5), Share(BestOf(MixedRollout(), count=3, score="teacher"), 0.5))),
)
ALL = {
    **{name: preset.method for name, preset in METHODS.items()},
    "selected": SELECTED,
    "gated": GATED,
    "prefixes": PREFIXES,
    "sure": SURE,
}
every = pytest.mark.parametrize("name", ALL)
CODEBOOK_VE = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))


@dataclass
class Case:
    """A method frozen at one moment of a run, with thresholds from earlier steps."""

    inputs: StepInputs
    context: Context
    world: World = field(default_factory=World)

    @property
    def totals(self) -> dict[str, float]:
        return denominators(self.inputs, self.context)


def thresholds(method: Method) -> State:
    """In the middle of the scores of the toy teacher, so that about half of the positions are kept."""
    middle = {"max_prob": 0.2, "cluster_mass": 0.38, "code_prob": 0.08, "entropy": -0.9}
    chosen = [
        (term.key(term.selection), term.selection) for term in method.terms if isinstance(term.selection, Confidence)
    ]
    return {key: torch.full((6,) if s.per_position else (1,), middle[s.score]) for key, s in chosen}


def memory(method: Method) -> State:
    """Thresholds, adaptive numbers and running gaps from earlier steps."""
    numbers = {key: [0.6, 0.01, 2.0] if isinstance(value, TaidTime) else [0.5, 2.0] for key, value in adaptives(method)}
    gaps = {term.key(term.skew): [0.03] for term in method.terms if term.skew}
    moved = {key: torch.tensor(values, dtype=torch.float64) for key, values in (numbers | gaps).items()}
    return {**thresholds(method), **moved}


def case(method: Method, student: Backbone, teacher: Backbone, batch: Batch, world: World | None = None) -> Case:
    state, world, rng = memory(method), world or World(), Rng(0, STEP)
    method, codebook_tables = method.at(PROGRESS, state), method.prepare(CODEBOOK_VE)
    reference = copy.deepcopy(student) if method.needs_reference else None
    inputs = StepInputs(method, student, teacher, state, rng, world, 7, codebook_tables, reference)
    return Case(inputs, method.contexts(batch, inputs), world)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.clone()
        parameter.grad = None
    return found


def run(
    case: Case, chunk_rows: int = 7, micro_batches: int = 1, audit: bool = False
) -> tuple[Tensor, dict[str, Tensor], Stats]:
    """The loss, the gradients and the statistics of one step."""
    inputs = replace(case.inputs, chunk_rows=chunk_rows, audit=audit)
    stats, total = Stats(), torch.zeros((), dtype=torch.float64)
    totals = case.totals
    for micro in case.context.micro_batches(micro_batches):
        value, micro_stats = distill_loss(inputs, micro, totals)
        value.backward()
        total += value.detach()
        stats.merge(micro_stats)
    return total, gradients(inputs.student), stats


def run_plain(case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    value = plain_loss(case.inputs, case.context, case.totals)
    value.backward()
    return value.detach(), gradients(case.inputs.student)


def assert_same(one: Any, other: Any, rtol: float = 1e-9, atol: float = 1e-12) -> None:
    torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


@every
def test_chunked_equals_plain_for_every_chunk_size(name, student, teacher, batch):
    subject = case(ALL[name], student, teacher, batch)
    expected = run_plain(subject)
    assert expected[0] != 0 and all(gradient.abs().max() > 0 for gradient in expected[1].values())
    for chunk_rows in (1, 7, 10_000):
        assert_same(run(subject, chunk_rows)[:2], expected)


@every
def test_the_split_into_micro_batches_changes_nothing(name, student, teacher, batch):
    subject = case(ALL[name], student, teacher, batch)
    value, gradient, stats = run(subject, audit=True)
    for count in (2, 4, 8):
        split_value, split_gradient, split_stats = run(subject, micro_batches=count, audit=True)
        assert_same((split_value, split_gradient), (value, gradient))
        means, split_means = stats.collect(World()).means, split_stats.collect(World()).means
        assert set(means) == set(split_means)
        for key in means:
            assert split_means[key] == pytest.approx(means[key], rel=1e-9)


def test_the_methods_here_do_select_and_weigh(student, teacher, batch):
    subject = case(GATED, student, teacher, batch)
    means = run(subject)[2].collect(World()).means
    assert 0.2 < means["kept/student"] < 0.9
    subject = case(SELECTED, student, teacher, batch)
    weights = [part.weight_B for part in subject.context.parts if part.source == "student"]
    assert weights[0].std() > 0.01


# ---- two ranks as two threads


class Exchange:
    """A meeting point of threads; a rank that does not come is an error after 20 s, not a hang."""

    def __init__(self, size: int) -> None:
        self.slots: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=20)

    def __call__(self, rank: int, value: Tensor) -> list[Tensor]:
        self.slots[rank] = value.clone()
        self.barrier.wait()
        found = list(self.slots)
        self.barrier.wait()
        return found


@dataclass(frozen=True)
class ThreadWorld(World):
    exchange: Exchange = field(default_factory=lambda: Exchange(2))

    def sum(self, value: Tensor) -> Tensor:
        return torch.stack(self.exchange(self.rank, value)).sum(0)

    def gather(self, rows: Tensor) -> Tensor:
        return torch.cat(self.exchange(self.rank, rows))


def on_two_ranks(work: Callable[[World], Any]) -> list[Any]:
    exchange, results, errors = Exchange(2), [None, None], []

    def target(rank: int) -> None:
        try:
            results[rank] = work(ThreadWorld(rank, 2, exchange))
        except BaseException as error:
            errors.append(error)
            exchange.barrier.abort()

    threads = [threading.Thread(target=target, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def step_on(world: World, method: Method, student: Backbone, teacher: Backbone, batch: Batch) -> dict[str, Any]:
    """What one rank does in a step, with its own copies and its share of the rows."""
    per_rank = len(batch) // world.size
    mine = batch.select(torch.arange(world.rank * per_rank, (world.rank + 1) * per_rank))
    subject = case(method, copy.deepcopy(student), copy.deepcopy(teacher), mine, world)
    inputs = replace(subject.inputs, audit=True)
    value, stats = distill_loss(inputs, subject.context, subject.totals, gradient_scale=world.size)
    value.backward()
    scores = stats.collect(world).observed
    state = subject.inputs.method.update({**subject.inputs.state}, subject.context, scores, subject.inputs.rng)
    return {
        "loss": value.detach() / world.size,
        "gradient": gradients(subject.inputs.student),
        "means": stats.collect(world).means,
        "shared": {key: value for key, value in state.items() if not key.startswith("rows/")},
        "rows": {key: value for key, value in state.items() if key.startswith("rows/")},
    }


UNEVEN = replace(
    ALL["varkd"], contexts=Mixture((Share(Data(), 0.9), Share(Rollout(), 0.1)))
)  # one student row, which rank 1 holds; rank 0 has none


@pytest.mark.parametrize("name", [*ALL, "uneven"])
def test_two_ranks_are_one(name, student, teacher, batch):
    method = {**ALL, "uneven": UNEVEN}[name]
    one = step_on(World(), method, student, teacher, batch)
    ranks = on_two_ranks(lambda world: step_on(world, method, student, teacher, batch))
    rounding = {"rtol": 1e-7, "atol": 1e-8}  # what codes were drawn with is kept in float32
    assert_same(ranks[0]["loss"] + ranks[1]["loss"], one["loss"], **rounding)
    averaged = {key: (ranks[0]["gradient"][key] + ranks[1]["gradient"][key]) / 2 for key in one["gradient"]}
    assert_same(averaged, one["gradient"], **rounding)
    for rank in ranks:
        assert set(rank["means"]) == set(one["means"])
        for key in one["means"]:
            assert rank["means"][key] == pytest.approx(one["means"][key], rel=1e-6)
        torch.testing.assert_close(rank["shared"], one["shared"], rtol=1e-6, atol=1e-7)
    for key, rings in one["rows"].items():  # in the order of the global rows
        assert_same(torch.cat([rank["rows"][key] for rank in ranks]), rings, rtol=1e-6, atol=1e-6)


# ---- what the loss must not do


def test_the_teacher_gets_no_gradient_and_does_not_change(student, teacher, batch):
    teacher.requires_grad_(True)
    before = copy.deepcopy(teacher.state_dict())
    run(case(ALL["varkd"], student, teacher, batch))
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not teacher.training


def test_a_missing_teacher_is_named(student, batch):
    subject = case(ALL["ce"], student, student, batch)
    inputs = replace(subject.inputs, method=ALL["gkd"], teacher=None)
    with pytest.raises(VarkdError, match="teacher=RUN"):
        distill_loss(inputs, subject.context, {"jsd": 1.0})


@pytest.mark.parametrize("normalizer", ["total", "selected"])
def test_a_batch_with_nothing_selected_is_zero_with_a_graph(student, teacher, batch, normalizer):
    nothing = Confidence(0.5, "max_prob", floor=0.0)
    subject = case(
        Method((Term("kd", ForwardKL(), selection=nothing, normalizer=normalizer),)), student, teacher, batch
    )
    subject.inputs = replace(subject.inputs, state={"threshold/kd": torch.full((6,), 2.0)})
    value, _ = distill_loss(subject.inputs, subject.context, subject.totals)
    assert value == 0 and value.requires_grad
    value.backward()
    assert all((gradient == 0).all() for gradient in gradients(student).values())


def test_garbage_at_positions_that_do_not_count_changes_nothing(student, teacher, batch):
    """Polarity: a target is read exactly where its weight is not 0."""
    method = Method((Term("ce", CrossEntropy(), selection=Random(0.5, floor=0.0)),))
    subject = case(method, student, teacher, batch)
    (part,) = subject.context.parts
    weight_BL = Random(0.5, floor=0.0)({}, part, method.terms[0].space, None, subject.inputs.rng)
    assert 0.2 < weight_BL.mean() < 0.8
    expected = run(subject)[:2]
    other_BL = (part.supervision_BL + 1) % 12
    unread = torch.where(weight_BL == 0, other_BL, part.supervision_BL)
    read = torch.where(weight_BL == 0, part.supervision_BL, other_BL)
    assert_same(run(replace(subject, context=Context((replace(part, supervision_BL=unread),))))[:2], expected)
    changed = run(replace(subject, context=Context((replace(part, supervision_BL=read),))))[0]
    assert abs(changed - expected[0]) > 1e-3


def test_normalizers_by_hand(student, teacher, batch):
    """`total` divides by all positions of the term's sources, `selected` by the mass of the weights."""
    weight_BL = Random(0.5, 0.1)(
        {}, case(ALL["ce"], student, teacher, batch).context.parts[0], None, None, Rng(0, STEP)
    )  # type: ignore[arg-type]
    plan = student.plan(8)
    logp = student.head(
        student(batch.codes_BL, case(ALL["ce"], student, teacher, batch).context.parts[0].condition, plan)
    )
    ce_BL = -logp.log_softmax(-1).gather(2, batch.codes_BL.unsqueeze(2)).squeeze(2)
    for normalizer, denominator in (("total", 48.0), ("selected", float(weight_BL.double().sum()))):
        term = Term("ce", CrossEntropy(), selection=Random(0.5, 0.1), weight=0.3, normalizer=normalizer)  # type: ignore[arg-type]
        subject = case(Method((term,)), student, teacher, batch)
        assert subject.totals["ce"] == pytest.approx(denominator)
        expected = 0.3 * (weight_BL * ce_BL).sum() / denominator
        torch.testing.assert_close(run(subject)[0], expected.detach().double(), rtol=1e-6, atol=0)


def test_rows_that_no_term_selects_need_no_head(student, teacher, batch, monkeypatch):
    method = Method((Term("kd", ReverseKL(), on=("student",)),), Mixture((Share(Data(), 0.75), Share(Rollout(), 0.25))))
    subject = case(method, student, teacher, batch)
    rows = {"student": 0, "teacher": 0}
    real = module.chunked_head_loss

    def counting(hidden_ND: Tensor, *rest: Any) -> Tensor:
        rows["student"] += len(hidden_ND)
        return real(hidden_ND, *rest)

    project = LiveRows._project

    def count(self: LiveRows, hidden_ND: Tensor) -> Tensor:
        rows["teacher"] += len(hidden_ND)
        return project(self, hidden_ND)

    monkeypatch.setattr(module, "chunked_head_loss", counting)
    monkeypatch.setattr(LiveRows, "_project", count)
    distill_loss(subject.inputs, subject.context, subject.totals)
    assert rows == {"student": 2 * 6, "teacher": 2 * 6}


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else (out,):
            if isinstance(each, Tensor):
                self.elements = max(self.elements, each.numel())
        return out


def test_the_logits_of_the_whole_batch_are_never_held(make_model, make_batch):
    vocab_size, num_rows = 509, 48
    student, teacher = make_model(1, vocab_size), make_model(2, vocab_size)
    method = Method((Term("kd", JSD(0.5), selection=Confidence(0.5, "cluster_mass"), space=Clusters(within=0.5)),))
    batch = make_batch(vocab_size=vocab_size)
    inputs = StepInputs(
        method,
        student,
        teacher,
        {},
        Rng(0, 0),
        chunk_rows=5,
        codebook_tables=method.prepare(torch.randn(vocab_size, 3)),
    )
    context = method.contexts(batch, step_inputs(student, teacher, {}, Rng(0, 0)))
    with Largest() as largest:
        distill_loss(inputs, context, {"kd": 48.0})[0].backward()
    with Largest() as plain:
        plain_loss(inputs, context, {"kd": 48.0}).backward()
    assert plain.elements >= num_rows * vocab_size  # the yardstick does see whole logits
    # The largest left over is the head itself, V x D, or a chunk of 5 rows.
    assert largest.elements <= max(16 * vocab_size, 5 * (vocab_size + 23)) < num_rows * vocab_size / 2


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk_rows", [2, 100])
def test_gradcheck_of_the_chunked_head(bias: bool, chunk_rows: int):
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 3), (4, 3), (4,)][: 3 if bias else 2]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    target_NV = torch.randn(5, 4, generator=generator, dtype=torch.float64)

    def evaluate(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            value = (leaf.log_softmax(1) * target_NV[rows]).sum() + (leaf**3).sum()
            return value.detach(), torch.autograd.grad(value, leaf)[0]

    def function(hidden: Tensor, weight: Tensor, bias_V: Tensor | None = None) -> Tensor:
        head = SimpleNamespace(weight=weight, bias=bias_V)
        return 1.7 * chunked_head_loss(hidden, head, evaluate, chunk_rows)  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(function, tensors)
    with torch.no_grad():
        without_grad = function(*tensors)
    torch.testing.assert_close(without_grad, function(*tensors).detach())


def test_the_gradient_scale_scales(student, teacher, batch):
    subject = case(ALL["gkd"], student, teacher, batch)
    value, gradient, _ = run(subject)
    scaled, _ = distill_loss(subject.inputs, subject.context, subject.totals, gradient_scale=3.0)
    scaled.backward()
    assert_same((scaled.detach(), gradients(student)), (3 * value, {key: 3 * each for key, each in gradient.items()}))


@pytest.mark.parametrize("name", ["kd", "gkd", "varkd", "gated"])
def test_bfloat16_stays_close_to_float32(name, make_model, batch):
    student, teacher = make_model(1, dtype=torch.float32, scale=0.2), make_model(2, dtype=torch.float32, scale=0.2)
    subject = case(ALL[name], student, teacher, batch)
    if name == "gated":  # a score next to its threshold may fall on the other side: compare with all positions kept
        subject.inputs = replace(subject.inputs, state={})
    totals = subject.totals
    value, gradient, _ = run(subject)
    with torch.autocast("cpu", torch.bfloat16):
        narrow, _ = distill_loss(subject.inputs, subject.context, totals)
    narrow.backward()
    assert narrow.dtype == torch.float32
    assert float(narrow.detach()) == pytest.approx(float(value), rel=2e-2)
    for key, each in gradients(student).items():
        assert each.dtype == torch.float32
        assert torch.cosine_similarity(each.flatten(), gradient[key].flatten(), dim=0) > 0.99, key


# ---- statistics


def test_statistics_are_means_in_nats(student, teacher, batch):
    subject = case(ALL["kd_ce"], student, teacher, batch)
    stats = run(subject)[2]
    means = stats.collect(World()).means
    assert means["kept/kd"] == 1
    part = subject.context.parts[0]
    logits = student.head(student(part.codes_BL, part.condition, part.plan))
    ce = nn.functional.cross_entropy(logits.flatten(0, 1), part.codes_BL.flatten()).detach()
    assert means["terms/ce"] == pytest.approx(float(ce), rel=1e-9)  # the term itself, without its weight of 1/2
    assert Stats().collect(World()).means == {}


def test_gathered_scores_are_by_generation_rank(student, teacher, batch):
    subject = case(SELECTED, student, teacher, batch)
    stats = run(subject, micro_batches=4)[2]
    (name,) = [t.key(t.selection) for t in subject.inputs.method.terms if isinstance(t.selection, Confidence)]
    scores = stats.collect(World()).observed
    assert set(scores) == {name}
    logits = [teacher.head(teacher(part.codes_BL, part.condition, part.plan)) for part in subject.context.parts]
    expected = torch.cat(logits).softmax(-1).max(-1).values
    torch.testing.assert_close(scores[name], expected.float().detach(), rtol=1e-5, atol=1e-6)


def test_a_term_of_weight_zero_costs_nothing(student, teacher, batch):
    with_zero = Method((Term("ce", CrossEntropy()), Term("kd", ForwardKL(), weight=0.0)))
    value, gradient, stats = run(case(with_zero, student, teacher, batch))
    expected = run(case(ALL["ce"], student, teacher, batch))
    assert_same((value, gradient), expected[:2])
    assert all(math.isfinite(mean) for mean in stats.collect(World()).means.values())
