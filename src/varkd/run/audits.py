"""What `varkd analyze` asks beside the curves: prefix swaps, the method's selection, risks, and cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from varkd.config import RunConfig
from varkd.distill.prefixes import leading
from varkd.evaluate.audits import kept_positions, kept_share
from varkd.evaluate.diagnostics import Sequences, Values, completed
from varkd.evaluate.exposure import risk
from varkd.evaluate.features import FeatureNet
from varkd.evaluate.samples import ReferenceSet, sample_metrics
from varkd.evaluate.speed import forward_codes_per_second, peak_memory, samples_per_second
from varkd.files import read_json
from varkd.report.runs import read_run as read_folder
from varkd.run.curves import Cell, Table, maps
from varkd.run.evaluation import feature_network, reference_for
from varkd.run.subject import Subject
from varkd.tokenizers.protocol import Tokenizer
from varkd.train.checkpoint import Checkpoints, load_tensors
from varkd.world import World

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
SWAP_METRICS = ("fd", "precision", "recall", "accuracy")
AUDITED = ("kept/", "kept_kl/", "accepted/")


def all_of(
    subject: Subject, contexts: Mapping[str, Sequences], values: Mapping[str, Values], tables: dict[str, Table]
) -> dict[str, Any]:
    """Fill `tables` and return what belongs into `analysis.json`."""
    net, record = feature_network(subject.codes, subject.codes.folder / "features", str(subject.device), subject.quiet)
    reference = reference_for(subject.codes, net, subject.quiet)
    tables["prefix_swap"] = prefix_swap(subject, contexts, reference, net)
    tables["risks"] = risks(values, subject.seed)
    tables["cost"] = cost(subject)
    return {
        "reference": reference.describe(),
        "features": record,
        "selection": selection(subject, contexts, values, tables),
    }


def decode(tokenizer: Tokenizer, codes_BL: Tensor, device: torch.device, batch_size: int = 250) -> Tensor:
    """Codes -> uint8 images on the CPU."""
    tokenizer = tokenizer.to(device).eval()
    with torch.no_grad():
        return torch.cat([tokenizer.to_uint8(tokenizer.decode(part)).cpu() for part in codes_BL.split(batch_size)])


def prefix_swap(subject: Subject, contexts: Mapping[str, Sequences], reference: ReferenceSet, net: FeatureNet) -> Table:
    """The first share of the codes from data or from the student, the rest from the teacher: what are the images worth?

    A share is cut to whole steps. Noise and labels are the same everywhere, so both curves begin at one point.
    """
    rows: list[tuple[Cell, ...]] = []
    label_B = contexts["data"].condition.label_B.cpu()
    for source in ("data", "student"):
        given = contexts[source]
        for share in SHARES:
            share_B1 = torch.full((len(given), 1), share, device=subject.device)
            whole = completed(subject.teacher, given, leading(given.plan, share_B1), subject.sampler, subject.seed)
            images = decode(subject.codes.tokenizer, whole.codes_BL, subject.device)
            found = sample_metrics(images, label_B, reference, net, resamples=subject.resamples, seed=subject.seed)
            for name in SWAP_METRICS:
                numbers = (found[name][end] for end in ("value", "low", "high"))
                rows.append((source, share, name, *numbers, len(given)))
    return Table(("source", "share", "metric", "value", "low", "high", "num"), tuple(rows))


def risks(values: Mapping[str, Values], seed: int) -> Table:
    """f-DISTILL's two risks, and the teacher's own surprise by its own sequences as their floor."""
    asked = {
        "likelihood": values["student"]["ce_teacher"],
        "coverage": values["teacher"]["ce"],
        "likelihood_floor": values["teacher"]["ce_teacher"],
        "coverage_floor": values["teacher"]["ce_teacher"],
        "student_entropy": values["student"]["ce"],
    }
    rows = tuple((name, *risk(value_NL, seed=seed), len(value_NL)) for name, value_NL in asked.items())
    return Table(("risk", "value", "low", "high", "num"), rows)


def cost(subject: Subject) -> Table:
    """Speed, memory and images seen, on the machine of the analysis."""
    rows: list[tuple[Cell, ...]] = []
    length = subject.student.sequence_length
    for name, model in (("student", subject.student), ("teacher", subject.teacher)):
        speed = samples_per_second(model, subject.sampler, planner=subject.student) * length
        rows.append((f"{name} rollout", speed, "codes/s"))
        rows.append((f"{name} forward", forward_codes_per_second(model, subject.student), "codes/s"))
        rows.append((f"{name} parameters", sum(each.numel() for each in model.parameters()), "weights"))
    where = "of tensors on the device" if subject.device.type == "cuda" else "of the analyzing process"
    memory = peak_memory(subject.device)
    if memory is not None:
        rows.append((f"peak memory {where}", memory, "MB"))
    if subject.run is not None and (subject.folder / "status.json").is_file():
        status = read_json(subject.folder / "status.json")
        rows.append(("images seen", status["step"] * subject.run.train.batch_size, "images"))
        rows.append(("training", status["seconds"], "s"))
    return Table(("what", "value", "unit"), tuple(rows))


def selection(
    subject: Subject, contexts: Mapping[str, Sequences], values: Mapping[str, Values], tables: dict[str, Table]
) -> dict[str, Any]:
    """The method's own selection, applied now with the thresholds of its last checkpoint, and its history."""
    run = subject.run
    if run is None:
        return {"why_not": "a model folder has no method"}
    log = read_folder(subject.folder).log
    history = [
        (entry["step"], key, float(value))
        for entry in log
        for key, value in entry.items()
        if entry.get("split") == "train" and key.startswith(AUDITED)
    ]
    tables["selection_training"] = Table(("step", "key", "value"), tuple(history))
    terms = [term.name for term in run.method.terms if not term.selection.keeps_all]
    if not terms:
        return {"why_not": f"the method {run.preset} keeps every position"}
    if run.method.target.guided:
        return {"why_not": "the target is guided, and the audit reads an unguided teacher"}
    state, step = _last_state(run, subject)
    method = run.method.at(1.0, state)
    codebook_tables = {
        key: each.to(subject.device) for key, each in method.prepare(subject.codes.tokenizer.codebook_VE).items()
    }
    rows: list[tuple[Cell, ...]] = []
    kept: dict[str, Values] = {name: {} for name in contexts}
    for term in (term for term in method.terms if term.name in terms):
        for source in term.on:
            kept_BL = kept_positions(
                method,
                term,
                source,
                contexts[source],
                subject.student,
                subject.teacher,
                state,
                codebook_tables,
                subject.seed,
            )
            kept[source][f"kept/{term.name}"] = kept_BL
            found = kept_share(kept_BL, values[source]["forward_kl"], seed=subject.seed)
            rows.append((term.name, source, "positions", *found.positions, len(kept_BL)))
            rows.append((term.name, source, "kl", *found.kl, len(kept_BL)))
    tables["selection"] = Table(("term", "context", "share_of", "value", "low", "high", "num"), tuple(rows))
    layout = subject.codes.layout
    shown = maps(kept, layout.grid, layout.scales)
    tables["maps"] = Table(shown.columns, tables["maps"].rows + shown.rows)
    selected = {term.name: type(term.selection).__name__ for term in method.terms if term.name in terms}
    return {"terms": selected, "checkpoint": step, "thresholds": sorted(key for key in state if "threshold" in key)}


def _last_state(run: RunConfig, subject: Subject) -> tuple[dict[str, Tensor], int | None]:
    """What the method remembered at its last checkpoint, without replayed rows; empty where there is none."""
    checkpoints = Checkpoints(subject.folder, World(), run.train.keep, run.train.select)
    step = checkpoints.latest()
    if step is None:
        return {}, None
    state = load_tensors(checkpoints.path(step) / "method.safetensors")
    return {key: each.to(subject.device) for key, each in state.items() if not key.startswith("rows/")}, step
