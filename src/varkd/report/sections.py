"""The parts of the page, computed: each function takes what was read and returns what the template prints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, Literal

import numpy as np

from varkd.report import figures
from varkd.report.figures import TEACHER, Line
from varkd.report.images import Picture, pictures_of
from varkd.report.protocol import as_text
from varkd.report.runs import RunFolder
from varkd.report.tables import Column, Row, make_cell, mark_best

SOURCES = {"data": "on real images", "student": "on the student's own samples"}
_PER_CODE: dict[str, tuple[str, str, Literal["lower", "higher"] | None]] = {
    "forward_kl": ("Forward KL", "KL(teacher || student), in nats per code", "lower"),
    "reverse_kl": ("Reverse KL", "KL(student || teacher), in nats per code", "lower"),
    "acceptance": ("Acceptance", "1 - total variation: codes that speculative sampling would keep", "higher"),
    "top1": ("Same top code", "positions where both rank the same code first", "higher"),
    "top1_cluster": ("Same top cluster", "positions where both rank a code of one cluster first", "higher"),
    "ce": ("Cross-entropy", "of the codes under the student, in nats per code", "lower"),
    "ce_teacher": ("Teacher cross-entropy", "of the codes under the teacher, in nats per code", None),
    "teacher_entropy": ("Teacher entropy", "of the teacher's own predictions, in nats per code", None),
}
_NOT_DRAWN = frozenset({"split", "step", "seconds", "num"})
SPEED_COLUMNS = (
    Column(
        "samples_per_second",
        "Samples/s",
        "",
        "sequences of codes sampled per second, without the tokenizer's decoder",
        "higher",
    ),
    Column("speedup", "Times teacher", "", "samples per second over those of the teacher", "higher"),
    Column("parameters", "Parameters", "", "weights of the model", "lower", kind="compact"),
    Column("compression", "Times smaller", "", "parameters of the teacher over those of the run", "higher"),
    Column("seconds", "Training (s)", "", "wall-clock seconds of training", "lower"),
    Column("sequences", "Sequences/s", "", "training sequences per second, median over the log"),
)


def styles(runs: Sequence[RunFolder], rows: Sequence[Row]) -> dict[str, int]:
    """The line style of every run, the same in all figures; a teacher has the color of the text."""
    teachers = {row.name for row in rows if row.role == "teacher"}
    others = [run.label for run in runs if run.label not in teachers]
    return dict.fromkeys(teachers, TEACHER) | {label: index for index, label in enumerate(others)}


def legend(runs: Sequence[RunFolder], styles: Mapping[str, int]) -> list[tuple[str, str, str]]:
    """(label, CSS color, dash pattern) per run."""
    result = []
    for run in runs:
        style = styles[run.label]
        color = "currentColor" if style == TEACHER else f"var(--run-{style % figures.NUM_COLORS})"
        result.append((run.label, color, " ".join(str(length) for length in figures.dash(style))))
    return result


@dataclass(frozen=True)
class Grid:
    """One run's samples: its evaluation grid, else its last grid from training, else nothing."""

    label: str
    role: str
    picture: Picture | None
    from_training: bool


def grids(runs: Sequence[RunFolder], rows: Sequence[Row]) -> list[Grid]:
    """The sample grids, the teacher's first."""
    role = {row.name: row.role for row in rows}
    result = []
    for run in runs:
        paths = [run.samples] if run.samples else list(run.progress[-1:])
        pictures = pictures_of(paths, len(runs), share=0.7)
        picture = pictures[0] if pictures else None
        result.append(Grid(run.label, role.get(run.label, "model"), picture, not run.samples))
    return sorted(result, key=lambda grid: grid.role != "teacher")


def floors(runs: Sequence[RunFolder]) -> list[tuple[str, str]]:
    """What real images and the tokenizer alone reach, as (who, number with its N); one entry per distinct value."""
    meaning = {
        "fd_validation": "real validation images",
        "fd_reconstruction": "real images through the tokenizer alone",
    }
    column = Column("fd", "FD", "", "")
    found: dict[tuple[str, str], None] = {}
    for run in runs:
        values = dict((run.metrics or {}).get("floors") or {})
        num = values.pop("num", None)
        size = "" if num is None else f" (N = {num:,})"
        for key, value in values.items():
            if value is not None:
                found[meaning.get(key) or str(key), make_cell(column, float(value)).text + size] = None
    return list(found)


