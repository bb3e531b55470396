"""A published folder in diffusers: the same codes and images as varkd, from a folder and by way of the hub."""

from __future__ import annotations

import shutil
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import varkd
from tiny_models import CLASS_NAMES, FAMILIES, tiny_model, tiny_tokenizer
from varkd.sampling import generate_with_codes

diffusers = pytest.importorskip("diffusers", reason="pip install diffusers")
SAMPLER = varkd.Sampler(guidance=2.0, top_k=20, top_p=0.9, temperature=0.9)
LABELS = [0, 1, 2, 3, 4, 5]


@pytest.fixture(autouse=True)
def modules_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where diffusers copies the code that it runs: not into the user's cache."""
    from diffusers.utils import dynamic_modules_utils, logging

    cache = tmp_path_factory.mktemp("modules")
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(cache))
    monkeypatch.syspath_prepend(str(cache))
    logging.disable_progress_bar()


def published(family: str, folder: Path) -> Path:
    tokenizer = tiny_tokenizer(family)
    tokenizer.save_pretrained(folder / "tokenizer")
    tiny_model(family, tokenizer).save_pretrained(folder / "model")
    varkd.publish(folder / "model", folder / "out", tokenizer=folder / "tokenizer", sampler=SAMPLER, rows=1, quiet=True)
    return folder / "out"


def load(folder: Path | str) -> Any:
    pipe = diffusers.DiffusionPipeline.from_pretrained(str(folder), trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("family", FAMILIES)
def test_codes_and_images_are_those_of_varkd(family: str, tmp_path: Path):
    tokenizer = tiny_tokenizer(family)
    model, pipe = tiny_model(family, tokenizer), load(published(family, tmp_path))
    for sampler, given in (
        (SAMPLER, {}),
        (varkd.Sampler(), {"guidance_scale": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}),
    ):
        images, codes = generate_with_codes(model, tokenizer, torch.tensor(LABELS), sampler, seed=4, quiet=True)
        found = pipe(class_labels=LABELS, seed=4, output_type="latent", **given).images
        assert torch.equal(found, codes), sampler
        drawn = pipe(class_labels=LABELS, seed=4, **given).images
        assert np.array_equal(np.stack([np.atleast_3d(np.asarray(image)) for image in drawn]),
                              images.permute(0, 2, 3, 1).numpy())  # fmt: skip


def test_what_a_call_takes_and_gives(tmp_path: Path):
    pipe = load(published("llamagen", tmp_path))
    pictures = pipe([1, 3, 1], seed=0).images
    assert [(image.mode, image.size) for image in pictures] == [("RGB", (8, 8))] * 3
    array, tensor = (pipe([1, 3, 1], seed=0, output_type=kind).images for kind in ("np", "pt"))
    assert array.shape == (3, 8, 8, 3) and array.dtype == np.float32 and array.min() >= 0 and array.max() <= 1
    assert torch.equal(torch.from_numpy(array).permute(0, 3, 1, 2), tensor)
    assert np.abs(np.asarray(pictures[0]) / 255 - array[0]).max() <= 1 / 255
    by_name = pipe([CLASS_NAMES[1], CLASS_NAMES[3]], seed=2, output_type="latent", return_dict=False)[0]
    assert torch.equal(by_name, pipe([1, 3], seed=2, output_type="latent").images)
    assert torch.equal(pipe("cat", seed=2, output_type="latent").images, pipe(0, seed=2, output_type="latent").images)
    whole = pipe([1, 2, 3], seed=9, output_type="latent").images
    assert torch.equal(pipe([1, 2, 3], seed=9, batch_size=2, output_type="latent").images, whole)


def test_generators(tmp_path: Path):
    pipe = load(published("arpg", tmp_path))

    def codes(labels: list[int], generator: Any) -> torch.Tensor:
        return pipe(labels, generator=generator, output_type="latent").images

    def made(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    assert torch.equal(codes([0, 1], made(5)), codes([0, 1], made(5)))
    assert not torch.equal(codes([0, 1], made(5)), codes([0, 1], made(6)))
    each = codes([2, 3], [made(5), made(6)])
    assert torch.equal(each[:1], codes([2], made(5))) and torch.equal(each[1:], codes([3], made(6)))
    state = torch.random.get_rng_state()
    pipe([0], seed=1)
    assert torch.equal(state, torch.random.get_rng_state()), "a seed leaves the global generator alone"
    with pytest.raises(ValueError, match="2 labels, but 1 generators"):
        codes([0, 1], [made(1)])


@pytest.mark.parametrize(
    ("call", "told"),
    [
        ({"class_labels": [6]}, r"0\.\.5"), ({"class_labels": [-1]}, r"0\.\.5"), ({"class_labels": []}, "at least one"),
        ({"class_labels": ["cow"]}, "no class 'cow'"), ({"class_labels": [0], "output_type": "jpg"}, "output_type"),
        ({"class_labels": [0], "num_inference_steps": 3}, "one code a step"),
    ],
)  # fmt: skip
def test_bad_calls(call: dict[str, Any], told: str, tmp_path: Path):
    with pytest.raises(ValueError, match=told):
        load(published("llamagen", tmp_path))(**call)


def test_saving_is_refused_rather_than_half_done(tmp_path: Path):
    pipe = load(published("rar", tmp_path))
    with pytest.raises(ValueError, match="copy the folder"):
        pipe.save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_families_do_not_mix_in_one_process(tmp_path: Path):
    """Local code is copied to one place and imported by its file's name: names must differ between families."""
    pipes = {family: load(published(family, tmp_path / family)) for family in FAMILIES}
    for family, pipe in pipes.items():
        again = load(tmp_path / family / "out")
        one, other = (each(LABELS, seed=1, output_type="latent").images for each in (pipe, again))
        assert torch.equal(one, other)


def test_the_hub_download_brings_every_file_that_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from diffusers.pipelines import pipeline_utils
    from diffusers.utils import dynamic_modules_utils

    source, snapshot = published("var", tmp_path), tmp_path / "snapshot"
    names = [path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()]

    def model_info(*arguments: Any, **options: Any) -> SimpleNamespace:
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names], sha="1")

    def download(repo: str, filename: str, subfolder: str | None = None, **options: Any) -> str:
        name = f"{subfolder}/{filename}" if subfolder else filename
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        return str(shutil.copyfile(source / name, snapshot / name))

    def download_all(repo: str, allow_patterns: list[str], ignore_patterns: list[str], **options: Any) -> str:
        for name in names:
            if any(fnmatch(name, one) for one in allow_patterns) and not any(
                fnmatch(name, one) for one in ignore_patterns
            ):
                download(repo, name)
        return str(snapshot)

    monkeypatch.setattr(pipeline_utils, "snapshot_download", download_all)
    for module in (pipeline_utils, dynamic_modules_utils):
        monkeypatch.setattr(module, "model_info", model_info)
        monkeypatch.setattr(module, "hf_hub_download", download)
    found = load("me/var")(LABELS, seed=3, output_type="latent").images
    assert torch.equal(found, load(source)(LABELS, seed=3, output_type="latent").images)
    assert not (snapshot / "varkd.json").exists(), "only what diffusers itself asks for"
