"""What once gave a wrong number without a word: now the right number, or a refusal of one line."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tiny_runs import quicken, train
from varkd.cli import main
from varkd.config import EvaluationConfig
from varkd.data.codes import CodeDataset
from varkd.data.loader import ordered_batches
from varkd.evaluate.agreement import cross_entropy
from varkd.run import evaluation, training
from varkd.run.data import Codes, encode
from varkd.run.models import load_trained
from varkd.train import encode as encoding


@pytest.fixture(scope="module")
def ordered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Codes of images listed class by class: 60 blank ones, then 60 of noise; nearly all are held out."""
    root = tmp_path_factory.mktemp("ordered")
    for name, high in (("blank", 1), ("noise", 256)):
        (root / "images" / name).mkdir(parents=True)
        for index in range(60):
            pixels = np.random.default_rng(index).integers(0, high, (4, 4), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "images" / name / f"{index:02}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "_CHECKED_IMAGES", 40)
        encode(str(root / "images"), "pixels", root / "codes", validation=0.8, device="cpu", quiet=True)
    return root / "codes"


def test_the_logged_validation_is_of_all_classes(tmp_path: Path, ordered: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(training, "_VALIDATION_CODES", 40)
    run = train(tmp_path / "run", ordered, "train.updates=60", "train.validate_every=60", "train.checkpoint_every=60")
    logged = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()][-1]["ce"]
    _, codes, model = load_trained(run, "cpu")
    everything = codes.split("validation")
    true = cross_entropy(model, ordered_batches(everything, 50), torch.device("cpu"))
    first = cross_entropy(model, [next(ordered_batches(everything, 40))], torch.device("cpu"))
    assert first < 0.5 * true, "the first images are of the easy class"
    assert logged == pytest.approx(true, rel=0.35)


def test_agreement_is_of_all_classes(ordered: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(evaluation, "_AGREEMENT_SEQUENCES", 40)
    label_N = torch.cat([batch.label_B for batch in evaluation._data_batches(Codes(ordered))])
    assert len(label_N) == 40 and 12 <= int(label_N.sum()) <= 28


def test_the_psnr_is_of_all_classes(ordered: Path):
    """A blank image comes back as it was (99 dB), noise in 17 levels does not."""
    found = json.loads((ordered / "manifest.json").read_text())["reconstruction"]
    assert found["num"] == 40 and 55 < found["psnr"] < 82


def test_a_share_is_the_same_for_all_and_whole_where_it_may_be(ordered: Path):
    codes = CodeDataset(ordered, "validation")
    rows = [torch.cat([batch.row_B for batch in ordered_batches(codes, size, most=40)]).tolist() for size in (7, 40)]
    assert rows[0] == rows[1] == sorted(set(rows[0])) and len(rows[0]) == 40 and max(rows[0]) > 60
    whole = torch.cat([batch.row_B for batch in ordered_batches(codes, 7, most=1000)]).tolist()
    assert whole == list(range(len(codes)))


def test_fewer_samples_than_classes_are_of_all_the_alphabet(
    tmp_path: Path, teacher: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    assert main(["sample", str(teacher), "--num", "5", "--device", "cpu", "--out", str(tmp_path / "out")]) == 0
    assert "one of each of 5 classes, spread evenly over 10" in " ".join(capfd.readouterr().err.split())
    assert np.load(tmp_path / "out" / "samples.npz")["label"].tolist() == [0, 2, 4, 6, 8]
    assert "spread evenly" in json.loads((tmp_path / "out" / "samples.json").read_text())["labels"]
    quicken(monkeypatch)
    run = Path(shutil.copytree(teacher, tmp_path / "teacher"))
    for num, said in ((8, "one of each of 8 classes, spread evenly over 10"), (20, "balanced")):
        evaluation.evaluate_run(run, settings=replace(EvaluationConfig(), num_samples=num, resamples=10), quiet=True)
        assert json.loads((run / "metrics.json").read_text())["protocol"]["labels"] == said
