"""The page and the terminal table of a study: what they say, and what they refuse."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from study_folder import results, write_folder

from varkd.errors import VarkdError
from varkd.pictures import save_png
from varkd.report.study import format_study, write_study
from varkd.report.study.plots import curves
from varkd.report.study.results import parse_study, read_study

SPREADS = {
    "fd": 1,
    "difference": 1,
    "gap_closed": 100,
    "precision": 100,
    "recall": 100,
    "accuracy": 100,
    "student_kl": 1,
}
COLUMNS = [
    "fd", "difference", "wins", "losses", "gap_closed", "precision", "recall", "accuracy", "student_kl", "num_seeds",
    "updates", "seconds", "temperature", "guidance", "setting",
]  # fmt: skip


def text_of(html: str) -> str:
    body = re.sub(r"<(style|script)>.*?</\1>|<svg.*?</svg>", " ", html, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body.replace("<wbr>", "")))


def page_of(folder: Path, study: dict[str, Any]) -> str:
    return write_study(write_folder(folder, study)).read_text(encoding="utf-8")


def table_of(html: str, id: str) -> dict[str, list[tuple[str, str]]]:
    """The body of a table: (data-value, text) of the cells right of the first, by the row's name."""
    body = html[html.index(f'<table id="{id}"') :].split("<tbody>")[1].split("</tbody>")[0]
    rows = {}
    for row in re.findall(r"<tr.*?</tr>", body, re.DOTALL):
        name, *cells = re.findall(r'<t[hd][^>]*data-value="([^"]*)"[^>]*>(.*?)</t[hd]>', row, re.DOTALL)
        rows[name[0]] = [(value, text_of(content).strip()) for value, content in cells]
    return rows


def warnings_of(html: str) -> str:
    return text_of(html[html.index('class="warning"') :].split("</div>")[0]) if 'class="warning"' in html else ""


def printed(text: str) -> list[float]:
    """The number of a cell and the ends of its interval, as printed."""
    return [float(number.replace(",", "")) for number in re.findall(r"[+-]?\d[\d,]*\.?\d*", text)]


@pytest.fixture(scope="module")
def study() -> dict[str, Any]:
    made = results(6, ("llamagen", "var"))
    made["summary"][1]["student_kl"] = {"value": None, "low": None, "high": None}
    made["summary"][2]["seconds"] = None
    made["summary"][3]["fd"] |= {"low": None, "high": None}
    return made


@pytest.fixture(scope="module")
def page(study, tmp_path_factory) -> str:
    return page_of(tmp_path_factory.mktemp("study"), study)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("budget", ["updates", "time"])
def test_numbers_on_the_page_are_those_of_the_file(study, page, number, budget):
    family = study["families"][number]["family"]
    table = table_of(page, f"family-{number}-{budget}")
    entries = [entry for entry in study["summary"] if (entry["family"], entry["budget"]) == (family, budget)]
    assert set(table) == {"teacher", "start", *(entry["method"] for entry in entries)}
    for entry in entries:
        cells = dict(zip(COLUMNS, table[entry["method"]][1:], strict=True))
        for key, scale in SPREADS.items():
            spread = entry[key] or {"value": None}
            value, text = cells[key]
            assert value == ("" if spread["value"] is None else str(spread["value"]))
            if spread["value"] is None:
                assert text == "–"
                continue
            near = [number for number in (spread["value"], spread["low"], spread["high"]) if number is not None]
            assert printed(text) == pytest.approx([scale * number for number in near], rel=0.06, abs=0.06)
        for key in ("num_seeds", "updates", "seconds", *(("wins", "losses") if entry["difference"] else ())):
            assert cells[key][0] == ("" if entry[key] is None else str(entry[key]))


def test_intervals_contain_their_values_as_printed(page):
    intervals = [printed(text) for id in ("family-0-updates", "family-1-time") for row in table_of(page, id).values()
                 for _, text in row if "[" in text]  # fmt: skip
    assert len(intervals) > 60
    assert all(low <= value <= high for value, low, high in intervals)


def test_table_is_sorted_by_mean_fd_below_teacher_and_start(page):
    for id in ("family-0-updates", "family-1-time"):
        table = table_of(page, id)
        assert list(table)[:2] == ["teacher", "start"]
        values = [float(cells[1][0]) for cells in list(table.values())[2:]]
        assert values == sorted(values)
        best = [name for name, cells in table.items() if cells[1][1].startswith("★")]
        assert best == [list(table)[2]], "the lowest of the methods, not the teacher"


def test_teacher_and_start_stand_in_the_table(study, page):
    table = table_of(page, "family-0-updates")
    assert table["teacher"][1] == ("2.5", "2.50 [2.30, 2.70]")
    assert table["start"][1] == ("12.25", "12.25 [12.05, 12.45]")


