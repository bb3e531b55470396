"""Decoding: LlamaGen (code by code, and ZipAR), VAR and ARPG, with guidance, against the official samplers.

Both sides hold the same weights, draw codes only (no image is decoded) and filter alike. What a rollout takes does not
depend on which codes it draws, so each side draws its own; that they compute the same is checked on teacher-forced
logits, and in float32 at the smallest batch on greedy codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from varkd.backbones import zoo
from varkd.backbones.llamagen import LlamaGen
from varkd.backbones.protocol import Backbone
from varkd.backbones.var import VAR
from varkd.bench.loss import relative_gap
from varkd.bench.machine import DTYPES, Machine, Precision, autocast_to
from varkd.bench.measure import Case, Problem, Side, Verdict
from varkd.bench.official import Checkout, OfficialLlamaGen, OfficialVAR
from varkd.bench.sizes import Sizes, random_model
from varkd.rollout import Sampler, rollout
from varkd.types import Condition, Plan
from varkd.world import Rng
from varkd.zipar import schedule

WINDOW = 4
_TOLERANCE: dict[Precision, float] = {"fp32": 1e-4, "bf16": 5e-2}
_GUIDED = Sampler(guidance=2.0)


@dataclass(frozen=True)
class Bench:
    """Where rollouts run, and the checkouts to run against."""

    machine: Machine
    device: torch.device
    sizes: Sizes
    llamagen: Checkout | None = None
    llamagen_compiled: bool = False
    var: Checkout | None = None


@dataclass(frozen=True)
class Decode:
    """A model, what it decodes, and how."""

    model: Backbone
    condition: Condition
    plan: Plan
    sampler: Sampler
    uniform_BL: Tensor
    autocast: Precision = "fp32"

    @classmethod
    def of(cls, model: Backbone, batch: int, sampler: Sampler, autocast: Precision = "fp32") -> Decode:
        row_B = torch.arange(batch, device=model.device)
        plan = sampler.plan(model, Rng(0), row_B)
        uniform_BL = Rng(0).uniform("bench", row_B, plan.order_BL.shape[1])
        return cls(model, Condition(row_B % model.num_classes), plan, sampler, uniform_BL, autocast)

    @property
    def context(self) -> AbstractContextManager[Any]:
        return autocast_to(self.autocast, self.model.device)

    def codes(self, sampler: Sampler | None = None) -> Tensor:
        with self.context:
            how = self.sampler if sampler is None else sampler
            return rollout(self.model, self.condition, self.plan, how, self.uniform_BL).codes_BL

    @torch.no_grad()
    def forced(self, codes_BL: Tensor, rows: slice = slice(None)) -> Tensor:
        """Logits (B, L, V) of some rows of given codes."""
        hidden = self.model(codes_BL[rows], self.condition.select(rows), self.plan.select(rows))
        return self.model.head(hidden)


def rollout_cases(bench: Bench) -> Iterator[Case]:
    """The largest batches come last. LlamaGen in both precisions, the others in the device's usual one."""
    usual: Precision = "bf16" if bench.device.type == "cuda" else "fp32"
    kinds: tuple[tuple[str, Callable[..., Problem], Precision], ...] = (
        ("LlamaGen", _llamagen, "fp32"),
        ("LlamaGen", _llamagen, "bf16"),
        (f"LlamaGen, ZipAR window {_window(bench)}", _zipar, usual),
        ("VAR", _var, usual),
        (f"ARPG, {bench.sizes.arpg_steps} steps", _arpg, usual),
    )
    for batch in bench.sizes.batches:
        for what, build, precision in kinds:
            yield Case("rollout", f"{what}, batch {batch}, {precision}", _later(build, bench, batch, precision))


def _window(bench: Bench) -> int:
    """A window as wide as the grid would be the sequential order."""
    return min(WINDOW, bench.sizes.student["grid"][1] - 1)


def _later(build: Callable[..., Problem], *arguments: Any) -> Callable[[], Problem]:
    return lambda: build(*arguments)


def _bound(bench: Bench, decode: Decode, precision: Precision, sizes: tuple[int, ...] | None = None) -> float:
    rows = len(decode.condition) * 2  # both branches of guidance
    return bench.machine.rollout_seconds(decode.model, rows, sizes or decode.plan.sizes, precision)


