"""A tiny study from end to end: every number stands where it should, and a stop changes none of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tiny_runs import quicken
from varkd.cli import main
from varkd.errors import VarkdError
from varkd.files import read_json, write_json
from varkd.study import results, work
from varkd.study.spec import Study, load_study
from varkd.train.loop import Diverged

pytestmark = pytest.mark.usefixtures("quick")
ENTRIES = {"ce": None, "mine": {"preset": "kd", "role": "varkd"}, "chance": {"preset": "kd", "role": "control"}}
METHODS = tuple(ENTRIES)
SMALL = ["train.batch_size=8", "train.log_every=1", "train.validate_every=3", "model.num_layers=1", "model.dim=16",
         "model.num_heads=1", "model.ffn_dim=16"]  # fmt: skip


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, codes: Path, teacher: Path) -> Path:
    own = tmp_path_factory.mktemp("recipe")
    shutil.copytree(codes, own / "codes")
    pair = {"data": str(own / "codes"), "teacher": str(teacher), "student_set": SMALL, "start_updates": 4}
    study = {
        "name": "tiny", "pairs": {"digits": pair}, "methods": ENTRIES, "seeds": [0, 1], "updates": 6,
        "sweep": [[], ["train.optim.lr*=0.5"]], "sweep_updates": 2, "temperatures": [0.9, 1.0], "search_samples": 20,
        "time_points": 6, "evaluation": {"num_samples": 40, "resamples": 20}, "workers": 0, "device": "cpu",
    }  # fmt: skip
    path = own / "tiny.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def finished(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("study") / "out"
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        assert main(["study", str(recipe), f"out={out}"]) == 0
    return out


def rows(out: Path) -> dict[tuple[str, int, str], dict[str, Any]]:
    found = read_json(out / "results.json")["rows"]
    return {(row["method"], row["seed"], row["budget"]): row for row in found}


def test_a_row_for_every_method_seed_and_budget(finished: Path):
    found = read_json(finished / "results.json")
    assert found["finished"] and not found["failures"]
    assert set(rows(finished)) == {(m, s, b) for m in METHODS for s in (0, 1) for b in ("updates", "time")}
    for row in found["rows"]:
        assert row["family"] == "digits" and row["fd_low"] <= row["fd"] <= row["fd_high"]
        assert {"precision", "recall", "accuracy", "student_kl", "gap_closed"} <= set(row)
    assert (finished / "report" / "index.html").is_file()


def test_the_numbers_are_those_of_the_runs(finished: Path):
    teacher = read_json(finished / "digits" / "teacher" / "judged.json")["metrics"]["fd"]["value"]
    found = rows(finished)
    for (method, seed, budget), row in found.items():
        name = {"updates": "judged", "time": "timed"}[budget]
        judged = read_json(finished / "digits" / method / f"seed-{seed}" / f"{name}.json")
        assert row["fd"] == judged["metrics"]["fd"]["value"]
        assert row["student_kl"] == judged["agreement"]["student"]["forward_kl"]
        base = found["ce", seed, budget]["fd"]
        expected = (base - row["fd"]) / (base - teacher) if base > teacher else None
        assert row["gap_closed"] == (None if expected is None else pytest.approx(expected))


def test_intervals_contain_their_values_and_the_baseline_is_the_best_one(finished: Path):
    found = read_json(finished / "results.json")
    for row in found["summary"]:
        for name in ("fd", "precision", "recall", "student_kl"):
            assert row[name]["low"] <= row[name]["value"] <= row[name]["high"]
        mine = [r["fd"] for r in found["rows"] if (r["method"], r["budget"]) == (row["method"], row["budget"])]
        assert row["fd"]["value"] == pytest.approx(sum(mine) / 2)
        means = {r["method"]: r["fd"]["value"] for r in found["summary"]
                 if r["budget"] == row["budget"] and r["role"] == "baseline"}  # fmt: skip
        best = min(means, key=lambda method: means[method])
        if row["method"] == best:
            assert row["difference"] is None
        else:
            assert row["difference"]["to"] == best
            assert row["difference"]["value"] == pytest.approx(row["fd"]["value"] - means[best])
    (control, _) = found["controls"]
    assert (control["method"], control["control"]) == ("mine", "chance")


def test_choices_are_made_on_seeds_that_are_not_reported(finished: Path):
    found = read_json(finished / "results.json")
    for method in METHODS:
        folder = finished / "digits" / method
        for run in ("sweep-0", "sweep-1", "validation"):
            assert yaml.safe_load((folder / run / "run.yaml").read_text())["seed"] == 100
        choice = read_json(folder / "choice.json")
        scores = [read_json(folder / f"sweep-{index}" / "score.json")["fd"] for index in (0, 1)]
        assert choice["chosen"] == scores.index(min(scores))
        tried = {one["temperature"]: one["fd"] for one in choice["choices"]}
        assert choice["sampler"]["temperature"] == min(tried, key=lambda t: tried[t])
        for seed in (0, 1):
            run = yaml.safe_load((folder / f"seed-{seed}" / "run.yaml").read_text())
            assert run["train"]["optim"]["lr"] == pytest.approx(6e-3 * (1, 0.5)[choice["chosen"]])
            assert run["init"].endswith("digits/start") and run["seed"] == seed
    assert found["validation_seed"] not in found["seeds"]


def test_equal_time_is_the_last_checkpoint_within_the_cheapest_methods_seconds(finished: Path):
    study = load(finished)
    budget = results.time_budget(study, "digits")
    means = [sum(rows(finished)[m, s, "updates"]["seconds"] for s in (0, 1)) / 2 for m in METHODS]
    assert budget == pytest.approx(min(means))
    for method in METHODS:
        for seed in (0, 1):
            run, row = finished / "digits" / method / f"seed-{seed}", rows(finished)[method, seed, "time"]
            within = [step for step, seconds in work.checkpoint_seconds(run) if budget and seconds <= budget]
            assert row["updates"] == (within[-1] if within else 0)


def load(out: Path) -> Study:
    from varkd.config import read_value

    return read_value(Study, out / "study.yaml")


def without_clocks(found: dict[str, Any]) -> list[dict[str, Any]]:
    """What does not depend on how fast the machine was."""
    kept = [row for row in found["rows"] if row["budget"] == "updates"]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in kept]


@pytest.mark.parametrize("stop_at", [5, 13])
def test_a_stop_changes_no_number(
    stop_at: int, recipe: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Killed in the middle of a run; then the same command."""
    calls = {"count": 0}
    whole = work.train_run

    def killed(*arguments: Any, **options: Any) -> Any:
        calls["count"] += 1
        if calls["count"] == stop_at:
            cut_short(monkeypatch)
        return whole(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(work, "train_run", killed)
        with pytest.raises(PowerCut):
            main(["study", str(recipe), f"out={tmp_path / 'out'}"])
    monkeypatch.undo()
    quicken(monkeypatch)
    assert main(["study", str(recipe), f"out={tmp_path / 'out'}"]) == 0
    first, second = (without_clocks(read_json(out / "results.json")) for out in (finished, tmp_path / "out"))
    assert first == second


class PowerCut(BaseException):
    pass


def cut_short(patch: pytest.MonkeyPatch) -> None:
    from varkd.train.loop import Session

    def pull_the_plug(self: Session, *arguments: Any) -> None:
        if self.progress.step == 1:
            raise PowerCut

    patch.setattr(Session, "report", pull_the_plug)


def test_a_finished_study_is_left_alone(recipe: Path, finished: Path, monkeypatch: pytest.MonkeyPatch):
    before = without_clocks(read_json(finished / "results.json"))
    monkeypatch.setattr(work, "train_run", lambda *_, **__: pytest.fail("it trains again"))
    assert main(["study", str(recipe), f"out={finished}"]) == 0
    assert without_clocks(read_json(finished / "results.json")) == before


def test_a_method_that_diverges_is_said_and_the_others_go_on(
    recipe: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The sweep leaves out a setting that diverges; a method that does so for good is named at the end."""
    whole: Callable[..., Any] = work.train_run

    def fragile(run: Any, **options: Any) -> Any:
        if "chance" in run.out and ("sweep-0" in run.out or "seed-1" in run.out):
            raise Diverged("the loss is not finite at update 3")
        return whole(run, **options)

    shutil.copytree(finished, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "digits" / "chance")
    monkeypatch.setattr(work, "train_run", fragile)
    assert main(["study", str(recipe), f"out={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert "digits/chance/seed-1: the loss is not finite" in error
    found = read_json(tmp_path / "out" / "results.json")
    assert not found["finished"] and list(found["failures"]) == ["digits/chance/seed-1"]
    there = rows(tmp_path / "out")
    assert ("chance", 0, "updates") in there and ("chance", 1, "updates") not in there
    assert ("mine", 1, "updates") in there
    sweep = next(sweep for sweep in found["sweeps"] if sweep["method"] == "chance")
    assert sweep["chosen"] == 1 and sweep["settings"][0]["fd"] is None


@pytest.mark.parametrize("gap, said", [(0.5, "too small a gap"), (40.0, "enough room")])
def test_a_verdict_on_the_gap(finished: Path, tmp_path: Path, gap: float, said: str):
    """The numbers of a finished study, the teacher moved near the baseline or far from it."""
    shutil.copytree(finished, tmp_path / "out")
    study = load(finished)
    base = [rows(finished)["ce", seed, "updates"]["fd"] for seed in (0, 1)]
    for method in METHODS:  # noise as small as that of a long study
        for seed in (0, 1):
            path = tmp_path / "out" / "digits" / method / f"seed-{seed}" / "judged.json"
            judged = read_json(path)
            judged["metrics"]["fd"] |= {"value": base[0] + seed * 1e-3, "low": base[0] - 0.1, "high": base[0] + 0.1,
                                        "draws": [base[0] + seed * 1e-3] * 20}  # fmt: skip
            write_json(path, judged)
    path = tmp_path / "out" / "digits" / "teacher" / "judged.json"
    teacher = read_json(path)
    teacher["metrics"]["fd"] |= {"value": base[0] - gap, "low": base[0] - gap - 0.3, "high": base[0] - gap + 0.3}
    write_json(path, teacher)
    from dataclasses import replace

    (family,) = results.collect(replace(study, out=str(tmp_path / "out")), {}, {})["families"]
    assert said in family["verdict"] and family["distinguishable"] == (gap > 1)


def test_results_are_plain_json(finished: Path):
    text = (finished / "results.json").read_text()
    assert "NaN" not in text and json.loads(text)["format"] == "varkd-study"


def test_out_is_needed(recipe: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["study", str(recipe)]) == 2
    assert "give out=" in capsys.readouterr().err


def test_another_tokenizers_teacher_is_refused(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tree = yaml.safe_load(recipe.read_text())
    foreign = tmp_path / "teacher"
    shutil.copytree(tree["pairs"]["digits"]["teacher"], foreign)
    config = read_json(foreign / "config.json")
    write_json(foreign / "config.json", config | {"tokenizer_hash": "0" * 64})
    tree["pairs"]["digits"]["teacher"] = str(foreign)
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    assert main(["study", str(tmp_path / "study.yaml"), f"out={tmp_path / 'out'}"]) == 2
    assert "was trained on codes of tokenizer 000000000000" in capsys.readouterr().err


def test_load_study_is_what_the_command_runs(recipe: Path):
    assert load_study(recipe, ["workers=2"]).workers == 2
    with pytest.raises(VarkdError, match="unknown key 'worker'"):
        load_study(recipe, ["worker=2"])


def with_stage(recipe: Path, folder: Path, **stage: Any) -> Path:
    found = yaml.safe_load(recipe.read_text())
    found |= {"seeds": [0], "methods": {"ce": None}, "sweep": [[]]}
    found["pairs"]["digits"]["start"] = stage
    path = folder / "staged.yaml"
    path.write_text(yaml.safe_dump(found))
    return path


def test_a_start_has_a_second_stage(recipe: Path, tmp_path: Path):
    """Cross-entropy, then KD to its best checkpoint: every method goes on from that one (VarKD, section 4.1)."""
    out = tmp_path / "out"
    staged = with_stage(recipe, tmp_path, method="kd", updates=3, select="best", set=["train.optim.lr*=0.5"])
    assert main(["study", str(staged), f"out={out}"]) == 0
    warm, start = out / "digits" / "start-warm", out / "digits" / "start"
    first, second = (yaml.safe_load((folder / "run.yaml").read_text()) for folder in (warm, start))
    assert (first["preset"], first["train"]["updates"]) == ("ce", 4)
    assert (second["preset"], second["train"]["updates"], second["train"]["select"]) == ("kd", 3, "best")
    assert second["train"]["optim"]["lr"] == pytest.approx(first["train"]["optim"]["lr"] / 2)
    log = [json.loads(line) for line in (start / "log.jsonl").read_text().splitlines()]
    before = [json.loads(line) for line in (warm / "log.jsonl").read_text().splitlines()]
    ends = [line["ce"] for line in before if line["split"] == "validation"]
    assert next(line["ce"] for line in log if line["split"] == "validation") == pytest.approx(ends[-1])


def test_a_second_stage_is_checked_before_anything_runs(recipe: Path, tmp_path: Path):
    with pytest.raises(VarkdError, match="start: updates must be at least 1"):
        load_study(with_stage(recipe, tmp_path, updates=0))
    with pytest.raises(VarkdError, match="unknown method 'kdd'"):
        load_study(with_stage(recipe, tmp_path, method="kdd"))


@pytest.mark.parametrize("stages", [0, 2])
def test_a_student_cut_out_of_the_teacher(stages: int, recipe: Path, tmp_path: Path):
    """It is the start itself, or what the start was trained from; its sizes are those of the cut."""
    out, pair = tmp_path / "out", "pairs.digits"
    cut = f"{pair}.shrink={{layers: 1, ffn: 8}}"
    changes = [
        cut,
        f"{pair}.start_updates={stages}",
        f"{pair}.methods=[ce]",
        "sweep=[[]]",
        "seeds=[0]",
        "temperatures=[1.0]",
    ]
    assert main(["study", str(recipe), f"out={out}", *changes]) == 0
    sizes = read_json(out / "digits" / "shrunk" / "config.json")
    assert (sizes["num_layers"], sizes["ffn_dim"]) == (1, 8)
    start = out / "digits" / ("start" if stages else "shrunk")
    run = yaml.safe_load((out / "digits" / "ce" / "seed-0" / "run.yaml").read_text())
    assert Path(run["init"]) == start and (out / "digits" / "start" / "judged.json").is_file()
    assert (out / "digits" / "start" / "run.yaml").is_file() == bool(stages)
    study = load_study(str(recipe), [f"{pair}.init={out / 'digits' / 'shrunk'}", f"{pair}.start_updates=0"])
    assert work.start_folder(study, "digits", 0) == out / "digits" / "shrunk"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("start_updates=0", "start_updates must be at least 1 for a student that starts at random"),
        ("shrink={}", "give either params"),
        ("shrink={params: 0.5, layers: 1}", "give either params"),
    ],
)
def test_starts_that_cannot_be(change: str, message: str, recipe: Path):
    with pytest.raises(VarkdError, match=message):
        load_study(str(recipe), [f"pairs.digits.{change}"])
    with pytest.raises(VarkdError, match="either init"):
        load_study(str(recipe), ["pairs.digits.init=x", "pairs.digits.shrink={params: 0.5}"])