def agreement(runs: Sequence[RunFolder], rows: Sequence[Row]) -> tuple[list[Column], list[Row]]:
    """How closely each student follows its teacher, on both sources of prefixes. Empty without a teacher."""
    columns: dict[str, Column] = {}
    result = []
    for run, row in zip(runs, rows, strict=True):
        measured = (run.metrics or {}).get("agreement") or {}
        by_source = {source: values for source, values in measured.items() if values}
        if not by_source:
            continue
        cells = {}
        for source, values in by_source.items():
            for key, value in values.items():
                if key == "num":
                    continue
                column = _agreement_column(key, source)
                columns[column.key] = column
                cells[column.key] = make_cell(column, None if value is None else float(value))
        result.append(Row(row.name, row.method, row.role, cells))
    ordered = sorted(columns.values(), key=lambda column: _order(column.key.split("/")[0]))
    empty = make_cell(Column("", "", "", ""))
    fill = lambda row: {column.key: row.cells.get(column.key, empty) for column in ordered}
    return ordered, mark_best([replace(row, cells=fill(row)) for row in result], ordered)


def agreement_counts(runs: Sequence[RunFolder]) -> list[str]:
    """N of the agreement per source: "data: N = 360 sequences"; every distinct one where runs differ."""
    found: dict[str, set[int]] = {}
    for run in runs:
        for source, values in ((run.metrics or {}).get("agreement") or {}).items():
            if values and values.get("num") is not None:
                found.setdefault(source, set()).add(values["num"])
    return [
        f"{source}: N = {' or '.join(f'{num:,}' for num in sorted(counts))} sequences"
        for source, counts in found.items()
    ]


def _order(key: str) -> tuple[int, str]:
    """Known quantities in the order of `_PER_CODE`, then the others by name."""
    known = list(_PER_CODE)
    return (known.index(key) if key in known else len(known), key)


def _agreement_column(key: str, source: str) -> Column:
    title, meaning, better = _PER_CODE.get(key, (key, key, None))
    if (key, source) == ("ce", "student"):
        better = None  # on its own samples this is the student's entropy: a sharper student is not a better one
    where = SOURCES.get(source, source)
    percent = key in ("acceptance", "top1", "top1_cluster")
    return Column(
        f"{key}/{source}",
        f"{title}{' (%)' if percent else ''}, {source}",
        "",
        f"{meaning}, {where}",
        better,
        100 if percent else 1,
    )


@dataclass(frozen=True)
class Panel:
    """One tab: figures with a caption."""

    title: str
    figures: list[tuple[str, str]]
    note: str = ""


def positions(runs: Sequence[RunFolder], styles: Mapping[str, int]) -> list[Panel]:
    """Agreement at every position of the sequence: a line per run, and a map where the codes form a grid."""
    values: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    for run in runs:
        for source, by_key in ((run.metrics or {}).get("agreement_by_position") or {}).items():
            for key, numbers in (by_key or {}).items():
                array = np.array([math.nan if number is None else number for number in numbers], float)
                if np.isfinite(array).any():
                    values.setdefault((key, source), {})[run.label] = array
    shape = {run.label: tuple(int(side) for side in (run.metrics or {}).get("grid") or ()) for run in runs}
    panels = []
    for key in sorted({key for key, _ in values}, key=_order):
        title = _PER_CODE.get(key, (key, "", None))[0]
        drawn = []
        for source in [source for name, source in values if name == key]:
            drawn += _position_figures(key, source, values[key, source], shape, styles)
        panels.append(Panel(title, drawn, _PER_CODE.get(key, ("", "", None))[1]))
    return panels


def _position_figures(
    key: str,
    source: str,
    by_run: Mapping[str, np.ndarray],
    shape: Mapping[str, tuple[int, ...]],
    styles: Mapping[str, int],
) -> list[tuple[str, str]]:
    title = _PER_CODE.get(key, (key, "", None))[0]
    where = SOURCES.get(source, source)
    name = f"position-{_slug(key)}-{_slug(source)}"
    curves = [Line(label, styles[label], range(len(array)), array.tolist()) for label, array in by_run.items()]
    drawn = [(f"{title} {where}, by position", figures.lines(name, curves, "position in the sequence", title))]
    square = [
        (label, array.reshape(shape[label]))
        for label, array in by_run.items()
        if len(shape[label]) == 2 and math.prod(shape[label]) == len(array)
    ]
    if square:
        drawn.append((f"{title} {where}, over the image grid", figures.maps(f"{name}-map", square, title)))
    return drawn


