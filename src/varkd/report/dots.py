"""Figures of points: a number with its interval per method (forest plot), and quality against cost (scatter).

Drawn as `figures.py` says. A point far outside the others would press them together: it stands at the edge, as an
arrow with its number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from varkd.report.figures import INK, RUN, as_svg, new_figure, styled

SHAPES = ("D", "s", "^", "v", "P", "X", "o")
_LONGEST_NAME = 26
_ROW_INCHES = 0.2
_POINTS_PER_LETTER = 4.5  # of the scatter's labels, a little more than the browser's font needs
_LABEL_HEIGHT = 9.0


@dataclass(frozen=True)
class Dot:
    """A point: `style` is the number of its color and shape. `x` may have an interval; a forest needs no `y`."""

    label: str
    style: int
    x: float
    low: float | None = None
    high: float | None = None
    y: float = 0.0


def forest(name: str, dots: Sequence[Dot], references: Sequence[tuple[str, float]], xlabel: str) -> str:
    """One row per dot in the given order, the first on top, with vertical lines at the references."""
    window = _window([dot.x for dot in dots], [end for dot in dots for end in (dot.low, dot.high) if end is not None])
    left, right = _reach(window, [x for _, x in references])
    with styled(name):
        height = 0.75 + 0.17 * len(references) + _ROW_INCHES * len(dots)
        figure, (axes,) = new_figure(1, 1, height, width=4.5)
        axes.set_xlim(left, right)
        axes.set_ylim(len(dots) - 0.4, -0.6)
        for row, dot in enumerate(dots):
            _row(axes, row, dot, window)
        axes.set_yticks(range(len(dots)), [_short(dot.label) for dot in dots])
        axes.tick_params(axis="y", length=0)
        for level, (label, x) in enumerate(references):
            _reference(axes, label, x, level, (left, right))
        axes.set_xlabel(xlabel)
        axes.grid(axis="x", color=INK, alpha=0.15, linewidth=0.6)
        axes.spines["left"].set_visible(False)
        values = "; ".join(f"{dot.label} {dot.x:.3g}" for dot in dots)
        marks = "; ".join(f"{label} {x:.3g}" for label, x in references)
        return as_svg(figure, name, f"{xlabel}: {values}" + (f". For scale: {marks}" if marks else ""))


def _row(axes: Any, row: int, dot: Dot, window: tuple[float, float]) -> None:
    color, shape = RUN.format(dot.style), SHAPES[dot.style % len(SHAPES)]
    low, high = window
    if not low <= dot.x <= high:
        edge, arrow = (high, "→") if dot.x > high else (low, "←")
        side = "right" if dot.x > high else "left"
        axes.text(edge, row, f"{dot.x:.3g} {arrow}", color=color, fontsize=9, ha=side, va="center")
        return
    if dot.low is not None and dot.high is not None:
        ends = (max(dot.low, low), min(dot.high, high))
        axes.hlines(row, *ends, color=color, linewidth=1.6)
    axes.plot([dot.x], [row], marker=shape, markersize=5, color=color, linestyle="")


def _reference(axes: Any, label: str, x: float, level: int, limits: tuple[float, float]) -> None:
    """A vertical line with its name above the axes; where it lies outside, an arrow that points to it."""
    left, right = limits
    inside = left <= x <= right
    if inside:
        axes.axvline(x, color=INK, linewidth=1, linestyle=(0, (4, 3)), alpha=0.7)
        text = f"{label} {x:.3g}"
    else:
        text = f"{label} {x:.3g} →" if x > right else f"← {label} {x:.3g}"
    at = min(max(x, left), right)
    middle = left + (right - left) / 2
    axes.annotate(
        text,
        (at, 1),
        (0, 3 + 12 * level),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha="left" if at < middle else "right",
        va="bottom",
        fontsize=9,
        annotation_clip=False,
    )


def _window(values: Sequence[float], ends: Sequence[float]) -> tuple[float, float]:
    """From where to where points are drawn in place: all, unless a few lie far outside the bulk of the others."""
    ordered = sorted(values)
    quarter, half, three = (ordered[min(len(ordered) - 1, len(ordered) * k // 4)] for k in (1, 2, 3))
    spread = max(three - quarter, 0.05 * abs(half), 1e-9)
    low, high = quarter - 4 * spread, three + 4 * spread
    seen = [value for value in ordered if low <= value <= high] or ordered
    near = [end for end in ends if low <= end <= high]
    return min([*seen, *near]), max([*seen, *near])


def _reach(window: tuple[float, float], references: Sequence[float]) -> tuple[float, float]:
    """The limits of the axis: the window, the references that are not too far from it, and a margin."""
    low, high = window
    span = max(high - low, 1e-3 * max(abs(low), abs(high)), 1e-9)
    near = [x for x in references if low - 1.5 * span <= x <= high + 1.5 * span]
    low, high = min([low, *near]), max([high, *near])
    margin = 0.04 * max(high - low, span)
    return low - margin, high + margin


def _short(label: str) -> str:
    return label if len(label) <= _LONGEST_NAME else f"{label[: _LONGEST_NAME - 1]}…"


def scatter(name: str, dots: Sequence[Dot], named: set[str], xlabel: str, ylabel: str) -> str:
    """Points at (x, y); those `named` carry their label, placed where it covers nothing if there is such a place."""
    xs, ys = [dot.x for dot in dots], [dot.y for dot in dots]
    (left, right), (bottom, top) = (_reach(_window(values, []), []) for values in (xs, ys))
    with styled(name):
        figure, (axes,) = new_figure(1, 1, 4.2)
        width, height = right - left, top - bottom
        axes.set_xlim(left - 0.04 * width, right + 0.04 * width)
        axes.set_ylim(bottom - 0.06 * height, top + 0.06 * height)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.grid(color=INK, alpha=0.15, linewidth=0.6)
        places = []
        for dot in dots:
            x, y = min(max(dot.x, left), right), min(max(dot.y, bottom), top)
            places.append((x, y))
            axes.plot([x], [y], marker=SHAPES[dot.style % len(SHAPES)], markersize=5.5, color=RUN.format(dot.style))
        figure.draw_without_rendering()
        _label(axes, dots, places, named)
        values = "; ".join(f"{dot.label} at {dot.x:.3g}, {dot.y:.3g}" for dot in dots)
        return as_svg(figure, name, f"{ylabel} against {xlabel}: {values}")


Box = tuple[float, float, float, float]


def _label(axes: Any, dots: Sequence[Dot], places: Sequence[tuple[float, float]], named: set[str]) -> None:
    """Greedy: every label takes the first free place around its point, further out with a thin line back to it."""
    scale = 72 / axes.figure.dpi
    centers = [tuple(axes.transData.transform(place) * scale) for place in places]
    frame = axes.get_window_extent()
    limits = (frame.x0 * scale, frame.y0 * scale, frame.x1 * scale, frame.y1 * scale)
    taken: list[Box] = [(x - 4, y - 4, x + 4, y + 4) for x, y in centers]
    for dot, (x, y), place in sorted(zip(dots, centers, places, strict=True), key=lambda item: item[1][1]):
        if dot.label not in named:
            continue
        text = _short(dot.label) if dot.y <= axes.get_ylim()[1] else f"{_short(dot.label)} ({dot.y:.3g} ↑)"
        box = _free_place(x, y, _POINTS_PER_LETTER * len(text), taken, limits)
        taken.append(box)
        far = math.hypot((box[0] + box[2]) / 2 - x, (box[1] + box[3]) / 2 - y) > (box[2] - box[0]) / 2 + 9
        axes.annotate(
            text,
            place,
            (box[0] - x, box[1] - y),
            textcoords="offset points",
            fontsize=8.5,
            va="bottom",
            ha="left",
            arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": INK, "alpha": 0.5} if far else None,
        )


def _free_place(x: float, y: float, width: float, taken: Sequence[Box], limits: Box) -> Box:
    best, least = None, math.inf
    for distance in (6, 14, 24, 36, 50):
        for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1)):
            left = x + dx * distance if dx > 0 else x - distance - width if dx < 0 else x - width / 2
            bottom = y + dy * distance - _LABEL_HEIGHT / 2
            box = (left, bottom, left + width, bottom + _LABEL_HEIGHT)
            cost = sum(_shared(box, other) for other in taken) + 50 * _outside(box, limits) + 0.01 * distance
            if cost < least:
                best, least = box, cost
        if least < 1:
            break
    assert best is not None, "there are places to choose from"
    return best


def _shared(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _outside(box: Box, limits: Box) -> float:
    over = (limits[0] - box[0], limits[1] - box[1], box[2] - limits[2], box[3] - limits[3])
    return sum(max(0.0, amount) for amount in over)
