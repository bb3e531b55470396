"""The preset table: every method as a value, with its source. Values only, no def, no if.

Directions are named in words: `ForwardKL` = KL(teacher || student). `varkd` is an independent implementation of the
idea of arXiv 2606.06078 (student samples with a reweighted signal, teacher applied by its confidence, compressed code
space); the paper's own formulas are not public to us.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from varkd.distill.contexts import Data, Mixture, Replay, Reweighted, Rollout, Share
from varkd.distill.divergences import (
    JSD,
    AdaptiveKL,
    CrossEntropy,
    ForwardKL,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
    TeacherArgmax,
    ToDi,
    TotalVariation,
)
from varkd.distill.method import Method, Term
from varkd.distill.schedule import Decay, Ramp
from varkd.distill.selection import All, Confidence, Random
from varkd.distill.spaces import Clusters, Full


@dataclass(frozen=True)
class Preset:
    """A named method: where it comes from, its equation, and what it does in one sentence."""

    source: str
    equation: str
    summary: str
    method: Method


_HALF_AND_HALF = Mixture((Share(Data(), 0.5), Share(Rollout(), 0.5)))
_TEACHER_AND_STUDENT = Mixture((Share(Rollout(by="teacher"), 0.5), Share(Rollout(), 0.5)))
_DATA_TO_STUDENT = Mixture((Share(Data(), Decay(1.0, 0.0)), Share(Rollout(), Decay(0.0, 1.0))))

# VarKD's parts (docs/varkd.md). Half of the rows become replayed student samples after a tenth of training on data; the
# teacher counts fully where its best cluster is above the per-position median, and a tenth below it.
_VARKD_MIX = Mixture((Share(Data(), Ramp(1.0, 0.5, 0.1, 0.4)), Share(Replay(), Ramp(0.0, 0.5, 0.1, 0.4))))
_VARKD_SELECT = Confidence(Ramp(0.0, 0.5, 0.1, 0.6), score="cluster_mass", floor=0.1)
_VARKD_SPACE = Clusters(within=0.3)
_VARKD_ANCHOR = (
    Term("anchor", ForwardKL(), on=("data",)),
    Term("anchor_ce", CrossEntropy(), on=("data",), weight=0.5),
)
_VARKD_TERM = Term("student", ForwardKL(), on=("student",), selection=_VARKD_SELECT, space=_VARKD_SPACE)
_VARKD_CONTEXTS = Reweighted(_VARKD_MIX)
_IDEA = "independent implementation of the idea of arXiv 2606.06078"

METHODS: dict[str, Preset] = {
    "ce": Preset(
        "maximum likelihood, no teacher", "-log q(x_t)",
        "Learns from the images' codes alone: the baseline that every method must beat.",
        Method((Term("ce", CrossEntropy()),)),
    ),
    "kd": Preset(
        "Hinton et al. 2015, arXiv 1503.02531; word-KD of Kim & Rush 2016, arXiv 1606.07947",
        "1/2 CE + 1/2 KL(p || q) on data prefixes",
        "Imitates the teacher's full distribution on real prefixes, beside the data.",
        Method((Term("kd", ForwardKL(), weight=0.5), Term("ce", CrossEntropy(), weight=0.5))),
    ),
    "seqkd": Preset(
        "Kim & Rush 2016, arXiv 1606.07947, sequence-level KD (images: sampled, never a beam)", "-log q(x_t), x ~ p",
        "Learns from images that the teacher samples now, as if they were data.",
        Method((Term("ce", CrossEntropy()),), Rollout(by="teacher")),
    ),
    "imitkd": Preset(
        "ImitKD, Lin et al. 2020, arXiv 2009.07253 (student sampled, not greedy)",
        "-log q(argmax p) on data, then on student samples (data share 200^-progress)",
        "Asks the teacher for its likeliest code, more and more on the student's own prefixes.",
        Method((Term("argmax", TeacherArgmax()),), _DATA_TO_STUDENT),
    ),
    "imitkd_full": Preset(
        "ImitKD +Full, Lin et al. 2020, arXiv 2009.07253",
        "KL(p || q) on data, then on student samples (data share 200^-progress)",
        "Imitates the teacher's full distribution, more and more on the student's own prefixes.",
        Method((Term("kd", ForwardKL()),), _DATA_TO_STUDENT),
    ),
    "fdistill_kl": Preset(
        "f-DISTILL, Wen et al. 2023, arXiv 2307.15190, KL row (soft SeqKD)", "E_{x~p} KL(p || q)",
        "Imitates the teacher's full distribution on sequences that the teacher samples now.",
        Method((Term("kd", ForwardKL()),), Rollout(by="teacher")),
    ),
    "fdistill_rkl": Preset(
        "f-DISTILL, Wen et al. 2023, arXiv 2307.15190, RKL row", "E_{x~q} KL(q || p)",
        "Keeps the student where the teacher agrees, on sequences that the student samples now.",
        Method((Term("rkl", ReverseKL()),), Rollout()),
    ),
    "fdistill_js": Preset(
        "f-DISTILL, Wen et al. 2023, arXiv 2307.15190, JS row (stepwise, an upper bound of the sequence JS)",
        "1/2 E_{x~p} KL(p || m) + 1/2 E_{x~q} KL(q || m), m = (p + q) / 2",
        "Compares with the mean of both models: the teacher's side on its samples, the student's side on its own.",
        Method((Term("teacher_side", SkewKL(0.5), on=("teacher",), weight=0.5),
                Term("student_side", SkewReverseKL(0.5), on=("student",), weight=0.5)), _TEACHER_AND_STUDENT),
    ),
    "fdistill_tvd": Preset(
        "f-DISTILL, Wen et al. 2023, arXiv 2307.15190, TVD row", "1/2 E_{x~p} TV(p, q) + 1/2 E_{x~q} TV(p, q)",
        "Total variation on the samples of both models, half and half.",
        Method((Term("tv", TotalVariation()),), _TEACHER_AND_STUDENT),
    ),
    "akl": Preset(
        "AKL, Wu et al. 2024, arXiv 2404.02657", "g_H/g KL(p || q) + g_L/g KL(q || p) on data prefixes",
        "Forward KL as far as the models differ in the teacher's head, reverse KL as far as they differ in its tail.",
        Method((Term("akl", AdaptiveKL(0.5)),)),
    ),
    "todi": Preset(
        "ToDi, 2025, arXiv 2505.16297", "sum_v a_v p log(p/q) + (1 - a_v) q log(q/p), a = sigmoid(log p/q)",
        "Forward KL for the codes that the student underrates, reverse KL for those that it overrates.",
        Method((Term("todi", ToDi()),)),
    ),
    "gkd": Preset(
        "GKD, Agarwal et al. 2023, arXiv 2306.13649, eq. 4", "JSD_0.5 on data (1/2) and student samples (1/2)",
        "Imitates the teacher on half real, half self-generated prefixes by a generalised Jensen-Shannon divergence.",
        Method((Term("jsd", JSD(0.5)),), _HALF_AND_HALF),
    ),
    "distillspec": Preset(
        "DistillSpec, Zhou et al. 2023, arXiv 2310.08461", "TV(p, q) on student samples",
        "Maximises the acceptance rate of speculative decoding on the student's own prefixes.",
        Method((Term("tv", TotalVariation()),), Rollout()),
    ),
    "varkd": Preset(
        _IDEA, "KL(p || q) + 1/2 CE on data + w(x) a_t [0.3 KL + 0.7 KL_clusters] on student samples",
        "Student samples with a reweighted signal, the teacher where it is confident, a compressed code space.",
        Method((*_VARKD_ANCHOR, _VARKD_TERM), _VARKD_CONTEXTS),
    ),
    "varkd_no_select": Preset(
        f"ablation; {_IDEA}", "varkd with a_t = 1", "VarKD that trusts the teacher at every position.",
        Method((*_VARKD_ANCHOR, replace(_VARKD_TERM, selection=All())), _VARKD_CONTEXTS),
    ),
    "varkd_no_clusters": Preset(
        f"ablation; {_IDEA}", "varkd over all codes, a_t by max p", "VarKD without the compressed code space.",
        Method((*_VARKD_ANCHOR, replace(_VARKD_TERM, space=Full(), selection=replace(_VARKD_SELECT, score="max_prob"))),
               _VARKD_CONTEXTS),
    ),
    "varkd_no_reweight": Preset(
        f"ablation; {_IDEA}", "varkd with w(x) = 1", "VarKD with equal weights on all student samples.",
        Method((*_VARKD_ANCHOR, _VARKD_TERM), _VARKD_MIX),
    ),
    "varkd_random_select": Preset(
        f"control; {_IDEA}", "varkd with a random a_t of the same kept fraction",
        "Control: the same number of positions, chosen by chance. It must not help.",
        Method((*_VARKD_ANCHOR, replace(_VARKD_TERM, selection=Random(Ramp(0.0, 0.5, 0.1, 0.6)))), _VARKD_CONTEXTS),
    ),
    "varkd_random_clusters": Preset(
        f"control; {_IDEA}", "varkd with clusters of the same sizes, drawn by chance",
        "Control: the code space compressed without its geometry. It must not help.",
        Method((*_VARKD_ANCHOR, replace(_VARKD_TERM, space=replace(_VARKD_SPACE, assignment="random"))),
               _VARKD_CONTEXTS),
    ),
    "varkd_shuffled_weights": Preset(
        f"control; {_IDEA}", "varkd with w(x) on the wrong sequences",
        "Control: the same sequence weights, shuffled. It must not help.",
        Method((*_VARKD_ANCHOR, _VARKD_TERM), replace(_VARKD_CONTEXTS, shuffle=True)),
    ),
}  # fmt: skip