def test_chosen_sampler_and_setting_are_visible(page):
    cells = dict(zip(COLUMNS, table_of(page, "family-0-updates")["kd"][1:], strict=True))
    assert (cells["temperature"][1], cells["guidance"][1]) == ("0.900", "1.50")
    assert cells["setting"][1] == "train.optim.lr=3e-3, method.terms.kd.weight=0.5"
    sweeps = text_of(page[page.index('id="family-0-sweeps"') :].split("</details>")[0])
    assert sweeps.count("✓ train.optim.lr=3e-3: 7.50") == sweeps.count("✓ train") == 6
    assert "train.optim.lr=1e-2: 8.50" in sweeps, "also what was not chosen"
    samplers = text_of(page[page.index('id="family-0-samplers"') :].split("</details>")[0])
    assert "✓ temperature 0.9, guidance 1.5: 7.75" in samplers and "guidance 2: 8.25" in samplers


def test_every_seed_has_its_number(study, page):
    table = table_of(page, "family-1-updates-seeds")
    for row in study["rows"]:
        if (row["family"], row["budget"]) == ("var", "updates"):
            assert table[row["method"]][1 + row["seed"]][0] == str(row["fd"])


def test_controls_are_won_and_lost(study, page):
    (entry,) = [entry for entry in study["controls"] if (entry["family"], entry["budget"]) == ("llamagen", "updates")]
    (cells,) = table_of(page, "family-0-updates-controls").values()
    assert cells[0][1] == "best_of_n_random_select"
    assert [cell[0] for cell in cells[1:4]] == [str(entry[key]) for key in ("value", "wins", "losses")]


def sharpen(study: dict[str, Any], budget: str, method: str, fd: float, low: float, high: float) -> None:
    """Put one method at `fd`, with a paired difference between `low` and `high`."""
    for entry in study["summary"]:
        if (entry["budget"], entry["method"]) == (budget, method):
            entry["fd"] = {"value": fd, "low": fd - 0.1, "high": fd + 0.1}
            entry["difference"] = entry["difference"] and {
                "to": "kd",
                "value": (low + high) / 2,
                "low": low,
                "high": high,
            }


@pytest.mark.parametrize(
    ("method", "ends", "said"),
    [
        ("varkd", (-0.5, -0.1), "At equal updates varkd has the lowest mean FD, 1.00 [0.90, 1.10], -0.30 "
         "[-0.50, -0.10] against the best baseline, kd, paired by seed: the interval excludes 0, so it is better."),
        ("gkd", (-0.5, 0.1), "gkd has the lowest mean FD, 1.00 [0.90, 1.10], -0.2 [-0.5, 0.1] against the best "
         "baseline, kd, paired by seed: the interval holds 0, so these seeds do not separate the two."),
    ],
)  # fmt: skip
def test_statement_names_the_lowest_and_what_the_pairs_allow(method, ends, said):
    study = results(6)
    for entry in study["summary"]:
        entry["difference"] = entry["difference"] or {"to": "kd", "value": 0.1, "low": 0.0, "high": 0.2}
    sharpen(study, "updates", method, 1.0, *ends)
    assert said in re.sub(r"\s+", " ", format_study(study))


def test_page_opens_with_words(page):
    text = text_of(page)
    assert (
        "compares 6 methods of training a small model" in text and "2 families of backbones: llamagen and var" in text
    )
    assert "6 methods were compared over 3 training seeds (0, 1 and 2) with N = 2,000 samples a run" in text
    assert "The teacher is 6.5 below hard labels, ten times the interval: methods can be told apart." in text
    assert text.count("has the lowest mean FD") == 4 and text.count("Methods that lost stay in every table") == 2


def test_a_baseline_that_wins_is_said_to():
    study = results(6)
    best = next(entry["method"] for entry in study["summary"] if entry["difference"] is None)
    sharpen(study, "updates", best, 1.0, 0, 0)
    assert f"At equal updates {best} has the lowest mean FD, 1.00 [0.90, 1.10]: it is the best baseline itself." in (
        re.sub(r"\s+", " ", format_study(study))
    )


def test_equal_time_says_that_schedules_are_unfinished(page):
    panel = page[page.index('id="family-0-budgets-panel-2"') : page.index('id="family-0-time"')]
    assert "within 173 seconds" in text_of(panel) and "schedules are unfinished there" in text_of(panel)


def test_a_clean_study_warns_of_nothing(page):
    assert warnings_of(page) == ""


