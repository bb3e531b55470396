"""How well a student agrees with its teacher, in the units that are optimized, on data and on its own contexts.

A low divergence on data prefixes that is higher on student prefixes is exposure bias. By position, it shows where.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from varkd.backbones.protocol import Backbone
from varkd.distill.divergences import CrossEntropy, TargetRows
from varkd.distill.logspace import log_softmax
from varkd.distill.scores import chunks
from varkd.evaluate.diagnostics import CHUNK_ROWS, CodeSpace, Sequences, measure
from varkd.rollout import Sampler, evaluating, rollout
from varkd.types import Batch, Condition, Plan
from varkd.world import Rng

QUANTITIES = ("ce", "ce_teacher", "forward_kl", "reverse_kl", "acceptance", "top1", "top1_cluster", "teacher_entropy")
Curves = dict[str, list[float]]


@torch.no_grad()
def cross_entropy(model: Backbone, batches: Iterable[Batch], device: torch.device) -> float:
    """-log q(code) in nats per code, mean over all codes of `batches`."""
    total, count = 0.0, 0
    with evaluating(model):
        for batch in batches:
            codes_BL, condition, plan = _inputs(model, batch, device)
            hidden_ND = model(codes_BL, condition, plan).flatten(0, 1)
            code_N = codes_BL.flatten()
            for rows in chunks(len(code_N), CHUNK_ROWS):
                logp_NV = log_softmax(model.head(hidden_ND[rows]))
                total += float(CrossEntropy()(logp_NV, None, TargetRows(code_N[rows])).double().sum())
            count += code_N.numel()
    return total / max(1, count)


def agreement(
    student: Backbone, teacher: Backbone, batches: Iterable[Batch], cluster_V: Tensor, device: torch.device
) -> tuple[dict[str, float], Curves]:
    """Compare two models on the prefixes in `batches`.

    Args:
        cluster_V: the cluster of every code, int64 (V,).

    Returns:
        The means (nats per code; `acceptance` = 1 - TV, `top1` and `top1_cluster` in [0, 1]; `ce` is the student's
        -log q of the codes, `ce_teacher` the teacher's) and the same by raster position, each a list of L.
    """
    sums, count = {}, 0
    for batch in batches:
        for name, value_BL in _compare(student, teacher, batch, cluster_V.to(device), device).items():
            sums[name] = sums.get(name, 0.0) + value_BL.double().sum(0)
        count += len(batch)
    curves = {name: (total / count).tolist() for name, total in sums.items()}
    return {name: sum(values) / len(values) for name, values in curves.items()}, curves


@torch.no_grad()
def student_batches(student: Backbone, label_B: Tensor, seed: int, batch_size: int) -> list[Batch]:
    """Sequences that the student samples from its own distribution (temperature 1, no filter, no guidance)."""
    batches, device = [], student.head.weight.device
    for begin in range(0, len(label_B), batch_size):
        label = label_B[begin : begin + batch_size].to(device)
        row_B = torch.arange(begin, begin + len(label), device=device)
        plan = _plan(student, row_B)
        uniform_BL = Rng(seed).uniform("agreement", row_B, plan.order_BL.shape[1])
        samples = rollout(student, Condition(label), plan, Sampler(), uniform_BL)
        batches.append(Batch(samples.codes_BL, label, row_B))
    return batches


def _compare(
    student: Backbone, teacher: Backbone, batch: Batch, cluster_V: Tensor, device: torch.device
) -> dict[str, Tensor]:
    sequences = Sequences(*_inputs(student, batch, device))
    return measure(student, teacher, sequences, CodeSpace(cluster_V), QUANTITIES, max(1, len(batch)))


def _inputs(model: Backbone, batch: Batch, device: torch.device) -> tuple[Tensor, Condition, Plan]:
    plan = _plan(model, batch.row_B.to(device))
    return batch.codes_BL.to(device), Condition(batch.label_B.to(device)), plan


def _plan(model: Backbone, row_B: Tensor) -> Plan:
    """The same order for a row wherever it is sampled or compared."""
    return model.plan(len(row_B), Rng(0), row_B)
