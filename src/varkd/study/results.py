"""From what the tasks left on disk to `results.json`: one row per run and budget, means, differences, verdicts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from varkd.files import read_json
from varkd.study.spec import Study
from varkd.study.statistics import mean_estimate, paired_difference, wins

Row = dict[str, Any]
_MEANS = ("precision", "recall", "accuracy", "ce", "student_kl", "acceptance", "gap_closed")
_RECALL_DROP = 0.02


def time_budget(study: Study, pair: str) -> float | None:
    """The seconds of the cheapest method, averaged over seeds: what every method is given at equal time."""
    seconds = []
    for method in study.methods_of(pair):
        found = [judged["seconds"] for seed in study.seeds if (judged := _judged(study, pair, method, seed))]
        seconds += [sum(found) / len(found)] if found else []
    return min(seconds) if seconds else None


def collect(study: Study, failures: Mapping[str, str], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The whole of `results.json`, from what is there; `finished` says whether that is all."""
    baseline = "ce" if "ce" in study.methods else "start"
    rows, families, summary, controls, sweeps, samplers = [], [], [], [], [], []
    for pair in study.pairs:
        mine = _rows(study, pair, baseline)
        means = [row for budget in ("updates", "time") for row in _summary(study, pair, budget, mine)]
        family = _family(study, pair, baseline, means)
        if family:
            families.append(family)
        rows += mine
        summary += means
        controls += [row for budget in ("updates", "time") for row in _controls(study, pair, budget, mine)]
        for method in study.methods_of(pair):
            path = Path(study.out) / pair / method / "choice.json"
            if path.is_file():
                choice = read_json(path)
                here = {"family": pair, "method": method}
                sweeps.append(here | {"settings": choice["sweep"], "chosen": choice["chosen"]})
                best = next(i for i, one in enumerate(choice["choices"]) if choice["sampler"].items() <= one.items())
                samplers.append(here | {"choices": choice["choices"], "chosen": best})
    expected = 2 * len(study.seeds) * sum(len(study.methods_of(pair)) for pair in study.pairs)
    return {
        "format": "varkd-study",
        "version": 1,
        "name": study.name,
        "finished": len(rows) == expected and len(families) == len(study.pairs),
        "updates": study.updates,
        "seeds": list(study.seeds),
        "validation_seed": study.validation_seed,
        "starts": study.starts,
        "num_samples": study.evaluation.num_samples,
        "gap_baseline": baseline,
        "families": families,
        "rows": rows,
        "summary": summary,
        "controls": controls,
        "sweeps": sweeps,
        "samplers": samplers,
        "failures": dict(failures),
        "machine": {"cores": os.cpu_count(), **facts},
    }


def _judged(study: Study, pair: str, method: str, seed: int, name: str = "judged") -> dict[str, Any] | None:
    path = Path(study.out) / pair / method / f"seed-{seed}" / f"{name}.json"
    return read_json(path) if path.is_file() else None


def _model(study: Study, pair: str, name: str) -> dict[str, Any] | None:
    path = Path(study.out) / pair / name / "judged.json"
    return read_json(path) if path.is_file() else None


def _rows(study: Study, pair: str, baseline: str) -> list[Row]:
    teacher = _model(study, pair, "teacher")
    rows = []
    for budget, name in (("updates", "judged"), ("time", "timed")):
        for seed in study.seeds:
            reference = _reference_fd(study, pair, baseline, seed, name)
            for method in study.methods_of(pair):
                judged = _judged(study, pair, method, seed, name)
                if judged:
                    target = None if teacher is None else teacher["metrics"]["fd"]["value"]
                    rows.append(_row(study, (pair, method, seed, budget), judged, reference, target))
    return rows


def _reference_fd(study: Study, pair: str, baseline: str, seed: int, name: str) -> float | None:
    """The distance from which the gap to the teacher is measured: of the baseline at this seed and budget."""
    found = (
        _model(study, pair, study.start_of(seed)) if baseline == "start" else _judged(study, pair, baseline, seed, name)
    )
    return None if found is None else found["metrics"]["fd"]["value"]


