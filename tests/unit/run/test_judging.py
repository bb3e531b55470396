"""`varkd evaluate IMAGES --reference`: one JSON object, folders, saved references, earlier results beside."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import adm_inputs as inputs
from varkd.cli import main

NAMES = ("fid", "sfid", "is", "precision", "recall")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    torch.save({name: torch.from_numpy(value) for name, value in inputs.weights(1).items()}, folder / "weights.pth")
    np.savez(folder / "real.npz", inputs.images(3, 0, 8, 24))
    images = inputs.images(3, 8, 6, 24)
    np.savez(folder / "samples.npz", images, np.arange(6))
    (folder / "samples").mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / "samples" / f"{index:06d}.png")
    return folder


def judged(capsys: pytest.CaptureFixture[str], files: Path, samples: str, reference: str, *more: object) -> dict:
    capsys.readouterr()
    command = ["evaluate", files / samples, "--reference", files / reference, "--inception", files / "weights.pth",
               "--device", "cpu", "--resamples", "10", "--json", *more]  # fmt: skip
    assert main([str(part) for part in command]) == 0
    return json.loads(capsys.readouterr().out)


def test_one_object_with_every_number_and_its_protocol(files: Path, capsys: pytest.CaptureFixture[str]):
    found = judged(capsys, files, "samples.npz", "real.npz", "--save-reference", files / "saved")
    assert all(isinstance(found[name], float) for name in NAMES)
    assert found["protocol"]["num"] == 6 and found["protocol"]["precision_recall"]["mode"] == "adm"
    low, high = found["intervals"]["is"]
    assert low <= found["is"] <= high
    assert "biased upward" in found["warnings"][0]
    folder = judged(capsys, files, "samples", "saved", "--out", files / "folder.json")
    assert {name: folder[name] for name in NAMES} == pytest.approx({name: found[name] for name in NAMES}, rel=1e-6)
    assert folder["protocol"] == found["protocol"]
    assert json.loads((files / "folder.json").read_text()) == folder


def test_text_names_the_protocol_and_an_earlier_result(files: Path, capsys: pytest.CaptureFixture[str]):
    judged(capsys, files, "samples.npz", "real.npz", "--out", files / "earlier.json")
    command = ["evaluate", files / "samples", "--reference", files / "real.npz", "--inception", files / "weights.pth",
               "--device", "cpu", "--resamples", "0", "--compare", files / "earlier.json"]  # fmt: skip
    assert main([str(part) for part in command]) == 0
    out = capsys.readouterr().out
    assert "inception.resize: TF1 bilinear to 299" in out and "earlier.json" in out


def test_a_class_sorted_file_is_warned_of(files: Path, capsys: pytest.CaptureFixture[str]):
    images = inputs.images(3, 8, 5, 24)
    np.savez(files / "sorted.npz", images.repeat(6, axis=0), np.arange(5).repeat(6))
    warnings = judged(capsys, files, "sorted.npz", "real.npz")["warnings"]
    assert any("sorted by class" in warning for warning in warnings)
