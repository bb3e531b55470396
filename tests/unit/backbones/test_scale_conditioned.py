"""A student that reads the guidance scale: its embedding, what it is taught, and that one pass does for two."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from varkd.backbones.layers import GuidanceEmbedding
from varkd.backbones.protocol import Backbone
from varkd.backbones.store import FAMILIES, build, weights_hash
from varkd.distill import loss as loss_module
from varkd.distill.inputs import StepInputs
from varkd.distill.loss import denominators, distill_loss
from varkd.distill.method import Method
from varkd.distill.target import Guided
from varkd.evaluate.agreement import agreement, cross_entropy, student_batches
from varkd.evaluate.speed import samples_per_second
from varkd.methods import METHODS
from varkd.rollout import Sampler, guidance_per_step, rollout
from varkd.types import Batch, Condition, Context, Part, Plan, state_hash
from varkd.world import Rng

SMALL = {"vocab_size": 12, "num_classes": 3, "num_layers": 2, "dim": 16, "num_heads": 2, "ffn_dim": 24}
CPU = torch.device("cpu")


def sizes_of(family: str, **changes: Any) -> dict[str, Any]:
    layout = {"scales": (1, 2, 3), "code_dim": 4} if family == "var" else {"grid": (2, 3)}
    return {**SMALL, **layout, **changes}


def make(family: str, seed: int = 0, std: float = 0.4, **changes: Any) -> Backbone:
    """Random float64 weights, the head included."""
    model, generator = build(family, sizes_of(family, **changes)).double(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=std, generator=generator)
    return model.eval()


# ---- the embedding


def test_the_embedding_equals_its_formula():
    embedding = GuidanceEmbedding(5).double()
    scales = [0.0, 1.0, 1.5, 4.0, 16.0]
    for scale, found_D in zip(scales, embedding(torch.tensor(scales)).tolist(), strict=True):
        angles = [2.0**power * (scale - 1) for power in range(-6, 2)]
        features = [*map(math.sin, angles), *(1 - math.cos(angle) for angle in angles)]
        for found, weights in zip(found_D, embedding.linear.weight.tolist(), strict=True):
            assert found == pytest.approx(sum(w * f for w, f in zip(weights, features, strict=True)), abs=1e-12)
    assert torch.equal(embedding(torch.ones(2)), torch.zeros(2, 5, dtype=torch.float64))


def test_scales_are_told_apart_in_low_precision():
    """A tenth of a scale survives bfloat16 weights: the angles are computed in float32."""
    embedding = GuidanceEmbedding(8).bfloat16()
    found = embedding(1 + torch.arange(160) / 10)
    assert found.dtype == torch.bfloat16 and len(found.unique(dim=0)) == 160


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_new_model_starts_without_an_effect_of_the_scale(family: str):
    flags = (False, True, True)
    plain, scaled, again = (build(family, sizes_of(family, guidance_conditioned=flag), seed=3) for flag in flags)
    own = dict(scaled.named_parameters())
    assert not own.pop("guidance_embedding.linear.weight").any()
    assert own.keys() == dict(plain.named_parameters()).keys()
    assert all(torch.equal(own[name], value) for name, value in plain.named_parameters())
    assert weights_hash(scaled) == weights_hash(again) != weights_hash(plain)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_recorded_names_of_plain_models_stay(family: str):
    """Run folders hold hashes from before there were scales; a resume compares them."""
    model = build(family, sizes_of(family))
    known = [field.name for field in fields(model.config) if field.name != "guidance_conditioned"]
    described = f"{type(model.config).__name__}({', '.join(f'{n}={getattr(model.config, n)!r}' for n in known)})"
    assert weights_hash(model) == state_hash(f"({family!r}, {described})", model.state_dict())


# ---- what the student is taught


def taught(teacher: Backbone, target: Guided, part: Part) -> Tensor:
    """The log-probabilities of kd_guided's target, (B, L, V)."""
    method = replace(METHODS["kd_guided"].method, target=target)
    student = make(teacher.family, seed=9, guidance_conditioned=True)
    found = loss_module._teacher_rows(StepInputs(method, student, teacher, {}, Rng(0), codebook_tables={}), part)
    assert found is not None
    return found.logits(slice(None)).log_softmax(-1).view(*part.codes_BL.shape, -1)


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5, check_dtype=False)


def of_codes(logp_BLV: Tensor, codes_BL: Tensor) -> Tensor:
    return logp_BLV.gather(2, codes_BL.unsqueeze(2)).squeeze(2)


