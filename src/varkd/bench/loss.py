"""The distillation loss with both heads and its gradient, on recorded hidden states.

Ours is what `Distiller` computes for forward KL (`kd`) and for the Jensen-Shannon divergence, all but the bodies of the
models. Against it: the same in plain autograd over whole logits, and Liger's fused linear JSD where it is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varkd.backbones.llamagen import LlamaGen, LlamaGenConfig
from varkd.bench.machine import Machine, Precision, autocast_to
from varkd.bench.measure import Case, Problem, Run, Side, Verdict
from varkd.bench.sizes import Sizes
from varkd.distill.divergences import JSD, ForwardKL
from varkd.distill.method import Method, Term
from varkd.train.distiller import Distiller
from varkd.types import Batch, Condition, Plan

_TOLERANCE: dict[Precision, float] = {"fp32": 1e-4, "bf16": 5e-2}


class Recorded(LlamaGen):
    """A LlamaGen whose body has spoken already: its forward pass returns hidden states that it was given."""

    def __init__(self, config: LlamaGenConfig, batch: int) -> None:
        super().__init__(config)
        self.hidden_BLD = nn.Parameter(torch.empty(batch, self.sequence_length, config.dim))

    def initialize(self, generator: torch.Generator) -> None:
        """Normal hidden states, and logits of variance 1."""
        super().initialize(generator)
        nn.init.normal_(self.hidden_BLD, generator=generator)
        nn.init.normal_(self.output.weight, std=self.config.dim**-0.5, generator=generator)

    def forward(self, codes_BL: Tensor, condition: Condition, plan: Plan) -> Tensor:
        del codes_BL, condition, plan
        return self.hidden_BLD


@dataclass(frozen=True)
class Heads:
    """Student and teacher hidden states and their heads, and a batch for `Distiller`."""

    student: Recorded
    teacher: Recorded
    batch: Batch
    precision: Precision

    @classmethod
    def of(cls, sizes: Sizes, device: torch.device, precision: Precision) -> Heads:
        generator = torch.Generator(device=device).manual_seed(0)
        grid, vocab_size = tuple(sizes.student["grid"]), sizes.student["vocab_size"]
        rows = sizes.loss_rows // (grid[0] * grid[1])
        student, teacher = (
            _recorded(LlamaGenConfig(vocab_size, 1, grid, 1, dim, 1), rows, generator)
            for dim in (sizes.student["dim"], sizes.teacher["dim"])
        )
        codes_BL = torch.randint(vocab_size, (rows, grid[0] * grid[1]), generator=generator, device=device)
        row_B = torch.arange(rows, device=device)
        return cls(student, teacher.requires_grad_(False), Batch(codes_BL, torch.zeros_like(row_B), row_B), precision)

    @property
    def flops(self) -> float:
        """Both heads forward, the student's also backward to its input and its weights."""
        rows, vocab_size = self.batch.codes_BL.numel(), self.student.vocab_size
        return 2.0 * rows * vocab_size * (3 * self.student.config.dim + self.teacher.config.dim)

    @property
    def hidden_states(self) -> tuple[Tensor, Tensor]:
        return self.student.hidden_BLD.flatten(0, 1), self.teacher.hidden_BLD.flatten(0, 1)

    def run(self, loss: Callable[[], Tensor]) -> dict[str, Any]:
        """The value and the gradients that a training step needs."""
        self.student.zero_grad(set_to_none=True)
        with autocast_to(self.precision, self.student.device):  # weights in float32, as in training
            value = loss()
        value.backward()
        weight, hidden = self.student.output.weight.grad, self.student.hidden_BLD.grad
        assert weight is not None and hidden is not None
        return {"value": value.detach(), "head gradient": weight, "hidden gradient": hidden}


def loss_cases(machine: Machine, device: torch.device, sizes: Sizes) -> Iterator[Case]:
    """Forward KL against plain autograd and the JSD against Liger; on CUDA under autocast first, then in float32."""
    precisions: tuple[Precision, ...] = ("bf16", "fp32") if device.type == "cuda" else ("fp32",)
    for precision in precisions:
        for what, make_theirs, term in (
            ("forward KL", _plain, Term("kd", ForwardKL())),
            ("JSD", _liger, Term("jsd", JSD(0.5))),
        ):
            size = f"{sizes.loss_rows:,} rows x {sizes.student['vocab_size']:,}"

            def build(make: Any = make_theirs, term: Term = term, precision: Precision = precision) -> Problem:
                heads = Heads.of(sizes, device, precision)
                bound = machine.seconds(heads.flops, precision)
                compiled = device.type == "cuda"
                name = "plain autograd" if make is _plain else f"Liger{' (compiled)' if compiled else ''}"
                theirs = Side(name, lambda: make(heads, compiled))
                return Problem(
                    Side(f"varkd{' (compiled)' if compiled else ''}", lambda: _ours(heads, term, compiled)),
                    theirs,
                    bound,
                    verify=lambda a, b: same_results(a, b, _TOLERANCE[precision]),
                )

            yield Case("loss", f"{what}, {size}, {precision}", build)


def same_results(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> Verdict:
    """Largest difference of each result relative to the largest number in it."""
    gaps = {name: relative_gap(ours[name], theirs[name]) for name in ours}
    worst = max(gaps, key=lambda name: gaps[name])
    same = gaps[worst] <= tolerance
    return Verdict(same, f"value and gradients {'agree' if same else 'differ'} to {gaps[worst]:.1e} ({worst})")


def relative_gap(ours: Tensor, theirs: Tensor) -> float:
    scale = float(theirs.detach().abs().max().clamp_min(1e-30))
    return float((ours.detach().float() - theirs.detach().float()).abs().max()) / scale


def _recorded(config: LlamaGenConfig, rows: int, generator: torch.Generator) -> Recorded:
    with torch.device(generator.device):
        model = Recorded(config, rows)
    model.initialize(generator)
    return model


def _ours(heads: Heads, term: Term, compiled: bool = False) -> Run:
    codebook_VE = torch.zeros(heads.student.vocab_size, 1)
    settings: dict[str, Any] = {"updates": 1, "label_drop": 0.0, "compile": compiled}
    distiller = Distiller(Method((term,)), heads.student, heads.teacher, codebook_VE, **settings)
    return lambda: heads.run(lambda: distiller(heads.batch)[0])


def _plain(heads: Heads, compiled: bool) -> Run:
    """KL(teacher || student), mean over rows, from logits that are held as a whole."""
    del compiled

    def loss() -> Tensor:
        student_ND, teacher_ND = heads.hidden_states
        with torch.no_grad():
            teacher_NV = F.log_softmax(heads.teacher.output(teacher_ND).float(), dim=-1)
        student_NV = F.log_softmax(heads.student.output(student_ND).float(), dim=-1)
        return F.kl_div(student_NV, teacher_NV, log_target=True, reduction="batchmean")

    return lambda: heads.run(loss)


def _liger(heads: Heads, compiled: bool) -> Run:
    """Liger's loss on the same states; it compiles its chunks with Triton, which there is on CUDA only."""
    liger = import_module("liger_kernel.chunked_loss")
    fused = liger.LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5, compiled=compiled)
    label_N = heads.batch.codes_BL.flatten()

    def loss() -> Tensor:
        student_ND, teacher_ND = heads.hidden_states
        heads_of = heads.student.output.weight, heads.teacher.output.weight
        return fused(student_ND, heads_of[0], teacher_ND, heads_of[1], label_N)

    return lambda: heads.run(loss)
