"""One self-contained page: everything that the template shows is computed here or in a neighbor."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from varkd.files import write_text
from varkd.folders import Own
from varkd.report import sections
from varkd.report.images import Picture, pictures_of
from varkd.report.official import COLUMNS as OFFICIAL_COLUMNS
from varkd.report.official import official
from varkd.report.protocol import differences, statement
from varkd.report.runs import RunFolder, read_runs
from varkd.report.tables import COLUMNS, Row, comparison_table

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-"  # of base.html.j2
REPORT = Own("a report", ("index.html",), lambda text: _POLICY in text)


def write_report(runs: Sequence[Path], out: Path, *, title: str = "varkd report") -> Path:
    """Read run folders and write `out/index.html`, a page that needs no network and no other file.

    Returns:
        The path of the page.

    Raises:
        VarkdError: no run, a folder that is not a run, a damaged file, or `out` is not a report's or cannot be written.
    """
    REPORT.check(out)
    page = render(read_runs(runs), title)
    path = out / "index.html"
    write_text(path, page)
    return path


def render(runs: Sequence[RunFolder], title: str) -> str:
    """The page as text. Whatever comes from disk is escaped, and no script but the page's own may run."""
    return render_template("report.html.j2", title=title, **_content(runs))


def render_template(name: str, **content: Any) -> str:
    """A template of this package as text: strict, escaped, and trusting the one script of base.html.j2."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup, escape

    script = re.search(r"<script>(.*?)</script>", _source("base.html.j2"), re.DOTALL)
    assert script is not None, "the base holds one script"
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    environment = Environment(
        loader=FunctionLoader(_source), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["svg"] = Markup
    environment.filters["breakable"] = lambda name: escape(name).replace("_", Markup("_<wbr>"))
    return environment.get_template(name).render(script_hash=digest, **content)


def _source(name: str) -> str:
    return files("varkd.report").joinpath(name).read_text(encoding="utf-8")


@dataclass(frozen=True)
class Card:
    """Everything known about how one run was made and judged."""

    run: RunFolder
    row: Row | None
    facts: list[tuple[str, str]]
    progress: list[Picture]


def _content(runs: Sequence[RunFolder]) -> dict[str, Any]:
    evaluated = [run for run in runs if run.metrics is not None]
    metrics = [run.metrics for run in evaluated if run.metrics is not None]
    rows = comparison_table(metrics)
    row_of = {row.name: row for row in rows}
    styles = sections.styles(runs, rows)
    agreement_columns, agreement_rows = sections.agreement(evaluated, rows)
    official_rows, one_protocol = official(runs, rows)
    cards = []
    for run in runs:
        progress = pictures_of(run.progress[-2:], len(runs), share=0.15)
        cards.append(Card(run, row_of.get(run.label), sections.facts(run), progress))
    return {
        "statement": statement(runs, rows),
        "differences": differences(runs, rows),
        "columns": COLUMNS,
        "rows": rows,
        "tied": any(cell.mark == "tied" for row in rows for cell in row.cells.values()),
        "waiting": [run for run in runs if run.metrics is None],
        "official_columns": OFFICIAL_COLUMNS,
        "official_rows": official_rows,
        "one_protocol": one_protocol,
        "floors": sections.floors(evaluated),
        "grids": sections.grids(runs, rows),
        "agreement_counts": sections.agreement_counts(evaluated),
        "agreement_columns": agreement_columns,
        "agreement_rows": agreement_rows,
        "positions": sections.positions(evaluated, styles),
        "curves": sections.curves(runs, styles),
        "positions_legend": sections.legend([run for run in evaluated if _has_positions(run)], styles),
        "curves_legend": sections.legend([run for run in runs if run.log], styles),
        "speed": sections.speed(runs, rows),
        "speed_columns": sections.SPEED_COLUMNS,
        "cards": cards,
    }


def _has_positions(run: RunFolder) -> bool:
    return any(((run.metrics or {}).get("agreement_by_position") or {}).values())
