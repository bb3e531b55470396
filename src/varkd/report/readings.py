"""The diagnostics by position, D1 to D8: figures, and two sentences each that are computed from the numbers.

The first sentence says what is drawn, the second what these numbers say. A difference whose interval holds 0 is told as
"nothing is seen", never as a tendency.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import log

from varkd.report import figures
from varkd.report.analysis import Analysis, Number, number
from varkd.report.figures import TEACHER, Bars, Line
from varkd.report.images import Picture

STYLE = {"data": 0, "student": 1, "teacher": TEACHER}
LABEL = {"data": "on data", "teacher": "on teacher samples", "student": "on student samples"}
Figure = tuple[str, str] | tuple[str, str, str]
"""A caption, a drawing and, where it is not that of the page, the N of the figure in words."""


@dataclass(frozen=True)
class Section:
    """One diagnostic on the page. `missing` says what to give where there is nothing to draw."""

    id: str
    title: str
    question: str
    drawn: str = ""
    says: str = ""
    figures: Sequence[Figure] = ()
    rows: Sequence[tuple[str, str]] = field(default_factory=tuple)
    missing: str = ""
    num: str = ""
    picture: Picture | None = None


def plain(value: float) -> str:
    """Three significant digits, without an exponent where a person would write none."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def told(found: Number, unit: str = "") -> str:
    return f"{plain(found.value)}{unit} [{plain(found.low)}, {plain(found.high)}]"


def share(value: float) -> str:
    return f"{100 * value:.1f} %"


def judged(gap: Number, more: str, less: str, nothing: str) -> str:
    """One of three clauses, by whether the interval of a difference lies above, below or around 0."""
    return {1: more, -1: less, 0: nothing}[gap.sign]


def three(found: Analysis, quantity: str, contexts: Sequence[str] = ("data", "teacher", "student")) -> list[Line]:
    """One line per context."""
    return [found.curve(context, quantity, LABEL[context], STYLE[context]) for context in contexts]


def gap_map(found: Analysis, name: str, quantity: str, ylabel: str) -> list[Figure]:
    """The quantity over the grid on data and on student samples."""
    panels = [(label, found.map(context, quantity)) for context, label in (("data", "data"), ("student", "student"))]
    shown = [(label, panel) for label, panel in panels if panel is not None]
    where = "the last scale" if found.info["scales"] else "the code grid"
    caption = f"{ylabel[0].upper()}{ylabel[1:]}: over {where}, on data and on student samples."
    return [(caption, figures.maps(name, shown, ylabel))] if shown else []


def entropy(found: Analysis) -> Section:
    gap = found.mean("student - teacher", "teacher_entropy")
    also = found.mean("student - data", "teacher_entropy")
    means = {context: found.mean(context, "teacher_entropy") for context in LABEL}
    verdict = judged(
        gap,
        "the teacher is less certain where the student goes",
        "the teacher is more certain where the student goes",
        "no loss of certainty is seen where the student goes",
    )
    return Section(
        "D1",
        "Entropy of the teacher",
        "Is the teacher still certain on prefixes that the student made?",
        "The plot shows H(p), the teacher's entropy in nats per code (at most ln V = "
        f"{log(found.info['vocab_size']):.2f}), by position, on prefixes of data, of the teacher and of the student; "
        "the second figure is the student's own entropy.",
        f"On average it is {plain(means['student'].value)} on student samples against "
        f"{plain(means['teacher'].value)} on the teacher's own and {plain(means['data'].value)} on data; student "
        f"minus teacher samples is {told(gap)} (minus data {told(also)}), so {verdict}.",
        [
            (
                "The teacher's entropy by position.",
                figures.lines("d1-teacher", three(found, "teacher_entropy"), found.xlabel, "H(p), nats", legend=True),
            ),
            (
                "The student's entropy by position.",
                figures.lines("d1-student", three(found, "student_entropy"), found.xlabel, "H(q), nats", legend=True),
            ),
            *gap_map(found, "d1-map", "teacher_entropy", "teacher entropy, nats"),
        ],
    )


