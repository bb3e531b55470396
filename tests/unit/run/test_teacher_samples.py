"""`varkd teach --samples`: the teacher's own codes as data, judged by the real images, stopped or not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import varkd
from tiny_runs import arguments, log, quicken, train
from varkd.cli import main
from varkd.data.codes import CodeDataset
from varkd.files import read_json
from varkd.run import teacher_samples
from varkd.run.data import Codes
from varkd.run.evaluation import evaluate_run
from varkd.run.models import load_trained
from varkd.sampling import generate_with_codes

NUM = 150
SAMPLER = ("temperature=0.8", "top_p=0.9", "guidance=1.5")


def command(teacher: Path, codes: Path, out: Path, *options: object) -> list[str]:
    asked = ["teach", teacher, "--data", codes, "--out", out, "--samples", NUM, "--shard-size", 40, "--device", "cpu"]
    return [str(part) for part in (*asked, *options)]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory, teacher: Path, codes: Path) -> Path:
    """150 plain samples beside the digits."""
    out = tmp_path_factory.mktemp("sampled") / "samples"
    assert main(command(teacher, codes, out)) == 0
    return out


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in log(run) if line["split"] == "train"]


def rows(dataset: CodeDataset) -> torch.Tensor:
    index = np.arange(len(dataset))
    return dataset.codes(index, index * 0)


def test_the_codes_are_the_teachers_own(tmp_path: Path, codes: Path, teacher: Path):
    """What `varkd sample` decodes for the same labels, seed and sampler, before it decodes it."""
    assert (
        main(command(teacher, codes, tmp_path / "s", "--seed", 7, "--labels", "balanced", "--sampler", *SAMPLER)) == 0
    )
    found = CodeDataset(tmp_path / "s")
    assert np.array_equal(found.labels, np.arange(NUM) % 10)
    model, sampler = varkd.load(teacher), varkd.Sampler(temperature=0.8, top_p=0.9, guidance=1.5)
    _, codes_NL = generate_with_codes(model, found.tokenizer, torch.from_numpy(found.labels), sampler, 7, quiet=True)
    assert torch.equal(rows(found), codes_NL)
    plain = generate_with_codes(model, found.tokenizer, torch.from_numpy(found.labels), varkd.Sampler(), 7, quiet=True)
    assert not torch.equal(codes_NL, plain[1])


def test_labels_come_as_often_as_in_the_data(samples: Path, codes: Path, teacher: Path, tmp_path: Path):
    real = CodeDataset(codes).labels
    whole = teacher_samples.label_rows("data", 2 * len(real), CodeDataset(codes), 0).numpy()
    assert np.array_equal(np.bincount(whole), 2 * np.bincount(real))
    assert not np.array_equal(whole[: len(real)], whole[len(real) :]), "each round in another order"
    assert np.array_equal(CodeDataset(samples).labels, whole[:NUM])


def test_validation_is_real_and_so_is_the_judge(
    samples: Path, codes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    real, made = CodeDataset(codes, "validation"), CodeDataset(samples, "validation")
    assert torch.equal(rows(real), rows(made)) and np.array_equal(real.labels, made.labels)
    assert Codes(samples).original.folder.resolve() == codes.resolve() and Codes(codes).original.folder == codes
    for split in ("train", "validation"):
        assert Codes(samples).images(split).fingerprint == Codes(codes).images(split).fingerprint
    run = train(tmp_path / "run", samples, "method=ce")
    assert load_trained(run, "cpu")[1].folder.resolve() == codes.resolve()
    quicken(monkeypatch)
    features = tmp_path / "judge" / "features"
    measured = evaluate_run(run, features=features, device="cpu", quiet=True)
    plain = train(tmp_path / "plain", codes, "method=ce")
    other = evaluate_run(plain, features=features, device="cpu", quiet=True)
    assert measured["protocol"]["reference"] == other["protocol"]["reference"]
    assert measured["protocol"]["reference"]["num"] == len(CodeDataset(codes))
    assert measured["floors"] == other["floors"] and measured["metrics"]["fd"] != other["metrics"]["fd"]
    assert not list(samples.glob("features*")) and not list(samples.glob("reference-*"))


@pytest.mark.parametrize("name", ["seqkd", "seqkd_soft"])
def test_presets_on_teacher_samples_take_them(name: str, tmp_path: Path, codes: Path, samples: Path, teacher: Path):
    """Bit by bit what plain methods on data make of the samples; no model is decoded."""
    plain = {"seqkd": "ce", "seqkd_soft": "kd"}[name]
    first = train(tmp_path / "first", samples, f"method={name}", f"teacher={teacher}")
    second = train(tmp_path / "second", samples, f"method={plain}", f"teacher={teacher}")
    online = train(tmp_path / "online", codes, f"method={name}", f"teacher={teacher}")
    assert losses(first) == losses(second) != losses(online)


def test_seqkd_needs_no_teacher_where_its_samples_are(tmp_path: Path, samples: Path):
    first = train(tmp_path / "first", samples, "method=seqkd")
    assert losses(first) == losses(train(tmp_path / "second", samples, "method=ce"))


def test_a_cache_of_the_samples(tmp_path: Path, samples: Path, teacher: Path, codes: Path):
    cache = tmp_path / "cache"
    options = ("--top-k", "17", "--dtype", "float32", "--device", "cpu")
    assert main(["teach", str(teacher), "--data", str(samples), "--out", str(cache), *options]) == 0
    live = train(tmp_path / "live", samples, "method=seqkd_soft", f"teacher={teacher}")
    cached = train(tmp_path / "cached", samples, "method=seqkd_soft", f"teacher={cache}")
    assert losses(cached) == pytest.approx(losses(live), rel=2e-5)
    assert main(arguments(tmp_path / "run", codes, "method=kd", f"teacher={cache}")) == 2, "of other codes"


def test_a_stopped_job_writes_the_same_bytes(
    tmp_path: Path, codes: Path, teacher: Path, samples: Path, monkeypatch: pytest.MonkeyPatch
):
    sampled, calls = teacher_samples.Sampled.__call__, []

    def dies(self: Any, *values: Any) -> torch.Tensor:
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return sampled(self, *values)

    out = samples.parent / "stopped"  # paths in the manifest are relative
    with monkeypatch.context() as patch:
        patch.setattr(teacher_samples.Sampled, "__call__", dies)
        assert main(command(teacher, codes, out)) == 130
    assert (out / "train-00001.npy").is_file() and not (out / "train-00002.npy").exists()
    assert main(arguments(tmp_path / "run", out, "method=ce")) == 2, "not complete"
    assert main(command(teacher, codes, out)) == 0
    assert files(out) == files(samples)
    assert len(calls) == 3, "the patch is gone"


def said(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("varkd: error: "), lines
    return lines[0]


def test_another_teacher_or_sampler_is_refused(
    tmp_path: Path, codes: Path, samples: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
):
    other = train(tmp_path / "other", codes, "method=ce", "seed=5")
    before = files(samples)
    capsys.readouterr()
    for asked, words in (
        (command(other, codes, samples), "another teacher"),
        (command(teacher, codes, samples, "--seed", 1), "another seed (0, now 1)"),
        (command(teacher, codes, samples, "--labels", "balanced"), "another labels"),
        (command(teacher, codes, samples, "--sampler", "temperature=0.5"), "another sampler"),
        (["encode", "digits", "--tokenizer", "pixels", "--out", str(samples)], "holds codes of another"),
        (command(teacher, codes, codes), "holds codes of another"),
        (command(teacher, samples, tmp_path / "s"), "holds samples of a teacher"),
        (command(teacher, codes, tmp_path / "s", "--top-k", 3), "--samples writes codes, not a cache"),
        (command(teacher, codes, tmp_path / "s", "--samples", 0), "samples=0"),
        (command(teacher, codes, tmp_path / "s", "--sampler", "temprature=1"), "temperature"),
        (command(teacher, codes, tmp_path / "s", "--sampler", "top_p=3"), "top_p"),
        (
            ["teach", str(teacher), "--data", str(codes), "--out", str(tmp_path / "s"), "--seed", "1"],
            "only with --samples",
        ),
        (arguments(tmp_path / "r", samples, "method=seqkd_soft", f"teacher={other}"), "sampled by another teacher"),
        (arguments(tmp_path / "r", samples, "method=seqkd_guided", f"teacher={teacher}"), "guidance=1.0"),
    ):
        assert main(asked) == 2, asked
        assert words in said(capsys)
    assert files(samples) == before and not (tmp_path / "s").exists() and not (tmp_path / "r").exists()


def test_a_run_does_not_go_on_with_other_samples(
    tmp_path: Path, samples: Path, codes: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
):
    train(tmp_path / "run", samples, "method=ce")
    assert main(command(teacher, codes, tmp_path / "more", "--seed", 1)) == 0
    capsys.readouterr()
    assert main(arguments(tmp_path / "run", tmp_path / "more", "method=ce")) == 2
    assert "another codes" in said(capsys)


def test_without_the_real_codes_nothing_is_judged(
    tmp_path: Path, samples: Path, codes: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(codes, tmp_path / "codes")
    assert main(command(teacher, tmp_path / "codes", tmp_path / "s")) == 0
    run = train(tmp_path / "run", tmp_path / "s", "method=ce")
    (tmp_path / "codes" / "manifest.json").unlink()  # the tokenizer stays
    train(tmp_path / "again", tmp_path / "s", "method=ce")
    capsys.readouterr()
    assert main(["evaluate", str(run), "--device", "cpu"]) == 2
    assert "put them back" in said(capsys)


def test_a_model_card_says_what_the_model_learned_from(tmp_path: Path, samples: Path, teacher: Path):
    run = train(tmp_path / "run", samples, "method=seqkd")
    varkd.publish(run, tmp_path / "published", device="cpu", quiet=True)
    card = (tmp_path / "published" / "README.md").read_text()
    assert f"on {NUM} samples of a teacher, not on images (classes: digits)." in card
    made_by = read_json(samples / "manifest.json")["samples"]["teacher"]["hash"]
    assert (
        f"Teacher: `{teacher.name}`" in card
        and made_by[:12] in card
        and "samples now" not in card
        and "the images' own codes" in card
    )


def test_what_is_said(samples: Path, codes: Path, teacher: Path, capsys: pytest.CaptureFixture[str]):
    before = {path: path.stat().st_mtime_ns for path in samples.iterdir()}
    capsys.readouterr()
    assert main(command(teacher, codes, samples)) == 0
    shown = capsys.readouterr().out.splitlines()
    held_out = len(CodeDataset(codes, "validation"))
    assert shown[0].startswith(f"{NUM} sequences by the teacher, ") and f"validation: {held_out} real" in shown[0]
    assert {path: path.stat().st_mtime_ns for path in samples.iterdir()} == before
    recorded = read_json(samples / "manifest.json")["samples"]
    assert json.loads(json.dumps(recorded["sampler"])) == vars(varkd.Sampler())