@pytest.mark.parametrize(
    ("family", "steps"), [*((family, None) for family in sorted(FAMILIES)), ("arpg", 3), ("randar", 3)]
)
def test_the_target_is_what_the_guided_teacher_samples_from(family: str, steps: int | None):
    """On its own guided samples, by each family's own schedule: the log-probabilities that the decode stored."""
    teacher, label_B, row_B = make(family, seed=1), torch.tensor([0, 1, 2, 1, 0]), torch.arange(5)
    plan = teacher.plan(5, Rng(4), row_B, steps)
    uniform_BL = Rng(2).uniform("sample", row_B, plan.order_BL.shape[1])
    for scale in (1.0, 1.5, 4.0):
        samples = rollout(teacher, Condition(label_B), plan, Sampler(guidance=scale), uniform_BL)
        part = Part.of("teacher", samples.codes_BL, Condition(label_B), plan, row_B)
        found = of_codes(taught(teacher, Guided(scale), part), samples.codes_BL)
        assert_close(found, samples.logp_BL)
        plain = teacher.head(teacher(samples.codes_BL, part.condition, plan)).log_softmax(-1)
        matters = (of_codes(plain, samples.codes_BL) - samples.logp_BL).abs().max() > 0.1
        assert matters == (scale > 1), "guidance must matter, or this compares nothing"


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_each_sequence_is_taught_its_own_scale(family: str):
    teacher, row_B = make(family, seed=1), torch.arange(3)
    plan, guidance_B = teacher.plan(3, Rng(4), row_B), torch.tensor([1.0, 1.7, 3.0])
    codes_BL = torch.randint(12, plan.order_BL.shape, generator=torch.Generator().manual_seed(0))
    part = Part.of("data", codes_BL, Condition(torch.tensor([0, 1, 2]), guidance_B), plan, row_B)
    together = taught(teacher, Guided(1.0, highest=3.0), part)
    for row, scale in enumerate(guidance_B.tolist()):
        alone = replace(part.select(slice(row, row + 1)), condition=Condition(part.condition.label_B[row : row + 1]))
        assert_close(taught(teacher, Guided(scale), alone)[0], together[row])


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_without_a_label_the_target_is_the_null_branch(family: str):
    """At every scale: the two branches are one, so the student's null branch stays the teacher's."""
    teacher, row_B = make(family, seed=1), torch.arange(3)
    plan = teacher.plan(3, Rng(4), row_B)
    codes_BL = torch.randint(12, plan.order_BL.shape, generator=torch.Generator().manual_seed(0))
    condition = Condition(torch.tensor([0, 1, 2]), torch.tensor([1.0, 2.0, 8.0]))
    context = Context((Part.of("data", codes_BL, condition, plan, row_B),))
    (part,) = context.drop_labels(1.0, teacher.null_label, [torch.zeros(3)]).parts
    null_BLV = teacher.head(teacher(codes_BL, Condition(torch.full((3,), teacher.null_label)), plan)).log_softmax(-1)
    assert_close(taught(teacher, Guided(1.0, highest=8.0), part), null_BLV)
    assert torch.equal(part.condition.guidance_B, condition.guidance_B)


# ---- one pass


