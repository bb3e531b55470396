"""The diagnostics that are not one curve by position, D10 to D18, in the form of `readings`."""

from __future__ import annotations

from varkd.report import figures
from varkd.report.analysis import Analysis, Number, number
from varkd.report.figures import TEACHER, Bars, Line
from varkd.report.readings import LABEL, STYLE, Section, judged, plain, share, three, told

SOURCE = {"data": "first codes of data", "student": "first codes of the student"}


def swap(found: Analysis) -> Section:
    def line(source: str, metric: str) -> Line:
        rows = found.rows("prefix_swap", source=source, metric=metric)
        value, low, high = zip(*map(number, rows), strict=True)
        return Line(SOURCE[source], STYLE[source], [float(row["share"]) for row in rows], value, low, high)

    def at(source: str, place: str, metric: str) -> Number:
        (row,) = found.rows("prefix_swap", source=source, share=place, metric=metric)
        return number(row)

    classes = all(row["value"] for row in found.rows("prefix_swap", metric="accuracy"))
    ylabel = {"fd": "Fréchet distance (lower is better)", "precision": "precision", "recall": "recall"}
    ylabel |= {"accuracy": "class accuracy"} if classes else {}
    own, half, data = (
        at(source, place, "fd") for source, place in (("data", "0"), ("student", "0.5"), ("data", "0.5"))
    )
    apart = half.low > own.high
    verdict = (
        "the teacher does not repair what the student began"
        if apart
        else "no harm to the teacher's completion is seen beyond its own interval"
    )
    accuracy = ""
    if classes:
        accuracy = (
            f"; class accuracy is {share(at('student', '0.5', 'accuracy').value)} after a student's half and "
            f"{share(at('data', '0.5', 'accuracy').value)} after a half of data"
        )
    return Section(
        "D10",
        "Prefix swap",
        "Can the teacher complete what the student began?",
        "The plot shows the quality of images whose first k codes come from data or from the student and whose other "
        "codes the teacher samples, by the share k; at 0 both are the teacher's own images, at 1 nothing is "
        "completed.",
        f"After half of the codes from the student the Fréchet distance is {told(half)}, after half from data "
        f"{told(data)}, and {told(own)} for the teacher alone, so {verdict}{accuracy}.",
        [
            (
                f"{label[0].upper()}{label[1:]} by the share that is given.",
                figures.lines(
                    f"d10-{metric}",
                    [line(source, metric) for source in SOURCE],
                    "share of codes given",
                    label,
                    legend=True,
                    marked=True,
                ),
            )
            for metric, label in ylabel.items()
        ],
    )


def teachers(found: Analysis) -> Section:
    title, question = "Two teachers", "Do teachers agree with each other where the student goes?"
    if not found.has("student", "second_jsd"):
        return Section(
            "D11",
            title,
            question,
            missing="Give --second MODEL: another teacher on the same codes, of "
            "another seed, another size, or after fewer updates.",
        )
    gap, top = found.mean("student - data", "second_jsd"), found.mean("student", "second_top1")
    verdict = judged(
        gap,
        "teachers disagree more where the student goes: less reliable labels",
        "teachers disagree less where the student goes",
        "no loss of agreement between teachers is seen",
    )
    return Section(
        "D11",
        title,
        question,
        "The plot shows the Jensen-Shannon divergence between the teacher and a second one, in nats (at most ln 2 = "
        "0.693), by position, on data, teacher and student samples.",
        f"It is {plain(found.mean('student', 'second_jsd').value)} on student samples and "
        f"{plain(found.mean('data', 'second_jsd').value)} on data, a difference of {told(gap)}, so {verdict}; on "
        f"student samples they rank the same code first at {share(top.value)} of the positions.",
        [
            (
                "Jensen-Shannon divergence by position.",
                figures.lines("d11", three(found, "second_jsd"), found.xlabel, "JSD, nats", legend=True),
            )
        ],
    )


