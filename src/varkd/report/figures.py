"""Figures as inline SVG that follows the theme of the page.

matplotlib draws with stand-in colours; they are replaced by `currentColor` and by the page's own variables
(`--run-0`, `--run-1`, ...), so that one drawing is readable in light and dark. Runs differ in their dashes as
well as in colour.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

INK = "#010203"
RUN = "#fe01{:02x}"
NUM_COLOURS = 7
DASHES = ((), (6, 2), (2, 2), (8, 2, 2, 2), (4, 1, 1, 1, 1, 1), (10, 3))
TEACHER = -1


@dataclass(frozen=True)
class Line:
    """One run's curve; `style` is the run's number among the runs, or TEACHER."""

    label: str
    style: int
    x: Sequence[float]
    y: Sequence[float]


def dash(style: int) -> tuple[int, ...]:
    """The dash pattern of a run, in points; empty is solid."""
    return () if style == TEACHER else DASHES[(style + style // NUM_COLOURS) % len(DASHES)]


def lines(
    name: str, curves: Sequence[Line], xlabel: str, ylabel: str, ylimits: tuple[float, float] | None = None
) -> str:
    """One line per run. `name` must be unique on the page (it prefixes the ids inside the SVG)."""
    with styled(name):
        figure, (axes,) = new_figure(1, 1, 3.0)
        for curve in curves:
            colour = INK if curve.style == TEACHER else RUN.format(curve.style % NUM_COLOURS)
            pattern = dash(curve.style)
            axes.plot(
                curve.x, curve.y, color=colour, linewidth=1.6, linestyle=(0, pattern) if pattern else "-",
                marker="o" if len(curve.x) == 1 else None, markersize=4,
            )  # fmt: skip
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        if ylimits:
            axes.set_ylim(*ylimits)
        axes.grid(color=INK, alpha=0.15, linewidth=0.6)
        ends = "; ".join(f"{curve.label} from {curve.y[0]:.3g} to {curve.y[-1]:.3g}" for curve in curves)
        return as_svg(figure, name, f"{ylabel} over {xlabel}: {ends}")


def maps(name: str, panels: Sequence[tuple[str, NDArray[np.floating]]], ylabel: str) -> str:
    """The same quantity over the image grid, one (h, w) panel per run, on one colour scale."""
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    values = np.concatenate([panel.ravel() for _, panel in panels])
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    with styled(name):
        figure, all_axes = new_figure(rows, columns, 0.6 + 1.75 * rows)
        for axes, (title, panel) in zip(all_axes, panels, strict=False):
            axes.imshow(panel, vmin=low, vmax=high, cmap="cividis", interpolation="none")
            axes.set_title(title if len(title) <= 18 else f"{title[:17]}…", fontsize=9)
        for axes in all_axes:
            axes.set_axis_off()
        bar = figure.colorbar(
            all_axes[0].images[0], ax=list(all_axes), location="bottom", shrink=0.8, aspect=40, label=ylabel
        )
        bar.outline.set_visible(False)
        means = "; ".join(f"{title}: mean {np.nanmean(panel):.3g}" for title, panel in panels)
        return as_svg(figure, name, f"{ylabel} over the image grid: {means}")


def styled(name: str):
    """matplotlib's settings while one figure is made: text stays text, and a `$` in a name is no formula.

    One font is named, for measuring: the page sets its own, and a whole list would be repeated with every text.
    """
    import matplotlib

    return matplotlib.rc_context({
        "svg.fonttype": "none", "svg.hashsalt": name, "font.sans-serif": ["DejaVu Sans"],
        "text.parse_math": False, "font.size": 10, "text.color": INK,
        "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK,
        "ytick.color": INK, "xtick.labelsize": 9, "ytick.labelsize": 9,
    })  # fmt: skip


def new_figure(rows: int, columns: int, height: float, width: float = 5.0):
    """A figure that is by default 5 inches wide, so that on a phone one point is about one pixel."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    all_axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, all_axes


def as_svg(figure, name: str, label: str) -> str:
    buffer = io.StringIO()
    no_stamp = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=no_stamp, bbox_inches="tight", pad_inches=0.04)
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = svg.replace(INK, "currentColor")
    svg = re.sub(r"#fe01([0-9a-f]{2})", lambda match: f"var(--run-{int(match[1], 16)})", svg)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", svg)
    svg = re.sub(r'( id="|href="#|url\(#)', lambda match: f"{match[1]}{name}-", svg)
    head, body = svg.split(">", 1)
    view = re.search(r'viewBox="[^"]*"', head)
    assert view is not None, "matplotlib writes a viewBox"
    space = 'xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {view[0]} role="img" aria-label="{escape(label)}" {space}>{body}'