def test_warnings_are_shown_on_page_and_terminal(tmp_path):
    study = results(3)
    study["finished"] = study["families"][0]["distinguishable"] = False
    study["summary"][2]["warnings"].append("seed 2 diverged")
    study["failures"] = {"llamagen/kd/seed-1": "no memory", "var/kd/seed-1": "elsewhere"}
    next(entry for entry in study["summary"] if entry["budget"] == "time")["updates"] = 0.0
    html, terminal = page_of(tmp_path, study), format_study(study)
    shown = warnings_of(html)
    assert "2 tasks of the study failed" in text_of(html) and "ce has no checkpoint within the equal time" in shown
    for said in (
        "not finished",
        "too small to tell methods apart",
        "varkd, at equal updates: seed 2 diverged",
        "llamagen/kd/seed-1 failed: no memory",
    ):
        assert said in shown and said in terminal
    assert "elsewhere" not in shown


def test_the_best_baseline_has_nobody_to_win_against(page):
    texts = [[text for _, text in cells] for cells in table_of(page, "family-0-updates").values()]
    assert [cells[2:5] for cells in texts].count(["–"] * 3) == 3, "teacher, start and the best baseline"


def test_one_seed_has_no_interval_of_no_width(tmp_path):
    study = results(3)
    for entry in study["summary"]:
        for key in ("recall", "fd"):
            entry[key] = dict.fromkeys(("value", "low", "high"), entry[key]["value"])
    cells = dict(zip(COLUMNS, table_of(page_of(tmp_path, study), "family-0-updates")["varkd"][1:], strict=True))
    assert "[" not in cells["recall"][1] and "[" not in cells["fd"][1] and "[" in cells["accuracy"][1]


def test_a_teacher_may_lie_outside_the_study(tmp_path):
    study = results(2)
    study["families"][0]["teacher"]["run"] = "../elsewhere/teacher"
    (write_folder(tmp_path, results(2)) / "results.json").write_text(json.dumps(study))
    assert write_study(tmp_path).is_file()


def test_page_is_self_contained_and_its_ids_are_unique(page):
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    for first, second in re.findall(r'href="#([^"]+)|url\(#([^)]+)\)', page):
        assert (first or second) in ids
    assert page.count("data:image/png;base64,") == 2 * 8, "teacher, start and six methods, twice"


def test_what_the_study_says_cannot_run(tmp_path):
    attack = "<script>alert(1)</script>\"'$x$ {{ 7*7 }}"
    text = json.dumps(results(5)).replace('"kd"', json.dumps(attack)).replace('"llamagen"', json.dumps(attack))
    study = json.loads(text)
    study["name"] = study["families"][0]["verdict"] = study["summary"][0]["warnings"] = attack
    study["summary"][0]["warnings"] = [attack]
    study["rows"][0]["setting"] = study["sweeps"][0]["settings"][0]["setting"] = [attack]
    study["machine"]["versions"] = {attack: attack}
    html = page_of(tmp_path, study)
    assert html.count("<script>") == 1, "the page's own"
    assert "alert(1)" in html and "<script>alert" not in html and "{{ 7*7 }}" in html
    assert not re.findall(r'="[^"]*<script', html)


def test_a_study_that_has_only_begun(tmp_path):
    study = results(3)
    study.update(finished=False, rows=[], summary=[], controls=None, sweeps=None, samplers=None, machine=None)
    study["families"][0].update(teacher=dict.fromkeys(study["families"][0]["teacher"]), floors=None)
    (tmp_path / "results.json").write_text(json.dumps(study))
    text = text_of(write_study(tmp_path).read_text())
    assert "No method has been evaluated yet" in text and "No samples." in text and "No training log" in text
    assert "No method has been evaluated yet" in format_study(study)
    study["families"] = []
    (tmp_path / "results.json").write_text(json.dumps(study))
    assert "holds no family yet" in text_of(write_study(tmp_path).read_text())


def null_numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: item if key in ("version",) else null_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [null_numbers(item) for item in value]
    return None if isinstance(value, int | float) and not isinstance(value, bool) else value


def test_any_number_may_be_null(tmp_path):
    made = write_folder(tmp_path, results(5))
    (made / "results.json").write_text(json.dumps(null_numbers(results(5))))
    table = table_of(write_study(made).read_text(), "family-0-updates")
    assert {text for name in ("ce", "varkd", "teacher") for _, text in table[name][1:-1]} == {"–"}
    assert "nan" not in format_study(null_numbers(results(5))).lower()


def test_numbers_that_are_not_finite_are_missing(tmp_path):
    study = results(4)
    study["summary"][0]["fd"]["value"] = float("nan")
    study["summary"][1]["fd"]["high"] = float("inf")
    table = table_of(page_of(tmp_path, study), "family-0-updates")
    assert table["ce"][1] == ("", "–")
    assert "[" not in table["kd"][1][1]


def test_large_samples_are_compressed(tmp_path):
    folder = write_folder(tmp_path, results(3))
    noise = np.random.default_rng(0).integers(0, 256, (600, 600, 3), dtype=np.uint8)
    for path in folder.glob("llamagen/*/**/samples.png"):
        save_png(path, noise)
    page = write_study(folder)
    assert page.stat().st_size < 4_500_000
    assert page.read_text().count("compressed to keep this page small") == 5