def calibration(found: Analysis) -> Section:
    labels = {"max_prob": ("one code (max p)", 0), "cluster_mass": ("one cluster", 2)}

    def line(context: str, confidence: str) -> Line:
        rows = found.rows("calibration", context=context, confidence=confidence)
        value, low, high = zip(*map(number, rows), strict=True)
        label, style = labels[confidence]
        return Line(label, style, [float(row["mean_confidence"]) for row in rows], value, low, high)

    (second,) = {row["quantity"] for row in found.rows("calibration", context="student")}
    other = second == "second_forward_kl"
    ylabel = "KL(second || teacher), nats" if other else "-log p(code), nats"
    rows = found.rows("calibration", context="student", confidence="max_prob")
    low, high = float(rows[0]["value"]), float(rows[-1]["value"])
    falls = number(rows[-1]).high < number(rows[0]).low
    worst = max(rows, key=lambda row: float(row["value"]))
    peak = f"{plain(float(worst['value']))}, at {plain(float(worst['mean_confidence']))}"
    uneven = "" if worst is rows[0] else f" (but it is largest, {peak})"
    must = ", as it must in part: a sure teacher has a low entropy (give --second for a fair test)."
    after = f"{uneven}{'.' if other else must}"
    what = "the divergence to the second teacher" if other else "the mean surprise of the teacher"
    diagonal = Line("calibrated", TEACHER, [0.0, 1.0], [0.0, 1.0])
    return Section(
        "D12",
        "Calibration of confidence",
        "Does confidence predict reliability?",
        "Drawn is, by bins of the teacher's confidence in one code or one cluster, how often that code or cluster "
        f"is the one in the data, and on student samples {what}.",
        f"On data the mean distance to the diagonal (ECE) is {plain(found.info['ece']['max_prob'])} for codes and "
        f"{plain(found.info['ece']['cluster_mass'])} for clusters; on student samples {what} goes from {plain(low)} "
        f"in the least to {plain(high)} in the most confident bin, so confidence "
        f"{'does' if falls else 'is not seen to'} predict it{after}",
        [
            (
                "Realized accuracy on data; the diagonal is perfect calibration.",
                figures.lines(
                    "d12-data",
                    [diagonal, *(line("data", name) for name in labels)],
                    "confidence",
                    "realized accuracy",
                    legend=True,
                    marked=True,
                ),
            ),
            (
                f"{what[0].upper()}{what[1:]} on student samples.",
                figures.lines(
                    "d12-student",
                    [line("student", name) for name in labels],
                    "confidence",
                    ylabel,
                    legend=True,
                    marked=True,
                ),
            ),
        ],
    )


def selection(found: Analysis) -> Section:
    title, question = "Selection audit", "Which positions does the method keep, and do they teach anything?"
    about, history = found.info["selection"], _history(found)
    if "why_not" in about:
        return Section("D13", title, question, missing=f"Nothing to audit: {about['why_not']}.")
    rows = found.rows("selection")
    groups = [(row["term"], row["context"]) for row in rows if row["share_of"] == "positions"]
    series, kept = [], {}
    for style, share_of in ((0, "positions"), (1, "kl")):
        values = [number(row) for row in rows if row["share_of"] == share_of]
        kept[share_of] = values
        label = "share of positions" if share_of == "positions" else "share of the KL"
        series.append(Bars(label, style, *([value[i] for value in values] for i in range(3))))
    names = [f"{term}\n{LABEL[context]}" for term, context in groups]
    told_of = "; ".join(
        f"{term} {LABEL[context]}: {share(positions.value)} of the positions with {share(kl.value)} of KL(p || q)"
        for (term, context), positions, kl in zip(groups, kept["positions"], kept["kl"], strict=True)
    )
    poor = min(kl.value / max(positions.value, 1e-9) for positions, kl in zip(*kept.values(), strict=True))
    verdict = (
        "kept positions carry less KL than their number: the selection keeps easy positions"
        if poor < 0.8
        else "kept positions carry about their share of the KL or more"
    )
    panels = [(f"{term}: {context}", found.map(context, f"kept/{term}")) for term, context in groups]
    shown = [(label, panel) for label, panel in panels if panel is not None]
    return Section(
        "D13",
        title,
        question,
        "The plot shows the share of positions that the method's selection gives full weight, with the thresholds of "
        f"its last checkpoint (update {about['checkpoint']}), the share of the forward KL at those positions, where "
        "they lie, and what training logged.",
        f"Kept are: {told_of}; so {verdict}.",
        [
            ("What is kept now.", figures.bars("d13-kept", names, series, "share kept")),
            ("Share of sequences in which a position is kept.", figures.maps("d13-map", shown, "share kept")),
            *(
                [
                    (
                        "What training logged.",
                        figures.lines("d13-log", history, "update", "share", legend=True),
                        "One number an update.",
                    )
                ]
                if history
                else []
            ),
        ],
    )


