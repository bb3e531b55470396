"""Whom the loss asks what the target is: a live teacher, or a cache of what one said of the data.

Both answer with `TeacherRows`: the target's logits of N rows, chunk by chunk. A cache holds the K likeliest codes of a
position and the mass tau of the m = V - K others, which it spreads evenly over them. Against the live teacher p, with
p' and q' for teacher and student among those others, forward KL moves by exactly tau (KL(p' || q') - KL(u || q')) for
u = 1 / m, so by at most tau times the largest log(1 / q'); its gradient with respect to the student's logits (L1) by at
most 2 tau, total variation by at most tau, JSD by at most tau / 2 (1 + log(1 + 1 / tau)). Reverse KL has no such bound:
where the student puts mass on codes that the teacher all but excludes, the cache asks less of it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varkd.backbones.protocol import Backbone
from varkd.data.codes import CodeDataset, codes_hash
from varkd.data.teacher_cache import TeacherCache
from varkd.distill.logspace import at_least_float32
from varkd.distill.target import Guided, Plain, Target
from varkd.errors import VarkdError
from varkd.rollout import evaluating, with_null_branch
from varkd.types import Part, Plan
from varkd.world import Rng

if TYPE_CHECKING:
    from varkd.distill.method import Method

_LIVE = "give a live teacher (a run or model folder) as teacher="
_DRAWN = 64
"""Rows for which a plan is drawn to see whether all are alike: by chance none are, even of two codes."""


class TeacherRows(ABC):
    """What the teacher knows of N rows (positions), and what the target makes of it, in chunks."""

    @abstractmethod
    def logits(self, rows: slice | Tensor) -> Tensor:
        """The target's logits of some rows, (n, V)."""

    @abstractmethod
    def plain_logits(self, rows: slice) -> Tensor:
        """The teacher's own logits, whatever the target makes of them."""


@dataclass(frozen=True)
class LiveRows(TeacherRows):
    """The hidden states of a model that has just read the rows, and its head, in the precision of autocast."""

    weight_VD: Tensor
    bias_V: Tensor | None
    target: Target
    hidden_ND: Tensor
    null_ND: Tensor | None = None
    scale_N: Tensor | None = None

    @torch.no_grad()
    def logits(self, rows: slice | Tensor) -> Tensor:
        null_NV = None if self.null_ND is None else self._project(self.null_ND[rows])
        scale_N = None if self.scale_N is None else self.scale_N[rows]
        return self.target(self._project(self.hidden_ND[rows]), null_NV, scale_N)

    @torch.no_grad()
    def plain_logits(self, rows: slice) -> Tensor:
        return self._project(self.hidden_ND[rows])

    def _project(self, hidden_ND: Tensor) -> Tensor:
        return F.linear(hidden_ND.to(self.weight_VD.dtype), self.weight_VD, self.bias_V)


@torch.no_grad()
def live_rows(teacher: Backbone, part: Part, target: Target) -> LiveRows:
    """Let the teacher read `part`, under both labels where the target is guided."""
    with evaluating(teacher):
        if not target.guided:
            hidden_BLD = teacher(part.codes_BL, part.condition, part.plan)
            return LiveRows(*_weights(teacher.head), target, hidden_BLD.flatten(0, 1))
        condition, plan = with_null_branch(teacher, part.condition, part.plan)
        both_2BLD = teacher(torch.cat([part.codes_BL, part.codes_BL]), condition, plan)
        hidden_BLD, null_BLD = both_2BLD.chunk(2)
        scale_BL = target.scale_BL(part, teacher)
        rows = (each.flatten(0, 1) for each in (hidden_BLD, null_BLD, scale_BL))
        return LiveRows(*_weights(teacher.head), target, *rows)


