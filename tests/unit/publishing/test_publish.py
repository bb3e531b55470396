"""`varkd publish`: what the folder holds, what the card says, and what is refused with nothing written."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import varkd
from varkd import pictures
from varkd.cli import main
from varkd.config import read_run
from varkd.errors import VarkdError
from varkd.publishing import folder as publishing_folder
from varkd.publishing.facts import without_folders
from varkd.publishing.metadata import LICENSES

Refusal = pytest.CaptureFixture[str]


def command(*arguments: object) -> int:
    return main(["publish", *map(str, arguments), "--device", "cpu"])


def refused(capsys: Refusal, *arguments: object) -> str:
    """The one line with which a command ends that writes nothing."""
    capsys.readouterr()
    assert command(*arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("varkd: error: "), lines
    return lines[0]


def metadata(folder: Path) -> dict[str, Any]:
    """The YAML block of the card, which the hub's own client must take as it is."""
    text = (folder / "README.md").read_text()
    card = pytest.importorskip("huggingface_hub").ModelCard(text)  # raises for metadata that it does not understand
    assert card.data.to_dict()["license"]
    return yaml.safe_load(text.split("---\n")[1])


def test_a_run_becomes_a_folder(run: Path, tmp_path: Path, capsys: Refusal):
    assert command(run, "--to", tmp_path / "out", "--license", "Apache-2.0", "--base-model", "me/teacher") == 0
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "out")]
    files = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert files == {"README.md", "samples.png", "varkd.json", "model_index.json", "pipeline.py", "model/config.json",
                     "model/model.safetensors", "model/modeling_llamagen.py", "tokenizer/config.json",
                     "tokenizer/decoder_pixels.py"}  # fmt: skip
    assert weights(varkd.Backbone.from_pretrained(tmp_path / "out")) == weights(varkd.load(run))
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "AutoregressivePipeline"]
    assert index["model"] == ["modeling_llamagen", "LlamaGen"] and index["tokenizer"] == ["decoder_pixels", "Pixels"]
    assert index["sampler"]["guidance"] == 1.5 and index["sampler"]["temperature"] == 0.8
    assert not any(isinstance(value, list) for name, value in index.items() if name not in ("_class_name", "model",
                   "tokenizer")), "diffusers takes every list for a component"  # fmt: skip


def weights(model: varkd.Backbone) -> list[float]:
    return [float(value.double().sum()) for value in model.state_dict().values()]


def test_the_card_says_what_the_files_say(run: Path, tmp_path: Path):
    assert command(run, "--to", tmp_path / "out", "--license", "apache-2.0", "--base-model", "me/teacher") == 0
    found, text = metadata(tmp_path / "out"), (tmp_path / "out" / "README.md").read_text()
    assert found["license"] == "apache-2.0" and found["base_model"] == "me/teacher"
    assert found["library_name"] == "diffusers" and {"varkd", "knowledge-distillation", "llamagen"} <= set(
        found["tags"]
    )
    metrics = json.loads((run / "metrics.json").read_text())["metrics"]
    results = {row["type"]: row["value"] for row in found["model-index"][0]["results"][0]["metrics"]}
    assert results["fd"] == pytest.approx(metrics["fd"]["value"], abs=1e-3) and "fid" not in results
    assert results["accuracy"] == pytest.approx(100 * metrics["accuracy"]["value"], abs=1e-3)
    low, high = (metrics["fd"][end] for end in ("low", "high"))
    printed = next(line for line in text.splitlines() if line.startswith("| FD "))
    start, end = map(float, printed.split("[")[1].split("]")[0].split(","))
    assert (start, end) == (pytest.approx(low, rel=0.05), pytest.approx(high, rel=0.05))
    assert "## Evaluation" in text and "seed 1234" in text and '"guidance": 1.5' in text
    assert "Teacher: `teacher`, llamagen" in text and "Method: **kd**" in text and "KL(p || q)" in text
    assert "It started from the weights of `teacher`" in text and "temperature 0.8, guidance 1.5" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in rows} == {5}
    assert str(run.parent) not in text and str(tmp_path) not in text, "no path of this machine"
    for path in (tmp_path / "out").glob("*.json"):
        assert str(run.parent) not in path.read_text()


