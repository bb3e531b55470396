"""`varkd study`: the tasks of a study and what each one waits for, run in a pool; then results.json and the page."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from varkd.errors import VarkdError
from varkd.files import read_json, write_json
from varkd.progress import console
from varkd.report.study import write_study
from varkd.run.environment import versions
from varkd.study import work
from varkd.study.pool import Task, execute, open_pool
from varkd.study.results import collect, gap_is_small, time_budget
from varkd.study.spec import Study, claim


def run_study(study: Study, quiet: bool = False) -> Path:
    """Run (or finish) a study in `study.out`; returns the page's path. A study that was killed is resumed.

    Raises:
        VarkdError: bad input, another study in the folder, or tasks that failed (after all others were finished; what
            is there stands in results.json and on the page).
    """
    if not study.out:
        raise VarkdError("give out= (the study's folder)")
    study = replace(study, out=str(Path(study.out).resolve()))  # what the runs record must not depend on the caller
    folder, begun = Path(study.out), time.monotonic()
    claim(study, folder)
    pool = open_pool(study.executor, study.workers, study.device, study.ray_address)
    spent = _seconds_before(folder)
    facts = lambda: {"workers": pool.workers, "seconds": spent + time.monotonic() - begun, "versions": versions()}
    try:
        failures = execute(model_tasks(study), pool, f"{study.name}: models", quiet)
        _look_at_the_gaps(study, quiet)
        failures |= execute(cell_tasks(study, failures), pool, f"{study.name}: methods", quiet)
        failures |= execute(timed_tasks(study), pool, f"{study.name}: equal time", quiet)
    finally:
        pool.close()
        write_json(folder / "spent.json", {"seconds": spent + time.monotonic() - begun})
    write_json(folder / "results.json", collect(study, failures, facts()))
    page = write_study(folder)
    if failures:
        first, reason = next(iter(failures.items()))
        raise VarkdError(
            f"{len(failures)} of the study's tasks failed, first {first}: {reason}; the others stand on {page}"
        )
    return page


def _seconds_before(folder: Path) -> float:
    path = folder / "spent.json"
    return read_json(path)["seconds"] if path.is_file() else 0.0


def model_tasks(study: Study) -> list[Task]:
    """Codes and judges, teachers, starts."""
    tasks, prepared = [], {}
    for pair in study.pairs:
        folder = str(work.codes_folder(study, pair))
        if folder not in prepared:  # pairs on the same images share codes and judge
            prepared[folder] = f"{pair}/prepare"
            tasks.append(Task(prepared[folder], work.prepare, (study, pair), (), 100))
        needs = (prepared[folder],)
        tasks.append(Task(f"{pair}/teacher", work.model, (study, pair, "teacher", study.seeds[0]), needs, 500))
        cut = study.pairs[pair].shrink is not None
        if cut:
            tasks.append(Task(f"{pair}/shrunk", work.shrunk, (study, pair), (f"{pair}/teacher",), 50))
        for seed in study.start_seeds:
            name = study.start_of(seed)
            # A second stage learns from the teacher, which must be there then.
            after = (*needs, f"{pair}/teacher") if study.pairs[pair].start is not None else needs
            after = (*after, f"{pair}/shrunk") if cut else after
            tasks.append(Task(f"{pair}/{name}", work.model, (study, pair, name, seed), after, 100))
    return tasks


def cell_tasks(study: Study, failures: dict[str, str]) -> list[Task]:
    """Sweeps, choices, and the reported runs. Pairs whose models failed are left out."""
    tasks = []
    for pair in study.pairs:
        if any(name.startswith(f"{pair}/") for name in failures):
            continue
        for method in study.methods_of(pair):
            name, settings = f"{pair}/{method}", study.settings(method)
            swept = [
                Task(f"{name}/sweep-{index}", work.sweep, (study, pair, method, index), (), study.sweep_updates)
                for index in range(len(settings) if len(settings) > 1 else 0)
            ]
            needs = tuple(task.name for task in swept)
            chosen = Task(f"{name}/choice", work.choose, (study, pair, method), needs, study.updates)
            cells = [
                Task(f"{name}/seed-{seed}", work.cell, (study, pair, method, seed), (chosen.name,), study.updates)
                for seed in study.seeds
            ]
            tasks += [*swept, chosen, *cells]
    return tasks


def timed_tasks(study: Study) -> list[Task]:
    """The finished runs once more, each at its last checkpoint within the seconds of the cheapest method."""
    tasks = []
    for pair in study.pairs:
        budget = time_budget(study, pair)
        for method in study.methods_of(pair) if budget is not None else ():
            for seed in study.seeds:
                if (work.method_folder(study, pair, method) / f"seed-{seed}" / "judged.json").is_file():
                    name = f"{pair}/{method}/seed-{seed}/timed"
                    tasks.append(Task(name, work.timed, (study, pair, method, seed, budget)))
    return tasks


def _look_at_the_gaps(study: Study, quiet: bool) -> None:
    """Say before the long part where a teacher is hardly worth imitating."""
    for pair in study.pairs:
        paths = [Path(study.out) / pair / name / "judged.json" for name in ("teacher", study.start_of(study.seeds[0]))]
        if quiet or not all(path.is_file() for path in paths):
            continue
        found: list[dict[str, Any]] = [read_json(path)["metrics"]["fd"] for path in paths]
        taught, begun = found
        if gap_is_small(taught, begun):
            console.print(
                f"warning: {pair}: the student starts at FD {begun['value']:.2f}, the teacher is at "
                f"{taught['value']:.2f}: too small a gap to tell methods apart"
            )
