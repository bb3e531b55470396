"""Writing a published folder, whole or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from varkd import pictures
from varkd.files import atomic_folder, write_json, write_text
from varkd.folders import Own, json_with
from varkd.publishing.card import id_to_label, model_card, record
from varkd.publishing.facts import Publication
from varkd.tokenizers.store import save_tokenizer
from varkd.version import VERSION

_FORMAT = "varkd-published"
PUBLISHED = Own("a published model", ("varkd.json",), json_with(format=(_FORMAT,)),
                ("README.md", "samples.png", "model_index.json", "pipeline.py", "model", "tokenizer"))  # fmt: skip
SHIPPED = Path(__file__).parent / "shipped"
"""Code that stands alone: it is copied into what is published and never imports varkd."""
_DIFFUSERS = "0.42.0"
"""The version that `model_index.json` names: the oldest one that the tests were run with."""


def write_folder(publication: Publication, grid_HWC: NDArray[np.uint8], folder: Path) -> None:
    """Write everything below `folder`, which is replaced where it is an older publication.

    Raises:
        VarkdError: the folder holds something else, or cannot be written.
    """
    with atomic_folder(folder, PUBLISHED) as temporary:
        publication.model.save(temporary / "model")
        save_tokenizer(publication.tokenizer, temporary / "tokenizer")
        for path, shipped in publication.code_files.items():
            shutil.copyfile(SHIPPED / shipped, temporary / path)
        write_json(temporary / "model_index.json", _model_index(publication))
        pictures.save_png(temporary / "samples.png", grid_HWC)
        write_json(temporary / "varkd.json", {"format": _FORMAT, "version": 1, **record(publication, VERSION)})
        write_text(temporary / "README.md", model_card(publication))


def _model_index(publication: Publication) -> dict[str, Any]:
    """What `DiffusionPipeline.from_pretrained` reads first: the classes by file, and what the pipeline is told."""
    return {
        "_class_name": ["pipeline", "AutoregressivePipeline"],
        "_diffusers_version": _DIFFUSERS,
        **{component: list(module) for component, module in publication.modules.items()},
        "id2label": id_to_label(publication),
        "sampler": publication.pipeline_sampler,
    }
