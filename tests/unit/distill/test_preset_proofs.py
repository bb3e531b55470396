"""Every preset is what its row says: loss and gradient against a float64 formula that shares no code with the library.

A formula takes full logits of both models, the codes and where they come from, and returns the scalar whose gradient by
autograd is the preset's; what the paper holds fixed is detached. The contexts (which prefixes) come from the library,
and so do random numbers and the k-means map, which other tests look at.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import combinations, product

import pytest
import torch
from torch import Tensor, nn

from reference import step_inputs
from varkd.backbones.protocol import Backbone
from varkd.backbones.store import build
from varkd.distill.filtering import DifferenceSampling, difference_scores
from varkd.distill.inputs import StepInputs
from varkd.distill.loss import denominators, distill_loss
from varkd.distill.spaces import CodebookTables
from varkd.methods import METHODS
from varkd.types import Batch, Context
from varkd.world import Rng, World

STEP, ROWS, VOCAB = 3, 8, 12
PROGRESS = {"dagger": 0.25, "imitkd": 0.13, "imitkd_full": 0.13, "hybrid_gate": 0.3}
"""Where a preset is at half of training does not show all of its parts; 0.5 for the others."""
MEMORY: dict[str, dict[str, list[float]]] = {
    "taid": {"adaptive.terms.0.divergence.time": [0.63, 0.01, 2.0]},
    "distillm": {"adaptive.contexts.shares.1.fraction": [0.5, 2.0]},
    "distillm2": {"skew/teacher_side": [0.058], "skew/student_side": [-0.056]},
}
"""What adaptive numbers and moving averages remember of earlier steps."""


@dataclass(frozen=True)
class Step:
    """All sequences of an optimizer step, stacked, with full logits: everything that a formula may look at."""

    student_BLV: Tensor  # logits, with a graph
    teacher_BLV: Tensor
    null_BLV: Tensor  # the teacher's under the null label
    code_BL: Tensor
    gold_BL: Tensor
    source: tuple[str, ...]
    behavior_BL: Tensor  # log-probability under which each code was drawn; NaN where nobody knows
    accept_BL: Tensor
    weight_B: Tensor
    order_BL: Tensor
    sizes: tuple[int, ...]
    row_B: Tensor
    codebook_tables: CodebookTables
    counts_BL: Tensor  # False where a mixed rollout keeps a code of the data
    memory: dict[str, Tensor] = field(default_factory=dict)

    @property
    def lq(self) -> Tensor:
        return log_softmax(self.student_BLV)

    @property
    def lp(self) -> Tensor:
        return log_softmax(self.teacher_BLV)

    def on(self, *sources: str) -> Tensor:
        return torch.tensor([source in sources for source in self.source])


def log_softmax(logits: Tensor) -> Tensor:
    return logits - logits.logsumexp(-1, keepdim=True)


# ---- the formulas' vocabulary: (B, L, V) -> (B, L)


def of(logp_BLV: Tensor, code_BL: Tensor) -> Tensor:
    """log-probability of a code at each position."""
    hit_BLV = code_BL.unsqueeze(2) == torch.arange(logp_BLV.shape[2])
    return (logp_BLV * hit_BLV).sum(2)


def kl(first_BLV: Tensor, second_BLV: Tensor) -> Tensor:
    return (first_BLV.exp() * (first_BLV - second_BLV)).sum(2)


def entropy(logp_BLV: Tensor) -> Tensor:
    return -(logp_BLV.exp() * logp_BLV).sum(2)


def mixed(first_BLV: Tensor, second_BLV: Tensor, share: float | Tensor) -> Tensor:
    return (share * first_BLV.exp() + (1 - share) * second_BLV.exp()).log()


def total_variation(step: Step) -> Tensor:
    return 1 - torch.minimum(step.lp.exp(), step.lq.exp()).sum(2)


def mean(value_BL: Tensor, rows_B: Tensor | None = None, weight_BL: Tensor | float = 1.0) -> Tensor:
    """sum of weight * value over the positions of some sequences, divided by how many positions those are."""
    weighted_BL = value_BL * weight_BL
    return weighted_BL.mean() if rows_B is None else weighted_BL[rows_B].mean()


def over(value_BL: Tensor, mask_BL: Tensor) -> Tensor:
    """The mean over the positions of a mask."""
    return value_BL[mask_BL].mean()


def ce(step: Step) -> Tensor:
    return -of(step.lq, step.gold_BL)


def fkl(step: Step) -> Tensor:
    return kl(step.lp, step.lq)


def rkl(step: Step) -> Tensor:
    return kl(step.lq, step.lp)


def cluster_masses(logp_BLV: Tensor, cluster_V: Tensor) -> Tensor:
    masses = [logp_BLV[:, :, cluster_V == k].exp().sum(2) for k in range(int(cluster_V.max()) + 1)]
    return torch.stack(masses, dim=2).log()


def time_of(step: Step) -> Tensor:
    """The decoding step in which each raster position is made, position by position."""
    time_BL = torch.empty_like(step.order_BL)
    for row, order in enumerate(step.order_BL.tolist()):
        place = 0
        for moment, size in enumerate(step.sizes):
            for _ in range(size):
                time_BL[row, order[place]] = moment
                place += 1
    return time_BL


def by_rank(step: Step, threshold_L: Tensor) -> Tensor:
    """The threshold of a generation rank at the position that is generated then; one number serves all."""
    if len(threshold_L) == 1:
        return threshold_L.expand(step.order_BL.shape)
    found_BL = torch.empty(step.order_BL.shape)
    for row, order in enumerate(step.order_BL.tolist()):
        for rank, position in enumerate(order):
            found_BL[row, position] = threshold_L[rank]
    return found_BL


def sums(step: Step, value_BL: Tensor, later: bool) -> Tensor:
    """For every position the sum over the codes of strictly later (or strictly earlier) decoding steps."""
    time_BL = time_of(step)
    there_BLL = time_BL.unsqueeze(1) > time_BL.unsqueeze(2) if later else time_BL.unsqueeze(1) < time_BL.unsqueeze(2)
    return (there_BLL * value_BL.unsqueeze(1)).sum(2)


# ---- one formula per preset


def kd_ce(step: Step) -> Tensor:
    return 0.5 * mean(ce(step)) + 0.5 * mean(fkl(step))


def expert_action(step: Step) -> Tensor:
    """DAgger, ImitKD: the teacher's likeliest code as if it were data."""
    return -mean(of(step.lq, step.lp.argmax(2)))