@contextmanager
def counted(model: Backbone, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The rows of every decode that `model` starts."""
    rows, start = [], model.start

    def counting(condition: Condition, *arguments: Any) -> Any:
        rows.append(len(condition))
        return start(condition, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(model, "start", counting)
        yield rows


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_rollout_takes_one_pass_at_its_scale(family: str, monkeypatch: pytest.MonkeyPatch):
    label_B, row_B = torch.tensor([0, 1, 2, 1]), torch.arange(4)
    plain, scaled = make(family), make(family, guidance_conditioned=True)
    plan = plain.plan(4, Rng(0), row_B)
    uniform_BL = Rng(2).uniform("sample", row_B, plan.order_BL.shape[1])
    for model, rows_of_a_decode in ((plain, 8), (scaled, 4)):
        with counted(model, monkeypatch) as rows:
            samples = rollout(model, Condition(label_B), plan, Sampler(guidance=2.5), uniform_BL)
            samples_per_second(model, Sampler(guidance=2.5), batch_size=4, repeats=1)
        assert rows == [rows_of_a_decode] * 3
    for scale, same in ((2.5, True), (1.0, False)):
        condition = Condition(label_B, torch.full((4,), scale))
        logp_BLV = scaled.head(scaled(samples.codes_BL, condition, plan)).log_softmax(-1)
        found = of_codes(logp_BLV, samples.codes_BL).float()
        assert torch.allclose(found, samples.logp_BL, rtol=0, atol=1e-5) == same


def test_a_comparison_is_at_scale_1():
    plain, scaled = make("llamagen"), make("llamagen", guidance_conditioned=True)
    teacher, cluster_V = make("llamagen", seed=5), torch.arange(12) // 4
    found = []
    for model in (plain, scaled):
        batches = student_batches(model, torch.arange(6) % 3, seed=0, batch_size=4)
        means, _ = agreement(model, teacher, batches, cluster_V, CPU)
        found.append((means, cross_entropy(model, batches, CPU), [batch.codes_BL.tolist() for batch in batches]))
    assert found[0] == found[1]


# ---- a toy that is learnt by heart


def every_sequence(model: Backbone) -> tuple[Tensor, Tensor, Plan]:
    """All codes under all labels: (B, L), (B,) and their plan."""
    codes = torch.tensor(list(product(range(model.vocab_size), repeat=model.sequence_length)))
    label_B = torch.arange(model.num_classes).repeat_interleave(len(codes))
    return codes.repeat(model.num_classes, 1), label_B, model.plan(len(label_B))


@torch.no_grad()
def kl_to_the_guided(student: Backbone, teacher: Backbone, scale: float, told: float) -> float:
    """KL(guided teacher || student that is told a scale) of whole images, mean over the labels, by enumeration."""
    codes_BL, label_B, plan = every_sequence(teacher)
    conditional, null = (teacher.head(teacher(codes_BL, condition, plan)) for condition in
                         (Condition(label_B), Condition(torch.full_like(label_B, teacher.null_label))))  # fmt: skip
    scale_S = guidance_per_step(Sampler(guidance=scale), plan, teacher.guidance).double()
    logp_BLV = (null + scale_S[plan.step_BL].unsqueeze(2) * (conditional - null)).log_softmax(-1)
    condition = Condition(label_B, torch.full((len(label_B),), told))
    logq_BLV = student.head(student(codes_BL, condition, plan)).log_softmax(-1)
    logp_B, logq_B = (of_codes(logits, codes_BL).sum(1) for logits in (logp_BLV, logq_BLV))
    labels = teacher.num_classes
    assert float(logp_B.exp().sum()) == pytest.approx(labels) == pytest.approx(float(logq_B.exp().sum()))
    return float((logp_B.exp() * (logp_B - logq_B)).sum() / labels)


def learn(student: Backbone, teacher: Backbone, method: Method, updates: int = 120) -> None:
    """kd_guided on every prefix there is, each of them at a scale of its own."""
    codes_BL, label_B, plan = every_sequence(teacher)
    row_B = torch.arange(len(label_B))
    optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for step in range(updates):
        rng = Rng(0, step)
        assert isinstance(method.target, Guided)
        batch = Batch(codes_BL, label_B, row_B, method.target.guidance_B(row_B, rng))
        context = Context((Part.of("data", codes_BL, batch.condition, plan, row_B),))
        inputs = StepInputs(method, student, teacher, {}, rng, codebook_tables={})
        loss, _ = distill_loss(inputs, context, denominators(inputs, context))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("family", ["llamagen", "rar"])
def test_a_student_becomes_the_guided_distribution_at_every_scale(family: str):
    """It starts as the teacher: right at scale 1, wrong above. A class slot, and a modulation of every block."""
    sizes = {**SMALL, "num_classes": 2, "vocab_size": 3, "grid": (2, 2)}
    teacher, student = build(family, sizes).double(), build(family, {**sizes, "guidance_conditioned": True}).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.normal_(std=0.4, generator=generator)
    student.load_state_dict({**student.state_dict(), **teacher.requires_grad_(False).eval().state_dict()})
    preset, scales = METHODS["kd_guided"].method, (1.0, 1.7, 2.3, 3.0)
    before = [kl_to_the_guided(student, teacher, scale, scale) for scale in scales]
    learn(student, teacher, replace(preset, terms=preset.terms[:1], target=Guided(1.0, highest=3.0)))
    after = [[kl_to_the_guided(student, teacher, scale, told) for told in scales] for scale in scales]
    assert abs(before[0]) < 1e-12 and min(before[1:]) > 0.1
    for place, kl in enumerate(after):
        assert min(kl) == kl[place] < 0.05, "told one scale, it is nearest to another"
        assert place == 0 or kl[place] < before[place] / 5
