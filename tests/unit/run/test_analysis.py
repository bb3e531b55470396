"""`varkd analyze` from end to end on tiny runs: files, the page, and families that are not raster."""

from __future__ import annotations

import csv
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from browsing import browser, fits, smallest_text, use, window
from tiny_runs import FROM_THE_START, scale_codes, train
from varkd.cli import main
from varkd.evaluate.agreement import agreement
from varkd.evaluate.diagnostics import by_rank, measure
from varkd.files import read_json
from varkd.report.analysis import read_analysis
from varkd.report.diagnostics import SECTIONS
from varkd.run import analysis as run_analysis
from varkd.run.analysis import analyze_run
from varkd.run.panels import kept_positions
from varkd.run.subject import open_subject, sequences_of
from varkd.train.encode import PSNR_CAP
from varkd.types import Batch, Plan

__all__ = ["browser", "scale_codes", "window"]

CPU = torch.device("cpu")
NUM = 24


class Page(HTMLParser):
    """The text of a page, its ids, and whether every element was closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag not in ("meta", "link", "br", "image", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value for name, value in attrs if name == "id" and value]

    def handle_endtag(self, tag: str) -> None:
        if tag != "image":
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style",):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory, codes: Path, teacher: Path) -> Path:
    return train(tmp_path_factory.mktemp("student") / "varkd", codes, f"teacher={teacher}", *FROM_THE_START)


@pytest.fixture(scope="module")
def analysis(tmp_path_factory: pytest.TempPathFactory, student: Path, teacher: Path) -> Path:
    from functools import partial

    from varkd.evaluate.features import FitFeatures
    from varkd.run import evaluation

    out = tmp_path_factory.mktemp("analysis") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "FitFeatures", partial(FitFeatures, updates=25))
        page = analyze_run(student, out, second=student, num=NUM, device="cpu", quiet=True)
    assert page == out / "index.html"
    return out


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_every_file_is_there(analysis: Path):
    tables = {"positions", "maps", "accumulated", "calibration", "prefix_swap", "risks", "cost", "selection",
              "selection_training"}  # fmt: skip
    assert {path.name for path in analysis.iterdir()} == {"analysis.json", "index.html",
                                                         "codebook.png", "continuations.png",
                                                         *(f"{name}.csv" for name in tables)}  # fmt: skip
    for name in tables:
        assert rows(analysis / f"{name}.csv"), name


def test_the_page_holds_every_diagnostic_and_says_n(analysis: Path):
    page = Page((analysis / "index.html").read_text())
    assert page.open == [] and len(set(page.ids)) == len(page.ids)
    assert [name for name in page.ids if name[0] == "D" and name[1:].isdigit()] == [
        f"D{number}" for number in (*range(1, 9), *range(10, 14), 15, 18, 19, 20)
    ]
    assert len(SECTIONS) == 16 and page.text.count(f"N = {NUM}") >= 30 and f"N = {NUM} sequences" in page.text
    assert "nan" not in page.text.split() and "Give --" not in page.text
    assert "update 6" in page.text, "the selection of the last checkpoint"


def test_numbers_are_those_of_the_models(analysis: Path, student: Path):
    """The CSV against a fresh pass, and against what `varkd evaluate` measures with."""
    subject = open_subject(student, None, None, None, 0, "cpu", True)
    contexts = sequences_of(subject, "validation", NUM)
    found = {(row["context"], row["quantity"]): row for row in rows(analysis / "positions.csv") if row["axis"] == "all"}
    for name, each in contexts.items():
        means, _ = agreement(
            subject.student, subject.teacher,
            [Batch(each.codes_BL, each.condition.label_B, torch.arange(NUM))], subject.space.cluster_V, CPU,
        )  # fmt: skip
        for quantity, mean in means.items():
            row = found[name, quantity]
            assert float(row["value"]) == pytest.approx(mean, rel=1e-4, abs=1e-5), (name, quantity)
            assert float(row["low"]) <= float(row["value"]) <= float(row["high"]) and int(row["num"]) == NUM
    gap = found["student", "forward_kl"], found["data", "forward_kl"], found["student - data", "forward_kl"]
    first, second, difference = (float(row["value"]) for row in gap)
    assert difference == pytest.approx(first - second, abs=1e-5)
    values = by_rank(measure(subject.student, subject.teacher, contexts["student"], subject.space, ["n90"]),
                     contexts["student"].plan)  # fmt: skip
    curve = read_analysis(analysis).curve("student", "n90", "", 0)
    assert curve.y == pytest.approx(values["n90"].double().mean(0).tolist(), rel=1e-4)


def test_contexts_share_their_classes(student: Path):
    contexts = sequences_of(open_subject(student, None, None, None, 0, "cpu", True), "validation", NUM)
    labels = [each.condition.label_B.tolist() for each in contexts.values()]
    assert labels[0] == labels[1] == labels[2] and len(set(labels[0])) > 5
    assert not torch.equal(contexts["teacher"].codes_BL, contexts["student"].codes_BL)


def test_both_swap_curves_begin_at_the_teacher(analysis: Path):
    found = rows(analysis / "prefix_swap.csv")
    at = {(row["source"], row["share"], row["metric"]): row["value"] for row in found}
    assert at["data", "0", "fd"] == at["student", "0", "fd"] and len(found) == 2 * 5 * 4
    assert at["data", "1", "fd"] != at["student", "1", "fd"]


def test_the_selection_is_the_methods_own(analysis: Path):
    info = read_json(analysis / "analysis.json")
    assert info["selection"]["terms"] == {"student": "Confidence"} and info["selection"]["checkpoint"] == 6
    assert info["selection"]["thresholds"] == ["threshold/student"]
    kept = {row["share_of"]: float(row["value"]) for row in rows(analysis / "selection.csv")}
    assert 0 < kept["positions"] < 1 and 0 < kept["kl"] <= 1
    logged = {row["key"] for row in rows(analysis / "selection_training.csv")}
    assert "kept/student" in logged


def test_a_model_folder_with_its_codes(student: Path, teacher: Path, codes: Path, tmp_path: Path):
    """Into a folder where more was asked for before: no old table stays behind."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "selection.csv").write_text("context\n")
    (out / "analysis.json").write_text('{"teacher_hash": "", "split": "train"}')
    assert main(["export", str(student), "--out", str(tmp_path / "model")]) == 0
    options = ["--teacher", str(teacher), "--data", str(codes), "--num", "8", "--device", "cpu", "--split", "train"]
    assert main(["analyze", str(tmp_path / "model"), "--out", str(out), *options]) == 0
    page = Page((out / "index.html").read_text()).text
    assert "a model folder has no method" in page and "training data" in page
    assert "Give --second" in page and "N = 8" in page
    assert not (out / "selection.csv").exists()