def imitation_mix(step: Step) -> Tensor:
    data, student = step.on("data"), step.on("student")
    return 0.5 * mean(ce(step), data) + 0.5 * mean(fkl(step), data) + mean(fkl(step), student)


def fdistill_js(step: Step) -> Tensor:
    m = mixed(step.lp, step.lq, 0.5)
    return 0.5 * mean(kl(step.lp, m), step.on("teacher")) + 0.5 * mean(kl(step.lq, m), step.on("student"))


def fdistill_tvd(step: Step) -> Tensor:
    tv = total_variation(step)
    return 0.5 * mean(tv, step.on("teacher")) + 0.5 * mean(tv, step.on("student"))


def akl(step: Step) -> Tensor:
    """Row by row and code by code: the head is what is likeliest up to a mass of 1/2, and always the first code."""
    share_BL = torch.empty(step.code_BL.shape, dtype=torch.float64)
    for b, t in product(*map(range, share_BL.shape)):
        p, q = step.lp[b, t].exp().tolist(), step.lq[b, t].exp().tolist()
        mass, gap = 0.0, {"head": 0.0, "tail": 0.0}
        for place, code in enumerate(sorted(range(len(p)), key=lambda v: -p[v])):
            mass += p[code]
            gap["head" if place == 0 or mass <= 0.5 else "tail"] += abs(p[code] - q[code])
        share_BL[b, t] = gap["head"] / (gap["head"] + gap["tail"])
    return mean(fkl(step), None, share_BL) + mean(rkl(step), None, 1 - share_BL)


def todi(step: Step) -> Tensor:
    gap = step.lp - step.lq
    a = (1 / (1 + (-gap).exp())).detach()
    return mean((a * step.lp.exp() * gap - (1 - a) * step.lq.exp() * gap).sum(2))


def taid(step: Step) -> Tensor:
    between = log_softmax(0.37 * step.student_BLV.detach() + 0.63 * step.teacher_BLV)
    return mean(kl(between, step.lq))


def atkd(step: Step) -> Tensor:
    """1/5 DKD on easy codes + 4/5 (TKD + DKD) on hard ones; hard = uncertainty 1 - p(g) at or above its median."""
    hit_BLV = torch.nn.functional.one_hot(step.gold_BL, step.lp.shape[2]).bool()
    g_p, g_q = of(step.lp, step.gold_BL).exp(), of(step.lq, step.gold_BL).exp()
    tkd = g_p * (g_p / g_q).log() + (1 - g_p) * ((1 - g_p) / (1 - g_q)).log()
    rest_p, rest_q = step.lp.exp() / (1 - g_p).unsqueeze(2), step.lq.exp() / (1 - g_q).unsqueeze(2)
    dkd = torch.where(hit_BLV, 0.0, rest_p * (rest_p / rest_q).log()).sum(2)
    hard = 1 - g_p >= 1 - step.memory["threshold/hard_rest"].double()
    return 0.2 * over(dkd, ~hard) + 0.8 * (over(tkd, hard) + over(dkd, hard))


def tiekd(step: Step) -> Tensor:
    """(1 - lambda) CE on the data + lambda / N sum over the N contexts of KL + ranking, lambda = 1/2, k = 5."""
    p, q = step.lp.exp(), step.lq.exp()
    ranking_BL = torch.zeros(step.code_BL.shape, dtype=torch.float64)
    for b, t in product(*map(range, ranking_BL.shape)):
        T = sorted(range(p.shape[2]), key=lambda v: -p[b, t, v].item())[:5]
        S = sorted(range(q.shape[2]), key=lambda v: -q[b, t, v].item())[:5]
        value = sum((q[b, t, i] - q[b, t, T[0]]).clamp_min(0) for i in T)
        for i in T:
            for j in S:
                if p[b, t, i] > p[b, t, j]:
                    value = value + (q[b, t, j] - q[b, t, i]).clamp_min(0)
        ranking_BL[b, t] = value
    rounds = len(step.source) // int(step.on("data").sum())
    assert rounds == 3
    return 0.5 * mean(ce(step), step.on("data")) + 0.5 * mean(fkl(step) + ranking_BL)


