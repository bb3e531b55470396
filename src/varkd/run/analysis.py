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
from varkd.distill.spaces import Clusters
from varkd.evaluate import diagnostics
from varkd.evaluate.diagnostics import CodeSpace, Sequences, Values, by_rank, measure, sampled
from varkd.files import write_json
from varkd.folders import Own, json_with
from varkd.report.diagnostics import write_page
from varkd.rollout import Sampler
from varkd.run import audits, curves
from varkd.run.curves import Table, write_tables
from varkd.run.environment import versions
from varkd.run.language import Language, language_pair
from varkd.run.subject import Subject, open_subject, sequences_of
from varkd.types import Condition
from varkd.world import Rng

ANALYSIS = Own("an analysis", ("analysis.json",), json_with("teacher_hash", "split"),
               ("index.html", "language", *(f"{name}.csv" for name in curves.TABLES)))  # fmt: skip
LANGUAGE_QUANTITIES = ("teacher_entropy", "student_entropy", "forward_kl", "reverse_kl", "total_variation", "top1",
                       "top5", "top1_cluster", "n90", "n90_clusters", "perplexity", "max_prob", "cluster_mass",
                       "ce", "ce_teacher")  # fmt: skip
SECOND_QUANTITIES = ("jsd", "forward_kl", "acceptance", "top1")


def analyze_run(
    folder: Path, out: Path, *, teacher: Path | None = None, second: Path | None = None, data: Path | None = None,
    language: Language | None = None, num: int = 1000, seed: int = 0, split: Split = "validation",
    device: str = "auto", quiet: bool = False,
) -> Path:  # fmt: skip
    """Write `out`: CSV files, `analysis.json`, `index.html` (its path is returned), and the language pair if asked for.

    Args:
        folder: a student's run folder, or a model folder together with `data`.
        teacher: by default the run's own.
        second: another teacher, to ask whether teachers agree where the student goes.
        data: the codes folder; by default the run's own.
        language: train (or find) a language pair and set it beside the images.
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
    if language is not None:
        found["language"] = _language(out / "language", language, len(contexts["data"]), seed, subject, tables)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "analysis.json", {**_about(subject, contexts, split, num), **found})  # first: it marks the folder
    write_tables(out, tables)
    return write_page(out)


def _second(teacher: Backbone, second: Backbone, sequences: Sequences, space: CodeSpace) -> Values:
    """The second teacher in the place of the teacher, the teacher in that of the student: KL(second || teacher)."""
    found = measure(teacher, second, sequences, space, SECOND_QUANTITIES)
    return {f"second_{name}": value_BL for name, value_BL in found.items()}


def _language(
    folder: Path, settings: Language, num: int, seed: int, subject: Subject, tables: dict[str, Table]
) -> dict[str, Any]:
    """Measure the language pair as the images are measured: its clusters are of the teacher's own output rows."""
    pair = language_pair(folder, settings, subject.device, subject.quiet)
    codes_NL = pair.text.validation_ML[:num].to(subject.device)
    row_N = torch.arange(len(codes_NL), device=subject.device)
    data = Sequences(codes_NL, Condition(torch.zeros_like(row_N)), pair.student.plan(len(codes_NL), Rng(seed), row_N))
    contexts = {"data": data, "teacher": sampled(pair.teacher, data, Sampler(), seed),
                "student": sampled(pair.student, data, Sampler(), seed)}  # fmt: skip
    rows_VE = torch.nn.functional.normalize(pair.teacher.head.weight.detach(), dim=1)
    space = CodeSpace.of(rows_VE, Clusters(), subject.device)
    values = {
        name: by_rank(measure(pair.student, pair.teacher, each, space, LANGUAGE_QUANTITIES), data.plan)
        for name, each in contexts.items()
    }
    tables["language"] = curves.positions(values, None, seed)
    return {
        "num": len(data), "vocab_size": len(pair.text.symbols), "sequence_length": settings.length,
        "parameters": {"student": _size(pair.student), "teacher": _size(pair.teacher)},
        "updates": settings.train.updates, "sample": pair.text.decode(contexts["student"].codes_BL[0].cpu()),
    }  # fmt: skip


def _about(subject: Subject, contexts: Mapping[str, Sequences], split: str, asked: int) -> dict[str, Any]:
    """What the numbers are of."""
    run, layout, data = subject.run, subject.codes.layout, contexts["data"]
    names: Tensor = data.condition.label_B.cpu()
    return {
        "name": (run.name if run else None) or subject.folder.resolve().name,
        "method": run.preset if run else None, "student": str(subject.folder), "teacher": str(subject.teacher_path),
        "second": str(subject.second_path) if subject.second_path else None,
        "teacher_hash": weights_hash(subject.teacher), "families": [subject.student.family, subject.teacher.family],
        "parameters": {"student": _size(subject.student), "teacher": _size(subject.teacher)},
        "data": subject.codes.manifest["source"]["name"], "tokenizer": subject.codes.manifest["tokenizer"]["hash"],
        "split": split, "num": len(data), "num_asked": asked, "seed": subject.seed,
        "labels": torch.bincount(names, minlength=layout.num_classes).tolist(), "sampler": asdict(subject.sampler),
        "grid": list(layout.grid), "scales": list(layout.scales) if layout.scales else None,
        "steps": len(data.plan.sizes), "sequence_length": data.codes_BL.shape[1], "vocab_size": layout.vocab_size,
        "raster": bool((data.plan.order_BL == torch.arange(data.codes_BL.shape[1], device=subject.device)).all()),
        "code_space": {
            "clusters": int(subject.space.cluster_V.max()) + 1, "assignment": subject.clusters.key,
            "radius": subject.space.radius, "slack": diagnostics.SLACK, "mass": diagnostics.MASS,
            "neighbors": 0 if subject.space.neighbor_Vk is None else subject.space.neighbor_Vk.shape[1],
        },
        "versions": versions(), "device": str(subject.device), "language": None,
    }  # fmt: skip


def _size(model: Backbone) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _check_out(out: Path) -> None:
    """Raise `VarkdError` where the folder holds anything that no analysis wrote; a language pair may be unfinished."""
    unfinished = out.is_dir() and [path.name for path in out.iterdir()] == ["language"]
    if not (unfinished and (out / "language" / "settings.json").is_file()):
        ANALYSIS.check(out)
