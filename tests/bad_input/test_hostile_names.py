"""A class that is called like a script: it goes through every verb, and no page runs it."""

from __future__ import annotations

from pathlib import Path

import pytest
from mistakes import encode, picture

from tiny_runs import quicken, train
from varkd.cli import main

HOSTILE = ("<script>alert(1)", "{{ 7*7 }}", "\"onload='x'")


def test_no_page_runs_a_class_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    quicken(monkeypatch)
    for name in HOSTILE:
        for index in range(12):
            picture(tmp_path / "<script>" / name / f"{index}.png", seed=index)
    command = [*encode(tmp_path / "<script>", tmp_path / "codes"), "--validation", "0.3"]
    assert main([str(part) for part in command]) == 0
    short = ("train.updates=2", "train.checkpoint_every=1")
    teacher = train(tmp_path / "teacher", tmp_path / "codes", *short, "name=<script>alert(2)</script>")
    run = train(tmp_path / "run", tmp_path / "codes", *short, "method=kd", f"teacher={teacher}", "name=<script>x")
    assert main(["evaluate", str(run), "--num", "9", "--device", "cpu"]) == 0
    assert main(["report", str(run), str(teacher), "--title", "<script>t", "--out", str(tmp_path / "report")]) == 0
    assert main(["analyze", str(run), "--num", "8", "--device", "cpu", "--out", str(tmp_path / "analysis")]) == 0
    for page in ("report", "analysis"):
        html = (tmp_path / page / "index.html").read_text()
        assert html.count("<script") == 1, "the page's own"
        assert "script-src 'sha256-" in html and "\"onload='x'" not in html
