"""A study in words: what opens a family's section, what is warned about, how it was done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from varkd.report.protocol import as_text
from varkd.report.study.results import BUDGETS, Family, Study
from varkd.report.study.tables import FD, gap_name, signed, spread_cell
from varkd.report.tables import MISSING, compact, make_cell

_BUDGET = {"updates": "At equal updates", "time": "At equal training time"}


def number(value: Any, unit: str = "") -> str:
    """A number in a sentence: whole numbers in full, others to three digits, nothing as a dash."""
    if value is None:
        return MISSING
    text = f"{value:,.0f}" if float(value).is_integer() else make_cell(FD, value).text
    return f"{text}{unit}"


def listed(names: Sequence[str]) -> str:
    """ "a, b and c" """
    return " and ".join(", ".join(names).rsplit(", ", 1))


def interval(spread: Mapping[str, Any], sign: bool = False) -> str:
    """ "5.0 [4.6, 5.4]" """
    cell = signed(FD, spread) if sign else spread_cell(FD, spread)
    return f"{cell.text} {cell.interval}".strip()


def opening(study: Study) -> list[str]:
    """The sentences below the title: what was compared, all families together."""
    facts = study.facts
    methods = {entry["method"] for family in study.families for entry in family.summary}
    names = [family.name for family in study.families]
    what = f"{_count(len(methods), 'method')} of training a small model, with and without a teacher"
    where = f"on {_count(len(names), 'family', 'families')} of backbones: {listed(names)}" if names else "on no family"
    seeds, failures = facts["seeds"], facts["failures"]
    failed = f"{_count(len(failures), 'task')} of the study failed: see the warnings." if failures else ""
    sentences = [
        f"This page compares {what}, {where}.",
        f"Every method trains for {number(facts['updates'])} updates on {_seeds(seeds)}, and every run is judged by "
        f"N = {number(facts['num_samples'])} samples. Everything that had to be chosen was chosen on seed "
        f"{number(facts['validation_seed'])}, which is no part of the results.",
        failed,
    ]
    return [sentence for sentence in sentences if sentence]


def statement(study: Study, family: Family) -> list[str]:
    """The sentences that open one family: who was compared on what, and the verdict."""
    facts = family.facts
    count = len({entry["method"] for entry in family.summary})
    shared = study.facts["starts"] == "shared"
    whose = "the start of every student" if shared else "the start of the first seed's students"
    sentences = [
        f"On {facts['data']}, {_count(count, 'method')} were compared over {_seeds(study.facts['seeds'])} with "
        f"N = {number(study.facts['num_samples'])} samples a run.",
        f"The teacher ({_model(facts['teacher'])}) and {whose} ({_model(facts['start'])}) "
        "are the marks to judge them by.",
    ]
    if facts["verdict"]:
        sentences.append(facts["verdict"] if facts["verdict"].rstrip().endswith(".") else f"{facts['verdict']}.")
    return sentences if family.budgets() else [*sentences, "No method has been evaluated yet."]


def findings(family: Family) -> list[str]:
    """Who came out lowest under each budget, and where VarKD stands: a sentence each."""
    found = [sentence for budget in family.budgets() for sentence in _lowest(family, budget)]
    return [*found, "Methods that lost stay in every table."] if found else []


def _model(model: Mapping[str, Any]) -> str:
    size = "size not stated" if model["parameters"] is None else f"{compact(model['parameters'])} parameters"
    return f"{size}, FD {interval({'value': model['fd'], 'low': model['fd_low'], 'high': model['fd_high']})}"


def _lowest(family: Family, budget: str) -> list[str]:
    entries = [entry for entry in family.methods(budget) if entry["fd"]["value"] is not None]
    if not entries:
        return [f"{_BUDGET[budget]} no method has an FD yet."]
    first, baseline = entries[0], family.best_baseline(budget)
    result = f"{_BUDGET[budget]} {first['method']} has the lowest mean FD, {interval(first['fd'])}"
    if baseline is None:
        return [f"{result}; there is no baseline to set it against."]
    sentences = (
        [f"{result}: it is the best baseline itself."]
        if first["method"] == baseline
        else [f"{result}, {_paired(first, baseline)}."]
    )
    others = [entry for entry in entries if entry["role"] == "varkd" and entry is not first]
    return sentences + [
        f"{_BUDGET[budget]} {entry['method']} is at {interval(entry['fd'])}, {_paired(entry, baseline)}."
        for entry in others
    ]


def _paired(entry: Mapping[str, Any], baseline: str) -> str:
    paired = entry["difference"]
    if paired is None or paired["value"] is None:
        return f"with no paired difference to the best baseline, {baseline}"
    text = f"{interval(paired, sign=True)} against the best baseline, {paired['to']}, paired by seed"
    if paired["low"] is None or paired["high"] is None:
        return f"{text}; too few seeds for an interval"
    if paired["low"] <= 0 <= paired["high"]:
        return f"{text}: the interval holds 0, so these seeds do not separate the two"
    return f"{text}: the interval excludes 0, so it is {'better' if paired['high'] < 0 else 'worse'}"


def warnings(study: Study, family: Family) -> list[str]:
    """What a reader must know before believing a number of this family."""
    found = []
    if not family.facts["distinguishable"]:
        found.append("The gap is too small to tell methods apart here: read the order of the methods as noise.")
    if not study.facts["finished"]:
        found.append("The study is not finished: numbers are missing or will change.")
    failures = study.facts["failures"]
    for task, reason in failures.items() if isinstance(failures, Mapping) else ():
        if str(task).split("/")[0] == family.name:
            found.append(f"{task} failed: {as_text(reason)}")
    for budget in family.budgets():
        for entry in family.methods(budget):
            if budget == "time" and entry["updates"] == 0:
                found.append(f"{entry['method']} has no checkpoint within the equal time: its row there is the start.")
            found += [f"{entry['method']}, {BUDGETS[budget].lower()}: {text}" for text in entry["warnings"]]
    return found


def floors(family: Family) -> list[tuple[str, str]]:
    """What real images and the tokenizer alone reach: (who, FD)."""
    meaning = {"fd_validation": "real validation images", "fd_reconstruction": "images through the tokenizer alone"}
    values = family.facts["floors"]
    return [(name, number(values[key])) for key, name in meaning.items() if values.get(key) is not None]


def protocol(study: Study) -> list[tuple[str, str]]:
    """How the study was done, as (name, value): what was fixed, what was chosen and where, the machine."""
    facts, machine = study.facts, study.facts["machine"]
    start = "its start" if facts["starts"] == "shared" else "its start at each training seed"
    fixed = (
        f"the data and their codes, the teacher, the student's architecture and {start}, the number of updates, the "
        "labels and seeds of sampling, the reference images and the feature network"
    )
    budgets = "; ".join(f"{family.name} {number(family.facts['time_budget'], ' s')}" for family in study.families)
    result = [
        ("The same for every method", fixed),
        ("Updates", number(facts["updates"])),
        ("Training seeds", ", ".join(number(seed) for seed in facts["seeds"]) or MISSING),
        ("Samples N of a run", number(facts["num_samples"])),
        (
            f"Chosen on validation seed {number(facts['validation_seed'])}",
            "the training setting of every method by a short training, then its sampler, both by the lowest FD; the "
            "seeds of the results chose nothing",
        ),
        (
            "Equal time",
            f"the last checkpoint of the same training runs within the seconds of the cheapest method "
            f"({budgets}); their schedules are unfinished there",
        ),
        ("Gap closed", f"counted from {gap_name(facts['gap_baseline'])} (0 %) to the teacher (100 %)"),
        ("Machine", f"{number(machine.get('cores'))} cores, runs at once: {number(machine.get('workers'))}"),
        ("The whole study took", number(machine.get("seconds"), " s")),
    ]
    versions = machine.get("versions")
    items = versions.items() if isinstance(versions, Mapping) else []
    return result + [(f"Version of {name}", as_text(value)) for name, value in items]


def _seeds(seeds: Sequence[float]) -> str:
    if not seeds:
        return "no seed"
    names = listed([number(seed) for seed in seeds])
    return f"{_count(len(seeds), 'training seed')} ({names})"


def _count(count: int, noun: str, plural: str = "") -> str:
    return f"{count} {noun if count == 1 else plural or noun + 's'}"
