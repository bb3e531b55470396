"""The sentences of a page: computed from the numbers, and honest where nothing is seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from varkd.backbones.llamagen import LlamaGen
from varkd.distill.spaces import Clusters
from varkd.evaluate.diagnostics import CodeSpace, Sequences, by_rank, measure, sampled
from varkd.report import figures, readings
from varkd.report.analysis import Analysis, Number
from varkd.report.figures import TEACHER, Bars, Line
from varkd.report.readings import judged, plain, told
from varkd.rollout import Sampler
from varkd.run import curves
from varkd.run.curves import Table
from varkd.types import Condition

BY_POSITION = (readings.entropy, readings.drift, readings.divergence, readings.accumulation, readings.choice,
               readings.acceptance, readings.distance, readings.ambiguity)  # fmt: skip
Models = Callable[..., LlamaGen]


@pytest.fixture(autouse=True)
def nothing_is_drawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "svg" not in request.node.name:
        for name in ("lines", "bars", "maps"):
            monkeypatch.setattr(figures, name, lambda *arguments, **options: "")


def as_read(table: Table) -> list[dict[str, str]]:
    return [dict(zip(table.columns, map(curves._text, row), strict=True)) for row in table.rows]


def analysis_of(student: LlamaGen, teacher: LlamaGen, num: int = 40) -> Analysis:
    """What `varkd analyze` would write of two models, without files."""
    codes_BL = torch.randint(student.vocab_size, (num, 6), generator=torch.Generator().manual_seed(0))
    data = Sequences(codes_BL, Condition(torch.arange(num) % 3), student.plan(num))
    contexts = {
        "data": data,
        "teacher": sampled(teacher, data, Sampler(), 1),
        "student": sampled(student, data, Sampler(), 1),
    }
    codebook_VE = torch.randn(student.vocab_size, 3, generator=torch.Generator().manual_seed(2))
    space = CodeSpace.of(codebook_VE, Clusters(count=4), torch.device("cpu"))
    values = {name: measure(student, teacher, each, space) for name, each in contexts.items()}
    ranked = {name: by_rank(found, data.plan) for name, found in values.items()}
    info: Mapping[str, Any] = {
        "num": num, "scales": None, "grid": [2, 3], "vocab_size": student.vocab_size, "sequence_length": 6,
        "code_space": {"clusters": 4, "neighbors": 3, "slack": 0.1, "radius": space.radius},
    }  # fmt: skip
    tables = {"positions": curves.positions(ranked, None, 0), "maps": curves.maps(values, (2, 3), None),
              "accumulated": curves.accumulated_error(ranked, 0)}  # fmt: skip
    return Analysis(Path("nowhere"), info, {name: as_read(table) for name, table in tables.items()})


def test_equal_models_show_nothing_and_the_page_says_so(make_model: Models):
    model = make_model(3)
    found = analysis_of(model, model)
    says = {section.id: section.says for section in (make(found) for make in BY_POSITION)}
    for name, words in {
        "D1": "no loss of certainty is seen", "D2": "as typical for the teacher as its own",
        "D3": "no exposure gap is seen", "D4": "no error that feeds on itself is seen", "D5": "not seen to differ",
        "D6": "not seen to differ", "D7": "not seen to differ",
    }.items():  # fmt: skip
        assert words in says[name], says[name]
    assert "100.0 %" in says["D5"]


def test_other_models_show_what_the_intervals_say(make_model: Models):
    """A student of random weights: whatever is claimed must be what the difference's interval says."""
    found = analysis_of(make_model(3), make_model(4, scale=0.8))
    for make, quantity, pair, claims in (
        (readings.entropy, "teacher_entropy", "student - teacher", ("less certain", "more certain")),
        (readings.drift, "typicality", "student - teacher", ("surprise the teacher more", "over-safe")),
        (readings.divergence, "forward_kl", "student - data", ("prefixes: an exposure gap", "no exposure gap")),
    ):
        gap, says = found.mean(pair, quantity), make(found).says
        assert gap.low <= gap.value <= gap.high
        assert (claims[0] in says, claims[1] in says.replace("no exposure gap is seen", "")) == (
            gap.sign == 1, gap.sign == -1)  # fmt: skip
        assert plain(gap.value) in says
    assert readings.drift(found).says.startswith("z is ") and found.mean("student", "typicality").sign == 1


def test_numbers_in_words():
    assert [plain(value) for value in (0.12345, 12.345, 1234.5, -0.00012345, 0)] == [
        "0.123", "12.3", "1234", "-0.000123", "0"]  # fmt: skip
    assert told(Number(0.5, 0.25, 0.75), " %") == "0.5 % [0.25, 0.75]"
    words = ("more", "less", "nothing")
    for low, high, expected in ((0.1, 0.3, "more"), (-0.3, -0.1, "less"), (-0.1, 0.1, "nothing"), (0, 0, "nothing"),
                                (0, 0.1, "nothing")):  # fmt: skip
        assert judged(Number((low + high) / 2, low, high), *words) == expected


def test_every_drawing_is_svg_that_says_what_it_is():
    drawings = [
        figures.lines("a", [Line("one", 0, [1, 2], [3, 4], [2, 3], [4, 5])], "x", "y", legend=True, reference=0.0),
        figures.bars("b", ["g", "h"], [Bars("one", 0, [1, None], [0.5, None], [2, None]),
                                       Bars("two", TEACHER, [1, 2], [0, 1], [2, 3])], "height"),
    ]  # fmt: skip
    words = [
        "y over x: one from 3 to 4",
        "one: g 1; two: g 1, h 2",
    ]
    for name, drawing, said in zip("ab", drawings, words, strict=True):
        root = ElementTree.fromstring(drawing.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))
        assert said in root.attrib["aria-label"]
        ids = [each.attrib["id"] for each in root.iter() if "id" in each.attrib]
        assert all(each.startswith(f"{name}-") for each in ids)
        assert "var(--run-" in drawing and "#fe01" not in drawing and "#010203" not in drawing
