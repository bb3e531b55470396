"""What the workers of a study do, each function a task: it reads what stands on disk, and leaves its result there.

    prepare   codes, feature network, reference         sweep    one setting of a method, on the validation seed
    shrunk    the student cut out of the teacher
    model     the teacher, or the warm-started student  choose   the best setting, trained in full; its best sampler
    cell      one method, one reported seed             timed    the same run, read where the cheapest one had ended

Training resumes from its last checkpoint, everything else is short and is done again.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from varkd.backbones.protocol import Backbone
from varkd.backbones.store import checkpoint_path, load_backbone
from varkd.config import EvaluationConfig, RunConfig
from varkd.errors import VarkdError
from varkd.files import read_json, remove_folder, write_json
from varkd.run.data import Codes, encode, pick_device
from varkd.run.evaluation import Judge
from varkd.run.models import open_model
from varkd.run.shrinking import shrink_run
from varkd.run.training import train_run
from varkd.study.spec import Pair, Setting, Study, recipe_run, second_stage_run, student_run
from varkd.train.loop import Diverged

Choice = dict[str, Any]


def codes_folder(study: Study, pair: str) -> Path:
    """Where the codes of a pair stand: its own `data`, or the study's folder, shared by pairs on equal images."""
    chosen = study.pairs[pair]
    if (Path(chosen.data) / "manifest.json").is_file():
        return Path(chosen.data)
    first = next(name for name, other in study.pairs.items() if _images(other) == _images(chosen))
    return Path(study.out) / first / "codes"


def _images(pair: Pair) -> tuple[str, str | None]:
    return pair.data, pair.tokenizer


def prepare(study: Study, pair: str) -> None:
    """Codes, and what samples are judged by."""
    chosen, folder = study.pairs[pair], codes_folder(study, pair)
    if folder != Path(chosen.data):
        if chosen.tokenizer is None:
            raise VarkdError(
                f"pairs.{pair}: data={chosen.data} is not a codes folder: encode it first, or give tokenizer too"
            )
        encode(chosen.data, chosen.tokenizer, folder, device=study.device, quiet=True)
    Judge.of(Codes(folder), study.device, quiet=True)


def teacher_folder(study: Study, pair: str) -> Path:
    """The teacher's run, or the trained model that the pair names."""
    chosen = study.pairs[pair]
    given = Path(chosen.teacher)
    return given if (given / "config.json").is_file() else Path(study.out) / pair / "teacher"


def given_folder(study: Study, pair: str) -> Path | None:
    """The model that the student is before any training, where it is not random."""
    chosen = study.pairs[pair]
    if chosen.shrink is not None:
        return Path(study.out) / pair / "shrunk"
    return Path(chosen.init) if chosen.init else None


def start_folder(study: Study, pair: str, seed: int) -> Path:
    """What all methods train on from: a run of the study, or the given model itself."""
    given = given_folder(study, pair)
    if given is not None and not study.pairs[pair].trains_start:
        return given
    return Path(study.out) / pair / study.start_of(seed)


def shrunk(study: Study, pair: str) -> None:
    """Cut the student of a pair out of its teacher."""
    folder, sizes = given_folder(study, pair), study.pairs[pair].shrink
    if folder is None or sizes is None or folder.is_dir():
        return
    data = codes_folder(study, pair)
    shrink_run(teacher_folder(study, pair), data, folder, **vars(sizes), device=study.device, quiet=True)


def model(study: Study, pair: str, name: str, seed: int) -> None:
    """Train and judge the teacher or a start (`name` is its folder), at the sampler that is best for it."""
    home = Path(study.out) / pair / name
    if (home / "judged.json").is_file():
        return
    folder = teacher_folder(study, pair) if name == "teacher" else start_folder(study, pair, seed)
    if folder == home:
        _train_model(study, pair, name, seed, folder)
    judge = Judge.of(Codes(codes_folder(study, pair)), study.device, quiet=True)
    loaded = open_model(folder, judge.codes, device=str(pick_device(study.device)))
    tried, best = search(study, judge, loaded)
    seen = judge.see(loaded, settings_of(study, best), quiet=True)
    seen.save_grid(home / "samples.png")
    status = folder / "status.json"
    write_json(
        home / "judged.json",
        {
            "run": str(folder),
            "metrics": seen.metrics,
            "sampler": best,
            "choices": tried,
            "parameters": sum(parameter.numel() for parameter in loaded.parameters()),
            "seconds": read_json(status)["seconds"] if status.is_file() else None,
            "ce": judge.cross_entropy(loaded),
            "floors": judge.floors() if name == "teacher" else None,
        },
    )


