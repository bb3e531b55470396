"""The preset table: every method as a value, with its source. Values only, no def, no if.

Directions are named in words: `ForwardKL` = KL(teacher || student). `varkd` is an independent implementation of the
idea of arXiv 2606.06078 (student samples with a reweighted signal, teacher applied by its confidence, compressed code
space); the paper's own formulas are not public to us.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from varkd.distill.contexts import Data, Mixture, Replay, Reweighted, Rollout, Share
from varkd.distill.divergences import JSD, CrossEntropy, ForwardKL, TotalVariation
from varkd.distill.method import Method, Term
from varkd.distill.schedule import Ramp
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
    "fdistill_kl": Preset(
        "f-DISTILL, Wen et al. 2023, arXiv 2307.15190, KL row (soft SeqKD)", "E_{x~p} KL(p || q)",
        "Imitates the teacher's full distribution on sequences that the teacher samples now.",
        Method((Term("kd", ForwardKL()),), Rollout(by="teacher")),
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
