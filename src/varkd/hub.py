"""The Hugging Face hub: folders from it, folders to it, and how our modules go there and back.

What `save` writes today (`config.json`, `model.safetensors`) is what stands on the hub. The mixins of huggingface_hub
would write a `config.json` of their own and would have to be imported with every model; so the client is called here
instead, when it is needed (`pip install 'varkd[hub]'`).
"""

from __future__ import annotations

import re
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

from varkd.errors import VarkdError, missing_extra
from varkd.folders import expand

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
Token = str | bool | None
"""An access token; None takes the one of `hf auth login`, False sends none."""


class OnHub(ABC):
    """Save, load and push a module under one layout; `hub_folder` is where it stands in a published folder."""

    hub_folder: ClassVar[str]

    @abstractmethod
    def save_pretrained(self, folder: str | Path) -> None:
        """Write the module's folder (replaced as a whole).

        Raises:
            VarkdError: the folder holds something else, or cannot be written.
        """

    @classmethod
    @abstractmethod
    def _from_folder(cls, folder: Path) -> Any:
        """The module that stands in a folder: of this class or of a sibling."""

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        token: Token = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Load from a folder, or from a repository of the hub (OWNER/NAME): in evaluation mode, on the CPU.

        Both may be what `save_pretrained` wrote or what `varkd publish` wrote. The other arguments are for the hub.

        Raises:
            VarkdError: nothing there that can be read, another kind of module, no network, or no hub client.
        """
        part = cls.hub_folder
        patterns = [f"{place}{ending}" for place in ("", f"{part}/") for ending in ("config.json", "model.safetensors")]
        folder = fetch(
            source, patterns, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
        )
        found = cls._from_folder(folder / part if (folder / part / "config.json").is_file() else folder)
        if not isinstance(found, cls):
            raise VarkdError(f"{source} holds a {type(found).__name__}, not a {cls.__name__}: load it as one")
        return found

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: Token = None,
        commit_message: str | None = None,
    ) -> str:
        """Upload to the repository OWNER/NAME, which is made where there is none; returns the address of the commit.

        Raises:
            VarkdError: not a repository's name, no permission, no network, or no hub client.
        """
        check_repo(repo_id)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / self.hub_folder
            self.save_pretrained(folder)
            return push(folder, repo_id, private=private, token=token, commit_message=commit_message)


def check_repo(repo_id: str) -> None:
    """Raise `VarkdError` unless this can be the name of a repository."""
    if not _REPO.fullmatch(repo_id):
        raise VarkdError(f"'{repo_id}' is not the name of a hub repository: write OWNER/NAME")


def fetch(
    source: str | Path,
    patterns: Sequence[str],
    *,
    revision: str | None = None,
    token: Token = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder `source` itself, or where the files `patterns` of the repository `source` lie on this machine.

    Raises:
        VarkdError: neither a folder nor a repository that can be downloaded.
    """
    folder = Path(expand(str(source)))
    if folder.is_dir():
        return folder
    name = str(source)
    if isinstance(source, Path) or not _REPO.fullmatch(name) or folder.parent.is_dir():
        raise VarkdError(f"no folder {source}: check the path (a hub repository is written OWNER/NAME)")
    library = client()
    with _told(f"no folder {name} here, and could not download it from the Hugging Face hub", name):
        found = library.snapshot_download(
            name,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            allow_patterns=list(patterns),
        )
    return Path(found)


def push(
    folder: Path, repo_id: str, *, private: bool | None = None, token: Token = None, commit_message: str | None = None
) -> str:
    """Upload a folder as one commit to a model repository, which is made where there is none; returns its address.

    Raises:
        VarkdError: not a repository's name, no permission, no network, or no hub client.
    """
    check_repo(repo_id)
    library = client()
    with _told(f"could not upload to {repo_id} on the Hugging Face hub", repo_id):
        api = library.HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True, repo_type="model")
        message = commit_message or "Upload with varkd"
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, repo_type="model", commit_message=message)
    return str(commit)


def client() -> Any:
    """huggingface_hub.

    Raises:
        VarkdError: it is not installed.
    """
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        if (advice := missing_extra(error)) is None:
            raise
        raise VarkdError(advice) from None
    return huggingface_hub


@contextmanager
def _told(what: str, repo_id: str) -> Iterator[None]:
    """Turn what the client raises into one line each."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise VarkdError(f"{what}: {repo_id} is gated; ask for access on its page and `hf auth login`") from error
    except errors.RepositoryNotFoundError as error:
        raise VarkdError(f"{what}: no such repository, or a private one; check the name, or `hf auth login`") from error
    except errors.RevisionNotFoundError as error:
        raise VarkdError(f"{what}: {repo_id} has no such revision; check it") from error
    except Exception as error:
        # The client and its HTTP library, which is not the same in every version, raise many types for what a network
        # or a permission refuses.
        raise VarkdError(f"{what} ({_reason(error)}): check the network, the name and `hf auth whoami`") from error


def _reason(error: BaseException) -> str:
    """The first line of the innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
