"""Figures as inline SVG that follows the theme of the page.

matplotlib draws with stand-in colors; they are replaced by `currentColor` and by the page's own variables
(`--run-0`, `--run-1`, ...), so that one drawing is readable in light and dark. Runs differ in their dashes as
well as in color.
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
NUM_COLORS = 7
DASHES = ((), (6, 2), (2, 2), (8, 2, 2, 2), (4, 1, 1, 1, 1, 1), (10, 3))
TEACHER = -1
_LEGEND_CHARACTERS = 76  # of nine points on five inches, the samples of the lines included


@dataclass(frozen=True)
class Line:
    """One curve; `style` is the run's number among the runs, or TEACHER; `low` and `high` are its interval."""

    label: str
    style: int
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


@dataclass(frozen=True)
class Bars:
    """One series of bars with intervals, one for every group of the figure; None leaves a group without a bar."""

    label: str
    style: int
    value: Sequence[float | None]
    low: Sequence[float | None]
    high: Sequence[float | None]


def dash(style: int) -> tuple[int, ...]:
    """The dash pattern of a run, in points; empty is solid."""
    return () if style == TEACHER else DASHES[(style + style // NUM_COLORS) % len(DASHES)]


def lines(
    name: str,
    curves: Sequence[Line],
    xlabel: str,
    ylabel: str,
    ylimits: tuple[float, float] | None = None,
    *,
    legend: bool = False,
    marked: bool = False,
    reference: float | None = None,
) -> str:
    """One line per curve, with the band of its interval. `name` must be unique on the page (it prefixes ids).

    `marked` puts a dot on every point; `reference` draws a thin level line.
    """
    with styled(name):
        figure, (axes,) = new_figure(1, 1, 3.0)
        if reference is not None:
            axes.axhline(reference, color=INK, alpha=0.5, linewidth=0.8)
        for curve in curves:
            pattern = dash(curve.style)
            if curve.low is not None and curve.high is not None:
                axes.fill_between(curve.x, curve.low, curve.high, color=_color(curve.style), alpha=0.2, linewidth=0)
            axes.plot(
                curve.x,
                curve.y,
                color=_color(curve.style),
                linewidth=1.6,
                linestyle=(0, pattern) if pattern else "-",
                marker="o" if len(curve.x) == 1 or marked else None,
                markersize=4,
                label=curve.label,
            )
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        if ylimits:
            axes.set_ylim(*ylimits)
        axes.grid(color=INK, alpha=0.15, linewidth=0.6)
        if legend:
            _legend(figure, axes)
        ends = "; ".join(f"{curve.label} from {curve.y[0]:.3g} to {curve.y[-1]:.3g}" for curve in curves)
        return as_svg(figure, name, f"{ylabel} over {xlabel}: {ends}")


def bars(name: str, groups: Sequence[str], series: Sequence[Bars], ylabel: str) -> str:
    """Groups of bars side by side, each with its interval as a thin line."""
    width = 0.8 / len(series)
    with styled(name):
        figure, (axes,) = new_figure(1, 1, 3.0)
        for index, each in enumerate(series):
            for group, (value, low, high) in enumerate(zip(each.value, each.low, each.high, strict=True)):
                if value is None:
                    continue
                x = group + (index + 0.5) * width - 0.4
                first = all(other is None for other in each.value[:group])
                axes.bar(
                    x, value, 0.92 * width, color=_color(each.style), alpha=0.75, label=each.label if first else None
                )
                if low is not None and high is not None:
                    axes.plot([x, x], [low, high], color=INK, linewidth=1.0)
        axes.set_xticks(range(len(groups)), groups)
        axes.set_ylabel(ylabel)
        axes.grid(color=INK, alpha=0.15, linewidth=0.6, axis="y")
        axes.set_axisbelow(True)
        if len(series) > 1:
            _legend(figure, axes)
        told = "; ".join(
            f"{each.label}: "
            + ", ".join(f"{g} {v:.3g}" for g, v in zip(groups, each.value, strict=True) if v is not None)
            for each in series
        )
        return as_svg(figure, name, f"{ylabel}: {told}".replace("\n", " "))


def _color(style: int) -> str:
    return INK if style == TEACHER else RUN.format(style % NUM_COLORS)


def _legend(figure, axes) -> None:
    """Above the axes, where it covers no curve and takes no width from them."""
    handles, labels = axes.get_legend_handles_labels()
    fitting = _LEGEND_CHARACTERS // (max(map(len, labels)) + 7)
    figure.legend(
        handles,
        labels,
        loc="outside upper left",
        ncols=max(1, min(fitting, len(labels))),
        frameon=False,
        fontsize=9,
        borderaxespad=0.1,
        columnspacing=1.2,
        handlelength=2.4,
    )


def maps(name: str, panels: Sequence[tuple[str, NDArray[np.floating]]], ylabel: str) -> str:
    """The same quantity over the image grid, one (h, w) panel per run, on one color scale."""
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

    return matplotlib.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": name,
            "font.sans-serif": ["DejaVu Sans"],
            "text.parse_math": False,
            "font.size": 10,
            "text.color": INK,
            "axes.labelcolor": INK,
            "axes.edgecolor": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "xtick.labelsize": 9,
            "ytick.labelsize": 9,
        }
    )


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
