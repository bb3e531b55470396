"""The page of a study: everything that study.html.j2 shows, computed from results.json and what it names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from varkd.files import write_text
from varkd.report.html import render_template
from varkd.report.study import plots, tables, words
from varkd.report.study.results import BUDGETS, Family, Study, read_study
from varkd.report.tables import Column, Row


def write_study(folder: Path) -> Path:
    """Read `folder`/results.json and write `folder`/report/index.html, a page that needs no other file.

    Returns:
        The path of the page.

    Raises:
        VarkdError: results.json is missing or damaged, or so is a picture or log that it names.
    """
    study = read_study(folder)
    path = folder / "report" / "index.html"
    write_text(path, _render(folder, study))
    return path


@dataclass(frozen=True)
class Budget:
    """One tab: the table and the figures of one budget."""

    key: str
    title: str
    columns: Sequence[Column]
    rows: list[Row]
    figures: list[plots.Drawn]
    seed_columns: Sequence[Column]
    seed_rows: list[Row]
    controls: list[Row]


@dataclass(frozen=True)
class Section:
    """One family on the page. `id` is a number, for a name may hold anything."""

    id: str
    family: Family
    statement: list[str]
    findings: list[str]
    warnings: list[str]
    floors: list[tuple[str, str]]
    budgets: list[Budget]
    roles: list[tuple[str, str, str]]
    samples: list[plots.Sample]
    curves: list[plots.Curves]
    sweeps: list[tables.Choice]
    samplers: list[tables.Choice]


def _render(folder: Path, study: Study) -> str:
    pictures = sum(2 + len(plots.first_seed_runs(study, family)) for family in study.families)
    return render_template(
        "study.html.j2",
        title=study.facts["name"],
        study=study.facts,
        opening=words.opening(study),
        sections=[
            _section(folder, study, family, f"family-{number}", pictures)
            for number, family in enumerate(study.families)
        ],
        protocol=words.protocol(study),
        control_columns=tables.CONTROL_COLUMNS,
        gap=tables.gap_name(study.facts["gap_baseline"]),
    )


def _section(folder: Path, study: Study, family: Family, id: str, pictures: int) -> Section:
    return Section(
        id=id,
        family=family,
        statement=words.statement(study, family),
        findings=words.findings(family),
        warnings=words.warnings(study, family),
        floors=words.floors(family),
        budgets=[_budget(study, family, budget, id) for budget in family.budgets()],
        roles=plots.role_legend(family),
        samples=plots.samples(folder, study, family, pictures),
        curves=plots.curves(folder, study, family, id),
        sweeps=tables.sweeps(family),
        samplers=tables.samplers(family),
    )


def _budget(study: Study, family: Family, budget: str, id: str) -> Budget:
    columns = tables.summary_columns(family, budget, study.facts["gap_baseline"])
    rows = tables.summary_rows(family, budget, columns)
    seed_columns, seed_rows = tables.seed_table(family, budget)
    return Budget(
        budget,
        BUDGETS[budget],
        columns,
        rows,
        plots.figures_of(family, budget, f"{id}-{budget}"),
        seed_columns,
        seed_rows,
        tables.control_rows(family, budget),
    )