def test_nothing_is_claimed_where_nothing_was_measured(model_folder: Path, tmp_path: Path):
    tokenizer = tmp_path / "tokenizer"
    assert command(model_folder, "--tokenizer", tokenizer, "--to", tmp_path / "out", "--guidance", "2") == 0
    found, text = metadata(tmp_path / "out"), (tmp_path / "out" / "README.md").read_text()
    assert found["license"] == "unknown" and "model-index" not in found and "base_model" not in found
    assert "knowledge-distillation" not in found["tags"]
    assert "Nothing was measured" in text and "files of its training were not published" in text
    assert "Unknown; the weights derive from" in text
    assert "2: a \\| bird" in text and "4: \\*star\\*" in text, "class names are text, not markup"
    assert json.loads((tmp_path / "out" / "model_index.json").read_text())["sampler"]["guidance"] == 2.0


@pytest.mark.parametrize(
    ("given", "expected"),
    [("MIT", {"license": "mit"}), ("cc-by-nc-4.0", {"license": "cc-by-nc-4.0"}),
     ("My-Own-1.0", {"license": "other", "license_name": "my-own-1.0"})],
)  # fmt: skip
def test_licenses(given: str, expected: dict[str, str], model_folder: Path, tmp_path: Path):
    varkd.publish(model_folder, tmp_path / "out", tokenizer=tmp_path / "tokenizer", license=given, rows=1, quiet=True)
    found = metadata(tmp_path / "out")
    assert {name: value for name, value in found.items() if name.startswith("license")} == expected
    assert f"{given}, as stated by who published this" in (tmp_path / "out" / "README.md").read_text()


def test_license_identifiers_are_lower_case():
    assert all(name == name.lower() and not name.endswith(",") for name in LICENSES) and "other" not in LICENSES


def test_the_first_row_of_the_grid_is_what_the_code_in_the_card_draws(run: Path, tmp_path: Path):
    varkd.publish(run, tmp_path / "out", seed=5, rows=2, quiet=True)
    text = (tmp_path / "out" / "README.md").read_text()
    code = (
        text.split("```python\nimport varkd\n")[1].split("```")[0].replace("path/to/this/folder", str(tmp_path / "out"))
    )
    names: dict[str, Any] = {"varkd": varkd}
    exec(code, names)
    first_row = pictures.grid(names["images"].permute(0, 2, 3, 1).numpy(), 10)
    grid = np.asarray(Image.open(tmp_path / "out" / "samples.png"))
    assert np.array_equal(grid[: len(first_row)], first_row)
    assert len(grid) > len(first_row)


def test_many_classes_are_shown_evenly_spread(tmp_path: Path):
    from tiny_models import tiny_tokenizer
    from varkd.backbones.store import build

    tokenizer = tiny_tokenizer("llamagen")
    model = build("llamagen", {"vocab_size": 32, "num_classes": 120, "grid": (4, 4), "num_layers": 1, "dim": 16,
                               "num_heads": 2})  # fmt: skip
    model.save(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    varkd.publish(tmp_path / "model", tmp_path / "out", tokenizer=tmp_path / "tokenizer", rows=1, quiet=True)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "class_labels=[0, 12, 24, 36, 48, 60, 72, 84, 96, 108]" in text and "nobody named them" in text


def test_publishing_again_replaces_and_anything_else_stays(run: Path, tmp_path: Path, capsys: Refusal):
    out = tmp_path / "out"
    assert command(run, "--to", out) == 0
    (out / "model" / "stale.txt").write_text("old")
    assert command(run, "--to", out, "--name", "second") == 0
    assert not (out / "model" / "stale.txt").exists()
    assert (out / "README.md").read_text().split("---\n")[2].strip().startswith("# second")
    (out / "notes.txt").write_text("mine")
    before = (out / "README.md").read_bytes()
    assert "notes.txt" in refused(capsys, run, "--to", out, "--name", "third")
    assert (out / "README.md").read_bytes() == before and (out / "notes.txt").read_text() == "mine"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "README.md").write_text("a project")
    assert "--to" in refused(capsys, run, "--to", tmp_path / "other")
    assert "--to" in refused(capsys, run, "--to", run)


