"""`varkd analyze`: the diagnostics of one student and its teacher, as CSV files, `analysis.json` and a page.

Three contexts are compared: the codes of images (data), sequences that the teacher sampled (teacher) and sequences that
the student sampled (student), with the same labels, plans, sampler and noise. Everything that is drawn is written to
files first; `report.diagnostics` makes the page from those alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from varkd.backbones.protocol import Backbone
from varkd.backbones.store import weights_hash
from varkd.data.images import Split
from varkd.evaluate import diagnostics
from varkd.evaluate.diagnostics import CodeSpace, Sequences, Values, by_rank, measure
from varkd.files import write_json
from varkd.folders import Own, json_with
from varkd.report.diagnostics import write_page
from varkd.run import audits, curves
from varkd.run.curves import Table, write_tables
from varkd.run.environment import versions
from varkd.run.panels import CODEBOOK, CONTINUATIONS, codebook_panel, continuations_panel
from varkd.run.subject import Subject, open_subject, sequences_of

ANALYSIS = Own("an analysis", ("analysis.json",), json_with("teacher_hash", "split"),
               ("index.html", CODEBOOK, CONTINUATIONS, *(f"{name}.csv" for name in curves.TABLES)))  # fmt: skip
SECOND_QUANTITIES = ("jsd", "forward_kl", "acceptance", "top1")


def analyze_run(
    folder: Path,
    out: Path,
    *,
    teacher: Path | None = None,
    second: Path | None = None,
    data: Path | None = None,
    num: int = 1000,
    seed: int = 0,
    split: Split = "validation",
    device: str = "auto",
    quiet: bool = False,
) -> Path:
    """Write `out`: CSV files, `analysis.json` and `index.html`, whose path is returned.

    Args:
        folder: a student's run folder, or a model folder together with `data`.
        teacher: by default the run's own.
        second: another teacher, to ask whether teachers agree where the student goes.
        data: the codes folder; by default the run's own.
        num: sequences in each context; fewer where the split has fewer.

    Raises:
        VarkdError: no teacher, models that do not fit the codes, or an `out` that holds something else.
    """
    _check_out(out)
    subject = open_subject(folder, teacher, second, data, seed, device, quiet)
    contexts = sequences_of(subject, split, num)
    values = {name: measure(subject.student, subject.teacher, each, subject.space) for name, each in contexts.items()}
    if subject.second is not None:
        for name, each in contexts.items():
            values[name] |= _second(subject.teacher, subject.second, each, subject.space)
    plan, layout = contexts["data"].plan, subject.codes.layout
    ranked = {name: by_rank(found, plan) for name, found in values.items()}
    sizes = tuple(side * side for side in layout.scales) if layout.scales else None
    tables: dict[str, Table] = {
        "positions": curves.positions(ranked, sizes, seed),
        "maps": curves.maps(values, layout.grid, layout.scales),
        "accumulated": curves.accumulated_error(ranked, seed),
    }
    tables["calibration"], errors = curves.calibrations(values, seed)
    found = {"ece": errors, **audits.all_of(subject, contexts, values, tables)}
    out.mkdir(parents=True, exist_ok=True)
    found["codebook"] = codebook_panel(subject, contexts["data"], split, num, out)
    found["continuations"] = continuations_panel(subject, contexts["data"], out)
    write_json(out / "analysis.json", {**_about(subject, contexts, split, num), **found})  # first: it marks the folder
    write_tables(out, tables)
    return write_page(out)


def _second(teacher: Backbone, second: Backbone, sequences: Sequences, space: CodeSpace) -> Values:
    """The second teacher in the place of the teacher, the teacher in that of the student: KL(second || teacher)."""
    found = measure(teacher, second, sequences, space, SECOND_QUANTITIES)
    return {f"second_{name}": value_BL for name, value_BL in found.items()}


def _about(subject: Subject, contexts: Mapping[str, Sequences], split: str, asked: int) -> dict[str, Any]:
    """What the numbers are of."""
    run, layout, data = subject.run, subject.codes.layout, contexts["data"]
    names: Tensor = data.condition.label_B.cpu()
    return {
        "name": (run.name if run else None) or subject.folder.resolve().name,
        "method": run.preset if run else None,
        "student": str(subject.folder),
        "teacher": str(subject.teacher_path),
        "second": str(subject.second_path) if subject.second_path else None,
        "teacher_hash": weights_hash(subject.teacher),
        "families": [subject.student.family, subject.teacher.family],
        "parameters": {"student": _size(subject.student), "teacher": _size(subject.teacher)},
        "data": subject.codes.manifest["source"]["name"],
        "tokenizer": subject.codes.manifest["tokenizer"]["hash"],
        "split": split,
        "num": len(data),
        "num_asked": asked,
        "seed": subject.seed,
        "labels": torch.bincount(names, minlength=layout.num_classes).tolist(),
        "sampler": asdict(subject.sampler),
        "grid": list(layout.grid),
        "scales": list(layout.scales) if layout.scales else None,
        "steps": len(data.plan.sizes),
        "sequence_length": data.codes_BL.shape[1],
        "vocab_size": layout.vocab_size,
        "raster": bool((data.plan.order_BL == torch.arange(data.codes_BL.shape[1], device=subject.device)).all()),
        "code_space": {
            "clusters": int(subject.space.cluster_V.max()) + 1,
            "assignment": subject.clusters.key,
            "radius": subject.space.radius,
            "slack": diagnostics.SLACK,
            "mass": diagnostics.MASS,
            "neighbors": 0 if subject.space.neighbor_Vk is None else subject.space.neighbor_Vk.shape[1],
        },
        "versions": versions(),
        "device": str(subject.device),
    }


def _size(model: Backbone) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _check_out(out: Path) -> None:
    """Raise `VarkdError` where the folder holds anything that no analysis wrote; a language pair may be unfinished."""
    unfinished = out.is_dir() and [path.name for path in out.iterdir()] == ["language"]
    if not (unfinished and (out / "language" / "settings.json").is_file()):
        ANALYSIS.check(out)
