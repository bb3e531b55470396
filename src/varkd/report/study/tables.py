"""The tables of a study as values: the summary under one budget, every seed, the controls, and what was tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from varkd.report.study.results import ROLES, Family
from varkd.report.tables import Cell, Column, Row, make_cell, mark_best

FD = Column(
    "fd",
    "FD",
    "FD",
    "Fréchet distance between the features of the samples and those of the reference images, averaged over training "
    "seeds",
    "lower",
)
_DIFFERENCE = "the mean over training seeds of its FD minus that of {} at the same seed; below 0 is better"
_QUALITY = (
    Column("precision", "Precision (%)", "prec%", "samples that lie among the reference images", "higher", 100),
    Column("recall", "Recall (%)", "rec%", "reference images that lie among the samples", "higher", 100),
    Column("accuracy", "Accuracy (%)", "acc%", "samples that the feature network takes for their label", "higher", 100),
    Column(
        "student_kl",
        "KL on own samples",
        "KL",
        "KL(teacher || student) on the student's own samples, in nats per code",
        "lower",
    ),
)
_COST = (
    Column("num_seeds", "Seeds", "seeds", "training seeds behind the means", kind="whole"),
    Column("updates", "Updates", "steps", "optimizer steps, mean over seeds", kind="whole"),
    Column("seconds", "Training (s)", "train s", "wall-clock seconds of training, mean over seeds", "lower"),
    Column("temperature", "Sampler temp.", "temp", "temperature of the sampler, chosen on the validation seed"),
    Column("guidance", "Sampler guidance", "cfg", "guidance scale of the sampler, chosen on the validation seed"),
    Column(
        "setting", "Setting", "setting", "settings of training that were chosen on the validation seed", kind="text"
    ),
)
_MARKED = (FD, *_QUALITY)


def seed_columns(other: str) -> tuple[Column, Column]:
    """How many seeds were won and lost against `other`."""
    meaning = f"training seeds at which its FD is {{}} than that of {other}"
    return (
        Column("wins", "Seeds won", "won", meaning.format("lower"), kind="whole"),
        Column("losses", "Seeds lost", "lost", meaning.format("higher"), kind="whole"),
    )


def difference_column(baseline: str | None) -> Column:
    """The paired difference to the best baseline, which the title names."""
    name = baseline or "best baseline"
    return Column("difference", f"FD minus {name}", f"to {name}", _DIFFERENCE.format(name), "lower")


def gap_column(gap_baseline: str | None) -> Column:
    """The share of the gap to the teacher that a method closes."""
    meaning = (
        f"(FD of {gap_name(gap_baseline)} - FD of the method) / (FD of {gap_name(gap_baseline)} - FD of the teacher)"
    )
    return Column("gap_closed", "Gap closed (%)", "gap%", meaning, "higher", 100)


def gap_name(gap_baseline: str | None) -> str:
    """From where the gap to the teacher is counted, as the page says it."""
    return {"start": "the start", None: "the baseline"}.get(gap_baseline, gap_baseline or "")


def summary_columns(family: Family, budget: str, gap_baseline: str | None) -> list[Column]:
    """The columns of the summary table, in the order of the page."""
    baseline = family.best_baseline(budget)
    paired = (difference_column(baseline), *seed_columns(baseline or "the best baseline"))
    return [FD, *paired, gap_column(gap_baseline), *_QUALITY, *_COST]


def summary_rows(family: Family, budget: str, columns: Sequence[Column]) -> list[Row]:
    """Teacher, start and every method by its mean FD, the best of the methods marked column by column."""
    rows = [_reference_row(name, family.facts[name], columns) for name in ("teacher", "start")]
    rows += [_method_row(family, entry, columns) for entry in family.methods(budget)]
    return mark_best(rows, _MARKED)


def _reference_row(name: str, model: Mapping[str, Any], columns: Sequence[Column]) -> Row:
    numbers: dict[str, tuple[float | None, ...]] = {
        key: (model[key],) for key in ("precision", "recall", "accuracy", "seconds")
    }
    numbers["fd"] = (model["fd"], model["fd_low"], model["fd_high"])
    numbers |= {key: (model["sampler"][key],) for key in ("temperature", "guidance")}
    return Row(name, "reference", "model", {c.key: make_cell(c, *numbers.get(c.key, ())) for c in columns})


def _method_row(family: Family, entry: Mapping[str, Any], columns: Sequence[Column]) -> Row:
    runs = [row for row in family.rows if (row["method"], row["budget"]) == (entry["method"], entry["budget"])]
    sampler = runs[0]["sampler"] if runs else {}
    cells = {}
    for column in columns:
        if column.key == "setting":
            cells[column.key] = _words(", ".join(runs[0]["setting"]) if runs else "")
        elif column.key in ("temperature", "guidance"):
            cells[column.key] = make_cell(column, sampler.get(column.key))
        elif column.key == "difference":
            cells[column.key] = signed(column, entry["difference"])
        elif column.key in ("wins", "losses") and entry["difference"] is None:
            cells[column.key] = Cell()  # nobody to win against
        elif isinstance(entry[column.key], Mapping):
            cells[column.key] = spread_cell(column, entry[column.key])
        else:
            cells[column.key] = make_cell(column, entry[column.key])
    return Row(entry["method"], ROLES[entry["role"]], "student", cells)


def _words(text: str) -> Cell:
    return Cell(text) if text else Cell()


def spread_cell(column: Column, spread: Mapping[str, Any]) -> Cell:
    """A number with its interval; one of no width (a single seed) is no interval."""
    value, low, high = (spread.get(end) for end in ("value", "low", "high"))
    return make_cell(column, value) if low == high else make_cell(column, value, low, high)


def signed(column: Column, spread: Mapping[str, Any] | None) -> Cell:
    """A difference: a number above 0 carries its plus sign."""
    cell = spread_cell(column, spread or {})
    return replace(cell, text=f"+{cell.text}") if cell.value is not None and cell.value > 0 else cell


def seed_table(family: Family, budget: str) -> tuple[list[Column], list[Row]]:
    """The FD of every run under one budget: a row per method, a column per training seed."""
    rows = [row for row in family.rows if row["budget"] == budget]
    seeds = sorted({row["seed"] for row in rows if row["seed"] is not None})
    meaning = "FD of the run with training seed {}; the interval is over its samples"
    columns = [Column(f"seed-{s:g}", f"FD, seed {s:g}", "", meaning.format(f"{s:g}"), "lower") for s in seeds]
    found = {(row["method"], row["seed"]): row for row in rows}
    table = []
    for entry in family.methods(budget):
        runs = [found.get((entry["method"], seed), {}) for seed in seeds]
        numbers = [[run.get(key) for key in ("fd", "fd_low", "fd_high")] for run in runs]
        cells = {column.key: make_cell(column, *of_run) for column, of_run in zip(columns, numbers, strict=True)}
        table.append(Row(entry["method"], ROLES[entry["role"]], "student", cells))
    return columns, table


CONTROL_COLUMNS = (
    Column("difference", "FD minus control", "", _DIFFERENCE.format("the control"), "lower"),
    *seed_columns("the control"),
    Column("finding", "What the interval says", "", "whether the paired interval lies on one side of 0", kind="text"),
)


def control_rows(family: Family, budget: str) -> list[Row]:
    """Each method against the control that lacks its idea, paired by seed."""
    rows = []
    for entry in family.controls:
        if entry["budget"] != budget:
            continue
        cells = {
            "difference": signed(CONTROL_COLUMNS[0], entry),
            "wins": make_cell(CONTROL_COLUMNS[1], entry["wins"]),
            "losses": make_cell(CONTROL_COLUMNS[2], entry["losses"]),
            "finding": Cell(finding(entry, "better than the control", "worse than the control")),
        }
        rows.append(Row(entry["method"], entry["control"], "student", cells))
    return rows


def finding(spread: Mapping[str, Any], better: str, worse: str) -> str:
    """What a paired interval of FD allows to say."""
    if spread["low"] is None or spread["high"] is None:
        return "no interval: too few seeds"
    return better if spread["high"] < 0 else worse if spread["low"] > 0 else "not separated: holds 0"


@dataclass(frozen=True)
class Trial:
    """One setting that was tried on the validation seed."""

    text: str
    fd: str
    chosen: bool


@dataclass(frozen=True)
class Choice:
    """What was tried for one method."""

    method: str
    trials: list[Trial]


def sweeps(family: Family) -> list[Choice]:
    """The training settings that were tried."""
    named = lambda trial: ", ".join(trial["setting"]) or "as the recipe has it"
    return [_choice(entry, entry["settings"], named) for entry in family.sweeps]


def samplers(family: Family) -> list[Choice]:
    """The samplers that were tried."""
    number = lambda value: "–" if value is None else f"{value:g}"
    named = lambda trial: f"temperature {number(trial['temperature'])}, guidance {number(trial['guidance'])}"
    return [_choice(entry, entry["choices"], named) for entry in family.samplers]


def _choice(entry: Mapping[str, Any], trials: Sequence[Mapping[str, Any]], named) -> Choice:
    texts = [
        Trial(named(trial), make_cell(FD, trial["fd"]).text, index == entry["chosen"])
        for index, trial in enumerate(trials)
    ]
    return Choice(entry["method"], texts)