def drift(found: Analysis) -> Section:
    own, student = found.mean("teacher", "typicality"), found.mean("student", "typicality")
    gap = found.mean("student - teacher", "typicality")
    curve = found.curve("student", "typicality", "", 0)
    half = len(curve.y) // 2
    early, late = sum(curve.y[:half]) / max(half, 1), sum(curve.y[half:]) / max(len(curve.y) - half, 1)
    verdict = judged(
        gap,
        "the student writes codes that surprise the teacher more than its own would",
        "the student is over-safe: its codes surprise the teacher less than the teacher's own do",
        "the student's codes are as typical for the teacher as its own",
    )
    return Section(
        "D2",
        "Drift: how the teacher sees the codes",
        "Would the teacher have written this?",
        "The plot shows the teacher's -log p of each code and the typicality z = (-log p(x) - H(p)) / sd of -log p, "
        "whose mean is 0 for codes that the teacher sampled itself at temperature 1.",
        f"z is {told(student)} on student samples and {told(own)} on the teacher's own (difference {told(gap)}), so "
        f"{verdict}; it is {plain(early)} in the first half of the positions and {plain(late)} in the second.",
        [
            (
                "The teacher's -log p of the codes by position.",
                figures.lines("d2-nll", three(found, "ce_teacher"), found.xlabel, "-log p(code), nats", legend=True),
            ),
            (
                "Typicality by position; 0 is what the teacher's own samples have.",
                figures.lines(
                    "d2-z", three(found, "typicality"), found.xlabel, "typicality z, sd", legend=True, reference=0.0
                ),
            ),
            *gap_map(found, "d2-map", "typicality", "typicality z, sd"),
        ],
    )


def divergence(found: Analysis) -> Section:
    names = {
        "forward_kl": ("FKL", "KL(p || q), nats"),
        "reverse_kl": ("RKL", "KL(q || p), nats"),
        "total_variation": ("TVD", "total variation"),
    }
    gaps = {name: found.mean("student - data", name) for name in names}
    parts = "; ".join(
        f"{short} {plain(found.mean('student', name).value)} against {plain(found.mean('data', name).value)}, gap "
        f"{told(gaps[name])}"
        for name, (short, _) in names.items()
    )
    verdict = judged(
        gaps["forward_kl"],
        "the student disagrees more on its own prefixes: an exposure gap",
        "the student disagrees less on its own prefixes than on data: no exposure gap",
        "no exposure gap is seen in the forward KL",
    )
    drawn = [
        (
            f"{short} by position.",
            figures.lines(f"d3-{name}", three(found, name, ("data", "student")), found.xlabel, ylabel, legend=True),
        )
        for name, (short, ylabel) in names.items()
    ]
    return Section(
        "D3",
        "Divergence and exposure gap",
        "Does the student agree less where its own samples lead?",
        "Drawn are KL(teacher || student), KL(student || teacher) and the total variation by position, on data and "
        "on student samples; the exposure gap is the difference of the two.",
        f"Means on student samples and on data: {parts}; so {verdict}.",
        [*drawn, *gap_map(found, "d3-map", "forward_kl", "KL(p || q), nats")],
    )