def _weights(head: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Weight and bias as autocast would use them: the loss itself, which asks for logits, runs outside of autocast."""
    device = head.weight.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
    return head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype)


@dataclass(frozen=True)
class CachedRows(TeacherRows):
    """The K likeliest codes of each row and the log of the mass of all others."""

    target: Target
    vocab_size: int
    logp_NK: Tensor
    tail_N: Tensor
    code_NK: Tensor

    def logits(self, rows: slice | Tensor) -> Tensor:
        return self.target(self.plain_logits(rows), None, None)

    def plain_logits(self, rows: slice | Tensor) -> Tensor:
        """The log-probabilities that were cached, the tail spread evenly over the other codes."""
        others = max(1, self.vocab_size - self.logp_NK.shape[1])
        each_N1 = at_least_float32(self.tail_N[rows]).unsqueeze(1) - math.log(others)
        spread_NV = each_N1.expand(-1, self.vocab_size)
        return spread_NV.scatter(1, self.code_NK[rows].long(), at_least_float32(self.logp_NK[rows]))


@dataclass(frozen=True)
class CachedTeacher:
    """A teacher that is not there: its word on the data's own sequences, read from a cache."""

    cache: TeacherCache

    @property
    def target(self) -> Target:
        """The distribution that the cache is of."""
        return Plain() if self.cache.guidance is None else Guided(self.cache.guidance)

    def rows(self, part: Part, target: Target) -> CachedRows:
        """What the cache holds of data sequences (`Part.sequence_B`), on the device of `part`.

        Raises:
            VarkdError: `part` does not say which training sequences it holds, or the cache does not have them.
        """
        if part.sequence_B is None:
            raise VarkdError(
                "a teacher cache needs rows that say which training sequences they are: take batches of "
                "varkd.DataLoader on the train split"
            )
        null_B = part.condition.label_B == self.cache.num_classes
        found = self.cache.read(part.sequence_B.cpu().numpy(), null_B.cpu().numpy())
        logp_NK, tail_N, code_NK = (torch.from_numpy(each).to(part.codes_BL.device).flatten(0, 1) for each in found)
        # A guided cache is of the guided distribution itself: nothing is left to do.
        left = Plain() if target.guided else target
        return CachedRows(left, self.cache.vocab_size, logp_NK, tail_N, code_NK)

    def check(self, method: Method, student: Backbone, label_drop: float) -> None:
        """Raise `VarkdError`, naming what needs a live teacher, unless the cache answers all that `method` asks."""
        if not method.needs_teacher:
            return
        for contexts in method.contexts.inner:
            if contexts.sources != ("data",):
                self._refuse(f"speaks of the data's own sequences, but this method trains on {contexts.summary}", _LIVE)
        if method.images.needs_teacher:
            self._refuse(f"cannot score images, but this method trains on {method.images.summary}", _LIVE)
        self._check_target(method.target)
        self._check_student(student)
        if label_drop and not self.cache.has_null:
            self._refuse("was made without the null branch", "set train.label_drop=0, or teach again without --no-null")

    def _check_target(self, target: Target) -> None:
        if (self.target.guided or target.guided) and self.target != target:
            advice = "teach again without --guidance"
            if target.guided:
                scale = target.one_scale
                simple = scale is not None and target == Guided(scale)
                advice = f"make one by `varkd teach --guidance {scale:g}`" if simple else _LIVE
            self._refuse(f"holds {self.target.summary}, but the target is {target.summary}", advice)
        most = target.most_codes or self.cache.vocab_size
        if target.excludes and most > self.cache.top_k < self.cache.vocab_size:
            self._refuse(
                f"tells only the {self.cache.top_k} likeliest codes apart, but the target cuts among more",
                f"set method.target.top_k={self.cache.top_k} or less, or {_LIVE}",
            )

    def _check_student(self, student: Backbone) -> None:
        sizes = {"codes": student.vocab_size, "classes": student.num_classes, "codes an image": student.sequence_length}
        held = self.cache.vocab_size, self.cache.num_classes, sum(self.cache.sizes)
        for (name, size), had in zip(sizes.items(), held, strict=True):
            if size != had:
                self._refuse(f"is of {had} {name}, the student has {size}", "make a student for these codes")
        plan = one_plan(student)
        if plan is None:
            self._refuse(
                f"knows one order of codes, but this {student.family} student draws a new one for every row",
                f"set model.order=raster, or {_LIVE}",
            )
        elif plan.sizes != self.cache.sizes or not torch.equal(plan.order_BL[0].cpu(), torch.arange(sum(plan.sizes))):
            self._refuse(
                f"is of raster order in {len(self.cache.sizes)} steps, this student predicts in {len(plan.sizes)}",
                _LIVE,
            )

    def _refuse(self, why: str, advice: str) -> NoReturn:
        raise VarkdError(f"{self.cache.folder} is a teacher cache and {why}: {advice}")


def one_plan(model: Backbone) -> Plan | None:
    """The plan of every row, (1, L), of a model that draws the same one for all; None for random orders."""
    row_B = torch.arange(_DRAWN, device=model.device)
    plan = model.plan(_DRAWN, Rng(0), row_B)
    first = plan.select(slice(0, 1))
    return first if torch.equal(plan.order_BL, first.order_BL.expand_as(plan.order_BL)) else None


def load_teacher_cache(folder: str | Path, codes: CodeDataset) -> CachedTeacher:
    """What `varkd teach` wrote, as the `teacher` of a `Distiller` that is fed with training batches of `codes`.

    Raises:
        VarkdError: not a finished cache, damaged, or made of other codes.
    """
    return CachedTeacher(TeacherCache(folder, codes_hash(codes.manifest)))