def hybrid_gate(step: Step) -> Tensor:
    gate = 1 - PROGRESS["hybrid_gate"]
    return gate * mean(fkl(step), step.on("data")) + (1 - gate) * mean(ce(step), step.on("teacher"))


def gkd(step: Step) -> Tensor:
    m = mixed(step.lp, step.lq, 0.5)
    return mean(0.5 * kl(step.lp, m) + 0.5 * kl(step.lq, m))


def reward(step: Step) -> Tensor:
    return (of(step.lp, step.code_BL) - of(step.lq, step.code_BL)).detach()


def ppo(ratio_BL: Tensor, advantage_BL: Tensor, lq_BL: Tensor) -> Tensor:
    """-ratio A log q, ratio and A held fixed, 0 where min(ratio A, clip(ratio, 0.8, 1.2) A) is flat in the ratio."""
    ratio_BL = ratio_BL.detach()
    flat_BL = ratio_BL.clamp(0.8, 1.2) * advantage_BL < ratio_BL * advantage_BL
    return torch.where(flat_BL, 0.0, -ratio_BL * advantage_BL) * lq_BL


def ratio_to(step: Step, behavior_BL: Tensor) -> Tensor:
    return (of(step.lq, step.code_BL).detach() - behavior_BL).exp()


def opd(step: Step) -> Tensor:
    return mean(ppo(ratio_to(step, step.behavior_BL), reward(step), of(step.lq, step.code_BL)))


def iwopd(step: Step) -> Tensor:
    """Rewards times 1 + 1/2 (1 - S_before / S), S the sum of |reward|."""
    r = reward(step)
    drift_BL = sums(step, r.abs(), later=False) / r.abs().sum(1, keepdim=True)
    position = ppo(ratio_to(step, step.behavior_BL), r, of(step.lq, step.code_BL))
    return mean(position, None, 1.5 - 0.5 * drift_BL)


def minillm(step: Step) -> Tensor:
    """w KL(q || p) - w R log q, R_t = the mean of later rewards / 0.5, on student sequences; + CE on data."""
    w = ratio_to(step, step.behavior_BL).nan_to_num()
    later_BL = sums(step, torch.ones_like(w), later=True)
    future_BL = sums(step, reward(step) / 0.5, later=True) / later_BL.clamp_min(1)
    position = w * rkl(step) - (w * future_BL).detach() * of(step.lq, step.code_BL)
    return mean(position, step.on("student")) + mean(ce(step), step.on("data"))


def eopd(step: Step) -> Tensor:
    """RKL everywhere, FKL as well where the teacher's entropy is at or above its threshold."""
    unsure = entropy(step.lp) >= -math.log(VOCAB) * by_rank(step, step.memory["threshold/fkl"])
    return mean(rkl(step)) + mean(fkl(step), None, unsure)


def distillm(step: Step) -> Tensor:
    return mean(kl(step.lq, mixed(step.lp, step.lq, 0.9)))


def distillm2(step: Step) -> Tensor:
    """Skews per sequence: clip(1 - 0.9 m / (p - q + 1e-5), 0.01, 0.1), p and q geometric means over the codes."""
    gap_B = (of(step.lp, step.code_BL).mean(1).exp() - of(step.lq, step.code_BL).mean(1).exp()).detach()

    def skew(name: str) -> Tensor:
        alpha_B = 1 - 0.9 * step.memory[name].double() / (gap_B + 1e-5)
        return alpha_B.clamp(0.01, 0.1).view(-1, 1, 1)

    teacher_side = kl(step.lp, mixed(step.lp, step.lq, skew("skew/teacher_side")))
    student_side = kl(step.lq, mixed(step.lq, step.lp, skew("skew/student_side")).detach())
    return mean(teacher_side, step.on("teacher")) + mean(student_side, step.on("student"))


def skd(step: Step) -> Tensor:
    return mean(fkl(step))


def selectkd_topk(step: Step) -> Tensor:
    likeliest_BL = step.lq.argmax(2)
    top_BL5 = step.lp.argsort(dim=2, descending=True)[:, :, :5]
    agrees_BL = (top_BL5 == likeliest_BL.unsqueeze(2)).any(2)
    return mean(fkl(step), None, torch.where(agrees_BL, 1.0, 0.1))


def selectkd_spec(step: Step) -> Tensor:
    """y ~ q by its inverse CDF, accepted with probability min(1, p(y) / q(y))."""
    propose_BL, verify_BL = (
        Rng(0, STEP).uniform("verify", step.row_B, 2 * step.code_BL.shape[1]).view(*step.code_BL.shape, 2).unbind(2)
    )
    y_BL = (step.lq.exp().cumsum(2) <= propose_BL.double().unsqueeze(2)).sum(2)
    accepted_BL = verify_BL < (of(step.lp, y_BL) - of(step.lq, y_BL)).exp()
    return mean(fkl(step), None, torch.where(accepted_BL, 1.0, 0.1))


def guided(step: Step) -> Step:
    return replace(step, teacher_BLV=step.null_BLV + 1.5 * (step.teacher_BLV - step.null_BLV))


def by_acceptance(step: Step) -> Tensor:
    """0.3 + 0.7 min(1, p / q) of the code at hand."""
    return 0.3 + 0.7 * (of(step.lp, step.code_BL) - of(step.lq, step.code_BL).detach()).exp().clamp(max=1)


