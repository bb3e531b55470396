"""`varkd teach` and training from what it wrote: the numbers of the live teacher, stopped or not, seen or gone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import varkd
from tiny_runs import arguments, assert_same_state, log, quicken, stop_after, train
from varkd.backbones.store import build, family_class, save_backbone
from varkd.cli import main
from varkd.data.codes import CodeDataset
from varkd.data.loader import DataLoader
from varkd.files import read_json
from varkd.run import teaching
from varkd.run.data import Codes, encode

ON_DATA = ("kd", "kd_ce", "kd_reverse", "akl", "todi", "taid", "atkd")
NEEDS_NO_TEACHER = ("ce", "scheduled_sampling_parallel")


def taught(teacher: Path, codes: Path, out: Path, *options: object) -> Path:
    command = ["teach", teacher, "--data", codes, "--out", out, "--device", "cpu", *options]
    assert main([str(part) for part in command]) == 0
    return out


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("teaching")


@pytest.fixture(scope="module")
def flipped(home: Path) -> Path:
    """The digits and their mirror images."""
    encode("digits", "pixels", home / "flipped", flip=True, quiet=True)
    return home / "flipped"


@pytest.fixture(scope="module")
def whole(home: Path, flipped: Path, teacher: Path) -> Path:
    """All 17 codes of every position, in float32."""
    return taught(teacher, flipped, home / "whole", "--top-k", 17, "--dtype", "float32", "--shard-size", 700)


@pytest.fixture(scope="module")
def cache(home: Path, codes: Path, teacher: Path) -> Path:
    return taught(teacher, codes, home / "cache", "--top-k", 8)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def losses(run: Path) -> list[float]:
    name = {"train": "loss", "validation": "ce"}
    return [line[name[line["split"]]] for line in log(run) if line["split"] in name]


def test_kd_from_the_cache_is_kd(tmp_path: Path, flipped: Path, teacher: Path, whole: Path):
    """Both views, dropped labels, several shards, micro-batches: every line of the log, to the rounding of float32."""
    options = ("method=kd", "train.micro_batches=2")
    live = train(tmp_path / "live", flipped, *options, f"teacher={teacher}")
    found = train(tmp_path / "found", flipped, *options, f"teacher={whole}")
    for line, other in zip(log(live), log(found), strict=True):
        assert line.keys() == other.keys() and line.pop("split") == other.pop("split")
        assert other == pytest.approx(line, rel=2e-5, abs=2e-6)
    assert losses(live) != losses(found), "they are rounded apart"


def test_what_is_kept_is_told(home: Path, codes: Path, teacher: Path, cache: Path, capsys: pytest.CaptureFixture[str]):
    """The same command again writes nothing and says it once more; means are those of the teacher itself."""
    before = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    taught(teacher, codes, cache, "--top-k", 8)
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == before
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("1617 sequences, the 8 likeliest of 17 codes in float16: ")
    assert [line.split()[0] for line in shown].count("row") == 8 and shown[-1] == str(cache)
    kept = read_json(cache / "manifest.json")["kept_mass"]
    model, dataset = varkd.load(teacher), CodeDataset(codes)
    index = np.arange(len(dataset))
    codes_BL, label_B = dataset.codes(index, index * 0), torch.from_numpy(dataset.labels)
    for branch, labels in (("label", label_B), ("null", torch.full_like(label_B, 10))):
        with torch.no_grad():
            hidden = model(codes_BL, varkd.Condition(labels), model.plan(len(index)))
            mass_BL = model.head(hidden).softmax(-1).topk(8).values.sum(-1).double()
        assert kept[branch]["mean"] == pytest.approx(float(mass_BL.mean()), abs=1e-3)
        for row in range(8):
            mean = float(mass_BL[:, 8 * row : 8 * row + 8].mean())
            assert kept[branch]["bands"][f"row {row + 1}"] == pytest.approx(mean, abs=1e-3)
        for share, value in kept[branch]["quantiles"].items():
            assert value == pytest.approx(float(np.quantile(mass_BL.numpy(), float(share))), abs=2e-3)


@pytest.mark.parametrize("name", [*ON_DATA, *NEEDS_NO_TEACHER])
def test_presets_on_data_train(name: str, tmp_path: Path, codes: Path, cache: Path, teacher: Path):
    run = train(tmp_path / name, codes, f"method={name}", f"teacher={cache}", "train.updates=3")
    assert all(np.isfinite(losses(run)))
    record = read_json(run / "environment.json")
    assert record["teacher_hash"] == read_json(cache / "manifest.json")["teacher"]["hash"]
    assert (run / record["teacher"]).resolve() == teacher.resolve()
    assert (run / record["teacher_cache"]).resolve() == cache.resolve() and len(record["teacher_cache_hash"]) == 64


def test_a_guided_cache(tmp_path: Path, codes: Path, teacher: Path):
    """kd_guided takes no cache but this; dropped labels are in it."""
    cache = taught(teacher, codes, tmp_path / "cache", "--top-k", 17, "--dtype", "float32", "--guidance", 1.5)
    runs = [train(tmp_path / str(n), codes, "method=kd_guided", f"teacher={each}")
            for n, each in enumerate((teacher, cache))]  # fmt: skip
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=2e-5)


def test_a_stopped_run_goes_on(tmp_path: Path, codes: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    options = ("method=kd", f"teacher={cache}")
    straight = train(tmp_path / "straight", codes, *options)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert main(arguments(tmp_path / "run", codes, *options)) == 143
    train(tmp_path / "run", codes, *options)
    assert_same_state(straight, tmp_path / "run", 6)


@pytest.mark.parametrize("calls", [1, 9, 20])
def test_a_stopped_teaching_goes_on_to_the_same_bytes(
    tmp_path: Path, codes: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch, calls: int
):
    options = ("--top-k", 4, "--shard-size", 300, "--batch-size", 128)
    straight = taught(teacher, codes, tmp_path / "straight", *options)
    asked, ask = [], teaching.Asked.__call__

    def tired(self: Any, *given: Any) -> Any:
        asked.append(0)
        if len(asked) > calls:
            raise KeyboardInterrupt
        return ask(self, *given)

    command = ["teach", teacher, "--data", codes, "--out", tmp_path / "stopped", "--device", "cpu", *options]
    with monkeypatch.context() as patch:
        patch.setattr(teaching.Asked, "__call__", tired)
        assert main([str(part) for part in command]) == 130
    assert len(list((tmp_path / "stopped").glob("*-logp.npy"))) == max(0, calls // 6)
    assert main(arguments(tmp_path / "run", codes, "method=kd", f"teacher={tmp_path / 'stopped'}")) == 2
    assert files(taught(teacher, codes, tmp_path / "stopped", *options)) == files(straight)


def test_evaluation_asks_the_teacher_that_made_the_cache(
    tmp_path: Path, codes: Path, teacher: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    quicken(monkeypatch)
    model = Path(shutil.copytree(teacher, tmp_path / "teacher"))
    cache = taught(model, codes, tmp_path / "cache", "--top-k", 8)
    run = train(tmp_path / "run", codes, "method=kd", f"teacher={cache}")
    shutil.rmtree(cache)  # it is not needed any more
    assert main(["evaluate", str(run), "--device", "cpu"]) == 0
    metrics = read_json(run / "metrics.json")
    teacher_hash = read_json(run / "environment.json")["teacher_hash"]
    assert metrics["agreement"]["data"]["forward_kl"] > 0 and metrics["protocol"]["teacher_hash"] == teacher_hash
    model.rename(tmp_path / "gone")
    capfd.readouterr()
    assert main(["evaluate", str(run), "--device", "cpu"]) == 0
    assert "agreement is left out: give --teacher" in " ".join(capfd.readouterr().err.split())
    metrics = read_json(run / "metrics.json")
    assert metrics["agreement"] is None and metrics["protocol"]["teacher"] is None
    assert metrics["protocol"]["teacher_hash"] == teacher_hash
    assert main(["report", str(run), "--out", str(tmp_path / "report")]) == 0


def test_a_teacher_of_random_orders_is_asked_in_raster_order(tmp_path: Path, codes: Path):
    """Its cache teaches a LlamaGen student as the model itself does."""
    opened = Codes(codes)
    sizes = {**family_class("arpg").sizes_for(opened.layout), "num_layers": 2, "dim": 16, "num_heads": 1}
    model = build("arpg", {**sizes, "order": "random"}, seed=1)
    torch.nn.init.normal_(model.head.weight, std=0.3, generator=torch.Generator().manual_seed(2))
    save_backbone(model, tmp_path / "arpg", opened.manifest["tokenizer"]["hash"])
    cache = taught(tmp_path / "arpg", codes, tmp_path / "cache", "--top-k", 17, "--dtype", "float32")
    runs = [train(tmp_path / str(n), codes, "method=kd", f"teacher={each}", "train.updates=3")
            for n, each in enumerate((tmp_path / "arpg", cache))]  # fmt: skip
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=2e-5)
    raster = ("model.family=arpg", "model.num_layers=2", "model.order=raster", "method=kd", "train.updates=1")
    train(tmp_path / "raster", codes, *raster, f"teacher={cache}")


def test_scales(tmp_path: Path, scale_codes: Path, capsys: pytest.CaptureFixture[str]):
    opened = Codes(scale_codes)
    sizes = {**family_class("var").sizes_for(opened.layout), "num_layers": 1, "dim": 16, "num_heads": 1}
    model = build("var", sizes, seed=1, quantizer=opened.tokenizer.quantizer)
    torch.nn.init.normal_(model.head.weight, std=0.3, generator=torch.Generator().manual_seed(2))
    save_backbone(model, tmp_path / "var", opened.manifest["tokenizer"]["hash"])
    cache = taught(tmp_path / "var", scale_codes, tmp_path / "cache", "--top-k", 32, "--dtype", "float32")
    assert "4x4 map" in capsys.readouterr().out
    runs = [train(tmp_path / str(n), scale_codes, "model.family=var", "method=kd", f"teacher={each}", "train.updates=3")
            for n, each in enumerate((tmp_path / "var", cache))]  # fmt: skip
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=2e-5)


def test_in_a_loop_of_ones_own(tmp_path: Path, codes: Path, teacher: Path, whole: Path, flipped: Path):
    """`varkd.teach`, `varkd.load_teacher_cache`, `varkd.Distiller`: the loss of the live teacher."""
    dataset = varkd.CodeDataset(flipped)
    student = varkd.build("llamagen", {"vocab_size": 17, "num_classes": 10, "grid": (8, 8), "num_layers": 1, "dim": 16,
                                       "num_heads": 1})  # fmt: skip
    batch = DataLoader(dataset, 8).batch(0)
    found = [
        float(varkd.Distiller("kd", student, each, dataset.tokenizer, updates=1)(batch)[0].detach())
        for each in (varkd.load(teacher), varkd.load_teacher_cache(whole, dataset))
    ]
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    manifest = varkd.teach(teacher, codes, tmp_path / "cache", top_k=2, null=False, quiet=True)
    assert manifest == json.loads((tmp_path / "cache" / "manifest.json").read_text())
    held_out = DataLoader(varkd.CodeDataset(flipped, "validation"), 8).batch(0)
    with pytest.raises(varkd.VarkdError, match="on the train split"):
        varkd.Distiller("kd", student, varkd.load_teacher_cache(whole, dataset), dataset.tokenizer, updates=1)(held_out)
    with pytest.raises(varkd.VarkdError, match="made of other codes"):
        varkd.load_teacher_cache(whole, varkd.CodeDataset(codes))