@pytest.mark.parametrize("family", ["var", "randar"])
def test_other_orders(family: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if family == "randar":  # its page looks like any other
        monkeypatch.setattr(run_analysis, "write_page", lambda out: out)
    data = request.getfixturevalue("scale_codes" if family == "var" else "codes")
    sizes = ("model.family=" + family, "train.updates=2", "model.dim=16", "model.num_heads=1")
    steps = ("evaluation.sampler.steps=7",) if family == "randar" else ()
    taught = train(tmp_path / "teacher", data, *sizes, "seed=3")
    run = train(tmp_path / "run", data, *sizes, *steps, "method=kd", f"teacher={taught}")
    assert main(["analyze", str(run), "--out", str(tmp_path / "out"), "--num", "8", "--device", "cpu"]) == 0
    info, found = read_json(tmp_path / "out" / "analysis.json"), rows(tmp_path / "out" / "positions.csv")
    axes = {row["axis"] for row in found}
    if family == "var":
        assert axes == {"rank", "scale", "all"} and info["scales"] == [1, 2, 4]
        assert max(int(row["row"]) for row in rows(tmp_path / "out" / "maps.csv")) == 3
        assert read_analysis(tmp_path / "out").curve("data", "n90", "", 0).x == [1.0, 2.0, 4.0]
    else:
        assert axes == {"rank", "all"} and not info["raster"] and info["steps"] == 7


def test_a_damaged_table_is_one_line(analysis: Path, tmp_path: Path):
    from shutil import copytree

    from varkd.errors import VarkdError
    from varkd.report.diagnostics import write_page

    copy = Path(copytree(analysis, tmp_path / "copy"))
    with (copy / "risks.csv").open("a") as file:
        file.write("likelihood,1\n")
    with pytest.raises(VarkdError, match=r"risks\.csv is damaged"):
        write_page(copy)
    with pytest.raises(VarkdError, match=r"analysis\.json"):
        write_page(tmp_path)


def test_names_are_escaped(analysis: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from shutil import copytree

    from varkd.files import write_json
    from varkd.report import diagnostics as page

    copy = Path(copytree(analysis, tmp_path / "copy"))
    info = read_json(copy / "analysis.json")
    write_json(copy / "analysis.json", {**info, "name": "<b>bold</b>"})
    monkeypatch.setattr(page, "SECTIONS", SECTIONS[-1:])
    text = page.write_page(copy).read_text()
    assert "<b>bold" not in text and "&lt;b&gt;bold" in text
    assert (analysis / "index.html").stat().st_size < 2_000_000


def test_the_page_in_a_browser(window, analysis: Path):
    window.goto((analysis / "index.html").as_uri())
    for link in window.locator("nav a").all():
        link.click()
        assert window.locator(link.get_attribute("href")).bounding_box()["y"] < 844, "it is in sight"
    use(window, "thead button")
    assert fits(window), "with everything opened"
    assert smallest_text(window) >= 14
    for drawing in window.locator("svg:visible").all():
        box = drawing.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= window.viewport_size["width"]


def test_the_panels_show_groups_and_continuations(analysis: Path):
    """VarKD's figures 4 and 5: a row per decode, and one per model and share of kept codes."""
    found = json.loads((analysis / "analysis.json").read_text())
    about = found["codebook"]
    assert about["groups"] == -(-about["codes"] // 4) and about["psnr"] < PSNR_CAP
    rows = found["continuations"]["rows"]
    assert [(row["model"], row["kept"]) for row in rows] == [
        (model, kept) for model in ("student", "teacher") for kept in (0.75, 0.5, 0.25, 0.0)
    ]
    assert all(0 <= row["confidence"] <= 1 and row["teacher_nll"] > 0 for row in rows)
    for name, strips in (("codebook.png", 4), ("continuations.png", 9)):
        with Image.open(analysis / name) as picture:
            assert picture.height == strips * 48 + (strips - 1) * 2 and picture.width > 8 * 48
    page = (analysis / "index.html").read_text()
    assert page.count("<img ") == 2 and "data:image/png;base64," in page


@pytest.mark.parametrize(("sizes", "share", "kept"), [((1,) * 8, 0.25, 2), ((1,) * 8, 0.0, 0), ((1, 4, 9), 0.5, 5),
                                                      ((1, 4, 9), 0.05, 0), ((2, 2, 4), 0.75, 4)])  # fmt: skip
def test_kept_positions_are_whole_leading_steps(sizes: tuple[int, ...], share: float, kept: int):
    order = torch.stack([torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(s)) for s in range(3)])
    where = kept_positions(Plan(order, sizes), share)
    assert where.gather(1, order).int().sum(1).tolist() == [kept] * 3
    assert where.gather(1, order)[:, :kept].all()
