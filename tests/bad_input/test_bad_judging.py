"""What people give `varkd evaluate IMAGES --reference` by mistake: one line each, and nothing written."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from mistakes import Refused, picture

import adm_inputs as inputs

SIZE = 32


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({name: torch.from_numpy(value) for name, value in inputs.weights(1).items()}, path)
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    np.savez(tmp_path / "images.npz", inputs.images(3, 0, 6, SIZE))
    return tmp_path / "images.npz"


def saved(path: Path, *arrays: np.ndarray, **named: np.ndarray) -> Path:
    np.savez(path, *arrays, **named)
    return path


def judge(samples: object, reference: object, weights: object, *more: object) -> list[object]:
    command = ["evaluate", samples, "--reference", reference, "--inception", weights, "--device", "cpu"]
    return [*command, "--resamples", "0", "--json", *more]


def test_samples(refused: Refused, tmp_path: Path, images: Path, weights: Path) -> None:
    against = lambda samples: refused(judge(samples, images, weights))
    assert "not a run folder" in against(tmp_path / "nothing.npz")
    pixels = inputs.images(3, 0, 6, SIZE)
    assert "float32, not uint8" in against(saved(tmp_path / "float.npz", pixels.astype(np.float32) / 255))
    assert "at least 4" in against(saved(tmp_path / "three.npz", pixels[:3]))
    assert "has no key arr_0 (keys: images)" in against(saved(tmp_path / "named.npz", images=pixels))
    assert "not (N, height, width, 3)" in against(saved(tmp_path / "nchw.npz", pixels.transpose(0, 3, 1, 2).copy()))
    whole = images.read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    assert "truncated or not an .npz" in against(tmp_path / "cut.npz")
    (tmp_path / "text.npz").write_text("not an archive")
    assert "truncated or not an .npz" in against(tmp_path / "text.npz")
    with zipfile.ZipFile(images) as archive, zipfile.ZipFile(tmp_path / "short.npz", "w") as short:
        short.writestr("arr_0.npy", archive.read("arr_0.npy")[:-100])
    assert "truncated or not an .npz" in against(tmp_path / "short.npz")
    (tmp_path / "empty").mkdir()
    assert "no images in" in against(tmp_path / "empty")
    for index in range(5):
        picture(tmp_path / "mixed" / f"{index}.png", (16, 16 + index // 4), "RGB")
    assert "is 16x17 pixels but 0.png is 16x16" in against(tmp_path / "mixed")
    (tmp_path / "mixed" / "4.png").write_bytes(b"\x89PNG")
    assert "cannot decode" in against(tmp_path / "mixed")


def test_references(refused: Refused, tmp_path: Path, images: Path, weights: Path) -> None:
    against = lambda reference: refused(judge(images, reference, weights))
    assert "give --reference FILE" in refused(["evaluate", images, "--inception", weights])
    assert "no such file or folder" in against(tmp_path / "nothing.npz")
    square = lambda width: np.eye(width)
    pixels = inputs.images(3, 0, 6, SIZE)
    assert "only one of the keys mu and sigma" in against(saved(tmp_path / "half.npz", pixels, mu=np.zeros(2048)))
    other = saved(tmp_path / "other.npz", pixels, mu=np.zeros(64), sigma=square(64))
    assert "statistics of another network" in against(other)
    nan = saved(tmp_path / "nan.npz", pixels, mu=np.full(2048, np.nan), sigma=square(2048))
    assert "is not finite" in against(nan)
    assert "at least 4 points" in against(saved(tmp_path / "few.npz", pixels[:3]))
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "config.json").write_text(json.dumps({"kind": "something"}))
    assert "no saved reference" in against(tmp_path / "saved")


def test_weights(refused: Refused, tmp_path: Path, images: Path) -> None:
    by = lambda weights: refused(judge(images, images, weights))
    assert "no such file" in by(tmp_path / "nothing.pth")
    state = {name: torch.from_numpy(value) for name, value in inputs.weights(1).items()}
    path = tmp_path / "weights.pth"

    def stored(**changes: torch.Tensor | None) -> Path:
        torch.save({k: v for k, v in {**state, **changes}.items() if v is not None}, path)
        return path

    assert "1 of its 472 tensors are missing" in by(stored(**{"fc.bias": None}))
    assert "not its own, first aux.weight" in by(stored(**{"aux.weight": torch.zeros(1)}))
    assert "(1008, 2048)" in by(stored(**{"fc.weight": torch.zeros(1000, 2048)}))
    assert "finite" in by(stored(**{"fc.bias": torch.full((1008,), torch.nan)}))
    path.write_bytes(stored().read_bytes()[:100_000])
    assert "truncated" in by(path)
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        for name in ("script/data.pkl", "script/code/__torch__.py", "script/constants.pkl"):
            archive.writestr(name, b"")
    assert "is TorchScript, a program" in by(tmp_path / "script.pt")
    (tmp_path / "graph.pb").write_bytes(b"\x0a\xff\xff\x01nothing")
    assert "truncated or not a TensorFlow graph" in by(tmp_path / "graph.pb")
    (tmp_path / "empty.pb").write_bytes(b"")
    assert "not the 2015 Inception graph" in by(tmp_path / "empty.pb")


def test_comparisons(refused: Refused, tmp_path: Path, images: Path, weights: Path) -> None:
    from varkd.cli import main

    arguments = [str(part) for part in judge(images, images, weights, "--out", tmp_path / "one.json")]
    assert main(arguments) == 0
    other = saved(tmp_path / "other.npz", inputs.images(3, 6, 6, SIZE))
    assert "different protocols: reference.hash" in refused(
        judge(images, other, weights, "--compare", tmp_path / "one.json")
    )
    more = ("--compare", tmp_path / "one.json", "--distances", "float32")
    assert "precision_recall.mode: 'float32' / 'adm'" in refused(judge(images, images, weights, *more))
    (tmp_path / "two.json").write_text("{}")
    assert "it has no protocol" in refused(judge(images, images, weights, "--compare", tmp_path / "two.json"))
