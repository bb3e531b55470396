"""Every recipe that ships trains, as it is but for two updates; sizes that do not fit would fail here."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from varkd.backbones.protocol import Layout
from varkd.backbones.store import build, family_class, load_backbone
from varkd.cli import main
from varkd.config import load_run
from varkd.study.spec import load_study
from varkd.tokenizers.multiscale import MultiScale, MultiScaleConfig
from varkd.tokenizers.protocol import Tokenizer
from varkd.tokenizers.store import save_tokenizer
from varkd.tokenizers.vq import VQ, VQConfig

FOLDER = Path(__file__).parents[2] / "recipes"
SHIPPED = sorted(FOLDER.rglob("*.yaml"))
RECIPES = [path for path in SHIPPED if path.parent == FOLDER and not path.stem.startswith("study-")]
STUDIES = [path for path in SHIPPED if path.stem.startswith("study-")]
SHORT = ("train.updates=2", "train.batch_size=8", "train.validate_every=2", "train.checkpoint_every=2",
         "train.grid_every=2", "train.log_every=1", "device=cpu")  # fmt: skip


@pytest.fixture(scope="session")
def color_images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Ten classes of 32 x 32 noise, as CIFAR-10's parquet file has them."""
    import datasets
    from datasets import config

    folder = tmp_path_factory.mktemp("color")
    random = np.random.default_rng(0)

    def picture() -> dict:
        buffer = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(buffer, format="PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    rows = {"img": [picture() for _ in range(40)], "label": [i % 10 for i in range(40)]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "HF_DATASETS_CACHE", str(folder / "cache"))
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "train.parquet")
        yield folder / "train.parquet"


def encoded(images: Path, tokenizer: Tokenizer) -> Path:
    """Codes of an untrained tokenizer."""
    folder = images.parent / tokenizer.kind
    save_tokenizer(tokenizer, folder / "tokenizer")
    command = ["encode", str(images), "--tokenizer", str(folder / "tokenizer"), "--flip", "--device", "cpu"]
    assert main([*command, "--out", str(folder / "codes")]) == 0
    return folder / "codes"


@pytest.fixture(scope="session")
def color_codes(color_images: Path) -> Path:
    torch.manual_seed(0)
    return encoded(color_images, VQ(VQConfig.small(32, 3, 512, 4)))


@pytest.fixture(scope="session")
def color_scale_codes(color_images: Path) -> Path:
    torch.manual_seed(0)
    return encoded(color_images, MultiScale(MultiScaleConfig.small(32, 3, 512, 4)))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains(recipe: Path, tmp_path: Path, request: pytest.FixtureRequest):
    kind = "codes" if recipe.stem.startswith("digits") else "color_codes"
    data = request.getfixturevalue("color_scale_codes" if "-var-" in recipe.stem else kind)
    assert main(["train", recipe.stem, f"out={tmp_path / 'run'}", f"data={data}", *SHORT]) == 0
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "done"
    assert (tmp_path / "run" / "samples" / "step-00000002.png").is_file()
    assert (tmp_path / "run" / "tensorboard").is_dir()


@pytest.mark.parametrize("family", ["digits", "cifar10"])
def test_the_student_of_a_pair_learns_from_its_teacher(family: str, tmp_path: Path, codes: Path, color_codes: Path):
    """The teacher is the larger one by far, and every step of the README's job fits the one before."""
    data = codes if family == "digits" else color_codes
    teacher, start, student = tmp_path / "teacher", tmp_path / "start", tmp_path / "varkd"
    quick = (*SHORT, "train.grid_every=0", "train.trackers=[]")
    assert main(["train", f"{family}-teacher", f"out={teacher}", f"data={data}", *quick]) == 0
    assert main(["train", f"{family}-student", f"out={start}", f"data={data}", *quick]) == 0
    places = (f"out={student}", f"data={data}", f"teacher={teacher}", f"init={start}", "method=best_of_n")
    assert main(["train", f"{family}-student", *places, *quick]) == 0
    sizes = [sum(p.numel() for p in load_backbone(folder)[0].parameters()) for folder in (teacher, student)]
    assert sizes[0] > 8 * sizes[1]


@pytest.mark.parametrize("family", ["var", "arpg", "randar", "rar"])
def test_the_recipes_of_a_family_are_a_pair(family: str):
    """The teacher is the larger one, and nothing but size and training tells the two apart."""
    layout = Layout(512, 10, (8, 8), (1, 2, 4, 8), 16, 4) if family == "var" else Layout(512, 10, (8, 8))
    count: dict[str, int] = {}
    runs = {role: load_run(f"cifar10-{family}-{role}") for role in ("teacher", "student")}
    for role, run in runs.items():
        chosen = {name: value for name, value in asdict(run.model).items() if name != "family" and value is not None}
        model = build(run.model.family, family_class(family).sizes_for(layout) | chosen)
        assert model.family == family
        count[role] = sum(parameter.numel() for parameter in model.parameters())
    assert count["teacher"] >= 500_000 and 150_000 <= count["student"] <= 300_000
    assert count["teacher"] > 2.5 * count["student"]
    assert runs["teacher"].evaluation == runs["student"].evaluation == load_run("cifar10-student").evaluation


@pytest.mark.parametrize("recipe", STUDIES, ids=lambda path: path.stem)
def test_a_study_resolves(recipe: Path):
    """Every run of it is one that `varkd train` would take; tests/unit/study runs small ones."""
    study = load_study(recipe.stem)
    assert study.pairs and study.methods and study.seeds


def test_recipes_say_how_to_use_them():
    for recipe in SHIPPED:
        verb = "study" if recipe in STUDIES else "train"
        name = recipe.relative_to(FOLDER).with_suffix("").as_posix()
        assert f"# varkd {verb} {name}" in recipe.read_text(), name
