"""The page's content, and what it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from run_folders import metrics, study, write_official, write_run

from varkd.errors import VarkdError
from varkd.pictures import save_png
from varkd.report import write_report


def page_of(runs: list[Path], out: Path, **options: str) -> str:
    return write_report(runs, out, **options).read_text(encoding="utf-8")


def text_of(html: str) -> str:
    body = re.sub(r"<(style|script)>.*?</\1>|<svg.*?</svg>", " ", html, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    return study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory) -> str:
    return page_of(runs, tmp_path_factory.mktemp("page"), title="Four digits students")


def test_page_states_what_was_compared(page):
    text = text_of(page)
    assert "Four digits students" in text
    assert "compares 3 students and 1 teacher" in text
    assert "N = 1,000 samples against 1,437 reference images" in text
    assert "Every student made 600 updates" in text
    assert "forward-kl reached the lowest Fréchet distance, 5.0 [4.6, 5.4]" in text
    assert "the interval of varkd overlaps" in text


def test_page_holds_every_section_in_order(page):
    names = re.findall(r'<section id="(\w+)"', page)
    assert names == ["comparison", "samples", "agreement", "curves", "speed", "protocol"]


def test_page_says_floors_feature_network_and_what_is_missing(page):
    text = text_of(page)
    assert "real validation images reach 1.23 (N = 180)" in text
    assert "real images through the tokenizer alone reach 0.567 (N = 180)" in text
    assert "trained on this data set by varkd" in text and "accuracy 98.5% on N = 180 held-out images" in text
    assert "Not evaluated yet, so without numbers below: later." in text
    assert "drawn while training (step-00000600)" in text
    assert "name: forward-kl" in text, "run.yaml is shown"


def test_speed_is_stated_against_the_teacher(page):
    speed = page[page.index('id="speed-table"') :]
    speed = text_of(speed[: speed.index("</table>")])
    assert "4.00" in speed, "812.4 / 203.1 samples per second"
    assert "7.73" in speed, "1,650,000 / 213,400 parameters"


def test_agreement_carries_its_n_and_marks_the_student_that_follows_best(page):
    section = page[page.index('id="agreement"') : page.index('id="curves"')]
    assert "data: N = 360 sequences; student: N = 360 sequences" in text_of(section)
    table = section[section.index('id="agreement-table"') : section.index("</table>")]
    header, *rows = table.split("<tr")[1:]
    assert "Forward KL, data" in header and "Forward KL, student" in header
    assert [row.count("★") for row in rows] == [0, 2, 0], "forward-kl, on both kinds of context"


def test_page_is_self_contained(page):
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', page)
    assert "@import" not in page and "url(http" not in page
    assert page.count("data:image/png;base64,") >= 5


def test_ids_are_unique_and_found(page):
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)|url\(#([^)]+)\)', page)) != set()
    for first, second in re.findall(r'href="#([^"]+)|url\(#([^)]+)\)', page):
        assert (first or second) in ids


def test_like_for_like_needs_no_warning(page):
    assert 'id="differences"' not in page


@pytest.mark.parametrize(
    ("change", "setting", "shown"),
    [
        (lambda values: values.update(updates=300), "updates", "300 (b)"),
        (lambda values: values.update(num_samples=10), "num_samples", "10 (b)"),
        (lambda values: values["protocol"]["sampler"].update(top_k=7), "sampler.top_k", "7 (b)"),
        (lambda values: values["protocol"].update(seed=8), "seed", "8 (b)"),
        (lambda values: values["protocol"]["reference"].update(num=99), "reference.num", "99 (b)"),
        (lambda values: values["protocol"].update(teacher_hash="other"), "teacher_hash", "other (b)"),
        (lambda values: values["protocol"].update(training_seed=3), "training_seed", "3 (b)"),
        (lambda values: values["protocol"]["features"].update(hash="other"), "feature network", "other (b)"),
    ],
)
def test_unequal_runs_are_warned_about(tmp_path, change, setting, shown):
    folders = []
    for name in ("a", "b"):
        values = metrics(name, "varkd", fd=3.0, teacher="runs/teacher")
        if name == "b":
            change(values)
        folders.append(write_run(tmp_path / name, values))
    html = page_of(folders, tmp_path / "out")
    box = text_of(html[html.index('id="differences"') :].split("</div>")[0])
    assert setting in box and shown in box
    assert box.count("(b)") == 1, "nothing else differs"


def test_runs_without_any_evaluation(tmp_path):
    html = page_of([write_run(tmp_path / "young", None)], tmp_path / "out")
    text = text_of(html)
    assert "none of them evaluated yet" in text and "There are no metrics to compare" in text
    assert "No run was compared with a teacher" in text


def test_a_bare_run_folder_is_enough(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.yaml").write_text("name: bare\n")
    text = text_of(page_of([tmp_path / "run"], tmp_path / "out"))
    assert "No samples yet" in text and "No run has logged anything yet" in text


def test_codes_that_form_no_grid_get_no_map(tmp_path):
    values = metrics("next-scale", "varkd", fd=3.0, teacher="t")
    values["grid"] = [3, 3]
    html = page_of([write_run(tmp_path / "run", values)], tmp_path / "out")
    assert "by position" in html and "over the image grid" not in html


def test_what_stands_on_disk_cannot_run(tmp_path):
    attack = "<script>alert(1)</script>\"'$x$"
    values = metrics(attack, attack, fd=3.0, teacher=None)
    values["protocol"]["class_names"] = [attack]
    values["agreement"] = {"data": {attack: 1.0}}
    values["agreement_by_position"] = {"data": {attack: [1.0] * 16}}
    folder = write_run(tmp_path / "run", values)
    (folder / "run.yaml").write_text(f"data: {attack}")
    with (folder / "log.jsonl").open("a") as log:
        log.write(json.dumps({"split": "validation", "step": 1, attack: 1.0}) + "\n")
    html = page_of([folder], tmp_path / "out", title=attack)
    assert html.count("<script>") == 1, "the page's own"
    assert "alert(1)" in html and "<script>alert" not in html
    assert "script-src 'sha256-" in html


def test_large_pictures_are_compressed_and_said_so(tmp_path):
    rng = np.random.default_rng(0)
    folders = []
    for index in range(6):
        values = metrics(f"run-{index}", "varkd", fd=float(index + 1), teacher=None, seed=index)
        folder = write_run(tmp_path / f"run-{index}", values)
        noise = rng.integers(0, 256, (900, 900, 3), dtype=np.uint8)
        save_png(folder / "evaluation" / "samples.png", noise)
        folders.append(folder)
    path = write_report(folders, tmp_path / "out")
    assert path.stat().st_size < 5_000_000
    assert path.read_text().count("compressed to keep this page small") == 6


def test_runs_of_one_name_are_told_apart(tmp_path):
    folders = [write_run(tmp_path / name, metrics("same", "ce", fd=3.0, teacher=None)) for name in ("a", "b")]
    text = text_of(page_of(folders, tmp_path / "out"))
    assert f"same ({folders[0]})" in text and f"same ({folders[1]})" in text


def test_a_log_that_is_being_written_is_read_up_to_its_last_whole_line(tmp_path):
    folder = write_run(tmp_path / "run", None)
    with (folder / "log.jsonl").open("a") as log:
        log.write('{"split": "train", "ste')
    assert "Training loss" in page_of([folder], tmp_path / "out")


def test_warnings_stand_with_the_run_and_are_no_curve(tmp_path):
    folder = write_run(tmp_path / "run", metrics("run", "varkd", fd=3.0, teacher=None))
    with (folder / "log.jsonl").open("a") as log:
        log.write(
            json.dumps({"split": "warning", "step": 7, "rule": "kept_kl/student", "text": "few positions <b>"}) + "\n"
        )
    html = page_of([folder], tmp_path / "out")
    assert "Warning at update 7" in html and "few positions &lt;b&gt;" in html
    assert "curve-warning" not in html and "Warning text" not in html


def damage(name: str, content: str):
    return lambda folder: (folder / name).write_text(content)


@pytest.mark.parametrize(
    ("break_it", "complaint"),
    [
        (damage("metrics.json", '{"name": "a", "met'), "truncated"),
        (damage("metrics.json", "[1, 2]"), "one JSON object"),
        (damage("metrics.json", '{"name": "a", "method": "b"}'), "'metrics' should be an object"),
        (damage("metrics.json", '{"name": 3}'), "'name' should be a string"),
        (
            damage("metrics.json", '{"name": "a", "method": "b", "metrics": {"fd": {"value": "low"}}}'),
            "'metrics.fd' should hold the numbers",
        ),
        (damage("log.jsonl", '{"step": 1}\n{"st\n{"step": 3}\n'), "line 2 is not a JSON object"),
        (damage("evaluation/samples.png", "no picture"), "not a readable image"),
        (lambda folder: (folder / "run.yaml").unlink(), "is not a run folder"),
    ],
)
def test_damage_is_one_line(tmp_path, break_it, complaint):
    folder = write_run(tmp_path / "run", metrics("run", "ce", fd=3.0, teacher=None))
    break_it(folder)
    with pytest.raises(VarkdError, match=re.escape(complaint)) as error:
        write_report([folder], tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out" / "index.html").exists()


def test_folders_must_exist_once(tmp_path):
    with pytest.raises(VarkdError, match="no run folder at"):
        write_report([tmp_path / "nowhere"], tmp_path / "out")
    with pytest.raises(VarkdError, match="at least one"):
        write_report([], tmp_path / "out")
    folder = write_run(tmp_path / "run", None)
    with pytest.raises(VarkdError, match="given twice"):
        write_report([folder, folder], tmp_path / "out")


def test_the_report_needs_no_torch(runs, tmp_path):
    code = (
        "import sys; from pathlib import Path; from varkd.report import write_report;"
        "write_report([Path(sys.argv[1])], Path(sys.argv[2])); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(runs[0]), str(tmp_path)], check=True, timeout=120)


def official_table(page: str) -> str:
    section = page[page.index('id="official"') :]
    return section[: section.index("</section>")]


def test_published_metrics_stand_in_their_own_table(tmp_path):
    runs = study(tmp_path / "runs")
    assert 'id="official"' not in page_of(runs, tmp_path / "before")
    for run, fid in zip(runs[:3], (2.1, 3.4, 3.9), strict=True):
        write_official(run, "llamagen", fid=fid)
    (runs[0] / "evaluation" / "other.json").write_text('{"seed": 1}')
    table = official_table(page_of(runs, tmp_path / "page"))
    text = text_of(table)
    assert "llamagen, N = 50,000" in text and "3.40" in text and "[3.30, 3.50]" in text and "216" in text
    assert table.count("<tr") == 4 and "different protocols" not in text
    assert table.count("★") == 1, "the lower FID of the two students; the rest is equal"


def test_published_metrics_of_two_protocols_are_not_ranked(tmp_path):
    runs = study(tmp_path / "runs")
    write_official(runs[1], "llamagen", fid=3.4)
    write_official(runs[2], "llamagen", fid=3.9, num=10_000)
    table = official_table(page_of(runs, tmp_path / "page"))
    assert "★" not in table and "no best one is marked" in text_of(table)