def accumulation(found: Analysis) -> Section:
    def line(curve: str, label: str, style: int, factor: float = 1.0, begin: int = 0) -> Line:
        rows = found.rows("accumulated", curve=curve)[begin:]
        value, low, high = ([factor * part for part in parts] for parts in zip(*map(number, rows), strict=True))
        return Line(label, style, [float(row["codes"]) for row in rows], value, low, high)

    last = number(found.rows("accumulated", curve="excess")[-1])
    total, data = (number(found.rows("accumulated", curve=curve)[-1]) for curve in ("student", "data"))
    verdict = judged(
        last,
        "errors feed on each other",
        "errors are smaller on the student's own prefixes",
        "no error that feeds on itself is seen",
    )
    xlabel = "codes so far (l)"
    # Over the first codes the excess is a ratio of two tiny sums and says nothing.
    begin = found.info["sequence_length"] // 8
    return Section(
        "D4",
        "Accumulated error",
        "Do errors feed on each other?",
        "The plot shows R(l), the reverse KL summed over the first l codes, on student samples and on data, and the "
        "excess of the first over the second in per cent (ExAccErr).",
        f"After all {found.info['sequence_length']} codes R is {plain(total.value)} nats against "
        f"{plain(data.value)}, an excess of {told(Number(*(100 * part for part in last)), ' %')}, so {verdict}.",
        [
            (
                "Accumulated reverse KL.",
                figures.lines(
                    "d4-sum",
                    [line("data", LABEL["data"], 0), line("student", LABEL["student"], 1)],
                    xlabel,
                    "R(l), nats",
                    legend=True,
                ),
            ),
            (
                f"Excess over data, from l = {begin + 1}; 0 is no exposure bias.",
                figures.lines(
                    "d4-excess", [line("excess", "excess", 1, 100, begin)], xlabel, "ExAccErr(l), %", reference=0.0
                ),
            ),
        ],
    )


def choice(found: Analysis) -> Section:
    names = {"top1": "same top\ncode", "top5": "in teacher's\ntop 5", "top1_cluster": "same top code's\ncluster"}
    top, cluster = found.mean("student", "top1"), found.mean("student", "top1_cluster")
    gap = found.mean("student - data", "top1")
    verdict = judged(
        gap,
        "it is higher on its own samples than on data",
        "it is lower on its own samples than on data",
        "it is not seen to differ from data",
    )
    share_of_misses = (cluster.value - top.value) / max(1 - top.value, 1e-9)
    return Section(
        "D5",
        "Agreement on the first choice",
        "Do both prefer the same code, or at least a similar one?",
        "The plot shows the share of positions at which both models rank the same code first, the student's first code "
        "is among the teacher's five likeliest, and both first codes lie in one of "
        f"{found.info['code_space']['clusters']} clusters of the codebook.",
        f"On student samples the first codes agree at {share(top.value)} of the positions (difference to data "
        f"{told(gap)}: {verdict}) and their clusters at {share(cluster.value)}, so {share(share_of_misses)} of the "
        "disagreements are between similar codes.",
        [
            (
                "Means over all positions.",
                figures.bars("d5-bars", list(names.values()), _bars(found, names), "share of positions"),
            ),
            (
                "By position, on student samples.",
                figures.lines(
                    "d5-lines",
                    [
                        found.curve("student", "top1", "same code", 1),
                        found.curve("student", "top1_cluster", "same cluster", 2),
                        found.curve("student", "top5", "in top 5", 3),
                    ],
                    found.xlabel,
                    "share of sequences",
                    legend=True,
                ),
            ),
        ],
    )


def _bars(found: Analysis, names: Sequence[str] | dict[str, str]) -> list[Bars]:
    series = []
    for context in LABEL:
        means = [found.mean(context, name) for name in names]
        series.append(Bars(LABEL[context], STYLE[context], *([m[i] for m in means] for i in range(3))))
    return series


def acceptance(found: Analysis) -> Section:
    space = found.info["code_space"]
    plain_rate, wide = found.mean("student", "acceptance"), found.mean("student", "acceptance_neighbors")
    gap = found.mean("student - data", "acceptance")
    verdict = judged(
        gap,
        "the rate is higher on student samples",
        "the rate is lower on student samples",
        "the rate is not seen to differ between student samples and data",
    )
    return Section(
        "D6",
        "Acceptance",
        "How often would speculative sampling keep the student's code?",
        "The plot shows sum min(p, q), the rate at which a draft of the student is accepted, and the same with the "
        f"mass of up to {space['neighbors']} nearest codes added (LANTERN, at most {space['slack']:g} more).",
        f"On student samples {told(plain_rate)} of the codes are accepted, and {told(wide)} with neighbors, a gain "
        f"of {plain(wide.value - plain_rate.value)}; student samples minus data is {told(gap)}: {verdict}.",
        [
            (
                "Acceptance by position.",
                figures.lines(
                    "d6",
                    [
                        found.curve("data", "acceptance", "data", 0),
                        found.curve("student", "acceptance", "student", 1),
                        found.curve("data", "acceptance_neighbors", "data, neighbors", 2),
                        found.curve("student", "acceptance_neighbors", "student, neighbors", 3),
                    ],
                    found.xlabel,
                    "acceptance rate",
                    legend=True,
                ),
            )
        ],
    )


