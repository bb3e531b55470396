"""A whole update: sequences, both models, loss, backward pass, clipping and AdamW.

`ce`, `kd` and `varkd` as presets, and GKD on student samples alone (JSD), which TRL's `GKDTrainer` does too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from varkd.bench.gkd import trl_step
from varkd.bench.machine import Machine, Precision, step_flops
from varkd.bench.measure import Case, Problem, Run, Side
from varkd.bench.sizes import Sizes, random_model
from varkd.distill.divergences import JSD
from varkd.distill.method import Method, Term
from varkd.distill.prefixes import Rollout
from varkd.methods import METHODS
from varkd.train.distiller import Distiller
from varkd.train.optim import OptimizerConfig
from varkd.types import Batch

ON_POLICY = Method((Term("jsd", JSD(0.5)),), Rollout())
"""GKD with all sequences sampled by the student (lambda = 1)."""


def step_cases(machine: Machine, device: torch.device, sizes: Sizes) -> Iterator[Case]:
    """In bfloat16 (autocast) on CUDA, in float32 on a CPU."""
    precision: Precision = "bf16" if device.type == "cuda" else "fp32"
    end = f"batch {sizes.step_batch}, {precision}"

    def problem(method: Method, theirs: Side | None = None, mfu: bool = False) -> Problem:
        updates = Updates(device, sizes, precision)
        flops = updates.flops(method)
        bound = machine.seconds(flops, precision)
        return Problem(Side("varkd", lambda: updates.of(method)), theirs, bound, mfu)

    def against_kd() -> Problem:
        updates = Updates(device, sizes, precision)
        varkd, kd = METHODS["varkd"].method, METHODS["kd"].method
        bound = machine.seconds(updates.flops(varkd), precision)
        return Problem(Side("varkd", lambda: updates.of(varkd)), Side("ours, kd", lambda: updates.of(kd)), bound)

    yield Case("step", f"ce, {end}", lambda: problem(METHODS["ce"].method, mfu=True))
    yield Case("step", f"kd, {end}", lambda: problem(METHODS["kd"].method, mfu=True))
    yield Case("step", f"varkd, {end}", against_kd)
    trl = Side("TRL GKDTrainer", lambda: trl_step(sizes, device, precision))
    yield Case("step", f"GKD on student samples, {end}", lambda: problem(ON_POLICY, trl))


class Updates:
    """Updates of one student by any method: the same step of the same batch again and again.

    Each draws the same prefixes, so that a decode of these lengths is a CUDA graph from its second use on, as all
    lengths are after a while of training.
    """

    def __init__(self, device: torch.device, sizes: Sizes, precision: Precision) -> None:
        self.device, self.precision = device, precision
        self.student = random_model("llamagen", sizes.student, device).requires_grad_(True)
        self.teacher = random_model("llamagen", sizes.teacher, device)
        draw = torch.Generator().manual_seed(0)
        codes_BL = torch.randint(
            self.student.vocab_size, (sizes.step_batch, self.student.sequence_length), generator=draw
        )
        row_B = torch.arange(sizes.step_batch)
        self.batch = Batch(codes_BL, row_B % self.student.num_classes, row_B).to(device)
        self.codebook_VE = nn.functional.normalize(torch.randn(self.student.vocab_size, 8, generator=draw), dim=1)

    def flops(self, method: Method) -> float:
        settled = method.at(0.0)
        teacher = self.teacher if settled.needs_teacher else None
        return step_flops(settled.cost, self.student, teacher, len(self.batch))

    def of(self, method: Method) -> Run:
        precision: Any = self.precision
        distiller = Distiller(method, self.student, self.teacher, self.codebook_VE, updates=1000, precision=precision)
        config = OptimizerConfig(lr=1e-6)
        optimizer = config.build(self.student)

        def update() -> Tensor:
            loss, stats = distiller(self.batch)
            loss.backward()
            nn.utils.clip_grad_norm_(self.student.parameters(), config.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            distiller.update(loss, stats)
            distiller.step = 0
            return loss.detach()

        return update