def test_curves_come_in_groups_of_seven_with_the_best_baseline_in_each(tmp_path):
    folder = write_folder(tmp_path, results(20))
    study = read_study(folder)
    groups = [[label for label, _, _ in drawn.legend] for drawn in curves(folder, study, study.families[0], "x")]
    baseline = study.families[0].best_baseline("updates")
    assert all(len(group) <= 7 and group[0] == baseline for group in groups)
    others = [label for group in groups for label in group[1:]]
    assert sorted([*others, baseline]) == sorted({row["method"] for row in study.facts["rows"]})


def test_terminal_table_is_narrow_and_holds_every_method():
    study = results(50, ("llamagen", "var"))
    study["summary"][7]["method"] = "a-method-" + "with-a-long-name-" * 8
    study["summary"][8]["fd"] = {"value": 123456.7, "low": 100000.1, "high": 140000.9}
    text = format_study(study)
    assert max(map(len, text.splitlines())) <= 110
    assert all(text.count(f"\nmethod_{index} ") == 4 for index in range(20, 50)), "two families, two budgets"


def test_terminal_table_holds_the_numbers_of_the_file():
    study = results(5)
    entry = next(entry for entry in study["summary"] if entry["method"] == "varkd")
    line = next(line for line in format_study(study).splitlines() if line.startswith("varkd "))
    fd, low, high, difference, *_ = printed(line)
    assert [fd, low, high] == pytest.approx([entry["fd"][end] for end in ("value", "low", "high")], abs=0.06)
    assert difference == pytest.approx(entry["difference"]["value"], abs=0.06)
    assert f"{entry['wins']}-{entry['losses']}" in line.split()


def change(key: str, value: Any, part: str | None = None):
    def edit(study: dict[str, Any]) -> None:
        (study[part][0] if part else study)[key] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (change("format", "something"), "is not a study"),
        (change("version", 2), "this varkd reads version 1"),
        (change("rows", 3), "'rows' should be a list"),
        (change("finished", None), "'finished' should be true or false"),
        (change("fd", "low", "rows"), "'rows[0].fd' should be a number or null"),
        (change("fd", 3.0, "summary"), "'summary[0].fd' should be an object"),
        (change("role", "hero", "summary"), "'summary[0].role' should be one of baseline"),
        (change("budget", "money", "rows"), "'rows[0].budget' should be updates or time"),
        (change("family", "other", "controls"), "'controls[0].family' should be one of 'families'"),
        (change("samples", "../secret.png", "rows"), "'rows[0].samples' should be a path inside the study folder"),
        (change("run", "/etc", "rows"), "'rows[0].run' should be a path inside the study folder"),
        (change("teacher", None, "families"), "'families[0].teacher' should be an object"),
    ],
)
def test_foreign_results_are_one_line(tmp_path, edit, complaint):
    study = results(5)
    edit(study)
    (tmp_path / "results.json").write_text(json.dumps(study))
    with pytest.raises(VarkdError, match=re.escape(complaint)) as error:
        write_study(tmp_path)
    assert "\n" not in str(error.value) and "results.json" in str(error.value)
    assert not (tmp_path / "report").exists()
    with pytest.raises(VarkdError, match=re.escape(complaint)):
        format_study(study)


def test_missing_and_truncated_results_are_one_line(tmp_path):
    with pytest.raises(VarkdError, match=r"no results\.json in"):
        write_study(tmp_path / "nowhere")
    (tmp_path / "results.json").write_text(json.dumps(results(3))[:500])
    with pytest.raises(VarkdError, match="truncated"):
        write_study(tmp_path)
    (tmp_path / "results.json").write_text("[1]")
    with pytest.raises(VarkdError, match="is not a study"):
        write_study(tmp_path)


@pytest.mark.parametrize(("name", "complaint"), [("samples.png", "readable image"), ("log.jsonl", "log is damaged")])
def test_damaged_files_of_a_run_are_one_line(tmp_path, name, complaint):
    folder = write_folder(tmp_path, results(3))
    (folder / "llamagen" / "kd" / "seed-0" / name).write_text("nothing\nof the kind\n")
    with pytest.raises(VarkdError, match=complaint) as error:
        write_study(folder)
    assert "\n" not in str(error.value)


def test_checking_changes_nothing_of_what_it_is_given():
    study = results(3)
    before = copy.deepcopy(study)
    parse_study(study)
    assert study == before


def test_the_study_page_needs_no_torch(tmp_path):
    code = (
        "import sys; from pathlib import Path; from varkd.report.study import write_study;"
        "write_study(Path(sys.argv[1])); assert 'torch' not in sys.modules"
    )
    folder = write_folder(tmp_path, results(3))
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, timeout=120)
