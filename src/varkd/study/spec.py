"""A study as one value: which methods, on which pairs of teacher and student, under which budget.

Everything that is chosen (the setting of each method's sweep, its sampling temperature and guidance) is chosen on a
training seed and a sampling seed that are not reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from varkd.config import EvaluationConfig, RunConfig, dump_value, load_run, load_value, read_value
from varkd.errors import VarkdError, did_you_mean
from varkd.files import write_text
from varkd.folders import contents
from varkd.methods import METHODS

Role = Literal["baseline", "varkd", "ablation", "control"]
Setting = tuple[str, ...]
"""`key=value` changes of a run; `key*=factor` multiplies the value that the recipe has."""


@dataclass(frozen=True)
class Entry:
    """One method: a preset (by default the one of its name) with changes, and the settings that its sweep tries."""

    preset: str | None = None
    set: Setting = ()
    sweep: tuple[Setting, ...] | None = None
    role: Role | None = None


@dataclass(frozen=True)
class Start:
    """A second stage of the start: after cross-entropy, `method` from the teacher (VarKD's first stage is KD).

    `select` "best" hands on the checkpoint with the lowest validation cross-entropy, "last" the last one.
    """

    method: str = "kd"
    updates: int = 1000
    select: Literal["best", "last"] = "best"
    set: Setting = ()

    def __post_init__(self) -> None:
        if self.updates < 1:
            raise VarkdError(f"start: updates must be at least 1, got {self.updates}")


@dataclass(frozen=True)
class Shrink:
    """A student that is cut out of the teacher, as `varkd shrink` does: sizes, or a share of the parameters."""

    params: float | None = None
    layers: int | None = None
    dim: int | None = None
    heads: int | None = None
    ffn: int | None = None
    num: int = 256

    def __post_init__(self) -> None:
        if (self.params is None) == all(size is None for size in (self.layers, self.dim, self.heads, self.ffn)):
            raise VarkdError(
                "shrink: give either params (a share of the parameters) or sizes (layers, dim, heads, ffn)"
            )


@dataclass(frozen=True)
class Pair:
    """A teacher and a student. `data` is a codes folder, or images that `tokenizer` encodes into the study's folder.

    `teacher` and `student` are recipes; `teacher` may also be the folder of a trained run or of a converted model,
    which is then used as it is. The student starts with `start_updates` of cross-entropy and, with `start`, a second
    stage after it; before that it is random, or the model of the folder `init`, or cut out of the teacher (`shrink`).
    With neither stage that model itself is the start. `methods` restricts the study's methods for this pair.
    """

    data: str = "digits"
    tokenizer: str | None = "pixels"
    teacher: str = "digits-teacher"
    student: str = "digits-student"
    teacher_set: Setting = ()
    student_set: Setting = ()
    start_updates: int = 150
    start: Start | None = None
    init: str | None = None
    shrink: Shrink | None = None
    methods: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.init and self.shrink:
            raise VarkdError("a pair has either init (a model to start from) or shrink (cut out of the teacher)")
        if self.start_updates < 0 or (self.start_updates == 0 and not self.given):
            raise VarkdError(
                f"start_updates must be at least 1 for a student that starts at random, got {self.start_updates}"
            )

    @property
    def given(self) -> bool:
        """Whether the student does not start at random."""
        return bool(self.init or self.shrink)

    @property
    def trains_start(self) -> bool:
        """Whether the start has any training before it."""
        return self.start_updates > 0 or self.start is not None


@dataclass(frozen=True)
class Study:
    """What `varkd study` runs. Counts are optimizer updates and samples.

    `seeds` are reported; `validation_seed` chooses. All methods of a pair train on from one warm-started student
    (`starts="per_seed"`: from one per seed, which says more about other initializations and costs one run each).
    """

    out: str = ""
    name: str = "study"
    pairs: dict[str, Pair] = field(default_factory=dict)
    methods: dict[str, Entry | None] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)
    validation_seed: int = 100
    starts: Literal["shared", "per_seed"] = "shared"
    updates: int = 250
    sweep: tuple[Setting, ...] = ((), ("train.optim.lr*=0.5",), ("train.optim.lr*=2",))
    sweep_updates: int = 80
    temperatures: tuple[float, ...] = (0.9, 1.0, 1.1)
    guidances: tuple[float, ...] = (1.0,)
    search_samples: int = 1000
    search_sampling_seed: int = 4321
    time_points: int = 20
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    workers: int | None = None
    executor: Literal["processes", "ray"] = "processes"
    ray_address: str | None = None
    device: str = "auto"

    def entry(self, method: str) -> Entry:
        return self.methods[method] or Entry()

    def preset(self, method: str) -> str:
        return self.entry(method).preset or method

    def settings(self, method: str) -> tuple[Setting, ...]:
        """What the sweep of a method tries, in order."""
        declared = self.entry(method).sweep
        return self.sweep if declared is None else declared

    def methods_of(self, pair: str) -> tuple[str, ...]:
        return self.pairs[pair].methods or tuple(self.methods)

    def role(self, method: str) -> Role:
        """What a method is compared as; by default what its preset's source says."""
        source, declared = METHODS[self.preset(method)].source, self.entry(method).role
        if declared:
            return declared
        if source.startswith(("ablation", "control")):
            return "ablation" if source.startswith("ablation") else "control"
        return "varkd" if self.preset(method).startswith("varkd") else "baseline"

    def start_of(self, seed: int) -> str:
        """The name of the warm-started student that a seed trains on from."""
        return "start" if self.starts == "shared" else f"start-{seed}"

    @property
    def start_seeds(self) -> tuple[int, ...]:
        return (self.seeds[0],) if self.starts == "shared" else (*self.seeds, self.validation_seed)


def load_study(recipe: str | Path, overrides: Sequence[str] = ()) -> Study:
    """Resolve a study recipe and `key=value` overrides, and check all of it before anything runs.

    Raises:
        VarkdError: an unknown key, method or recipe, or settings that do not go together; one line.
    """
    study = load_value(Study, recipe, overrides)
    _check(study)
    return study


def _check(study: Study) -> None:
    if not study.pairs or not study.methods or not study.seeds:
        raise VarkdError("a study needs pairs:, methods: and seeds: (recipes/study-smoke.yaml is a small one)")
    if study.validation_seed in study.seeds:
        raise VarkdError(
            f"validation_seed {study.validation_seed} is a reported seed: choose another one, so that "
            "nothing is chosen on what is reported"
        )
    if study.search_sampling_seed == study.evaluation.seed:
        raise VarkdError("search_sampling_seed must differ from evaluation.seed: nothing is chosen on what is reported")
    if not study.temperatures or not study.guidances or min(study.temperatures) <= 0:
        raise VarkdError("temperatures and guidances need at least one value each, temperatures above 0")
    for name in ("updates", "sweep_updates", "search_samples", "time_points"):
        if getattr(study, name) < 1:
            raise VarkdError(f"{name} must be at least 1, got {getattr(study, name)}")
    for method in study.methods:
        if study.preset(method) not in METHODS:
            raise VarkdError(
                f"methods.{method}: unknown preset '{study.preset(method)}': "
                f"{did_you_mean(study.preset(method), METHODS)}"
            )
        if len(study.settings(method)) != len(study.sweep):
            raise VarkdError(
                f"methods.{method}.sweep tries {len(study.settings(method))} settings, the study "
                f"{len(study.sweep)}: the same budget for all"
            )
    for name, pair in study.pairs.items():
        unknown = [method for method in pair.methods or () if method not in study.methods]
        if unknown:
            raise VarkdError(
                f"pairs.{name}.methods: '{unknown[0]}' is no method of this study: "
                f"{did_you_mean(unknown[0], study.methods)}"
            )
        second_stage_run(study, name, study.seeds[0], "", "")
        for method in study.methods_of(name):
            for setting in study.settings(method):
                student_run(study, name, method, setting, study.seeds[0], study.updates, "")


def student_run(
    study: Study, pair: str, method: str, setting: Setting, seed: int, updates: int, folder: str
) -> RunConfig:
    """The run of one method: the student's recipe, the method's changes, one setting of its sweep."""
    entry, chosen = study.entry(method), study.pairs[pair]
    changes = _explicit(chosen.student, (*chosen.student_set, f"method={study.preset(method)}"), (*entry.set, *setting))
    every = max(1, updates // study.time_points)
    fixed = (
        f"seed={seed}",
        f"train.updates={updates}",
        f"train.checkpoint_every={every}",
        "train.trackers=[]",
        f"train.keep={updates // every + 2}",
        "train.grid_every=0",
        "train.select=last",
        f"device={study.device}",
    )
    run = load_run(chosen.student, (*changes, *fixed))
    name = method if seed == study.seeds[0] else f"{method}, seed {seed}"
    return replace(run, evaluation=study.evaluation, out=folder, name=name)


def recipe_run(study: Study, pair: str, role: Literal["teacher", "student"], seed: int, folder: str) -> RunConfig:
    """The run that makes the teacher, or the warm-started student, of a pair."""
    chosen = study.pairs[pair]
    recipe, changes = (
        (chosen.teacher, chosen.teacher_set) if role == "teacher" else (chosen.student, chosen.student_set)
    )
    fixed = [f"seed={seed}", "train.trackers=[]", "train.grid_every=0", f"device={study.device}"]
    if role == "student":
        fixed += ["method=ce", f"train.updates={chosen.start_updates}"]
    run = load_run(recipe, (*_explicit(recipe, (), changes), *fixed))
    return replace(run, evaluation=study.evaluation, out=folder, name="teacher" if role == "teacher" else "start")


def second_stage_run(study: Study, pair: str, seed: int, folder: str, init: str) -> RunConfig | None:
    """The run that turns the warm-started student into the start of a pair with a second stage."""
    chosen = study.pairs[pair]
    if chosen.start is None:
        return None
    changes = _explicit(chosen.student, (), (*chosen.student_set, *chosen.start.set))
    fixed = [
        f"method={chosen.start.method}",
        f"seed={seed}",
        "train.trackers=[]",
        "train.grid_every=0",
        f"device={study.device}",
        f"train.updates={chosen.start.updates}",
        f"train.select={chosen.start.select}",
    ]
    run = load_run(chosen.student, (*changes, *fixed))
    return replace(run, evaluation=study.evaluation, out=folder, init=init, name="start")


def _explicit(recipe: str, base: Setting, changes: Setting) -> Setting:
    """`changes` with every `key*=factor` multiplied out over the recipe with `base` and what was changed before it."""
    explicit = base
    for change in changes:
        key, star, factor = change.partition("*=")
        if star:
            value: Any = load_run(recipe, explicit)
            for part in key.split("."):
                value = getattr(value, part, None)
            if not isinstance(value, float | int) or not _is_float(factor):
                raise VarkdError(f"'{change}': {key} is no number that could be multiplied by {factor}")
            change = f"{key}={value * float(factor):.9g}"
        explicit = (*explicit, change)
    return explicit


def _is_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


_MAY_GROW = ("pairs", "methods", "seeds")
_FREE = ("out", "workers", "executor", "ray_address", "device")


def claim(study: Study, folder: Path) -> None:
    """Write `study.yaml`; a folder that holds the same study, or a smaller one, is resumed.

    Raises:
        VarkdError: it holds another study, or foreign files.
    """
    path = folder / "study.yaml"
    if not path.is_file() and folder.is_dir() and contents(folder):
        raise VarkdError(f"{folder} is not empty and not a study's folder: choose another out=")
    if path.is_file():
        _check_same(read_value(Study, path), study, folder)
    write_text(path, dump_value(study))


def _check_same(old: Study, new: Study, folder: Path) -> None:
    for name in vars(new):
        before, now = getattr(old, name), getattr(new, name)
        if name in _FREE or before == now:
            continue
        if name in _MAY_GROW and isinstance(before, dict) and all(now.get(key) == before[key] for key in before):
            continue
        if name == "seeds" and set(before) <= set(now) and before[0] == now[0]:
            continue
        raise VarkdError(
            f"{folder} holds a study with other settings ({name}): methods, pairs and seeds may be added, "
            "for anything else choose another out="
        )
