"""The table of presets: complete, told apart, and values only."""

from __future__ import annotations

import ast
import inspect
import json
from dataclasses import replace

import pytest

from varkd import methods
from varkd.cli import main
from varkd.distill.method import Method
from varkd.distill.mixture import Mixture, Share
from varkd.distill.replay import Replay
from varkd.methods import METHODS, Preset

KEYS = {"name", "source", "equation", "summary", "contexts", "target", "terms", "schedule"}


def table(capsys: pytest.CaptureFixture[str]) -> list[dict]:
    capsys.readouterr()
    assert main(["methods", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_table_lists_every_preset_with_every_axis(capsys: pytest.CaptureFixture[str]):
    rows = table(capsys)
    assert [row["name"] for row in rows] == list(METHODS)
    for row in rows:
        assert set(row) >= KEYS
        assert all(row[key] for key in KEYS - {"schedule"}), row["name"]
        assert isinstance(row["schedule"], dict)
        for term in row["terms"]:
            assert {"name", "on", "divergence", "space", "selection", "weight"} <= set(term)


def test_no_two_rows_are_alike(capsys: pytest.CaptureFixture[str]):
    """Neither what they are made of, nor what they say of themselves."""
    rows = table(capsys)
    axes = ("contexts", "target", "images", "terms", "schedule")
    made_of = [json.dumps({key: row[key] for key in axes}) for row in rows]
    assert len(set(made_of)) == len(rows)
    for key in ("equation", "summary"):
        assert len({row[key] for row in rows}) == len(rows), key


def test_each_preset_is_described_alone(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """The description follows the value: change a part and its row changes."""
    before = {row["name"]: row for row in table(capsys)}["best_of_n"]
    method = METHODS["best_of_n"].method
    assert isinstance(method.contexts, Mixture)
    shares = method.contexts.shares[0], Share(Replay(max_age=125), 0.5)
    changed = replace(method, contexts=Mixture(shares))
    monkeypatch.setitem(METHODS, "best_of_n", replace(METHODS["best_of_n"], method=changed))
    after = {row["name"]: row for row in table(capsys)}["best_of_n"]
    assert "125" in after["contexts"] and before["contexts"] != after["contexts"]
    assert {key: before[key] for key in KEYS - {"contexts"}} == {key: after[key] for key in KEYS - {"contexts"}}


def test_the_text_table_names_them_all(capsys: pytest.CaptureFixture[str]):
    assert main(["methods"]) == 0
    said = capsys.readouterr().out
    for name, preset in METHODS.items():
        assert name in said.splitlines() and preset.source in said and preset.equation in said


def test_the_file_holds_values_only():
    tree = ast.parse(inspect.getsource(methods))
    kinds = (ast.FunctionDef, ast.If, ast.Lambda, ast.IfExp, ast.For, ast.While)
    assert [node.lineno for node in ast.walk(tree) if isinstance(node, kinds)] == []


@pytest.mark.parametrize("name", METHODS)
def test_presets_know_whether_they_need_a_teacher(name: str):
    preset = METHODS[name]
    assert isinstance(preset, Preset) and isinstance(preset.method, Method)
    alone = ("ce", "scheduled_sampling", "scheduled_sampling_parallel")
    assert preset.method.needs_teacher == (name not in alone)


@pytest.mark.parametrize("name", [name for name in METHODS if name.startswith("varkd")])
def test_varkd_names_its_paper(name: str):
    assert "arXiv 2606.06078" in METHODS[name].source


@pytest.mark.parametrize("name", [name for name in METHODS if name.startswith("best_of")])
def test_our_own_method_is_not_called_the_paper_s(name: str):
    assert "ours" in METHODS[name].source and "varkd" not in METHODS[name].summary.lower()