def _row(
    study: Study,
    place: tuple[str, str, int, str],
    judged: dict[str, Any],
    reference: float | None,
    target: float | None,
) -> Row:
    pair, method, seed, budget = place
    metrics, folder = judged["metrics"], Path(study.out) / pair / method
    fd, run = metrics["fd"], f"{pair}/{method}/seed-{seed}"
    gap = None if reference is None or target is None or reference <= target else reference - target
    picture = f"{run}/samples.png" if budget == "updates" else None
    return {
        "family": pair,
        "method": method,
        "seed": seed,
        "budget": budget,
        "updates": judged["updates"],
        "seconds": judged["seconds"],
        "fd": fd["value"],
        "fd_low": fd["low"],
        "fd_high": fd["high"],
        **{name: metrics[name]["value"] for name in ("precision", "recall", "accuracy")},
        "ce": judged["ce"],
        "student_kl": judged["agreement"]["student"]["forward_kl"],
        "data_kl": judged["agreement"]["data"]["forward_kl"],
        "acceptance": judged["agreement"]["student"]["acceptance"],
        "gap_closed": None if gap is None or reference is None else (reference - fd["value"]) / gap,
        "sampler": judged["sampler"],
        "setting": read_json(folder / "choice.json")["setting"],
        "run": run,
        "samples": picture,
    }


def _draws(study: Study, rows: Sequence[Row]) -> list[list[float]]:
    names = {"updates": "judged", "time": "timed"}
    found = [_judged(study, row["family"], row["method"], row["seed"], names[row["budget"]]) for row in rows]
    return [judged["metrics"]["fd"]["draws"] for judged in found if judged]


def _of(rows: Sequence[Row], method: str, budget: str) -> list[Row]:
    return [row for row in rows if row["method"] == method and row["budget"] == budget]


def _summary(study: Study, pair: str, budget: str, rows: Sequence[Row]) -> list[Row]:
    found = {method: mine for method in study.methods_of(pair) if (mine := _of(rows, method, budget))}
    rivals = {
        m: mean_estimate([row["fd"] for row in mine])["value"]
        for m, mine in found.items()
        if study.role(m) == "baseline" and len(mine) == len(study.seeds)
    }
    best = min(rivals, key=lambda method: rivals[method]) if rivals else None
    summary = []
    for method, mine in found.items():
        row: Row = {
            "family": pair,
            "budget": budget,
            "method": method,
            "role": study.role(method),
            "num_seeds": len(mine),
        }
        row |= {name: sum(one[name] for one in mine) / len(mine) for name in ("updates", "seconds")}
        row["fd"] = mean_estimate([one["fd"] for one in mine], _draws(study, mine))
        for name in _MEANS:
            values = [one[name] for one in mine if one[name] is not None]
            row[name] = mean_estimate(values) if values else {"value": None, "low": None, "high": None}
        row["difference"], row["wins"], row["losses"] = None, 0, 0
        if best is not None and method != best and len(mine) == len(found[best]):
            row["difference"], row["wins"], row["losses"] = _against(study, mine, found[best], best)
        summary.append(row)
    for row in summary:
        row["warnings"] = _warnings(row, summary)
    return summary


def _against(study: Study, mine: Sequence[Row], other: Sequence[Row], name: str) -> tuple[Row, int, int]:
    values = [row["fd"] for row in mine], [row["fd"] for row in other]
    paired = paired_difference(*values, draw_SR=(_draws(study, mine), _draws(study, other)))
    return {"to": name, **paired}, *wins(*values)


def _warnings(row: Row, summary: Sequence[Row]) -> list[str]:
    """What a user should know before believing the row."""
    known = {other["method"]: other for other in summary}
    reference = known.get("kd") or known.get("ce")
    found = []
    if reference and row["method"] != reference["method"] and row["recall"]["value"] is not None:
        drop = reference["recall"]["value"] - row["recall"]["value"]
        if drop > _RECALL_DROP:
            found.append(f"recall is {100 * drop:.1f} points below {reference['method']}'s: it covers less of the data")
    return found


