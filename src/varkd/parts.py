"""The parts that methods are made of, under one name: `varkd.parts.Term(...)`, `varkd.parts.ReverseKL()`.

Method(terms, contexts, target, images)   the value that `Distiller` takes
Term(name, divergence, on, selection, space, weight, normalizer, credit)   one summand of its loss
"""

from varkd.distill.bestof import BestOf
from varkd.distill.credit import FutureReturn, Importance, NoCredit, PrefixDiscrepancy, Reward
from varkd.distill.divergences import (
    JSD,
    TAID,
    AdaptiveKL,
    CrossEntropy,
    Decoupled,
    ForwardKL,
    Ranking,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
    TargetRows,
    TeacherArgmax,
    ToDi,
    TotalVariation,
)
from varkd.distill.filtering import AllImages, DifferenceSampling
from varkd.distill.method import Method, Term
from varkd.distill.mixture import Mixture, Share
from varkd.distill.prefixes import (
    Completions,
    Data,
    MixedRollout,
    MixtureSampling,
    ParallelSampling,
    Rollout,
    ScheduledSampling,
    SpeculativeSampling,
)
from varkd.distill.replay import Replay
from varkd.distill.schedule import ExponentialSchedule, LinearSchedule, Plateau, TaidTime
from varkd.distill.selection import Accepted, All, Confidence, EntropyWeight, Random
from varkd.distill.skew import SequenceSkew
from varkd.distill.spaces import Clusters, Full, TopK
from varkd.distill.target import Guided, Plain, Temperature, Truncated

__all__ = [
    "JSD",
    "TAID",
    "Accepted",
    "AdaptiveKL",
    "All",
    "AllImages",
    "BestOf",
    "Clusters",
    "Completions",
    "Confidence",
    "CrossEntropy",
    "Data",
    "Decoupled",
    "DifferenceSampling",
    "EntropyWeight",
    "ExponentialSchedule",
    "ForwardKL",
    "Full",
    "FutureReturn",
    "Guided",
    "Importance",
    "LinearSchedule",
    "Method",
    "MixedRollout",
    "Mixture",
    "MixtureSampling",
    "NoCredit",
    "ParallelSampling",
    "Plain",
    "Plateau",
    "PrefixDiscrepancy",
    "Random",
    "Ranking",
    "Replay",
    "ReverseKL",
    "Reward",
    "Rollout",
    "ScheduledSampling",
    "SequenceSkew",
    "Share",
    "SkewKL",
    "SkewReverseKL",
    "SpeculativeSampling",
    "TaidTime",
    "TargetRows",
    "TeacherArgmax",
    "Temperature",
    "Term",
    "ToDi",
    "TopK",
    "TotalVariation",
    "Truncated",
]  # fmt: skip