def curves(runs: Sequence[RunFolder], styles: Mapping[str, int]) -> list[Panel]:
    """The training loss and every validation number that was logged, over optimizer steps."""
    series: dict[tuple[str, str], list[Line]] = {}
    for run in runs:
        for split, key in dict.fromkeys(_logged(run)):
            points = {
                entry["step"]: entry[key] for entry in run.log if entry.get("split") == split and _plotted(entry, key)
            }
            steps = sorted(points)
            if steps:
                line = Line(run.label, styles[run.label], steps, [points[step] for step in steps])
                series.setdefault((split, key), []).append(line)
    panels = []
    for (split, key), found in series.items():
        quantity = _PER_CODE.get(key, (key, "", None))[0]
        title = f"{'training' if split == 'train' else split} {quantity[0].lower()}{quantity[1:]}"
        svg = figures.lines(f"curve-{_slug(split)}-{_slug(key)}", found, "optimizer step", title)
        note = "Methods minimize different losses: compare each curve with itself only." if split == "train" else ""
        panels.append(Panel(title[0].upper() + title[1:], [(title[0].upper() + title[1:], svg)], note))
    return panels


def _logged(run: RunFolder) -> list[tuple[str, str]]:
    found = []
    for entry in run.log:
        if entry.get("split") == "train":
            found.append(("train", "loss"))
        elif entry.get("split") == "warning":
            continue  # text, not a curve: see `facts`
        elif isinstance(entry.get("split"), str):
            found += [(entry["split"], key) for key in entry if key not in ("split", "step", "seconds", "num")]
    return found


def _plotted(entry: Mapping[str, Any], key: str) -> bool:
    numbers = (entry.get("step"), entry.get(key))
    return all(isinstance(number, int | float) and math.isfinite(number) for number in numbers)


def speed(runs: Sequence[RunFolder], rows: Sequence[Row]) -> list[Row]:
    """Sampling and training speed of the evaluated runs, as measured on their machines."""
    log_of = {run.label: run.log for run in runs}
    teachers = [row for row in rows if row.role == "teacher"]
    result = []
    for row in rows:
        rates = [entry["sequences_per_second"] for entry in log_of[row.name] if _rate(entry)]
        numbers = {key: row.cells[key].value for key in ("samples_per_second", "parameters", "seconds")} | {
            "sequences": median(rates) if rates else None,
            "speedup": None,
            "compression": None,
        }
        if len(teachers) == 1 and row.role != "teacher":
            numbers["speedup"] = _ratio(row, teachers[0], "samples_per_second")
            numbers["compression"] = _ratio(teachers[0], row, "parameters")
        cells = {column.key: make_cell(column, numbers[column.key]) for column in SPEED_COLUMNS}
        result.append(Row(row.name, row.method, row.role, cells))
    return mark_best(result, SPEED_COLUMNS)


def _rate(entry: Mapping[str, Any]) -> bool:
    return entry.get("split") == "train" and isinstance(entry.get("sequences_per_second"), int | float)


def _ratio(over: Row, under: Row, key: str) -> float | None:
    numerator, denominator = over.cells[key].value, under.cells[key].value
    return numerator / denominator if numerator and denominator else None


def facts(run: RunFolder) -> list[tuple[str, str]]:
    """The protocol card of one run as (name, value), in the words of a methods section."""
    metrics = run.metrics or {}
    protocol = dict(metrics.get("protocol") or {})
    result = [("Run folder", str(run.path))]
    if metrics:
        result.append(("Method", metrics["method"]))
        result.append(("Generated samples N", as_text(metrics.get("num_samples"))))
    reference, network = protocol.pop("reference", None), protocol.pop("features", None)
    if isinstance(reference, Mapping):
        result.append(("Reference images", f"{as_text(reference.get('name'))}, N = {as_text(reference.get('num'))}"))
    if isinstance(network, Mapping):
        result.append(("Feature network", _network(network)))
    result += [(key.replace("_", " ").capitalize(), as_text(value)) for key, value in protocol.items()]
    result += [(f"Status: {key}", as_text(value)) for key, value in (run.status or {}).items()]
    result += [
        (f"Warning at update {entry.get('step')}", as_text(entry.get("text")))
        for entry in run.log
        if entry.get("split") == "warning"
    ]
    result += [(f"Environment: {key}", as_text(value)) for key, value in (run.environment or {}).items()]
    return result


def _network(network: Mapping[str, Any]) -> str:
    accuracy, fitted, held_out = (network.get(key) for key in ("accuracy", "num_train", "num_validation"))
    known = f", fitted on N = {fitted:,} images" if isinstance(fitted, int) else ""
    if isinstance(accuracy, int | float):
        known += f", accuracy {accuracy:.1%}"
        known += f" on N = {held_out:,} held-out images" if isinstance(held_out, int) else ""
    return (
        f"{as_text(network.get('name'))} (hash {as_text(network.get('hash'))}{known}): trained on "
        "this data set by varkd, so its distances are not the Inception FID of papers"
    )


def _slug(text: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in text)