def _controls(study: Study, pair: str, budget: str, rows: Sequence[Row]) -> list[Row]:
    """Every method of the role varkd against the ablations and controls of its name."""
    names, found = study.methods_of(pair), []
    for method in [name for name in names if study.role(name) == "varkd"]:
        for control in [name for name in names if study.role(name) in ("control", "ablation")]:
            mine, other = _of(rows, method, budget), _of(rows, control, budget)
            if mine and len(mine) == len(other):
                difference, won, lost = _against(study, mine, other, control)
                del difference["to"]
                found.append(
                    {
                        "family": pair,
                        "budget": budget,
                        "method": method,
                        "control": control,
                        **difference,
                        "wins": won,
                        "losses": lost,
                    }
                )
    return found


def _family(study: Study, pair: str, baseline: str, summary: Sequence[Row]) -> dict[str, Any] | None:
    teacher, start = _model(study, pair, "teacher"), _model(study, pair, study.start_of(study.seeds[0]))
    if teacher is None or start is None:
        return None
    verdict, clear = _verdict(teacher, start, baseline, [row for row in summary if row["budget"] == "updates"])
    return {
        "family": pair,
        "data": study.pairs[pair].data,
        "teacher": _about(study, pair, "teacher", teacher),
        "start": _about(study, pair, study.start_of(study.seeds[0]), start),
        "floors": teacher["floors"],
        "time_budget": time_budget(study, pair),
        "verdict": verdict,
        "distinguishable": clear,
    }


def _about(study: Study, pair: str, name: str, model: dict[str, Any]) -> Row:
    fd = model["metrics"]["fd"]
    home = Path(study.out) / pair / name
    run = os.path.relpath(model["run"], study.out) if Path(model["run"]).is_dir() else model["run"]
    return {
        "run": run,
        "parameters": model["parameters"],
        "fd": fd["value"],
        "fd_low": fd["low"],
        "fd_high": fd["high"],
        **{key: model["metrics"][key]["value"] for key in ("precision", "recall", "accuracy")},
        "ce": model["ce"],
        "sampler": model["sampler"],
        "seconds": model["seconds"],
        "samples": f"{pair}/{name}/samples.png" if (home / "samples.png").is_file() else None,
    }


def gap_is_small(teacher: Mapping[str, Any], student: Mapping[str, Any]) -> bool:
    """Whether two models' distances (objects with value, low, high) are too near for methods in between."""
    noise = (teacher["high"] - teacher["low"] + student["high"] - student["low"]) / 2
    return student["value"] - teacher["value"] < 2 * noise


def _verdict(teacher: dict[str, Any], start: dict[str, Any], baseline: str, summary: Sequence[Row]) -> tuple[str, bool]:
    """Whether there is room between student and teacher, next to how surely methods can be told apart."""
    taught, begun = teacher["metrics"]["fd"], start["metrics"]["fd"]
    reference = next((row["fd"] for row in summary if row["method"] == baseline), None)
    begin = begun if reference is None else reference
    widths = [row["difference"]["high"] - row["difference"]["low"] for row in summary if row["difference"]]
    who = "The start" if reference is None else f"Cross-entropy ('{baseline}')"
    gap = begin["value"] - taught["value"]
    told = f"{who} is {gap:.2f} FD from the teacher ({begin['value']:.2f} against {taught['value']:.2f})"
    if gap_is_small(taught, begin):
        return f"{told}: too small a gap to tell methods apart; train a better teacher or a smaller student", False
    if not widths:
        return f"{told}; the start stood at {begun['value']:.2f}", True
    half = median(widths) / 2
    if gap < 4 * half:
        return (
            f"{told}, and paired differences are known to +-{half:.2f} only: methods can hardly be told apart; add "
            "seeds, or train a better teacher"
        ), False
    return f"{told}, and paired differences are known to about +-{half:.2f}: enough room to tell methods apart", True