def by_chance(step: Step) -> Tensor:
    """The control's positions: 0.3 for a share of 0.15 by chance."""
    uniform_BL = Rng(0, STEP).uniform("select", step.row_B, step.code_BL.shape[1])
    return torch.where(uniform_BL >= 0.15, 1.0, 0.3).double()


@dataclass(frozen=True)
class BestOfN:
    """KL(q || p) on data, + on student sequences a [0.3 KL(q || p) + 0.7 KL of clusters]; parts can be added."""

    clusters: str | None = None
    selection: Callable[[Step], Tensor] | None = None
    sources: tuple[str, ...] = ("data", "student")
    target: Callable[[Step], Step] = lambda step: step

    def __call__(self, step: Step) -> Tensor:
        step = self.target(step)
        total = mean(rkl(step), step.on("data"))
        if "student" not in self.sources:
            return total
        value_BL = rkl(step)
        if self.clusters:
            cluster_V = step.codebook_tables[self.clusters]
            coarse_BL = kl(cluster_masses(step.lq, cluster_V), cluster_masses(step.lp, cluster_V))
            value_BL = 0.3 * value_BL + 0.7 * coarse_BL
        return total + mean(value_BL, step.on("student"), self.selection(step) if self.selection else 1.0)


GROUPS = "clusters/plain-factor4-seed0"


@dataclass(frozen=True)
class Published:
    """VarKD's equations 7 to 12: a_t D over groups of codes, on data rows and on what was generated."""

    divergence: str = "rkl"
    weighted: bool = True
    groups: str | None = None
    permuted: bool = False

    def __call__(self, step: Step) -> Tensor:
        lp, lq = step.lp, step.lq
        weight_BL = self.weight(step) if self.weighted else torch.ones_like(lp[..., 0])
        if self.groups:
            lp, lq = (cluster_masses(each, step.codebook_tables[self.groups]) for each in (lp, lq))
        m = mixed(lp, lq, 0.5)
        value_BL = kl(lq, lp) if self.divergence == "rkl" else 0.5 * kl(lp, m) + 0.5 * kl(lq, m)
        return over(weight_BL * value_BL, step.counts_BL)

    def weight(self, step: Step) -> Tensor:
        a_BL, time_BL = 1 - entropy(step.lp) / math.log(VOCAB), time_of(step)
        for row in step.on("student").nonzero().flatten().tolist():
            lost = time_BL[row][(a_BL[row] < 0.1) & step.counts_BL[row]]
            if len(lost):
                a_BL[row] = torch.where(time_BL[row] > lost.min(), 0.0, a_BL[row])
        if self.permuted:
            noise_BL = Rng(0, STEP).uniform("permute", step.row_B, a_BL.shape[1])
            for row, counts in enumerate(step.counts_BL):
                (here,) = counts.nonzero(as_tuple=True)
                a_BL[row, here[noise_BL[row, here].argsort()]] = a_BL[row, here].clone()
        return a_BL


FORMULAS: dict[str, Callable[[Step], Tensor]] = {
    "ce": lambda step: mean(ce(step)),
    "kd": lambda step: mean(fkl(step)),
    "kd_ce": kd_ce,
    "seqkd": lambda step: mean(ce(step)),
    "seqkd_guided": lambda step: mean(ce(step)),
    "seqkd_soft": lambda step: mean(fkl(step)),
    "seqkd_prefix": lambda step: over(fkl(step), step.counts_BL),
    "seqinter": lambda step: mean(ce(step)),
    "dagger": expert_action,
    "scheduled_sampling": lambda step: mean(ce(step)),
    "scheduled_sampling_parallel": lambda step: mean(ce(step)),
    "imitkd": expert_action,
    "imitkd_full": lambda step: mean(fkl(step)),
    "imitation_mix": imitation_mix,
    "fdistill_rkl": lambda step: mean(rkl(step)),
    "fdistill_js": fdistill_js,
    "fdistill_tvd": fdistill_tvd,
    "akl": akl,
    "todi": todi,
    "taid": taid,
    "atkd": atkd,
    "tiekd": tiekd,
    "hybrid_gate": hybrid_gate,
    "miniplm": lambda step: mean(ce(step)),
    "gkd": gkd,
    "gkd_prefix": Published("jsd", weighted=False),
    "distillspec": lambda step: mean(total_variation(step)),
    "opd": opd,
    "iwopd": iwopd,
    "eopd": eopd,
    "minillm": minillm,
    "distillm": distillm,
    "distillm2": distillm2,
    "skd": skd,
    "selectkd_topk": selectkd_topk,
    "selectkd_spec": selectkd_spec,
    "kd_guided": lambda step: kd_ce(guided(step)),
    "varkd": Published(groups=GROUPS),
    "varkd_jsd": Published("jsd", groups=GROUPS),
    "varkd_mixed": Published(weighted=False),
    "varkd_weight": Published(),
    "varkd_weight_groups": Published(groups=GROUPS),
    "varkd_permuted_weight": Published(groups=GROUPS, permuted=True),
    "varkd_random_groups": Published(groups="clusters/permuted-factor4-seed0"),
    "varkd_free": Published(groups=GROUPS),
    "best_of_n": BestOfN(),
    "best_of_n_guided": BestOfN(target=guided),
    "kd_reverse": BestOfN(sources=("data",)),
    "best_of_1": BestOfN(),
    "best_of_n_random": BestOfN(),
    "best_of_n_select": BestOfN(selection=by_acceptance),
    "best_of_n_random_select": BestOfN(selection=by_chance),
    "best_of_n_clusters": BestOfN(clusters="clusters/kmeans-sqrt-seed0"),
    "best_of_n_random_clusters": BestOfN(clusters="clusters/random-sqrt-seed0"),
}