def _llamagen(bench: Bench, batch: int, precision: Precision) -> Problem:
    model = random_model("llamagen", bench.sizes.student, bench.device).to(DTYPES[precision])
    assert isinstance(model, LlamaGen)
    decode, checkout = Decode.of(model, batch, _GUIDED), bench.llamagen
    ours, bound = Side("varkd", lambda: decode.codes), _bound(bench, decode, precision)
    if checkout is None:
        return Problem(ours, bound_s=bound)
    made: list[OfficialLlamaGen] = []

    def make() -> Callable[[], Tensor]:
        made.append(OfficialLlamaGen.like(model, checkout, bench.llamagen_compiled))
        return lambda: made[0].sample(decode.condition.label_B, model.sequence_length, _GUIDED.guidance)

    def verify(codes_BL: Tensor, other_BL: Tensor) -> Verdict:
        del other_BL  # drawn by other random numbers
        rows, official = slice(0, min(batch, 4)), made[0]
        theirs = official.logits(codes_BL[rows], decode.condition.label_B[rows])
        verdict = same_logits(decode.forced(codes_BL, rows), theirs, precision)
        if precision == "bf16" or batch != min(bench.sizes.batches):
            return verdict
        greedy = official.sample(decode.condition.label_B, model.sequence_length, _GUIDED.guidance, greedy=True)
        return _with_codes(verdict, decode.codes(replace(_GUIDED, temperature=0.0)), greedy)

    name = "official, compiled" if bench.llamagen_compiled else "official"
    return Problem(ours, Side(name, make), bound, verify=verify)


def _zipar(bench: Bench, batch: int, precision: Precision) -> Problem:
    """Against the same model decoded code by code."""
    model = random_model("llamagen", bench.sizes.student, bench.device).to(DTYPES[precision])
    window = _window(bench)
    plain = Decode.of(model, batch, _GUIDED)
    waves = replace(plain, sampler=replace(_GUIDED, parallel="zipar", window=window))
    open_rows = tuple(len(step.positions) for step in schedule(*bench.sizes.student["grid"], window))
    bound = _bound(bench, waves, precision, open_rows)
    return Problem(Side("varkd", lambda: waves.codes), Side("ours, code by code", lambda: plain.codes), bound)


def _var(bench: Bench, batch: int, precision: Precision) -> Problem:
    """Under autocast, as the official code samples; filters and guidance of the published setting."""
    model = random_model("var", bench.sizes.var, bench.device)
    assert isinstance(model, VAR)
    published = zoo.entry("VAR-d16").sampling
    top_k = min(published["top_k"], model.vocab_size)
    sampler = Sampler(guidance=published["guidance"], top_k=top_k, top_p=published["top_p"])
    decode, checkout = Decode.of(model, batch, sampler, precision), bench.var
    ours, bound = Side("varkd", lambda: decode.codes), _bound(bench, decode, precision)
    if checkout is None:
        return Problem(ours, bound_s=bound)
    made: list[OfficialVAR] = []

    def make() -> Callable[[], Tensor]:
        made.append(OfficialVAR.like(model, checkout))

        def run() -> Tensor:
            with decode.context:
                return made[0].sample(decode.condition.label_B, sampler.guidance - 1, sampler.top_k, sampler.top_p)

        return run

    def verify(codes_BL: Tensor, features: Tensor) -> Verdict:
        del features  # of other codes
        rows = slice(0, min(batch, 4))
        theirs = made[0].logits(model, codes_BL[rows], decode.condition.select(rows))
        return same_logits(decode.forced(codes_BL, rows), theirs, "fp32")  # without autocast, which rounds elsewhere

    return Problem(ours, Side("official", make), bound, verify=verify)


def _arpg(bench: Bench, batch: int, precision: Precision) -> Problem:
    model = random_model("arpg", bench.sizes.arpg, bench.device).to(DTYPES[precision])
    published = zoo.entry("ARPG-L").sampling
    how = {"steps": bench.sizes.arpg_steps, "step_schedule": published["step_schedule"]}
    decode = Decode.of(model, batch, Sampler(guidance=published["guidance"], **how))
    return Problem(Side("varkd", lambda: decode.codes), bound_s=_bound(bench, decode, precision))


def same_logits(ours: Tensor, theirs: Tensor, precision: Precision) -> Verdict:
    gap = relative_gap(ours, theirs)
    same = gap <= _TOLERANCE[precision]
    return Verdict(same, f"logits {'agree' if same else 'differ'} to {gap:.1e}")


def _with_codes(verdict: Verdict, ours_BL: Tensor, theirs_BL: Tensor) -> Verdict:
    """Greedy codes part for good where two logits nearly tie, so they are told, and judged only where all are equal."""
    equal = float((ours_BL == theirs_BL).float().mean())
    return Verdict(verdict.same, f"{verdict.text}, greedy codes {equal:.1%} equal")
