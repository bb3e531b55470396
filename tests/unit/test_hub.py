"""Models and tokenizers to the hub and back: a folder stands in for a repository, a recorder for the client."""

from __future__ import annotations

import shutil
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch

import varkd
from tiny_models import FAMILIES, tiny_model, tiny_tokenizer
from varkd.backbones.store import weights_hash
from varkd.errors import VarkdError

huggingface_hub = pytest.importorskip("huggingface_hub")
hub_errors = pytest.importorskip("huggingface_hub.errors")


class FakeHub:
    """One repository in a folder; every call is written down."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls = folder, []

    def api(self, token: Any = None) -> FakeHub:
        self.calls.append(("token", token))
        return self

    def create_repo(self, repo_id: str, **options: Any) -> None:
        self.calls.append(("create", repo_id, options))

    def upload_folder(self, *, repo_id: str, folder_path: Path, **options: Any) -> str:
        self.calls.append(("upload", repo_id, options))
        shutil.copytree(folder_path, self.folder / repo_id, dirs_exist_ok=True)
        return f"https://huggingface.co/{repo_id}/commit/1"

    def snapshot_download(self, repo_id: str, *, allow_patterns: list[str], **options: Any) -> str:
        self.calls.append(("download", repo_id, options))
        source, target = self.folder / repo_id, self.folder / "cache" / repo_id
        for path in (path for path in source.rglob("*") if path.is_file()):
            name = path.relative_to(source).as_posix()
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target / name)
        return str(target)


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", fake.api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    return fake


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(huggingface_hub, "HfApi", fail)


def hub_error(name: str, text: str = "404 Client Error") -> Exception:
    """One of the client's own errors, whose constructors want a response of its HTTP library."""
    error = getattr(hub_errors, name)
    made = error.__new__(error)
    made.args = (text,)
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_models_and_tokenizers_come_back_from_a_folder(family: str, tmp_path: Path):
    tokenizer = tiny_tokenizer(family)
    model = tiny_model(family, tokenizer)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    for place in (tmp_path / "model", tmp_path):  # the folder itself, and one that holds it
        loaded = varkd.Backbone.from_pretrained(place)
        assert weights_hash(loaded) == weights_hash(model) and not loaded.training
        assert loaded.class_names == model.class_names and loaded.tokenizer_hash == tokenizer.hash
    assert varkd.Tokenizer.from_pretrained(str(tmp_path / "tokenizer")).hash == tokenizer.hash
    assert type(type(tokenizer).from_pretrained(tmp_path)) is type(tokenizer)
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"config.json", "model.safetensors"}


def test_a_model_goes_to_the_hub_and_comes_back(fake_hub: FakeHub):
    model = tiny_model("llamagen", tiny_tokenizer("llamagen"))
    address = model.push_to_hub("me/student", private=True, token="secret", commit_message="first")
    assert address == "https://huggingface.co/me/student/commit/1"
    assert fake_hub.calls == [
        ("token", "secret"),
        ("create", "me/student", {"private": True, "exist_ok": True, "repo_type": "model"}),
        ("upload", "me/student", {"repo_type": "model", "commit_message": "first"}),
    ]
    loaded = varkd.LlamaGen.from_pretrained("me/student", revision="v1", token=False)
    assert torch.equal(loaded.head.weight, model.head.weight)
    assert fake_hub.calls[-1][2] == {"revision": "v1", "token": False, "cache_dir": None, "local_files_only": False}


def test_only_the_module_that_is_asked_for_is_downloaded(fake_hub: FakeHub, tmp_path: Path):
    tokenizer = tiny_tokenizer("var")
    repository = fake_hub.folder / "me/pair"
    tokenizer.save_pretrained(repository / "tokenizer")
    tiny_model("var", tokenizer).save_pretrained(repository / "model")
    (repository / "model" / "code.py").write_text("raise SystemExit")
    assert varkd.Tokenizer.from_pretrained("me/pair").hash == tokenizer.hash
    cached = fake_hub.folder / "cache" / "me/pair"
    assert sorted(path.name for path in cached.rglob("*") if path.is_file()) == ["config.json", "model.safetensors"]
    assert not (cached / "model").exists()


def test_another_family_than_the_one_asked_for(tmp_path: Path):
    tiny_model("rar", tiny_tokenizer("rar")).save_pretrained(tmp_path / "model")
    with pytest.raises(VarkdError, match="holds a RAR, not a LlamaGen"):
        varkd.LlamaGen.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("source", ["no-such-folder", "a/b/c", "../x", Path("me/student")])
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(
    source: Any, fake_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(VarkdError, match=r"no folder .*OWNER/NAME"):
        varkd.Backbone.from_pretrained(source)
    assert fake_hub.calls == []


def test_a_mistyped_path_is_not_looked_for_on_the_hub(
    fake_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(VarkdError, match="no folder runs/studnet"):
        varkd.Backbone.from_pretrained("runs/studnet")
    assert fake_hub.calls == []


@pytest.mark.parametrize("name", ["student", "me/", "me/a/b", "hub:me/a", ""])
def test_pushing_to_what_is_no_repository(name: str, fake_hub: FakeHub):
    with pytest.raises(VarkdError, match="OWNER/NAME"):
        tiny_tokenizer("arpg").push_to_hub(name)
    assert fake_hub.calls == []


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (hub_error("RepositoryNotFoundError"), "no such repository, or a private one"),
        (hub_error("GatedRepoError"), "is gated"),
        (hub_error("RevisionNotFoundError"), "no such revision"),
        (hub_error("LocalEntryNotFoundError", "cannot find the files in the cache"), "check the network"),
        (ConnectionError("[Errno -2] Name or service not known"), "Name or service not known.*check the network"),
        (hub_error("HFValidationError", "Repo id must use alphanumeric chars"), "alphanumeric"),
    ],
)
def test_what_the_hub_refuses_is_one_line(error: Exception, told: str, monkeypatch: pytest.MonkeyPatch):
    failing(monkeypatch, error)
    for action in (
        lambda: varkd.Backbone.from_pretrained("me/student"),
        lambda: tiny_tokenizer("arpg").push_to_hub("me/student"),
    ):
        with pytest.raises(VarkdError, match=told) as refused:
            action()
        assert len(str(refused.value).splitlines()) == 1


def test_without_the_hub_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tokenizer = tiny_tokenizer("arpg")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert varkd.Tokenizer.from_pretrained(tmp_path / "tokenizer").hash == tokenizer.hash  # a folder needs no client
    for action in (
        lambda: varkd.Tokenizer.from_pretrained("me/student"),
        lambda: tokenizer.push_to_hub("me/student"),
    ):
        with pytest.raises(VarkdError, match=r"pip install 'varkd\[hub\]'"):
            action()