DATA, TEACHER, STUDENT = {"data": ROWS}, {"teacher": ROWS}, {"student": ROWS}
DATA_STUDENT, TEACHER_STUDENT = {"data": 4, "student": 4}, {"teacher": 4, "student": 4}
SOURCES: dict[str, dict[str, int]] = {
    **dict.fromkeys(("ce", "kd", "akl", "todi", "taid", "atkd", "miniplm", "kd_ce", "kd_guided",
                     "kd_reverse"), DATA),
    **dict.fromkeys(("seqkd", "seqkd_guided", "seqkd_prefix", "seqkd_soft", "seqinter"), TEACHER),
    **dict.fromkeys(("scheduled_sampling", "scheduled_sampling_parallel", "fdistill_rkl", "distillspec", "opd",
                     "iwopd", "eopd", "skd"), STUDENT),
    **dict.fromkeys(("dagger", "fdistill_js", "fdistill_tvd", "distillm2"), TEACHER_STUDENT),
    **{name: {"data": ROWS - 1, "student": 1} for name in METHODS if name.startswith(("varkd", "gkd_prefix"))},
    "hybrid_gate": {"data": 4, "teacher": 4},
    "imitation_mix": {"data": 5, "student": 3},
    "tiekd": {"data": ROWS, "student": 2 * ROWS},
}  # fmt: skip
"""Sequences by source; half data and half student samples for those that are not named."""

SCORES: dict[str, dict[str, Callable[[Step], Tensor]]] = {
    "atkd": dict.fromkeys(
        ("threshold/easy", "threshold/hard_target", "threshold/hard_rest"),
        lambda step: of(step.lp, step.gold_BL).exp(),
    ),
    "eopd": {"threshold/fkl": lambda step: -entropy(step.lp) / math.log(VOCAB)},
}
"""What is compared with a threshold; the tests put the threshold into the middle of it."""


# ---- the library's side


@dataclass(frozen=True)
class Case:
    """A preset in the middle of a run, on toy models of one family."""

    inputs: StepInputs
    context: Context
    step: Step
    batch: Batch


def toy(family: str, seed: int, dim: int) -> Backbone:
    """Float64, all weights drawn from a normal distribution, the head included."""
    sizes = {"vocab_size": VOCAB, "num_classes": 3, "num_layers": 2, "dim": dim, "num_heads": 2, "ffn_dim": 24}
    sizes |= {"scales": (1, 2), "code_dim": 4} if family == "var" else {"grid": (2, 3)}
    model = build(family, sizes).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4, generator=generator)
    return model


def toy_batch(num_rows: int = ROWS, length: int = 6) -> Batch:
    draw = torch.Generator().manual_seed(0)
    codes_BL = torch.randint(VOCAB, (num_rows, length), generator=draw)
    return Batch(codes_BL, torch.randint(3, (num_rows,), generator=draw), torch.arange(num_rows))


def full_logits(model: Backbone, context: Context, null: bool = False) -> Tensor:
    """(B, L, V) of all parts by a plain forward pass."""
    conditions = [part.condition.null(model.null_label) if null else part.condition for part in context.parts]
    hidden = [model(part.codes_BL, c, part.plan) for part, c in zip(context.parts, conditions, strict=True)]
    return model.head(torch.cat(hidden))


def look(student: Backbone, teacher: Backbone, context: Context, codebook_tables: CodebookTables) -> Step:
    """The step as the formulas see it."""
    parts = context.parts

    def stack(values: list[Tensor | None], blank: float | bool) -> Tensor:
        return torch.cat(
            [
                torch.full(part.codes_BL.shape, blank) if value is None else value
                for part, value in zip(parts, values, strict=True)
            ]
        )

    with torch.no_grad():
        teacher_BLV, null_BLV = full_logits(teacher, context), full_logits(teacher, context, null=True)
    return Step(
        full_logits(student, context),
        teacher_BLV,
        null_BLV,
        code_BL=torch.cat([part.codes_BL for part in parts]),
        gold_BL=torch.cat([part.supervision_BL for part in parts]),
        source=tuple(part.source for part in parts for _ in range(len(part))),
        behavior_BL=stack([part.behavior_logp_BL for part in parts], math.nan).double(),
        accept_BL=stack([part.accept_BL for part in parts], True),
        weight_B=torch.cat([part.weight_B for part in parts]).double(),
        order_BL=torch.cat([part.plan.order_BL for part in parts]),
        sizes=parts[0].plan.sizes,
        row_B=torch.cat([part.row_B for part in parts]),
        codebook_tables=codebook_tables,
        counts_BL=stack([part.generated_BL for part in parts], True),
    )


