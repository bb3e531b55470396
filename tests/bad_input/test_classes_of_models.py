"""Teachers and starts whose classes are not the data's: matched by name or by a map, or refused; never by position."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from mistakes import Refused, encode, picture

from tiny_runs import arguments, quicken, train
from varkd.backbones.store import load_backbone, weights_hash
from varkd.cli import main
from varkd.run.data import Codes
from varkd.run.models import open_model
from varkd.world import Rng

STEPS = ("train.updates=20", "train.checkpoint_every=20", "train.validate_every=20", "train.optim.ema=0")
ANIMALS = ("ant", "bee", "cat", "dog")


def codes_of(root: Path, names: tuple[str, ...], *options: object) -> Path:
    for name in names:
        for index in range(12):
            picture(root / "images" / name / f"{index}.png", seed=ANIMALS.index(name) * 100 + index)
    assert (
        main([str(part) for part in [*encode(root / "images", root / "codes"), "--validation", "0.3", *options]]) == 0
    )
    return root / "codes"


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of four classes and codes of two of them."""
    home = tmp_path_factory.mktemp("zoo")
    train(home / "teacher", codes_of(home / "four", ANIMALS), *STEPS)
    codes_of(home / "two", ("bee", "dog"))
    return home


def logits(model, label: int) -> torch.Tensor:
    from varkd.types import Condition

    codes_BL = torch.zeros(1, model.sequence_length, dtype=torch.long)
    label_B = torch.tensor([label])
    plan = model.plan(1, Rng(0), torch.zeros(1, dtype=torch.long))
    with torch.no_grad():
        return model.head(model(codes_BL, Condition(label_B), plan))


def test_a_model_keeps_the_names_of_its_classes(zoo: Path, tmp_path: Path):
    assert load_backbone(zoo / "teacher")[0].class_names == ANIMALS
    assert main(["export", str(zoo / "teacher"), "--out", str(tmp_path / "model")]) == 0
    assert load_backbone(tmp_path / "model")[0].class_names == ANIMALS


def test_a_teacher_of_more_classes_teaches_some_of_them(zoo: Path, tmp_path: Path):
    whole, cut = load_backbone(zoo / "teacher")[0], open_model(zoo / "teacher", Codes(zoo / "two" / "codes"))
    assert (cut.num_classes, cut.class_names) == (2, ("bee", "dog"))
    for ours, theirs in ((0, 1), (1, 3), (cut.null_label, whole.null_label)):
        assert torch.equal(logits(cut, ours), logits(whole, theirs))
    assert not torch.equal(logits(cut, 0), logits(whole, 0))
    run = train(tmp_path / "run", zoo / "two" / "codes", *STEPS, "method=kd", f"teacher={zoo / 'teacher'}",
                f"init={zoo / 'teacher'}")  # fmt: skip
    assert load_backbone(run)[0].class_names == ("bee", "dog")


def test_classes_in_another_order_are_put_right(zoo: Path, tmp_path: Path):
    """The same names at other labels, as data of another format may have them."""
    codes = Path(shutil.copytree(zoo / "four" / "codes", tmp_path / "codes"))
    manifest = json.loads((codes / "manifest.json").read_text())
    manifest["class_names"] = list(ANIMALS[::-1])
    (codes / "manifest.json").write_text(json.dumps(manifest))
    whole, turned = load_backbone(zoo / "teacher")[0], open_model(zoo / "teacher", Codes(codes))
    assert all(torch.equal(logits(turned, 3 - label), logits(whole, label)) for label in range(4))


def nameless(model: Path, out: Path) -> Path:
    """As official files are: nothing tells what the classes are called."""
    shutil.copytree(model, out)
    info = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**info, "class_names": None}))
    return out


def test_a_teacher_without_names_needs_a_map(zoo: Path, tmp_path: Path, refused: Refused):
    teacher = nameless(zoo / "teacher", tmp_path / "teacher")
    command = arguments(tmp_path / "run", zoo / "two" / "codes", *STEPS, "method=kd", f"teacher={teacher}")
    refused(command, "4 classes", "the data 2", "--class-map", untouched=tmp_path)
    (tmp_path / "map.json").write_text(json.dumps({"dog": 3, "bee": 1}))
    codes = codes_of(tmp_path / "two", ("bee", "dog"), "--class-map", tmp_path / "map.json")
    assert torch.equal(logits(open_model(teacher, Codes(codes)), 1), logits(load_backbone(teacher)[0], 3))
    assert train(tmp_path / "run", codes, *STEPS, "method=kd", f"teacher={teacher}")


def test_a_map_can_be_added_to_codes_that_stand(zoo: Path, tmp_path: Path):
    teacher = nameless(zoo / "teacher", tmp_path / "teacher")
    codes = codes_of(tmp_path / "two", ("bee", "dog"))
    written = (codes / "train-00000.npy").stat().st_mtime_ns
    (tmp_path / "names.txt").write_text("\n".join(ANIMALS))
    codes_of(tmp_path / "two", ("bee", "dog"), "--class-map", tmp_path / "names.txt")
    assert (codes / "train-00000.npy").stat().st_mtime_ns == written
    assert open_model(teacher, Codes(codes)).num_classes == 2


def test_a_map_that_names_not_all(zoo: Path, tmp_path: Path, refused: Refused):
    (tmp_path / "map.json").write_text(json.dumps({"dog": 3}))
    command = [*encode(zoo / "two" / "images", tmp_path / "codes"), "--class-map", tmp_path / "map.json"]
    refused(command, "'bee'", untouched=tmp_path)


@pytest.mark.parametrize("what", ["teacher", "init"])
def test_another_class_of_the_same_number(zoo: Path, tmp_path: Path, refused: Refused, what: str):
    for name in ("bee", "yak"):
        for index in range(8):
            picture(tmp_path / "images" / name / f"{index}.png", seed=index)
    assert main([str(part) for part in encode(tmp_path / "images", tmp_path / "codes")]) == 0
    teacher = train(tmp_path / "teacher", zoo / "two" / "codes", *STEPS)
    command = arguments(tmp_path / "run", tmp_path / "codes", *STEPS, "method=ce", f"{what}={teacher}")
    refused(command, "'yak'", "--class-map", untouched=tmp_path)


def test_evaluation_records_the_teacher_that_it_compared_with(
    zoo: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
):
    quicken(monkeypatch)
    codes = Path(shutil.copytree(zoo / "two", tmp_path / "two")) / "codes"
    run = train(tmp_path / "run", codes, *STEPS, "method=kd", f"teacher={zoo / 'teacher'}")
    other = train(tmp_path / "other", codes, *STEPS, "seed=5")
    own, named = [], []
    for found, more in ((own, []), (named, ["--teacher", str(other)])):
        assert main(["evaluate", str(run), "--num", "8", "--device", "cpu", *more]) == 0
        found.append(json.loads((run / "metrics.json").read_text())["protocol"]["teacher_hash"])
    assert own == [json.loads((run / "environment.json").read_text())["teacher_hash"]]
    assert named == [weights_hash(load_backbone(other)[0])] != own
    foreign = train(tmp_path / "foreign", codes_of(tmp_path / "ants", ("ant", "cat")), *STEPS)
    refused(["evaluate", run, "--teacher", foreign], "'bee'")
    assert np.isfinite(json.loads((run / "metrics.json").read_text())["metrics"]["fd"]["value"])
