"""What is published, as values: nothing here is guessed, and what nobody stated is None."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from varkd.backbones.protocol import Backbone
from varkd.report.runs import RunFolder
from varkd.rollout import Sampler
from varkd.tokenizers.protocol import Tokenizer

SHIPPED_MODELS = {"llamagen": "modeling_llamagen", "var": "modeling_var", "arpg": "modeling_arpg"}
SHIPPED_DECODERS = {"vq": "decoder_vq", "multiscale": "decoder_multiscale", "pixels": "decoder_pixels"}
"""Family or kind -> the file in `shipped/` that runs it without varkd; its class has the name of ours."""


@dataclass(frozen=True)
class Teacher:
    """The model that taught: its folder's name, the hash of its weights, and what its config says."""

    name: str
    hash: str
    config: dict[str, Any] | None


@dataclass(frozen=True)
class Training:
    """How a run was trained. `start` names the weights that it began with, `changed` says whether the method is no
    longer the preset's own; `method` explains it in lines."""

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
    def has_pipeline(self) -> bool:
        """Whether the folder runs in diffusers."""
        return self.model.family in SHIPPED_MODELS and self.tokenizer.kind in SHIPPED_DECODERS

    @property
    def pipeline_sampler(self) -> dict[str, Any]:
        """The settings as the pipeline takes them; it decodes one step after the other."""
        sequential = {name: value for name, value in asdict(self.sampler).items() if name not in ("parallel", "window")}
        return {name: value for name, value in sequential.items() if name != "kind"}