def _train_model(study: Study, pair: str, name: str, seed: int, folder: Path) -> None:
    """The teacher, or the start: by cross-entropy and then, where the pair asks for one, by a second stage."""
    data, chosen = str(codes_folder(study, pair)), study.pairs[pair]
    if name == "teacher":
        train_run(replace(recipe_run(study, pair, "teacher", seed, str(folder)), data=data), quiet=True)
        return
    given = given_folder(study, pair)
    init = None if given is None else str(given)
    if chosen.start_updates:
        first_folder = folder if chosen.start is None else Path(f"{folder}-warm")
        first = recipe_run(study, pair, "student", seed, str(first_folder))
        train_run(replace(first, data=data, init=init), quiet=True)
        init = str(first_folder)
    second = second_stage_run(study, pair, seed, str(folder), init or "")
    if second is not None:
        train_run(replace(second, data=data, teacher=str(teacher_folder(study, pair))), quiet=True)


def search(study: Study, judge: Judge, loaded: Backbone) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The Fréchet distance at every temperature and guidance on the sampling seed of the search, and the best one."""
    settings = replace(study.evaluation, seed=study.search_sampling_seed)
    tried: list[dict[str, Any]] = []
    for temperature, guidance in product(study.temperatures, study.guidances):
        sampler = replace(study.evaluation.sampler, temperature=temperature, guidance=guidance)
        distance = judge.distance(loaded, study.search_samples, sampler, settings)
        tried.append({"temperature": temperature, "guidance": guidance, "fd": distance})
    best = min(tried, key=lambda choice: choice["fd"])
    return tried, {name: best[name] for name in ("temperature", "guidance")}


def settings_of(study: Study, sampler: dict[str, float]) -> EvaluationConfig:
    """The reported evaluation, at a chosen temperature and guidance."""
    return replace(study.evaluation, sampler=replace(study.evaluation.sampler, **sampler))


def method_folder(study: Study, pair: str, method: str) -> Path:
    return Path(study.out) / pair / method


def sweep(study: Study, pair: str, method: str, index: int) -> None:
    """Train one setting briefly on the validation seed, and note its distance at the plain sampler."""
    folder = method_folder(study, pair, method) / f"sweep-{index}"
    if (folder / "score.json").is_file():
        if read_json(folder / "score.json")["fd"] is not None:
            remove_folder(folder / "checkpoints")  # the process may have been killed before it did so
        return
    setting = study.settings(method)[index]
    run = _student(study, pair, method, setting, study.validation_seed, study.sweep_updates, folder)
    try:
        train_run(run, quiet=True)
    except Diverged as error:  # a setting like any other, and the worst of them
        write_json(folder / "score.json", {"setting": list(setting), "fd": None, "error": str(error)})
        return
    judge = Judge.of(Codes(Path(run.data)), study.device, quiet=True)
    settings = replace(study.evaluation, seed=study.search_sampling_seed)
    loaded, _ = load_backbone(folder, str(pick_device(study.device)))
    distance = judge.distance(loaded, study.search_samples, study.evaluation.sampler, settings)
    write_json(folder / "score.json", {"setting": list(setting), "fd": distance})
    remove_folder(folder / "checkpoints")  # its number is all that is needed of it


def choose(study: Study, pair: str, method: str) -> None:
    """The best setting of the sweep, trained in full on the validation seed, and the sampler that suits it."""
    folder = method_folder(study, pair, method)
    checkpoints = folder / "validation" / "checkpoints"
    if (folder / "choice.json").is_file():
        remove_folder(checkpoints)
        return
    settings = study.settings(method)
    scores = [_score(folder / f"sweep-{index}" / "score.json", setting) for index, setting in enumerate(settings)]
    finite = [index for index, score in enumerate(scores) if score["fd"] is not None]
    if len(scores) > 1 and not finite:
        raise VarkdError(f"{method}: the training of every setting of its sweep diverged")
    chosen = min(finite, key=lambda index: scores[index]["fd"]) if finite else 0
    only = {"temperature": study.temperatures[0], "guidance": study.guidances[0]}
    if len(study.temperatures) * len(study.guidances) == 1:
        tried, sampler = [only | {"fd": None}], only
    else:
        tried, sampler = _best_sampler(study, pair, method, settings[chosen])
    write_json(
        folder / "choice.json",
        {
            "setting": list(settings[chosen]),
            "sweep": scores,
            "chosen": chosen,
            "sampler": sampler,
            "choices": tried,
        },
    )
    remove_folder(checkpoints)  # its sampler is all that is needed of it


def _best_sampler(
    study: Study, pair: str, method: str, setting: Setting
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Train the setting in full on the validation seed, and try every sampler on it."""
    folder = method_folder(study, pair, method) / "validation"
    run = _student(study, pair, method, setting, study.validation_seed, study.updates, folder)
    train_run(run, quiet=True)
    judge = Judge.of(Codes(Path(run.data)), study.device, quiet=True)
    loaded, _ = load_backbone(folder, str(pick_device(study.device)))
    return search(study, judge, loaded)


