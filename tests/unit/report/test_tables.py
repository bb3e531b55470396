"""Rows, marks and the terminal's table."""

from __future__ import annotations

import pytest
from run_folders import interval, metrics

from varkd.report.tables import COLUMNS, Column, comparison_table, format_text_table, make_cell, roles

REAL = Column("x", "X", "x", "")
PERCENT = Column("x", "X", "x", "", scale=100)


@pytest.mark.parametrize(
    ("column", "numbers", "text", "printed_interval"),
    [
        (REAL, (12.345, None, None), "12.3", ""),
        (REAL, (1234.5, None, None), "1,234", ""),
        (REAL, (0.0, None, None), "0.00", ""),
        (REAL, (9.996, None, None), "10.0", ""),
        (REAL, (12.345, 11.9, 12.8), "12.3", "[11.9, 12.8]"),
        (REAL, (12.345, 12.33, 12.36), "12.345", "[12.330, 12.360]"),
        (PERCENT, (0.9134, 0.90, 0.925), "91.3", "[90.0, 92.5]"),
        (PERCENT, (1, None, None), "100", ""),
        (REAL, (None, None, None), "–", ""),
        (REAL, (float("nan"), None, None), "–", ""),
        (Column("x", "X", "x", "", kind="compact"), (1_654_321, None, None), "1.65 M", ""),
        (Column("x", "X", "x", "", kind="whole"), (12_000, None, None), "12,000", ""),
    ],
)
def test_numbers_are_printed_as_finely_as_they_are_known(column, numbers, text, printed_interval):
    cell = make_cell(column, *numbers)
    assert (cell.text, cell.interval) == (text, printed_interval)


def four() -> list[dict]:
    return [
        metrics("teacher", "ce", fd=2.5, teacher=None),
        metrics("hard", "ce", fd=9.0, teacher="runs/teacher"),
        metrics("fkl", "forward_kl", fd=5.0, teacher="runs/teacher"),
        metrics("varkd", "varkd", fd=5.5, teacher="runs/teacher"),
    ]


def test_best_student_is_marked_and_the_teacher_is_not():
    rows = comparison_table(four())
    assert [row.cells["fd"].mark for row in rows] == ["", "", "best", "tied"]
    assert [row.role for row in rows] == ["teacher", "student", "student", "student"]


def test_higher_is_better_where_the_column_says_so():
    runs = four()
    runs[1]["metrics"]["recall"] = interval(0.95, 0.01)
    rows = comparison_table(runs)
    assert [row.cells["recall"].mark for row in rows] == ["", "best", "", ""]


def test_a_run_without_a_teacher_does_not_compete_with_the_students():
    start = metrics("start", "ce", fd=1.0, teacher=None)
    rows = comparison_table([*four(), start])
    assert [row.cells["fd"].mark for row in rows] == ["", "", "best", "tied", ""]
    assert rows[-1].role == "model"
    alone = comparison_table([start, metrics("other", "ce", fd=3.0, teacher=None)])
    assert [row.cells["fd"].mark for row in alone] == ["best", ""]


def test_equal_numbers_have_no_best():
    assert {row.cells["accuracy"].mark for row in comparison_table(four())} == {""}


def test_losing_rows_and_missing_numbers_stay():
    runs = four()
    runs[1]["metrics"]["fd"] = {"value": None, "low": None, "high": None}
    runs[2]["metrics"].pop("fd")
    rows = comparison_table(runs)
    assert len(rows) == 4
    assert [row.cells["fd"].text for row in rows] == ["2.5", "–", "–", "5.5"]
    assert [row.cells["fd"].mark for row in rows] == [""] * 4


def test_teacher_is_found_by_its_name_in_a_path_or_by_being_the_only_one_without():
    named = [{"name": "t", "protocol": {"teacher": None}}, {"name": "b", "protocol": {"teacher": None}}]
    student = {"name": "s", "protocol": {"teacher": "runs/t/checkpoints/step-00000600"}}
    assert roles([*named, student]) == ["teacher", "model", "student"]
    assert roles([named[1], student]) == ["teacher", "student"]
    assert roles([named[0]]) == ["model"]


def test_text_table_is_aligned_and_fits():
    runs = four()
    runs[1]["name"] = "a-run-with-a-name-that-is-much-longer-than-any-terminal-would-want-it-to-be"
    lines = format_text_table(comparison_table(runs)).splitlines()
    table = lines[:6]
    assert max(map(len, lines)) <= 110
    assert len({len(line) for line in [table[0], table[1]]}) == 1
    ends = table[0].index("img/s") + len("img/s↑")
    assert all(
        line[:ends].rstrip().endswith(number) for line, number in zip(table[2:], ["203", *["812"] * 3], strict=True)
    )
    assert "5.0 [4.6, 5.4]*" in table[4] and "5.5 [5.1, 5.9]~" in table[5]
    assert "…" in table[3]
    assert any("N = 1,000" in line for line in lines[6:])


def test_text_table_shows_different_N():
    runs = four()
    runs[1]["num_samples"] = 500
    text = format_text_table(comparison_table(runs))
    assert "different N" in text and " 500 " in text and " 1,000 " in text


def test_every_column_says_what_it_means():
    assert all(column.meaning and column.short for column in COLUMNS)
