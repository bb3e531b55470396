"""What the app shows is what the library gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import varkd
from varkd.app.playground import Playground
from varkd.cli import main
from varkd.config import read_run
from varkd.errors import VarkdError
from varkd.rollout import Sampler


@pytest.fixture(scope="module")
def playground(runs: list[Path]) -> Playground:
    return Playground(runs, "cpu")


def test_samples_are_those_of_the_library(playground: Playground, runs: list[Path]):
    sampler = Sampler(temperature=0.7, guidance=2.0)
    shown = playground.sample(3, 5, seed=4, sampler=sampler)
    for run, each in zip(runs, shown, strict=True):
        expected = varkd.generate(varkd.load(run), playground.tokenizer, [3] * 5, sampler, seed=4)
        assert each.images_NHWC is not None
        assert torch.from_numpy(each.images_NHWC).permute(0, 3, 1, 2).equal(expected)


def test_all_classes_take_turns(playground: Playground, runs: list[Path]):
    shown = playground.sample(None, 12, seed=0, sampler=Sampler())[0]
    labels = [index % 10 for index in range(12)]
    expected = varkd.generate(varkd.load(runs[0]), playground.tokenizer, labels, Sampler(), seed=0)
    assert shown.images_NHWC is not None
    assert torch.from_numpy(shown.images_NHWC).permute(0, 3, 1, 2).equal(expected)


def test_a_model_that_cannot_says_so_and_the_others_go_on(playground: Playground):
    shown = playground.sample(0, 2, seed=0, sampler=Sampler(parallel="zipar", window=2))
    assert shown[0].images_NHWC is not None and shown[0].refusal is None
    assert shown[1].images_NHWC is None and "zipar is for llamagen" in (shown[1].refusal or "")


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_a_continuation_keeps_its_share_of_the_codes(playground: Playground, share: float):
    data = playground.codes.split("validation")
    codes_L = data.codes(np.array([7]), np.array([0]))[0]
    image = Image.fromarray(playground.decoded(codes_L[None])[0, :, :, 0])
    reconstruction, shown = playground.continued(image, 2, share, 3, seed=1, sampler=Sampler())
    assert np.array_equal(reconstruction, playground.decoded(codes_L[None])[0])
    for each in shown:
        assert each.codes_NL is not None
        kept = (each.codes_NL == codes_L).sum(1)
        assert int(kept.min()) >= int(share * len(codes_L))
    assert shown[0].codes_NL is not None
    assert bool((shown[0].codes_NL[:, : int(share * len(codes_L))] == codes_L[: int(share * len(codes_L))]).all())


def test_the_nearest_training_image_of_a_training_image_is_itself(playground: Playground):
    data = playground.codes.split("train")
    codes_NL = data.codes(np.arange(len(data)), np.zeros(len(data), dtype=np.int64))
    images, distances = playground.nearest(codes_NL[11], num=4)
    assert distances[0] == pytest.approx(0, abs=1e-3) and distances == sorted(distances)
    assert np.array_equal(images[0], playground.decoded(codes_NL[11:12])[0])
    vectors = playground.tokenizer.codebook_VE.double()
    apart = (vectors[codes_NL] - vectors[codes_NL[11]]).square().sum(-1).mean(1).sqrt()
    assert distances == pytest.approx(apart.sort().values[:4].tolist(), abs=1e-3)


def test_examples_wrap_around(playground: Playground):
    length = len(playground.codes.split("validation"))
    first, label = playground.example(0)
    again, same = playground.example(length)
    assert np.array_equal(first, again) and label == same


def test_names_tell_models_apart(runs: list[Path], tmp_path: Path):
    assert [each.name for each in Playground(runs).candidates] == ["<b>raster</b>", "random"]
    model = varkd.load(runs[0])
    for name in ("one", "two"):
        model.save(tmp_path / name / "student")
    folders = [runs[0], tmp_path / "one" / "student", tmp_path / "two" / "student"]
    assert [each.name for each in Playground(folders).candidates][1:] == ["one/student", "two/student"]


def test_models_without_a_run_or_of_other_codes_are_refused(runs: list[Path], tmp_path: Path):
    model = varkd.load(runs[0])
    model.save(tmp_path / "alone")
    with pytest.raises(VarkdError, match="is not a run folder: give at least one"):
        Playground([tmp_path / "alone"])
    model.tokenizer_hash = "0" * 64
    model.save(tmp_path / "other")
    with pytest.raises(VarkdError, match="encode the data with the model's tokenizer"):
        Playground([runs[0], tmp_path / "other"])


def test_the_command_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["app", str(tmp_path / "none")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_the_runs_sampler_is_where_the_page_begins(runs: list[Path], playground: Playground):
    assert playground.sampler == read_run(runs[0]).evaluation.sampler == Sampler(temperature=0.85)
