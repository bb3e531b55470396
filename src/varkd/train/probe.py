"""What the phases of an update take, found by running them on models of one and of two blocks per stack.

A model of many blocks costs what its embeddings and head cost, and so much more for each block: time, FLOPs and the
bytes that a backward pass keeps are linear in depth, so two shallow models say what a deep one takes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from varkd.backbones.protocol import Backbone
from varkd.backbones.store import build
from varkd.distill.divergences import ForwardKL, TargetRows
from varkd.distill.logspace import log_softmax, to_logits
from varkd.distill.loss import chunked_head_loss
from varkd.distill.scores import affordable_rows
from varkd.rollout import Sampler, rollout
from varkd.train.optim import Ema, OptimizerConfig
from varkd.types import Condition
from varkd.world import Rng

_REPEATS = 3


@dataclass(frozen=True)
class Amount:
    """Of one phase: seconds on this machine (None where nothing was timed), FLOPs, bytes kept for the backward pass."""

    seconds: float | None = None
    flops: float = 0.0
    kept_bytes: float = 0.0

    def times(self, factor: float) -> Amount:
        return self._with(lambda name: factor * getattr(self, name))

    def plus(self, other: Amount) -> Amount:
        return self._with(lambda name: getattr(self, name) + getattr(other, name), other)

    def _with(self, value: Callable[[str], float], other: Amount | None = None) -> Amount:
        timed = self.seconds is not None and (other is None or other.seconds is not None)
        return Amount(value("seconds") if timed else None, value("flops"), value("kept_bytes"))


@dataclass(frozen=True)
class Phases:
    """One model at a batch: its blocks and embeddings trained, read (without gradient), and decoded."""

    train: Amount
    read: Amount
    decode: Amount
    optimizer: Amount


@dataclass(frozen=True)
class Probe:
    """How to run the phases.

    Args:
        batch_size: sequences of a training pass (a micro-batch).
        decoded: sequences that are decoded at once.
        sampler: how they are decoded; guidance is counted by `Method.cost`, and left out here.
        bf16: compute under autocast.
        timed: take the time too; else only count.
    """

    batch_size: int
    decoded: int
    sampler: Sampler
    bf16: bool
    timed: bool
    device: torch.device

    def phases(self, family: str, sizes: dict[str, Any], trained: bool, decodes: bool) -> Phases:
        """Of the model with these sizes, from two that are shallow."""
        depth, step = sizes["num_layers"], len(self._model(family, {**sizes, "num_layers": 2}).stacks)
        one, two = (
            self._measure(family, {**sizes, "num_layers": blocks * step}, trained, decodes) for blocks in (1, 2)
        )
        extra = depth // step - 1
        return Phases(
            **{item.name: _extended(getattr(one, item.name), getattr(two, item.name), extra) for item in fields(Phases)}
        )

    def loss(self, student: dict[str, Any], teacher_dim: int | None, length: int) -> Amount:
        """The chunked loss of `batch_size` sequences: both heads, a divergence, and its gradient."""
        rows, vocab_size = self.batch_size * length, student["vocab_size"]
        head = nn.Linear(student["dim"], vocab_size, bias=False, device=self.device)
        hidden_ND = torch.randn(rows, student["dim"], device=self.device, requires_grad=True)
        other = None if teacher_dim is None else nn.Linear(teacher_dim, vocab_size, bias=False, device=self.device)
        other_ND = torch.randn(rows, teacher_dim or 1, device=self.device)

        def evaluate(logits_NV: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
            student_NV = log_softmax(logits_NV)
            teacher_NV = log_softmax(torch.zeros_like(logits_NV) if other is None else other(other_ND[chunk]))
            sides = student_NV, teacher_NV, TargetRows(None)
            return ForwardKL()(*sides).sum().double(), to_logits(ForwardKL().gradient(*sides), student_NV)

        def run() -> None:
            with self._autocast():
                loss = chunked_head_loss(hidden_ND, head, evaluate, affordable_rows(vocab_size))
            loss.backward()

        return self._amount(run)

    def _measure(self, family: str, sizes: dict[str, Any], trained: bool, decodes: bool) -> Phases:
        model = self._model(family, sizes)
        codes_BL, condition, plan = self._inputs(model, self.batch_size, replace(self.sampler, steps=None))

        def train() -> None:
            with self._autocast():
                hidden_BLD = model(codes_BL, condition, plan)
            hidden_BLD.float().sum().backward()

        @torch.no_grad()
        def read() -> None:
            with self._autocast():
                model(codes_BL, condition, plan)

        def decode() -> None:
            _, given, drawn = self._inputs(model, self.decoded, self.sampler)
            uniform_BL = torch.rand(self.decoded, drawn.order_BL.shape[1], device=self.device)
            with self._autocast():
                rollout(model, given, drawn, replace(self.sampler, guidance=1.0), uniform_BL)

        model.train(trained)
        done = Phases(self._amount(train) if trained else Amount(0.0), Amount(0.0), Amount(0.0), Amount(0.0))
        if trained:
            done = replace(done, optimizer=self._optimizer(model))
        model.eval()
        return replace(done, read=self._amount(read), decode=self._amount(decode) if decodes else Amount(0.0))

    def _optimizer(self, model: Backbone) -> Amount:
        config = OptimizerConfig()
        optimizer, average = config.build(model), Ema(model, 0.99)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)

        def step() -> None:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            average.update(0)

        return replace(self._amount(step), flops=0.0)

    def _model(self, family: str, sizes: dict[str, Any]) -> Backbone:
        return build(family, sizes, device=str(self.device))

    def _inputs(self, model: Backbone, num: int, sampler: Sampler) -> tuple[Tensor, Condition, Any]:
        row_B = torch.arange(num, device=self.device)
        plan = sampler.plan(model, Rng(0), row_B)
        codes_BL = torch.randint(0, model.vocab_size, plan.order_BL.shape, device=self.device)
        return codes_BL, Condition(row_B % model.num_classes), plan

    def _amount(self, run: Callable[[], None]) -> Amount:
        with _Flops() as counter, sdpa_kernel(SDPBackend.MATH):  # the CPU's own attention is not counted
            run()
        with _kept() as kept:  # attention as it is computed
            run()
        return Amount(self._seconds(run) if self.timed else None, counter.total, kept.total)

    def _seconds(self, run: Callable[[], None]) -> float:
        seconds = []
        for _ in range(_REPEATS):
            self._wait()
            begun = time.perf_counter()
            run()
            self._wait()
            seconds.append(time.perf_counter() - begun)
        return statistics.median(seconds)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()


class _Flops(TorchDispatchMode):
    """Counts matrix products, forward and backward, by PyTorch's own formulas.

    Its `FlopCounterMode` also hooks modules, which breaks on outputs without a gradient (ARPG's queries).
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


class _kept:
    """Counts the bytes of all storages that autograd saves inside the block, parameters apart."""

    def __enter__(self) -> _kept:
        self.seen: dict[int, int] = {}
        self.hooks = saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> Tensor:
        if not (tensor.is_leaf and tensor.requires_grad):
            storage = tensor.untyped_storage()
            self.seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def total(self) -> float:
        return float(sum(self.seen.values()))


def _extended(one: Amount, two: Amount, extra: int) -> Amount:
    """One block, and `extra` times what a second adds: never less than nothing."""
    grown = one.plus(two.plus(one.times(-1)).times(extra))
    seconds = None if grown.seconds is None or one.seconds is None else max(grown.seconds, one.seconds)
    return replace(grown, seconds=seconds)