def _score(path: Path, setting: Setting) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {"setting": list(setting), "fd": None}


def cell(study: Study, pair: str, method: str, seed: int) -> None:
    """One method at one reported seed: trained at its chosen setting, judged at its chosen sampler."""
    folder = method_folder(study, pair, method)
    choice, out = read_json(folder / "choice.json"), folder / f"seed-{seed}"
    if (out / "judged.json").is_file():
        thin(out)
        return
    run = _student(study, pair, method, tuple(choice["setting"]), seed, study.updates, out)
    train_run(run, quiet=True)
    loaded, _ = load_backbone(out, str(pick_device(study.device)))
    found = _judged(study, pair, run, loaded, choice["sampler"], out / "samples.png")
    spent = read_json(out / "status.json")["seconds"]
    write_json(out / "judged.json", found | {"updates": study.updates, "seconds": spent})
    thin(out)


def timed(study: Study, pair: str, method: str, seed: int, budget: float) -> None:
    """The same run at its last checkpoint within `budget` seconds of training; before the first one, the start."""
    folder = method_folder(study, pair, method)
    out, start = folder / f"seed-{seed}", start_folder(study, pair, seed)
    target = out / "timed.json"
    if target.is_file() and read_json(target)["budget"] == budget:
        return
    within = [(step, seconds) for step, seconds in checkpoint_seconds(out) if seconds <= budget]
    step, seconds = within[-1] if within else (0, 0.0)
    device = str(pick_device(study.device))
    loaded, _ = load_backbone(out, device, step) if step else load_backbone(start, device)
    choice = read_json(folder / "choice.json")
    run = _student(study, pair, method, tuple(choice["setting"]), seed, study.updates, out)
    found = _judged(study, pair, run, loaded, choice["sampler"], None)
    write_json(target, found | {"updates": step, "seconds": seconds, "budget": budget})


def _judged(
    study: Study, pair: str, run: RunConfig, loaded: Backbone, sampler: dict[str, float], picture: Path | None
) -> dict[str, Any]:
    judge = Judge.of(Codes(codes_folder(study, pair)), study.device, quiet=True)
    seen = judge.see(loaded, settings_of(study, sampler), quiet=True)
    if picture is not None:
        seen.save_grid(picture)
    teacher, _ = load_backbone(teacher_folder(study, pair), str(pick_device(study.device)))
    means, _ = judge.agreement(loaded, teacher, run.method, study.evaluation.seed)
    return {"metrics": seen.metrics, "agreement": means, "ce": judge.cross_entropy(loaded), "sampler": sampler}


def _student(
    study: Study, pair: str, method: str, setting: Setting, seed: int, updates: int, folder: Path
) -> RunConfig:
    run = student_run(study, pair, method, setting, seed, updates, str(folder))
    init = start_folder(study, pair, seed)
    teacher = str(teacher_folder(study, pair)) if run.method.needs_teacher else None
    return replace(run, data=str(codes_folder(study, pair)), teacher=teacher, init=str(init))


def checkpoint_seconds(run: Path) -> list[tuple[int, float]]:
    """Update and seconds of training of every checkpoint of a run, ascending."""
    found = sorted((run / "checkpoints").glob("step-*/state.json"))
    states = [read_json(path) for path in found]
    return [(state["step"], state["seconds"]) for state in states]


def thin(run: Path) -> None:
    """Leave the averaged weights of a finished run's checkpoints, which is all that is read again.

    Only the last one stays whole: the run counts as finished by it.
    """
    steps = [step for step, _ in checkpoint_seconds(run)]
    for step in steps[:-1]:
        folder = checkpoint_path(run, step)
        for name in ("student", "optimizer", "method"):
            (folder / f"{name}.safetensors").unlink(missing_ok=True)