def middle(step: Step, score_BL: Tensor, rows_B: Tensor, per_rank: bool) -> Tensor:
    """A number amid the scores of each generation rank (or of all) that no score is equal to."""
    score_BL = score_BL.gather(1, step.order_BL)[rows_B]
    found = []
    for scores in score_BL.T if per_rank else [score_BL.flatten()]:
        different = torch.tensor(sorted({round(score, 9) for score in scores.tolist()}))
        half = len(different) // 2
        found.append((different[half - 1] + different[half]) / 2)
    return torch.stack(found)


def case(name: str, family: str = "llamagen", drift: float = 0.0) -> Case:
    """`drift`: how far the behavior log-probabilities are from the student's, as if it had moved on since."""
    student, teacher = toy(family, 1, 16), toy(family, 2, 24).eval().requires_grad_(False)
    memory = {key: torch.tensor(values, dtype=torch.float64) for key, values in MEMORY.get(name, {}).items()}
    method = METHODS[name].method.at(PROGRESS.get(name, 0.5), memory)
    codebook_tables = method.prepare(torch.randn(VOCAB, 3, generator=torch.Generator().manual_seed(0)))
    batch, rng = toy_batch(length=student.sequence_length), Rng(0, STEP)
    inputs = step_inputs(
        student, teacher, memory, rng, codebook_tables=codebook_tables, reference=toy(family, 3, 16).eval()
    )
    context = method.contexts(batch, inputs)
    if drift:
        noise = torch.Generator().manual_seed(5)
        context = Context(
            tuple(
                part
                if part.behavior_logp_BL is None
                else replace(
                    part,
                    behavior_logp_BL=part.behavior_logp_BL + drift * torch.randn(part.codes_BL.shape, generator=noise),
                )
                for part in context.parts
            )
        )
    step = look(student, teacher, context, codebook_tables)
    for key, score in SCORES.get(name, {}).items():
        memory[key] = middle(step, score(step), step.on(step.source[0]), per_rank=name != "atkd").detach()
    inputs = StepInputs(method, student, teacher, memory, rng, codebook_tables=codebook_tables, chunk_rows=7)
    return Case(inputs, context, replace(step, memory=memory), batch)


def gradients(model: nn.Module, value: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(value, parameters, retain_graph=True), strict=True))


def assert_proof(subject: Case, expected: Tensor) -> None:
    """Value and gradient, to what is left of scores and weights that are kept in float32."""
    totals = denominators(subject.inputs, subject.context)
    found, stats = distill_loss(subject.inputs, subject.context, totals)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-8)
    assert all(stats.collect(World()).means[f"terms/{term.name}"] != 0 for term in subject.inputs.method.terms)
    student = subject.inputs.student
    ours, formula = gradients(student, found), gradients(student, expected)
    largest = max(float(gradient.abs().max()) for gradient in formula.values())
    for name, gradient in formula.items():
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=2e-6 * largest)


# ---- the proofs


def test_every_preset_has_a_formula():
    assert set(FORMULAS) == set(METHODS)
    assert set(PROGRESS) | set(MEMORY) | set(SOURCES) | set(SCORES) <= set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_a_preset_is_its_formula(name: str):
    subject = case(name)
    assert Counter(subject.step.source) == SOURCES.get(name, DATA_STUDENT)
    assert_proof(subject, FORMULAS[name](subject.step))


def test_the_cases_show_every_part():
    """Selections that keep some positions, skews between their limits, rejected proposals, other samples."""
    codes = [case(name).step.code_BL for name in ("best_of_n", "best_of_1", "best_of_n_random")]
    for first, second in combinations(codes, 2):
        assert (first != second).any(1).sum() >= 2, "they differ in which samples they are about"
    for selection in (by_acceptance, by_chance):
        step = case("best_of_n").step
        assert 0.05 < float((selection(step) < 0.999)[step.on("student")].double().mean()) < 0.95
    for name, about in {**SCORES, "selectkd_topk": ["kd"], "selectkd_spec": ["kd"]}.items():
        subject = case(name)
        _, stats = distill_loss(subject.inputs, subject.context, denominators(subject.inputs, subject.context))
        for key in about:
            assert 0.1 < stats.collect(World()).means[f"kept/{key.removeprefix('threshold/')}"] < 0.9, (name, key)
    subject = case("distillm2")
    skews = distill_loss(subject.inputs, subject.context, {"teacher_side": 1.0, "student_side": 1.0})[1]
    for side in ("teacher_side", "student_side"):
        assert 0.02 < skews.collect(World()).means[f"skew/{side}"] < 0.09, side


@pytest.mark.parametrize("family", ["randar", "var"])
@pytest.mark.parametrize("name", ["iwopd", "minillm", "eopd", "distillm2", "best_of_n", "varkd"])
def test_time_is_generation_time(name: str, family: str):
    """A random order for every sequence; a whole scale at once: prefixes, futures and thresholds follow the plan."""
    subject = case(name, family)
    assert_proof(subject, FORMULAS[name](subject.step))


@pytest.mark.parametrize("name", ["opd", "iwopd", "minillm"])
def test_policy_gradients_correct_for_old_samples(name: str):
    """The ratios are far from 1 here, and PPO's clip is at work where there is one."""
    subject = case(name, drift=0.4)
    ratio_BL = ratio_to(subject.step, subject.step.behavior_BL)[subject.step.on("student")]
    assert ratio_BL.max() > 1.5 and ratio_BL.min() < 0.7
    assert_proof(subject, FORMULAS[name](subject.step))


