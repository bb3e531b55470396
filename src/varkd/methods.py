"""The preset table: every method as a value, with its source. Values only, no def, no if.

Directions are named in words: `ForwardKL` = KL(teacher || student). `varkd` and its relatives are an independent
implementation of the published equations of arXiv 2606.06078; no code was published. `best_of_n` and its relatives are
our own. docs/varkd.md lists what the paper leaves open and which reading is the default.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from varkd.distill.bestof import BestOf
from varkd.distill.credit import FutureReturn, Importance, PrefixDiscrepancy, Reward
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
    TeacherArgmax,
    ToDi,
    TotalVariation,
)
from varkd.distill.filtering import DifferenceSampling
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
from varkd.distill.selection import Accepted, Confidence, EntropyWeight, Random
from varkd.distill.skew import SequenceSkew
from varkd.distill.spaces import Clusters
from varkd.distill.target import Guided
from varkd.rollout import Sampler


@dataclass(frozen=True)
class Preset:
    """A named method: where it comes from, its equation, and what it does in one sentence."""

    source: str
    equation: str
    summary: str
    method: Method


_HALF_AND_HALF = Mixture((Share(Data(), 0.5), Share(Rollout(), 0.5)))
_TEACHER_AND_STUDENT = Mixture((Share(Rollout(by="teacher"), 0.5), Share(Rollout(), 0.5)))
_DATA_TO_STUDENT = Mixture(
    (Share(Data(), ExponentialSchedule(1.0, 0.0)), Share(Rollout(), ExponentialSchedule(0.0, 1.0)))
)
_DATA_AND_TEACHER = Mixture((Share(Data(), 0.5), Share(Rollout(by="teacher"), 0.5)))

# Nothing that a DAgger run has seen is thrown away: a ring of 64 sequences per row, of any age.
_DAGGER = Mixture(
    (
        Share(Rollout(by="teacher"), LinearSchedule(1.0, 0.0, 0.0, 0.5)),
        Share(Replay(every=2, capacity=64, max_age=10**6), "rest"),
    )
)
_MINILLM = Mixture((Share(Data(), 0.5), Share(MixtureSampling(alpha=0.2), 0.5)))
_DISTILLM = Mixture(
    (
        Share(Data(), "rest"),
        Share(Replay(fresh=LinearSchedule(1.0, 0.0), capacity=16, max_age=1000), Plateau()),
    )
)
_TIEKD = ParallelSampling(share=1.0, rounds=2, greedy=True, with_data=True)
_IMITATION = Mixture(
    (
        Share(Data(), "rest"),
        Share(Replay(rollout=MixedRollout(0.0, 1.0), max_age=40, capacity=8), LinearSchedule(0.1, 0.7)),
    )
)
_HARD = Confidence(0.5, score="code_prob", floor=0.0, decay=0.0, side="low", per_position=False)
_EASY = replace(_HARD, side="high")
_UNSURE = Confidence(0.5, score="entropy", floor=0.0, side="low")
_SKEW = SequenceSkew()

# VarKD (arXiv 2606.06078; docs/varkd.md). One term on data rows (0.9) and on student continuations of data (0.1).
_MIXED = Mixture((Share(Data(), "rest"), Share(MixedRollout(), 0.1)))
_PARALLEL = Sampler(parallel="auto", window=4)
_MIXED_PARALLEL = Mixture((Share(Data(), "rest"), Share(MixedRollout(sampler=_PARALLEL), 0.1)))
_VARKD_WEIGHT = Term("varkd", ReverseKL(), selection=EntropyWeight(0.1), generated_only=True)
_VARKD_GROUPS = replace(_VARKD_WEIGHT, space=Clusters(factor=4, within=0.0, assignment="plain"))
_PAPER = "VarKD, arXiv 2606.06078"

# Best of n, our own: half of the rows are student samples, each the best of eight by what the teacher sees in them that
# the student at its start did not, drawn anew every eighth step.
_BEST = Replay(BestOf(count=8), every=8, max_age=40)
_BEST_AND_DATA = Mixture((Share(Data(), 0.5), Share(_BEST, 0.5)))
_ONE_AND_DATA = Mixture((Share(Data(), 0.5), Share(replace(_BEST, rollout=Rollout()), 0.5)))
_ANY_AND_DATA = Mixture((Share(Data(), 0.5), Share(replace(_BEST, rollout=BestOf(count=8, shuffle=True)), 0.5)))
_ANCHOR = Term("anchor", ReverseKL(), on=("data",))
_STUDENT = Term("student", ReverseKL(), on=("student",))
_BALANCED = Clusters(within=0.3)
_OURS = "ours, not of a paper"

METHODS: dict[str, Preset] = {
    "ce": Preset(
        "maximum likelihood, no teacher", "-log q(x_t)",
        "Learns from the images' codes alone: the baseline that every method must beat.",
        Method((Term("ce", CrossEntropy()),)),
    ),
    "kd": Preset(
        "Hinton et al. 2015, arXiv 1503.02531; word-KD of Kim & Rush 2016, arXiv 1606.07947",
        "KL(p || q) on data prefixes",
        "Imitates the teacher's full distribution on real prefixes.",
        Method((Term("kd", ForwardKL()),)),
    ),
    "kd_ce": Preset(
        "Hinton et al. 2015, arXiv 1503.02531, with the mix of losses", "1/2 CE + 1/2 KL(p || q) on data prefixes",
        "Imitates the teacher's full distribution on real prefixes, beside the data.",
        Method((Term("kd", ForwardKL(), weight=0.5), Term("ce", CrossEntropy(), weight=0.5))),
    ),
    "seqkd": Preset(
        "Kim & Rush 2016, arXiv 1606.07947, sequence-level KD (images: sampled, never a beam)", "-log q(x_t), x ~ p",
        "Learns from images that the teacher samples, as if they were data.",
        Method((Term("ce", CrossEntropy()),), Rollout(by="teacher")),
    ),
    "seqkd_guided": Preset(
        "SeqKD, Kim & Rush 2016, arXiv 1606.07947, with a guided sampler",
        "-log q(x_t), x ~ the guided teacher (scale 1.5)",
        "Learns from guided teacher samples as data: it becomes the guided distribution, sample it without guidance.",
        Method((Term("ce", CrossEntropy()),), Rollout(by="teacher", sampler=Sampler(guidance=1.5))),
    ),
    "seqkd_soft": Preset(
        "SeqKD of VarKD, arXiv 2606.06078, eq. 4, online; the KL row of f-DISTILL, arXiv 2307.15190",
        "E_{x~p} KL(p || q)",
        "Imitates the teacher's full distribution on sequences that the teacher samples.",
        Method((Term("kd", ForwardKL()),), Rollout(by="teacher")),
    ),
    "seqkd_prefix": Preset(
        "SeqKD++ of VarKD, arXiv 2606.06078, table 4", "KL(p || q) on teacher continuations of data",
        "SeqKD with samples that stay near the data: the teacher continues data prefixes; only what it samples counts.",
        Method((Term("kd", ForwardKL(), generated_only=True),), MixedRollout(by="teacher")),
    ),
    "seqinter": Preset(
        "Seq-Inter, Kim & Rush 2016, arXiv 1606.07947 (sampled completions, no beam)",
        "-log q(x_t), x = the teacher's completion nearest to the image",
        "Learns from teacher samples that stay near the data: the best of four completions of half an image.",
        Method((Term("ce", CrossEntropy()),), Completions(count=4, prefix=0.5)),
    ),
    "dagger": Preset(
        "DAgger, Ross et al. 2011, arXiv 1011.0686; one policy per sequence",
        "-log q(argmax p) on teacher, then student samples, all of which are kept",
        "Asks the teacher for its action on all sequences that the teacher and, more and more, the student sampled.",
        Method((Term("argmax", TeacherArgmax()),), _DAGGER),
    ),
    "scheduled_sampling": Preset(
        "Scheduled sampling, Bengio et al. 2015, arXiv 1506.03099, sequential",
        "-log q(x_t) on data with student codes mixed in (share 0 -> 1/2)",
        "Predicts the data from prefixes in which more and more codes are the student's own.",
        Method((Term("ce", CrossEntropy()),), ScheduledSampling(LinearSchedule(0.0, 0.5))),
    ),
    "scheduled_sampling_parallel": Preset(
        "Scheduled sampling in one pass, after Mihaylova & Martins 2019, arXiv 1906.07651",
        "-log q(x_t) on data with one-step student codes mixed in (share 0 -> 1/2)",
        "Scheduled sampling with codes predicted from the data's prefixes at once: two forward passes, no decoding.",
        Method((Term("ce", CrossEntropy()),), ParallelSampling(LinearSchedule(0.0, 0.5))),
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
    "imitation_mix": Preset(
        "Pozzi et al. 2025, doi 10.1007/s00521-025-11162-0 (from its abstract: our reading)",
        "1/2 CE + 1/2 KL(p || q) on data, KL(p || q) on student continuations of data (share 0.1 -> 0.7)",
        "Two experts: the data where there are data, the teacher where the student went on by itself.",
        Method((Term("kd", ForwardKL(), on=("data",), weight=0.5), Term("ce", CrossEntropy(), on=("data",), weight=0.5),
                Term("student", ForwardKL(), on=("student",))), _IMITATION),
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
    "taid": Preset(
        "TAID, Shing et al. 2025, arXiv 2501.16937",
        "KL(p_t || q), p_t = softmax((1 - t) log q + t log p), t adaptive from 0.4 to 1",
        "A target that starts near the student and moves to the teacher as fast as the student follows.",
        Method((Term("taid", TAID(TaidTime())),)),
    ),
    "atkd": Preset(
        "ATKD, Zhong et al. 2024, arXiv 2402.11890 (median of the former step)",
        "0.2 DKD on easy codes + 0.8 (TKD + DKD) on hard ones, hard = p(code) below the median",
        "Splits the KL at the data's code, drops its uncertainty factor, leans on codes that the teacher doubts.",
        Method((
            Term("easy", Decoupled("rest"), selection=_EASY, weight=0.2, normalizer="selected"),
            Term("hard_target", Decoupled("target"), selection=_HARD, weight=0.8, normalizer="selected"),
            Term("hard_rest", Decoupled("rest"), selection=_HARD, weight=0.8, normalizer="selected"),
        )),
    ),
    "tiekd": Preset(
        "TIE-KD, 2023, arXiv 2305.08096",
        "1/2 CE on data + 1/2 mean over 3 rounds of [KL(p || q) + ranking]",
        "Imitates the teacher and the order of its first codes, on data and two rounds of the student's predictions.",
        Method((Term("ce", CrossEntropy(), on=("data",), weight=0.5), Term("kd", ForwardKL(), weight=0.5),
                Term("ranking", Ranking(5), weight=0.5)), _TIEKD),
    ),
    "hybrid_gate": Preset(
        "Wei et al. 2024, arXiv 2404.14827 (gate by schedule: our reading)",
        "g KL(p || q) on data + (1 - g) CE on teacher samples, g: 1 -> 0",
        "Starts with word-level KD on the data and ends with sequence-level KD on teacher samples.",
        Method((Term("token", ForwardKL(), on=("data",), weight=LinearSchedule(1.0, 0.0)),
                Term("sequence", CrossEntropy(), on=("teacher",), weight=LinearSchedule(0.0, 1.0))), _DATA_AND_TEACHER),
    ),
    "miniplm": Preset(
        "MiniPLM, Gu et al. 2024, arXiv 2410.17215",
        "-log q(x_t) on the half of each class with the largest NLL_start - NLL_teacher",
        "Learns from the images alone, but only from those that the teacher finds likelier than a small model does.",
        Method((Term("ce", CrossEntropy()),), images=DifferenceSampling(0.5)),
    ),
    "gkd": Preset(
        "GKD, Agarwal et al. 2023, arXiv 2306.13649, eq. 4", "JSD_0.5 on data (1/2) and student samples (1/2)",
        "Imitates the teacher on half real, half self-generated prefixes by a generalized Jensen-Shannon divergence.",
        Method((Term("jsd", JSD(0.5)),), _HALF_AND_HALF),
    ),
    "distillspec": Preset(
        "DistillSpec, Zhou et al. 2023, arXiv 2310.08461", "TV(p, q) on student samples",
        "Maximizes the acceptance rate of speculative decoding on the student's own prefixes.",
        Method((Term("tv", TotalVariation()),), Rollout()),
    ),
    "opd": Preset(
        "On-policy distillation, Lu et al. 2025 (Thinking Machines blog)",
        "-(log p - log q)(x_t) log q(x_t), x ~ q",
        "Policy gradient with the teacher's log-probability against the student's own as reward: sampled reverse KL.",
        Method((Term("opd", CrossEntropy(), credit=Reward()),), Rollout()),
    ),
    "iwopd": Preset(
        "IW-OPD, 2026, arXiv 2606.22600",
        "opd with rewards weighted by 1 + 1/2 (1 - S_<t / S), S = sum |log p - log q|",
        "On-policy distillation that counts early codes more, before the prefix has drifted.",
        Method((Term("opd", CrossEntropy(), credit=PrefixDiscrepancy(0.5)),), Rollout()),
    ),
    "eopd": Preset(
        "EOPD, 2026, arXiv 2603.07079 (threshold: the median entropy per position)",
        "KL(q || p) + [H(p) high] KL(p || q) on student samples",
        "Reverse KL on student samples, and forward KL as well where the teacher is unsure.",
        Method((Term("rkl", ReverseKL()), Term("fkl", ForwardKL(), selection=_UNSURE)), Rollout()),
    ),
    "minillm": Preset(
        "MiniLLM, Gu et al. 2023, arXiv 2306.08543 (one inner epoch, no whitening)",
        "w_t KL(q || p) - w_t R_{t+1} log q(x_t) on codes from 0.2 p + 0.8 q, + CE on data",
        "Reverse KL of whole sequences: each step's own, and a policy gradient for what later steps say about it.",
        Method((Term("step", ReverseKL(), on=("student",), credit=Importance()),
                Term("future", CrossEntropy(), on=("student",), credit=FutureReturn(scale=0.5, clip=None)),
                Term("ce", CrossEntropy(), on=("data",))), _MINILLM),
    ),
    "distillm": Preset(
        "DistiLLM, Ko et al. 2024, arXiv 2402.03898",
        "KL(q || 0.9 p + 0.1 q) on data and, by phi, on replayed student samples",
        "Skewed reverse KL; student samples come in only when validation gets worse, ever more of them from a buffer.",
        Method((Term("srkl", SkewReverseKL(0.1)),), _DISTILLM),
    ),
    "distillm2": Preset(
        "DistiLLM-2, Ko et al. 2025, arXiv 2503.07067 (beta = 1; samples made in every step)",
        "KL(p || a p + (1-a) q), x ~ p, + KL(q || (1-a) p + a q), x ~ q, a per sequence in [0.01, 0.1]",
        "Pulls teacher samples up and pushes student samples towards the teacher, each by its own skew.",
        Method((Term("teacher_side", SkewKL(_SKEW), on=("teacher",)),
                Term("student_side", SkewReverseKL(_SKEW, detached=True), on=("student",))), _TEACHER_AND_STUDENT),
    ),
    "skd": Preset(
        "Speculative KD, Xu et al. 2024, arXiv 2410.11325 (set by mass, not by count)",
        "KL(p || q) on student proposals, redrawn from p outside its 0.9 nucleus",
        "Student samples in which the teacher replaces the codes that it would not draw itself.",
        Method((Term("kd", ForwardKL()),), SpeculativeSampling(top_p=0.9)),
    ),
    "selectkd_topk": Preset(
        "SelecTKD, 2025, arXiv 2510.24021, greedy top-k",
        "a_t KL(p || q), a_t = [argmax q in top-5 of p] or 0.1",
        "Imitates the teacher where it would accept the student's likeliest code.",
        Method((Term("kd", ForwardKL(), selection=Accepted("top_k", top_k=5)),), _HALF_AND_HALF),
    ),
    "selectkd_spec": Preset(
        "SelecTKD, 2025, arXiv 2510.24021, propose and verify (our reading)",
        "a_t KL(p || q), a_t = [y ~ q passes with min(1, p(y)/q(y))] or 0.1",
        "Imitates the teacher where a code drawn by the student passes speculative verification.",
        Method((Term("kd", ForwardKL(), selection=Accepted("speculative")),), _HALF_AND_HALF),
    ),
    "kd_guided": Preset(
        "Guidance distillation, after Meng et al. 2023, arXiv 2210.03142; Hinton et al. 2015",
        "1/2 CE + 1/2 KL(null + s (cond - null) || q) on data, s = 1.5 along the family's schedule",
        "Imitates the guided teacher: one pass of the student where the teacher needs two.",
        Method((Term("kd", ForwardKL(), weight=0.5), Term("ce", CrossEntropy(), weight=0.5)), target=Guided(1.5)),
    ),
    "gkd_prefix": Preset(
        f"the GKD baseline of {_PAPER}",
        "JSD_0.5 on data (0.9) and on student continuations of data (0.1)",
        "GKD on student continuations of data prefixes: the first row of the paper's ablation.",
        Method((Term("jsd", JSD(0.5), generated_only=True),), _MIXED),
    ),
    "varkd": Preset(
        f"{_PAPER}, eq. 6 to 13",
        "a_t KL(q~ || p~) over groups of codes, on data (0.9) and student continuations of data (0.1), "
        "a_t = 1 - H(p) / log V, 0 after the first a_t < 0.1",
        "Distils on student continuations of data, by the teacher's confidence, over groups of look-alike codes.",
        Method((_VARKD_GROUPS,), _MIXED_PARALLEL),
    ),
    "varkd_jsd": Preset(
        f"{_PAPER}, the wording of section 4.1", "varkd with JSD_0.5 in the place of the reverse KL",
        "VarKD built on the GKD baseline, as the paper's experiments describe it.",
        Method((replace(_VARKD_GROUPS, divergence=JSD(0.5)),), _MIXED_PARALLEL),
    ),
    "varkd_mixed": Preset(
        f"ablation; {_PAPER}, eq. 7", "KL(q || p) on data (0.9) and student continuations of data (0.1)",
        "VarKD's mixed rollouts and reverse KL alone: no entropy weight, no groups.",
        Method((Term("varkd", ReverseKL(), generated_only=True),), _MIXED),
    ),
    "varkd_weight": Preset(
        f"ablation; {_PAPER}, eq. 10", "a_t KL(q || p) on data (0.9) and student continuations of data (0.1)",
        "VarKD without groups of codes and without parallel rollouts.", Method((_VARKD_WEIGHT,), _MIXED),
    ),
    "varkd_weight_groups": Preset(
        f"ablation; {_PAPER}, eq. 12", "varkd with sequential rollouts",
        "VarKD without parallel rollouts: one code after the other.", Method((_VARKD_GROUPS,), _MIXED),
    ),
    "varkd_permuted_weight": Preset(
        f"control; {_PAPER}", "varkd with a_t randomly permuted over the positions of a sequence",
        "Control: the same weights at random positions. It must do worse than varkd.",
        Method((replace(_VARKD_GROUPS, selection=EntropyWeight(0.1, permuted=True)),), _MIXED_PARALLEL),
    ),
    "varkd_random_groups": Preset(
        f"control; {_PAPER}", "varkd with random groups of the same sizes",
        "Control: groups that forget the geometry of the codebook. It must do worse than varkd.",
        Method((replace(_VARKD_GROUPS, space=Clusters(factor=4, within=0.0, assignment="permuted")),), _MIXED_PARALLEL),
    ),
    "varkd_free": Preset(
        f"control; {_PAPER}", "varkd on free-running student samples",
        "Control: student samples without a data prefix, so that they drift.",
        Method((_VARKD_GROUPS,), Mixture((Share(Data(), "rest"), Share(Rollout(sampler=_PARALLEL), 0.1)))),
    ),
    "best_of_n": Preset(
        _OURS, "KL(q || p) on data + KL(q || p) on student samples, each the best of 8 by log p - log r (r: the start)",
        "Reverse KL on data and on those of the student's samples that the teacher prefers.",
        Method((_ANCHOR, _STUDENT), _BEST_AND_DATA),
    ),
    "best_of_n_guided": Preset(
        f"guidance distillation; {_OURS}", "best_of_n with the guided teacher (scale 1.5) as the target",
        "Best of n that learns the guided distribution: sample it without guidance.",
        Method((_ANCHOR, _STUDENT), _BEST_AND_DATA, target=Guided(1.5)),
    ),
    "kd_reverse": Preset(
        "reverse KL in the place of forward KL; MiniLLM, Gu et al. 2023, arXiv 2306.08543", "KL(q || p) on data",
        "Imitates the teacher on real prefixes, where the student puts its mass: a strong baseline without samples.",
        Method((_ANCHOR,)),
    ),
    "best_of_1": Preset(
        f"ablation; {_OURS}", "best_of_n on one student sample instead of the best of 8",
        "Reverse KL on data and on all student samples alike.", Method((_ANCHOR, _STUDENT), _ONE_AND_DATA),
    ),
    "best_of_n_random": Preset(
        f"control; {_OURS}", "best_of_n with the 8 samples' scores randomly permuted",
        "Control: one of 8 student samples, chosen at random. It must not help.",
        Method((_ANCHOR, _STUDENT), _ANY_AND_DATA),
    ),
    "best_of_n_select": Preset(
        f"ablation; {_OURS}", "best_of_n with a_t = 0.3 + 0.7 min(1, p(x_t) / q(x_t)) on student samples",
        "Best of n that trusts the teacher as far as it would accept the student's code.",
        Method((_ANCHOR, replace(_STUDENT, selection=Accepted("code", floor=0.3))), _BEST_AND_DATA),
    ),
    "best_of_n_random_select": Preset(
        f"control; {_OURS}", "best_of_n_select with an a_t that is 0.3 at 15 % of the positions, at random",
        "Control: positions chosen at random. It must do worse than best_of_n_select.",
        Method((_ANCHOR, replace(_STUDENT, selection=Random(0.15, floor=0.3))), _BEST_AND_DATA),
    ),
    "best_of_n_clusters": Preset(
        f"ablation; {_OURS}", "best_of_n with 0.3 KL + 0.7 KL of clusters on student samples",
        "Best of n in a compressed code space.",
        Method((_ANCHOR, replace(_STUDENT, space=_BALANCED)), _BEST_AND_DATA),
    ),
    "best_of_n_random_clusters": Preset(
        f"control; {_OURS}", "best_of_n_clusters with clusters of the same sizes, drawn at random",
        "Control: the code space compressed without its geometry. It must do worse than best_of_n_clusters.",
        Method((_ANCHOR, replace(_STUDENT, space=replace(_BALANCED, assignment="random"))),
               _BEST_AND_DATA),
    ),
}  # fmt: skip
