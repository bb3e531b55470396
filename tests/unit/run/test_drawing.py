"""Many images to disk: killed and resumed, by two ranks, as PNGs: always the same bytes, which judges accept."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tiny_runs import train
from varkd.cli import main
from varkd.errors import VarkdError
from varkd.evaluate.image_files import class_sorted, open_image_files
from varkd.rollout import Sampler
from varkd.run import drawing as drawing_module
from varkd.run.drawing import Drawing, draw_to, file_order
from varkd.run.models import load_trained
from varkd.run.sampling import balanced_labels

NUM, BATCH = 60, 8


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory, codes: Path, teacher: Path) -> Path:
    return train(tmp_path_factory.mktemp("student") / "kd", codes, "method=kd", f"teacher={teacher}")


@pytest.fixture(scope="module")
def drawing(student: Path) -> Drawing:
    _, codes, model = load_trained(student, "cpu")
    return Drawing(model, codes.tokenizer, balanced_labels(NUM, 10), Sampler(), 3, BATCH, order="shuffled")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, drawing: Drawing) -> Path:
    return draw_to(drawing, tmp_path_factory.mktemp("whole") / "s", quiet=True)


def content(folder: Path) -> bytes:
    return (folder / "samples.npz").read_bytes()


def test_images_are_shuffled_with_their_labels(whole: Path, drawing: Drawing):
    with np.load(whole / "samples.npz") as found:
        images_NHWC, label_N, codes_NL = found["arr_0"], found["label"], found["codes"]
    assert images_NHWC.shape[:1] == label_N.shape == codes_NL.shape[:1] == (NUM,)
    assert label_N.tolist() != balanced_labels(NUM, 10).tolist() and not class_sorted(label_N)
    assert np.bincount(label_N).tolist() == [NUM // 10] * 10
    decoded = drawing.tokenizer.to_uint8(drawing.tokenizer.decode(torch.from_numpy(codes_NL.astype(np.int64))))
    assert np.array_equal(decoded.permute(0, 2, 3, 1).numpy(), images_NHWC)


def test_only_files_of_several_chunks_are_shuffled():
    assert file_order(5000) == "given" and file_order(5001) == "shuffled"


def test_interrupted_drawing_resumes(tmp_path: Path, drawing: Drawing, whole: Path, monkeypatch: pytest.MonkeyPatch):
    real, calls = drawing_module.generate_with_codes, []

    def stops(*arguments: object, **options: object):
        calls.append(options["first_row"])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(drawing_module, "generate_with_codes", stops)
    with pytest.raises(KeyboardInterrupt):
        draw_to(drawing, tmp_path / "s", quiet=True)
    assert not (tmp_path / "s").exists()
    other = replace(drawing, seed=4)
    with pytest.raises(VarkdError, match=r"other settings \(seed\)"):
        draw_to(other, tmp_path / "s", quiet=True)
    draw_to(drawing, tmp_path / "s", quiet=True)
    assert calls == [0, 8, 16, 24, 24, 32, 40, 48, 56], "what was drawn is not drawn again"
    assert content(tmp_path / "s") == content(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


@pytest.mark.slow
def test_a_killed_command_resumes(tmp_path: Path, student: Path):
    command = ["sample", str(student), "--num", "3000", "--batch-size", "20", "--device", "cpu", "--out"]
    process = subprocess.Popen([sys.executable, "-m", "varkd", *command, str(tmp_path / "killed")])
    partial = tmp_path / ".killed.partial"
    for _ in range(600):
        if len(list(partial.glob("*-codes.npy"))) >= 2:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed").exists() and partial.is_dir()
    for name in ("killed", "other"):
        assert main([*command, str(tmp_path / name)]) == 0
    assert content(tmp_path / "killed") == content(tmp_path / "other")


@pytest.mark.slow
def test_two_ranks_write_what_one_does(tmp_path: Path, student: Path):
    options = ["--num-images", "50", "--batch-size", "8", "--device", "cpu", "--out"]
    command = ["-m", "varkd.cli", "sample", str(student), *options]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([sys.executable, *torchrun, *command, str(tmp_path / "two")], timeout=240, check=False,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert main([*command[2:], str(tmp_path / "one")]) == 0
    assert content(tmp_path / "two") == content(tmp_path / "one")


def test_pngs_hold_the_same_images(tmp_path: Path, drawing: Drawing, whole: Path):
    folder = draw_to(drawing, tmp_path / "s", "png", quiet=True)
    paths = sorted((folder / "images").iterdir())
    assert [path.name for path in paths[:2]] == ["000000.png", "000001.png"] and len(paths) == NUM
    with np.load(whole / "samples.npz") as found:
        images_NHWC, label_N = found["arr_0"], found["label"]
    assert np.array_equal(np.stack([np.asarray(Image.open(path)) for path in paths]), images_NHWC[..., 0])
    assert np.array_equal(np.load(folder / "labels.npy"), label_N)
    assert open_image_files(folder / "images").num == NUM


def test_resized_images(tmp_path: Path, drawing: Drawing):
    small = replace(drawing, label_N=balanced_labels(4, 10), resize=6)
    with np.load(draw_to(small, tmp_path / "s", quiet=True) / "samples.npz") as found:
        codes_NL = torch.from_numpy(found["codes"].astype(np.int64))
        decoded = drawing.tokenizer.decode(codes_NL)
        expected = torch.nn.functional.interpolate(decoded, (6, 6), mode="bicubic", antialias=False)
        assert np.array_equal(drawing.tokenizer.to_uint8(expected).permute(0, 2, 3, 1).numpy(), found["arr_0"])