def test_the_clip_is_that_of_ppo():
    """Autograd of PPO's clipped surrogate in the ratio itself, not of its log-derivative form."""
    subject = case("opd", drift=0.4)
    step, advantage_BL = subject.step, reward(subject.step)
    ratio_BL = (of(step.lq, step.code_BL) - step.behavior_BL).exp()
    surrogate_BL = torch.minimum(ratio_BL * advantage_BL, ratio_BL.clamp(0.8, 1.2) * advantage_BL)
    student = subject.inputs.student
    expected = gradients(student, -surrogate_BL.mean())
    for name, gradient in gradients(student, opd(step)).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-7, atol=1e-9)


# ---- what the samples are, where a preset is about that


def test_on_policy_codes_were_drawn_with_the_recorded_probability():
    """opd from q, minillm from 0.2 p + 0.8 q, seqkd_guided from the guided teacher."""
    laws: dict[str, Callable[[Step], Tensor]] = {
        "opd": lambda step: step.lq,
        "minillm": lambda step: mixed(step.lp, step.lq, 0.2),
        "seqkd": lambda step: step.lp,
        "seqkd_guided": lambda step: log_softmax(guided(step).teacher_BLV),
    }
    for name, law in laws.items():
        step = case(name).step
        drawn = ~step.behavior_BL.isnan()
        assert drawn.any()
        torch.testing.assert_close(of(law(step), step.code_BL)[drawn], step.behavior_BL[drawn], rtol=0, atol=1e-5)


def test_speculative_kd_redraws_what_the_teacher_would_not_draw():
    """q(x) in the 0.9 nucleus of p, + the rejected mass times p(x); rejected codes exist, and are counted."""
    step = case("skd").step
    p, q = step.lp.exp(), step.lq.exp()
    ordered = p.sort(2, descending=True)
    before = ordered.values.cumsum(2) - ordered.values
    nucleus = torch.zeros_like(p, dtype=torch.bool).scatter(2, ordered.indices, before <= 0.9)
    law = nucleus * q + (q * ~nucleus).sum(2, keepdim=True) * p
    torch.testing.assert_close(law.sum(2), torch.ones_like(law[:, :, 0]))
    torch.testing.assert_close(of(law.log(), step.code_BL), step.behavior_BL, rtol=0, atol=1e-5)
    assert 0.3 < step.accept_BL.double().mean() < 1
    kept = of(nucleus.double(), step.code_BL) > 0
    assert kept[step.accept_BL.bool()].all()


def test_scheduled_sampling_replaces_a_quarter_of_the_prefix_and_no_target():
    """Halfway between 0 and 1/2; codes are replaced where the coin says so, and nowhere else."""
    for name, stream in (("scheduled_sampling", "coins"), ("scheduled_sampling_parallel", "coins/0")):
        subject = case(name)
        step = subject.step
        assert torch.equal(step.gold_BL, subject.batch.codes_BL[step.row_B])
        tossed_BL = Rng(0, STEP).uniform(stream, step.row_B, step.code_BL.shape[1]) < 0.25
        changed_BL = step.code_BL != step.gold_BL
        assert not changed_BL[~tossed_BL].any()
        assert changed_BL[tossed_BL].double().mean() > 0.6, name


def test_tie_kd_feeds_back_the_likeliest_codes():
    step = case("tiekd").step
    likeliest_BL = step.lq.argmax(2)
    assert step.source[:ROWS] == ("data",) * ROWS
    for turn in (1, 2):
        fed = slice(turn * ROWS, (turn + 1) * ROWS)
        assert torch.equal(step.code_BL[fed], likeliest_BL[fed.start - ROWS : fed.start])
        assert torch.equal(step.gold_BL[fed], step.gold_BL[:ROWS])


def test_completions_begin_with_half_the_image():
    subject = case("seqinter")
    step = subject.step
    assert torch.equal(step.code_BL[:, :3], subject.batch.codes_BL[step.row_B][:, :3])
    assert not torch.equal(step.code_BL[:, 3:], subject.batch.codes_BL[step.row_B][:, 3:])
    assert torch.equal(step.gold_BL, step.code_BL)


def test_difference_sampling_keeps_the_better_half_of_each_class():
    """MiniPLM: NLL_start - NLL_teacher by full logits, image by image."""
    subject = case("miniplm")
    step, label = subject.step, subject.batch.label_B
    images = METHODS["miniplm"].method.images
    assert isinstance(images, DifferenceSampling)
    score = (of(step.lp, step.code_BL) - of(step.lq, step.code_BL)).mean(1).detach()
    found = difference_scores(subject.inputs.teacher, subject.inputs.student, [subject.batch])  # type: ignore[arg-type]
    torch.testing.assert_close(found.double(), score, rtol=1e-5, atol=1e-6)
    kept = images.kept(found, label).tolist()
    for each in label.unique().tolist():
        mine = sorted(((float(score[i]), i) for i in range(ROWS) if label[i] == each), reverse=True)
        best = sorted(i for _, i in mine[: max(1, round(len(mine) / 2))])
        assert [i for i in kept if label[i] == each] == best


# ---- what moves over training