def distance(found: Analysis) -> Section:
    whole, own = found.mean("student", "embedding_distance"), found.mean("student", "embedding_self")
    gap, change = found.mean("student", "mean_gap"), found.mean("student - data", "mean_gap")
    verdict = judged(
        change,
        "it grows on the student's own samples",
        "it shrinks on the student's own samples",
        "it is not seen to differ from data",
    )
    return Section(
        "D7",
        "Distance between codes",
        "How far apart are the codes that both would draw?",
        "Drawn on student samples is E|e_v - e_u|^2 for v ~ p and u ~ q over codebook vectors, the same for two "
        "draws of the teacher, and |mu_p - mu_q|^2, which is what is left of the first beyond the spread of either "
        "model.",
        f"Two draws of teacher and student differ by {told(whole)} and two of the teacher by {told(own)}; the means "
        f"are apart by {told(gap)}, which is {share(gap.value / max(whole.value, 1e-9))} of the first (student "
        f"samples minus data {told(change)}: {verdict}).",
        [
            (
                "Squared distances by position, on student samples.",
                figures.lines(
                    "d7",
                    [
                        found.curve("student", "embedding_distance", "teacher and student", 1),
                        found.curve("student", "embedding_self", "teacher and teacher", TEACHER),
                        found.curve("student", "mean_gap", "between the means", 2),
                    ],
                    found.xlabel,
                    "squared distance",
                    legend=True,
                ),
            ),
            *gap_map(found, "d7-map", "mean_gap", "|mu_p - mu_q|^2"),
        ],
    )


def ambiguity(found: Analysis) -> Section:
    space = found.info["code_space"]
    n90, clusters = found.mean("data", "n90"), found.mean("data", "n90_clusters")
    top, mass, near = (found.mean("data", name) for name in ("max_prob", "cluster_mass", "near_mass"))
    vocabulary, count = found.info["vocab_size"], space["clusters"]
    fewer = clusters.value / count < n90.value / vocabulary
    return Section(
        "D8",
        "Ambiguity",
        "Over how many codes does the teacher spread its mass, before and after compression?",
        "Drawn on data is N90, the number of codes (clusters) that hold 90 % of the teacher's mass, with exp H, and "
        f"the largest mass of one code, of one of {count} clusters, and of all codes within {plain(space['radius'])} "
        "of the likeliest one.",
        f"The teacher needs {told(n90)} of {vocabulary} codes ({share(n90.value / vocabulary)}) and {told(clusters)} "
        f"of {count} clusters ({share(clusters.value / count)}): in shares of what there is, compression makes it "
        f"{'less' if fewer else 'not less'} ambiguous, while the mass of the likeliest outcome rises from "
        f"{share(top.value)} to {share(mass.value)} for a cluster and {share(near.value)} for a neighborhood.",
        [
            (
                "Outcomes that hold 90 % of the mass.",
                figures.lines(
                    "d8-n90",
                    [
                        found.curve("data", "n90", "codes (N90)", 0),
                        found.curve("data", "perplexity", "exp H", TEACHER),
                        found.curve("data", "n90_clusters", "clusters (N90)", 2),
                    ],
                    found.xlabel,
                    "outcomes",
                    legend=True,
                ),
            ),
            (
                "Mass of the likeliest outcome.",
                figures.lines(
                    "d8-mass",
                    [
                        found.curve("data", "max_prob", "code", 0),
                        found.curve("data", "cluster_mass", "cluster", 2),
                        found.curve("data", "near_mass", "neighborhood", 3),
                    ],
                    found.xlabel,
                    "probability mass",
                    legend=True,
                ),
            ),
            *gap_map(found, "d8-map", "n90", "N90, codes"),
        ],
    )
