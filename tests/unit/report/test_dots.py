"""Figures of points: what is drawn in place, what at the edge, and labels that cover nothing."""

from __future__ import annotations

import re

import numpy as np
import pytest

from varkd.report.dots import Dot, _free_place, _shared, _window, forest, scatter


def words(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def test_forest_holds_every_row_and_both_references():
    dots = [Dot("a", 0, 3.0, 2.5, 3.5), Dot("b", 1, 4.0), Dot("<c>", 2, 5.0, 4.9, 5.1)]
    svg = forest("one", dots, [("teacher", 2.0), ("start", 6.0)], "FD")
    assert {"a", "b", "&lt;c&gt;", "teacher 2", "start 6", "FD"} <= set(words(svg))
    assert svg.index(">a<") < svg.index(">b<"), "the first row comes first"
    assert "a 3; b 4" in svg, "the numbers are there for who cannot see the drawing"


def test_a_point_far_outside_does_not_press_the_others_together():
    dots = [Dot(f"m{index}", 0, 5 + index / 10, 4.9 + index / 10, 5.1 + index / 10) for index in range(8)]
    svg = forest("two", [*dots, Dot("diverged", 1, 312.0, 280.0, 340.0)], [("start", 88.0)], "FD")
    assert "312 →" in words(svg) and "start 88 →" in words(svg)
    ticks = [float(word) for word in words(svg) if re.fullmatch(r"\d+\.\d+", word)]
    assert ticks and max(ticks) < 7


@pytest.mark.parametrize(
    ("values", "window"),
    [
        ([3.0], (3.0, 3.0)),
        ([3.0, 4.0, 5.0], (3.0, 5.0)),
        ([5.0, 5.1, 5.2, 5.3, 300.0], (5.0, 5.3)),
        ([0.0, 0.0], (0.0, 0.0)),
    ],
)
def test_window(values, window):
    assert _window(values, []) == window


def test_every_point_that_is_named_has_its_label():
    rng = np.random.default_rng(0)
    dots = [Dot(f"method_{index}", index % 7, *rng.random(1), y=float(rng.random())) for index in range(20)]
    found = words(scatter("three", dots, {dot.label for dot in dots[:15]}, "s", "FD"))
    assert {f"method_{index}" for index in range(15)} <= set(found)
    assert "method_15" not in found


def test_labels_do_not_cover_each_other():
    rng = np.random.default_rng(1)
    points = rng.random((15, 2)) * (300, 250) + 20
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in points]
    for x, y in points:
        box = _free_place(x, y, 60, taken, (0, 0, 340, 290))
        assert sum(_shared(box, other) for other in taken) < 1
        taken.append(box)


def test_equal_points_can_be_drawn():
    svg = scatter("four", [Dot("a", 0, 1.0, y=2.0), Dot("b", 1, 1.0, y=2.0)], {"a", "b"}, "s", "FD")
    assert {"a", "b"} <= set(words(svg))