STUDENT_SHARE: dict[str, Callable[[float], float]] = {
    "dagger": lambda p: min(1.0, 2 * p),
    "imitkd": lambda p: 1 - 200**-p,
    "imitkd_full": lambda p: 1 - 200**-p,
    "imitation_mix": lambda p: 0.1 + 0.6 * p,
    "varkd": lambda p: 0.1,
    "best_of_n": lambda p: 0.5,
    "best_of_1": lambda p: 0.5,
    "gkd": lambda p: 0.5,
    "minillm": lambda p: 0.5,
    "hybrid_gate": lambda p: 0.0,
}


@pytest.mark.parametrize("name", STUDENT_SHARE)
def test_the_share_of_student_samples_follows_its_schedule(name: str):
    student, teacher = toy("llamagen", 1, 16), toy("llamagen", 2, 24)
    batch = toy_batch(40)
    for progress in (0.0, 0.2, 0.35, 0.7, 1.0):
        method = METHODS[name].method.at(progress)
        context = method.contexts(batch, step_inputs(student, teacher, {}, Rng(0, STEP), reference=teacher))
        count = sum(len(part) for part in context.parts if part.source == "student")
        assert abs(count - 40 * STUDENT_SHARE[name](progress)) <= 1, (progress, count)


def test_distillm_samples_less_and_replays_more():
    """A student row is sampled anew with probability 1 - progress, whatever its ring holds."""
    student, batch = toy("llamagen", 1, 16), toy_batch()
    state = {"adaptive.contexts.shares.1.fraction": torch.tensor([1.0, 2.0], dtype=torch.float64)}
    for progress, expected in ((0.2, 0.8), (0.7, 0.3)):
        method, fresh = METHODS["distillm"].method.at(progress, state), []
        for turn in range(26):
            inputs = step_inputs(student, student, state, Rng(1, turn))
            context = method.contexts(batch, inputs)
            state = method.update(state, context, {}, inputs.rng)
            fresh += [bool(age == 0) for part in context.parts for age in part.age_B] if turn > 5 else []
        assert abs(sum(fresh) / len(fresh) - expected) < 0.1  # 160 rows: a standard deviation of 0.04


QUANTILE = {"atkd": (0.5, 0.0), "eopd": (0.5, 0.9)}
"""Quantile and decay."""


@pytest.mark.parametrize("name", SCORES)
def test_thresholds_follow_the_quantiles_of_their_scores(name: str):
    """decay * before + (1 - decay) * quantile, per generation rank; ATKD: the median over all positions."""
    subject, (quantile, decay) = case(name), QUANTILE[name]
    totals = denominators(subject.inputs, subject.context)
    _, stats = distill_loss(subject.inputs, subject.context, totals)
    before, inputs = subject.step.memory, subject.inputs
    after = inputs.method.update(dict(before), subject.context, stats.collect(World()).observed, inputs.rng)
    step = subject.step
    rows_B = step.on(step.source[0])
    for key, score in SCORES[name].items():
        score_BL = score(step).gather(1, step.order_BL)[rows_B]
        columns = [score_BL.flatten()] if name == "atkd" else score_BL.T
        for rank, column in enumerate(columns):
            ordered = sorted(column.tolist())
            place = quantile * (len(ordered) - 1)
            low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
            fresh = low + (place - math.floor(place)) * (high - low)
            expected = decay * float(before[key][rank]) + (1 - decay) * fresh
            assert float(after[key][rank]) == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_adaptive_numbers_move_as_published():
    """TAID's t, DistiLLM's phi and DistiLLM-2's running gap over a few steps, by hand."""
    method, state = METHODS["taid"].method, {}
    time, average, former = 0.4, 0.0, 3.0
    for progress, loss in ((0.01, 3.0), (0.02, 2.0), (0.021, 2.5), (0.5, 1.0)):
        state = method.adapt(state, progress, loss)
        average = 0.99 * average + 0.01 * (former - loss) / (former + 1e-15)
        time = min(1.0, max(0.4 + 0.6 * progress, time + 5e-4 / (1 + math.exp(-average)) * (1 - time)))
        former = loss
        assert state["adaptive.terms.0.divergence.time"].tolist() == pytest.approx([time, average, loss], rel=1e-12)
    assert time == pytest.approx(0.7)

    method, state = METHODS["distillm"].method, {}
    for loss, phi in ((3.0, 0.0), (3.05, 0.0), (3.11, 0.1), (3.15, 0.1), (3.22, 0.2), (2.0, 0.2)):
        state = method.validated(state, loss)
        assert float(state["adaptive.contexts.shares.1.fraction"][0]) == pytest.approx(phi)

    subject = case("distillm2")
    step, method = subject.step, subject.inputs.method
    gap_B = (of(step.lp, step.code_BL).mean(1).exp() - of(step.lq, step.code_BL).mean(1).exp()).detach()
    _, stats = distill_loss(subject.inputs, subject.context, {"teacher_side": 1.0, "student_side": 1.0})
    after = method.update(dict(step.memory), subject.context, stats.collect(World()).observed, subject.inputs.rng)
    for source in ("teacher", "student"):
        mean_gap = 0.9 * step.memory[f"skew/{source}_side"] + 0.1 * gap_B[step.on(source)].mean()
        torch.testing.assert_close(after[f"skew/{source}_side"].double(), mean_gap, rtol=1e-5, atol=0)
