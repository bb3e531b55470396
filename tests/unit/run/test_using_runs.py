"""`sample` and `evaluate` on a run: what they write, and that the numbers are those of the run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tiny_runs import train
from varkd.cli import main
from varkd.config import read_run
from varkd.evaluate.agreement import cross_entropy
from varkd.files import read_json
from varkd.run.data import Codes
from varkd.run.models import load, load_trained
from varkd.run.sampling import balanced_labels
from varkd.sampling import generate_with_codes


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory, codes: Path, teacher: Path) -> Path:
    return train(tmp_path_factory.mktemp("student") / "kd", codes, "method=kd", f"teacher={teacher}")


def samples(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(folder / "samples.npz", allow_pickle=False) as found:
        return found["arr_0"], found["label"]


def test_samples_in_the_common_layout(tmp_path: Path, student: Path, capsys: pytest.CaptureFixture[str]):
    """ADM's: one `arr_0` of uint8 NHWC."""
    assert main(["sample", str(student), "--out", str(tmp_path / "s"), "--num", "23"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "s")
    images_NHWC, label_N = samples(tmp_path / "s")
    assert images_NHWC.shape == (23, 8, 8, 1) and images_NHWC.dtype == np.uint8
    assert label_N.tolist() == [*range(10), *range(10), 0, 1, 2]
    about = read_json(tmp_path / "s" / "samples.json")
    assert (about["num"], about["seed"], about["sampler"]["temperature"]) == (23, 1234, 1.0)
    with Image.open(tmp_path / "s" / "grid.png") as grid:
        assert grid.width > grid.height > 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s"]


def test_a_sample_depends_on_its_place_and_the_seed_alone(tmp_path: Path, student: Path):
    changes = {
        "a": [],
        "b": ["--batch-size", "5"],
        "c": ["--num", "20"],
        "d": ["--seed", "7"],
        "e": ["--temperature", "0"],
    }
    for name, change in changes.items():
        options = ["--num", "12", *change]
        assert main(["sample", str(student), "--out", str(tmp_path / name), *options]) == 0
    a, b, c, d, e = (samples(tmp_path / name)[0] for name in "abcde")
    assert np.array_equal(a, b) and np.array_equal(a, c[:12])
    assert not np.array_equal(a, d) and not np.array_equal(a, e)


def test_labels_can_be_asked_for(tmp_path: Path, student: Path):
    assert main(["sample", str(student), "--out", str(tmp_path / "s"), "--num", "5", "--labels", "3", "7"]) == 0
    assert samples(tmp_path / "s")[1].tolist() == [3, 7, 3, 7, 3]


def test_balanced_labels():
    assert balanced_labels(5, 1000).tolist() == [0, 200, 400, 600, 800]
    assert balanced_labels(7, 10).tolist() == sorted(set(balanced_labels(7, 10).tolist()))
    counts = torch.bincount(balanced_labels(47, 10))
    assert counts.tolist() == [5] * 7 + [4] * 3


def test_evaluation_of_a_student(
    tmp_path: Path, student: Path, teacher: Path, codes: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["evaluate", str(student), "--num", "40"]) == 0
    assert str(student / "metrics.json") in capsys.readouterr().out
    metrics = read_json(student / "metrics.json")
    assert (metrics["name"], metrics["method"], metrics["updates"], metrics["num_samples"]) == ("kd", "kd", 6, 40)
    assert metrics["parameters"] == sum(p.numel() for p in load(student).parameters())
    for entry in metrics["metrics"].values():
        assert entry["value"] is None or entry["low"] <= entry["value"] <= entry["high"]
    assert set(metrics["metrics"]) >= {"fd", "precision", "recall", "accuracy", "class_entropy", "nearest", "copies"}
    assert metrics["protocol"]["teacher_hash"] == read_json(student / "environment.json")["teacher_hash"] is not None
    assert metrics["protocol"]["checkpoint"] == "step-00000006" and metrics["protocol"]["weights"] == "ema"
    assert (student / metrics["samples"]).is_file()
    for name in ("data", "student"):
        means, curves = metrics["agreement"][name], metrics["agreement_by_position"][name]
        assert len(curves["forward_kl"]) == 64 and means["forward_kl"] > 0 and 0 <= means["acceptance"] <= 1
        assert np.mean(curves["forward_kl"]) == pytest.approx(means["forward_kl"], rel=1e-4)


def test_the_validation_loss_is_the_one_of_the_log(student: Path, codes: Path):
    """180 validation images: the loop sees all of them."""
    logged = [json.loads(line) for line in (student / "log.jsonl").read_text().splitlines()]
    last = [line["ce"] for line in logged if line["split"] == "validation"][-1]
    _, opened, model = load_trained(student)
    from varkd.data.loader import ordered_batches

    found = cross_entropy(model, ordered_batches(opened.split("validation"), 50), torch.device("cpu"))
    assert found == pytest.approx(last, abs=1e-6)


def test_a_student_that_is_its_teacher_agrees_with_it(tmp_path: Path, teacher: Path, codes: Path):
    assert main(["evaluate", str(teacher), "--num", "40", "--teacher", str(teacher)]) == 0
    agreement = read_json(teacher / "metrics.json")["agreement"]
    for name in ("data", "student"):
        assert agreement[name]["forward_kl"] == pytest.approx(0, abs=1e-6)
        assert agreement[name]["acceptance"] == pytest.approx(1, abs=1e-6) and agreement[name]["top1"] == 1


def test_a_moved_teacher_of_codes_is_found_by_its_hash(tmp_path: Path, codes: Path):
    """Codes keep their small tokenizer inside, so the folder can be moved."""
    import shutil

    moved = Path(shutil.copytree(codes, tmp_path / "elsewhere"))
    assert Codes(moved).tokenizer.hash == Codes(codes).tokenizer.hash


def test_generate_restores_nothing_but_images(student: Path):
    run, opened, model = load_trained(student)
    images, codes_BL = generate_with_codes(
        model, opened.tokenizer, balanced_labels(10, 10), read_run(student).evaluation.sampler, 3, quiet=True
    )
    assert images.shape == (10, 1, 8, 8) and codes_BL.shape == (10, 64) and not model.training
    assert run.preset == "kd"


def test_images_are_encoded_on_the_way(tmp_path: Path):
    """`data=` may be images together with `tokenizer=`: the codes go into the run folder, once."""
    run = train(tmp_path / "run", Path("digits"), "tokenizer=pixels", "train.updates=1")
    assert (run / "codes" / "manifest.json").is_file()
    before = (run / "codes" / "train-00000.npy").stat().st_mtime_ns
    train(run, Path("digits"), "tokenizer=pixels", "train.updates=1")
    assert (run / "codes" / "train-00000.npy").stat().st_mtime_ns == before
    assert load_trained(run)[1].folder == (run / "codes").resolve()
