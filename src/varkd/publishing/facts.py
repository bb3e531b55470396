"""What is published, as values: nothing here is guessed, and what nobody stated is None."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from varkd.backbones.protocol import Backbone
from varkd.report.runs import RunFolder
from varkd.rollout import Sampler
from varkd.tokenizers.protocol import Tokenizer


@dataclass(frozen=True)
class Teacher:
    """The model that taught: its folder's name, the hash of its weights, and what its config says."""

    name: str
    hash: str
    config: dict[str, Any] | None


@dataclass(frozen=True)
class Training:
    """How a run was trained. `start` names the weights that it began with, `changed` says whether the method is no
    longer the preset's own; `method` explains it in lines. `num_sampled` is the number of a teacher's samples
    where the run was trained on such and not on images."""

    preset: str
    source: str
    summary: str
    changed: bool
    method: Sequence[str]
    updates: int
    batch_size: int
    data: str
    num_images: int
    start: str | None
    teacher: Teacher | None
    num_sampled: int | None = None


@dataclass(frozen=True)
class Publication:
    """Everything that a published folder says.

    `run` holds the run's metrics, where they were measured on these very weights. `license` is an identifier or a name,
    `base_model` a repository of the hub; `repo_id` is where the folder goes, None for a folder on this machine.
    """

    name: str
    model: Backbone
    tokenizer: Tokenizer
    sampler: Sampler
    seed: int
    columns: int
    training: Training | None = None
    run: RunFolder | None = None
    license: str | None = None
    base_model: str | None = None
    repo_id: str | None = None

    @property
    def class_names(self) -> tuple[str, ...]:
        """By label; digits where nobody named the classes."""
        return self.model.class_names or tuple(map(str, range(self.model.num_classes)))

    @property
    def modules(self) -> dict[str, tuple[str, str]]:
        """Component of the pipeline -> (file in `shipped/` that runs it without varkd, its class, named as ours)."""
        return {
            "model": (f"modeling_{self.model.family}", type(self.model).__name__),
            "tokenizer": (f"decoder_{self.tokenizer.kind}", type(self.tokenizer).__name__),
        }

    @property
    def code_files(self) -> dict[str, str]:
        """Where each file of code stands in the folder -> its name in `shipped/`."""
        components = {f"{folder}/{file}.py": f"{file}.py" for folder, (file, _) in self.modules.items()}
        return {"pipeline.py": "pipeline.py", **components}

    @property
    def pipeline_sampler(self) -> dict[str, Any]:
        """The settings as the pipeline takes them; it decodes one step after the other."""
        ours_alone = ("kind", "parallel", "window")
        return {name: value for name, value in asdict(self.sampler).items() if name not in ours_alone}


def without_folders(text: str) -> str:
    """The names of images (comma-separated, as given to varkd) without the folders of this machine; hub ids stay."""
    return re.sub(r"(?<![^\s,])(?:~|\.{1,2})?/(?:[^,]*/)?", "", text)