def _history(found: Analysis) -> list[Line]:
    series: dict[str, list[tuple[float, float]]] = {}
    for row in found.rows("selection_training"):
        series.setdefault(row["key"], []).append((float(row["step"]), float(row["value"])))
    moving = {key: points for key, points in series.items() if any(value != 1 for _, value in points)}
    return [
        Line(key, style, *(list(part) for part in zip(*points, strict=True)))
        for style, (key, points) in enumerate(sorted(moving.items()))
    ]


def coverage(found: Analysis) -> Section:
    risk = {row["risk"]: number(row) for row in found.rows("risks")}
    llh, cvg, floor = risk["likelihood"], risk["coverage"], risk["likelihood_floor"]
    series = [
        Bars("student", 1, [llh.value, cvg.value], [llh.low, cvg.low], [llh.high, cvg.high]),
        Bars("the teacher in its place", TEACHER, [floor.value] * 2, [floor.low] * 2, [floor.high] * 2),
    ]
    at = {
        metric: number(found.rows("prefix_swap", source="student", share="1", metric=metric)[0])
        for metric in ("precision", "recall")
    }
    above, missed = llh.value - floor.value, cvg.value - floor.value
    both = (
        "averages over modes (implausible samples) more than it leaves modes out"
        if above > missed
        else "leaves modes out more than it makes implausible samples"
    )
    return Section(
        "D15",
        "Likelihood and coverage",
        "Does the student average over modes, or leave some out?",
        "Drawn are R_llh = E[-log p] on student samples and R_cvg = E[-log q] on teacher samples, in nats per code, "
        "beside the teacher's own E[-log p] on its own samples, which both would reach if the student were the "
        "teacher.",
        f"R_llh is {told(llh)} and R_cvg {told(cvg)} over a floor of {told(floor)}: the student {both} (excess "
        f"{plain(above)} against {plain(missed)}); its samples have precision {told(at['precision'])} and recall "
        f"{told(at['recall'])} at N = {found.info['num']}.",
        [
            (
                "The two risks.",
                figures.bars("d15", ["likelihood\nE_S[-log p]", "coverage\nE_P[-log q]"], series, "nats per code"),
            )
        ],
    )


def cost(found: Analysis) -> Section:
    rows = {row["what"]: (float(row["value"]), row["unit"]) for row in found.rows("cost")}
    faster = rows["student rollout"][0] / rows["teacher rollout"][0]
    passes = rows["student forward"][0] / rows["student rollout"][0]
    return Section(
        "D18",
        "Cost",
        "What does a code cost?",
        "Listed are codes per second of decoding and of one forward pass (64 sequences at once, on "
        f"{found.info['device']}), parameters, memory, and what training saw.",
        f"The student decodes {faster:.1f} times as fast as the teacher; a code that it samples costs {passes:.1f} "
        "times a code in a forward pass, which is what student contexts add to training.",
        rows=[(what, f"{value:,.0f} {unit}") for what, (value, unit) in rows.items()],
    )
