"""The YAML block at the head of a model card, by the rules of the Hugging Face hub (hub-docs, modelcard.md)."""

from __future__ import annotations

import math
import re
from typing import Any

from varkd.config import dump_tree
from varkd.errors import VarkdError
from varkd.hub import check_repo
from varkd.publishing.facts import Publication
from varkd.report.tables import COLUMNS

_TASK = {"type": "unconditional-image-generation", "name": "Class-conditional image generation"}
"""The hub has no task for images by class; this is the nearest one."""
PLAIN = ("num_samples", "parameters", "updates", "seconds", "samples_per_second")
"""Columns that say what was measured, or what it took: no results."""
LICENSES = frozenset((
    "afl-3.0", "agpl-3.0", "apache-2.0", "apple-amlr", "apple-ascl", "artistic-2.0", "bigcode-openrail-m",
    "bigscience-bloom-rail-1.0", "bigscience-openrail-m", "bsd", "bsd-2-clause", "bsd-3-clause",
    "bsd-3-clause-clear", "bsl-1.0", "c-uda", "cc", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0",
    "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0",
    "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0",
    "cdla-permissive-1.0", "cdla-permissive-2.0", "cdla-sharing-1.0", "creativeml-openrail-m",
    "deepfloyd-if-license", "ecl-2.0", "epl-1.0", "epl-2.0", "etalab-2.0", "eupl-1.1", "eupl-1.2", "gfdl", "gpl",
    "gpl-2.0", "gpl-3.0", "intel-research", "isc", "lgpl", "lgpl-2.1", "lgpl-3.0", "lgpl-lr", "lppl-1.3c", "mit",
    "mpl-2.0", "ms-pl", "ncsa", "odbl", "odc-by", "ofl-1.1", "openrail", "openrail++", "osl-3.0", "pddl",
    "postgresql", "unlicense", "wtfpl", "zlib",
))  # fmt: skip
"""What the hub takes as `license`; others are `other` with a `license_name`."""


def check_license(text: str | None) -> None:
    """Raise `VarkdError` unless this can name a license on the hub."""
    if text is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+_-]*", text):
        raise VarkdError(
            f"--license '{text}': give an identifier such as apache-2.0, mit or cc-by-nc-4.0, or a short "
            "name of your own without spaces"
        )


def check_base_model(text: str | None) -> None:
    """Raise `VarkdError` unless this can be a repository of the hub."""
    if text is not None:
        check_repo(text)


def front_matter(publication: Publication) -> str:
    """The block with its two rules."""
    model, training = publication.model, publication.training
    tags = ["varkd", "image-generation", "autoregressive", "class-conditional", model.family]
    if training is not None and training.teacher is not None:
        tags.insert(1, "knowledge-distillation")
    found = {
        **_license(publication.license),
        "library_name": "diffusers",
        "pipeline_tag": _TASK["type"],
        "tags": tags,
    }
    if publication.base_model:
        found["base_model"] = publication.base_model
    if results := _results(publication):
        found["model-index"] = [{"name": publication.name, "results": [results]}]
    return f"---\n{dump_tree(found)}---\n"


def _license(text: str | None) -> dict[str, str]:
    if text is None:
        return {"license": "unknown"}
    if text.lower() in LICENSES:
        return {"license": text.lower()}
    return {"license": "other", "license_name": text.lower()}


def _results(publication: Publication) -> dict[str, Any] | None:
    """One entry of a model index: the metrics of the run's own evaluation, by their names here, never as "fid"."""
    if publication.run is None or publication.run.metrics is None or publication.training is None:
        return None
    measured, num = publication.run.metrics["metrics"], publication.run.metrics["num_samples"]
    values = {column: (measured.get(column.key) or {}).get("value") for column in COLUMNS if column.key not in PLAIN}
    rows = [
        {
            "type": column.key,
            "name": f"{column.title} ({num:,} samples, features of varkd's own network)",
            "value": round(value * column.scale, 4),
        }
        for column, value in values.items()
        if value is not None and math.isfinite(value)
    ]
    data = publication.training.data
    slug = re.sub(r"[^a-z0-9._/-]+", "-", data.lower()).strip("-") or "images"
    return {"task": _TASK, "dataset": {"name": data, "type": slug}, "metrics": rows} if rows else None