def test_a_failure_leaves_nothing_behind(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*arguments: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(publishing_folder, "model_card", fail)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(VarkdError, match="disk is full"):
        varkd.publish(model_folder, tmp_path / "out", tokenizer=tmp_path / "tokenizer", rows=1, quiet=True)
    assert sorted(tmp_path.iterdir()) == before


def test_numbers_of_other_weights_are_not_published(run: Path, tmp_path: Path, capsys: Refusal):
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["protocol"]["checkpoint"] = "step-00000003"
    (run / "metrics.json").write_text(json.dumps(metrics))
    told = refused(capsys, run, "--to", tmp_path / "out")
    assert "step-00000003" in told and "varkd evaluate" in told and not (tmp_path / "out").exists()


def test_numbers_of_parallel_decoding_are_told_apart(run: Path, tmp_path: Path):
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["protocol"]["sampler"] |= {"parallel": "zipar", "window": 2}
    (run / "metrics.json").write_text(json.dumps(metrics))
    varkd.publish(run, tmp_path / "out", rows=1, quiet=True)
    assert "measured with parallel decoding" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--license", "two words"], "--license"),
        (["--base-model", "teacher"], "OWNER/NAME"),
        (["--rows", "0"], "--rows"),
        (["--parallel", "zipar"], "parallel"),
        (["--tokenizer", "."], "leave --tokenizer out"),
        (["--seed", str(2**70)], "seed"),
    ],
)
def test_bad_options(options: list[str], told: str, run: Path, tmp_path: Path, capsys: Refusal):
    assert told in refused(capsys, run, "--to", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_model_folders_need_their_own_tokenizer(model_folder: Path, tmp_path: Path, capsys: Refusal):
    from tiny_models import tiny_tokenizer

    assert "--tokenizer DIR" in refused(capsys, model_folder, "--to", tmp_path / "out")
    torch.manual_seed(9)
    other = tiny_tokenizer("rar")
    other.save_pretrained(tmp_path / "other")
    told = refused(capsys, model_folder, "--tokenizer", tmp_path / "other", "--to", tmp_path / "out")
    assert other.hash[:12] in told
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps(config | {"tokenizer_hash": None}))
    tiny_tokenizer("arpg").save_pretrained(tmp_path / "pixels")
    assert "the tokenizer 17 and 16" in refused(capsys, model_folder, "--tokenizer", tmp_path / "pixels", "--to",
                                                tmp_path / "out")  # fmt: skip
    assert "no model at" in refused(capsys, tmp_path / "nothing", "--to", tmp_path / "out")


def test_to_the_hub(run: Path, capsys: Refusal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    hub = pytest.importorskip("huggingface_hub")
    calls: list[Any] = []

    class Recorder:
        def __init__(self, token: Any = None) -> None:
            calls.append(token)

        def create_repo(self, repo_id: str, **options: Any) -> None:
            calls.append((repo_id, options))

        def upload_folder(self, *, repo_id: str, folder_path: Path, **options: Any) -> str:
            shutil.copytree(folder_path, tmp_path / "uploaded")
            calls.append((repo_id, options))
            return "https://huggingface.co/me/tiny/commit/1"

    monkeypatch.setattr(hub, "HfApi", Recorder)
    assert command(run, "--to", "hub:me/tiny", "--private") == 0
    assert capsys.readouterr().out.splitlines() == ["https://huggingface.co/me/tiny/commit/1"]
    assert calls == [
        None,
        ("me/tiny", {"private": True, "exist_ok": True, "repo_type": "model"}),
        ("me/tiny", {"repo_type": "model", "commit_message": "Publish tiny"}),
    ]
    text = (tmp_path / "uploaded" / "README.md").read_text()
    assert 'DiffusionPipeline.from_pretrained("me/tiny", trust_remote_code=True)' in text
    assert "OWNER/NAME" in refused(capsys, run, "--to", "hub:tiny")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "varkd[hub]" in refused(capsys, run, "--to", "hub:me/tiny")


@pytest.mark.parametrize(
    ("given", "shown"),
    [("/home/ann/my pets/train-*.parquet,/home/ann/test.parquet", "train-*.parquet,test.parquet"),
     ("~/pets", "pets"), ("../x/pets", "pets"), ("/pets", "pets"), ("ylecun/mnist", "ylecun/mnist"),
     ("digits", "digits"), ("varkd features of /home/ann/pets", "varkd features of pets")],
)  # fmt: skip
def test_names_of_images_without_folders(given: str, shown: str):
    assert without_folders(given) == shown


def test_paths_in_the_protocol_stay_at_home(run: Path, tmp_path: Path):
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["protocol"]["reference"]["name"] = "/home/ann/pets"
    metrics["protocol"]["features"]["name"] = "varkd features of /home/ann/pets"
    (run / "metrics.json").write_text(json.dumps(metrics))
    varkd.publish(run, tmp_path / "out", rows=1, quiet=True)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "ann" not in text and '"name": "pets"' in text and '"varkd features of pets"' in text


def test_the_default_sampler_is_the_one_of_the_numbers(run: Path, model_folder: Path):
    from varkd.run.publish import default_sampler

    assert default_sampler(run) == read_run(run).evaluation.sampler
    assert default_sampler(model_folder) == varkd.Sampler()
