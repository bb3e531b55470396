"""A run as one value: load, merge, check, dump. The only file that knows pydantic and yaml.

defaults < recipe (YAML) < `key=value` of the command line. A key that does not exist is refused with the nearest one
that does. The resolved run is written to `run.yaml` in the run folder.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from varkd.distill.method import Method
from varkd.errors import VarkdError, check_seed, did_you_mean
from varkd.files import read_errors
from varkd.folders import expand
from varkd.methods import METHODS
from varkd.rollout import Sampler
from varkd.train.loop import TrainConfig


@dataclass(frozen=True)
class ModelConfig:
    """The student's family and sizes. Codes, classes and grid (or scales) come from the data.

    `order` ("raster" or "random") is for families that decode in any order, `shared_adaln` for `var`; None is the
    family's own choice. A student with `guidance_conditioned` is told the guidance scale: with a guided target
    (`method.target.highest`) it learns to need one pass where guidance takes two.
    """

    family: str = "llamagen"
    num_layers: int = 2
    dim: int = 32
    num_heads: int = 2
    ffn_dim: int | None = None
    order: Literal["raster", "random"] | None = None
    shared_adaln: bool | None = None
    guidance_conditioned: bool | None = None


@dataclass(frozen=True)
class EvaluationConfig:
    """How a run is judged. Every run that is compared uses the same numbers here."""

    num_samples: int = 2000
    batch_size: int = 250
    sampler: Sampler = field(default_factory=Sampler)
    seed: int = 1234
    resamples: int = 200

    def __post_init__(self) -> None:
        check_seed("evaluation.seed", self.seed)
        for name in ("num_samples", "batch_size", "resamples"):
            if getattr(self, name) < 1:
                raise VarkdError(f"evaluation: {name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class RunConfig:
    """One training run. `data` is a codes folder, or images (then `tokenizer` encodes them into `out`/codes first).

    `teacher` is a run or model folder, or what `varkd teach` made of one; `init` a run or model folder whose weights
    the student starts from.
    `preset` names the row of the method table that `method` came from.
    """

    out: str = ""
    data: str = ""
    tokenizer: str | None = None
    teacher: str | None = None
    init: str | None = None
    name: str | None = None
    preset: str = "ce"
    method: Method = field(default_factory=lambda: METHODS["ce"].method)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        check_seed("seed", self.seed)


PATHS = ("data", "tokenizer", "teacher", "init")
FREE = ("out", "device", "name", "evaluation", "train.keep", "train.log_every", "train.checkpoint_every",
        "train.grid_every", "train.trackers")  # fmt: skip
"""Settings that change no number of the training itself: they may change whenever a run goes on."""
Tree = dict[str, Any]
T = TypeVar("T")
_TEXT = {item.name: str(item.type) for item in fields(RunConfig) if str(item.type) in ("str", "str | None")}


def load_run(recipe: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Resolve a recipe (a path, or the name of one that ships with varkd) and `key=value` overrides.

    Raises:
        VarkdError: no such recipe, an unknown key or method, or a value that does not fit; one line.
    """
    return resolve(read_recipe(recipe), overrides)


def resolve(recipe: Tree, overrides: Sequence[str] = ()) -> RunConfig:
    """Merge a recipe tree and overrides over the defaults and check the result."""
    asked = copy.deepcopy(recipe)
    pairs = [_split(override) for override in overrides]
    preset, method_tree = _preset(asked.pop("preset", None), asked.pop("method", None), dict(pairs).get("method"))
    base = _plain(asdict(RunConfig()))
    base["preset"], base["method"] = preset, method_tree
    tree = _merge(base, asked, "")
    for key, value in pairs:
        if key == "preset":
            raise VarkdError(f"preset={value}: a name alone changes nothing, give method={value}")
        if key != "method":
            _assign(tree, key.split("."), value, key)
    return check(tree)


def read_run(folder: str | Path) -> RunConfig:
    """The resolved run of a run folder.

    Raises:
        VarkdError: no run there.
    """
    path = Path(folder) / "run.yaml"
    if not path.is_file():
        raise VarkdError(f"{folder} is not a run folder (no run.yaml): give the out= of a `varkd train`")
    return check(_read_yaml(path))


def dump(run: RunConfig) -> str:
    """The resolved run as YAML that `read_run` reads back to an equal value."""
    return dump_value(run)


def differences(first: RunConfig, second: RunConfig) -> list[str]:
    """`key: old -> new` for every leaf in which two runs differ, apart from `FREE` settings and paths.

    What stands at a path is for hashes to tell.
    """
    old, new = (dict(_leaves(_plain(asdict(run)))) for run in (first, second))
    ignored = (*FREE, *PATHS)
    keys = [key for key in {**old, **new} if not any(key == name or key.startswith(f"{name}.") for name in ignored)]
    return [f"{key}: {old.get(key, 'none')} -> {new.get(key, 'none')}" for key in keys if old.get(key) != new.get(key)]


def settings(run: RunConfig) -> Tree:
    """Every leaf of a run under its dotted key."""
    return dict(_leaves(_plain(asdict(run))))


def check(tree: Tree) -> RunConfig:
    """Turn a full tree into a `Run`, or say in one line which value does not fit."""
    return check_value(RunConfig, tree)


def check_value(kind: type[T], tree: Tree) -> T:
    """Turn a tree into a frozen dataclass, or say in one line which value does not fit."""
    try:
        return _adapter(kind).validate_python(tree)
    except ValidationError as error:
        raise VarkdError(_one_line(error)) from None


def load_value(kind: type[T], recipe: str | Path, overrides: Sequence[str] = ()) -> T:
    """A dataclass other than `Run` from a YAML recipe and `key=value`, over the defaults of its fields.

    Raises:
        VarkdError: as `load_run`.
    """
    defaults: Any = check_value(kind, {})
    given: Any = check_value(kind, _merge(_plain(asdict(defaults)), read_recipe(recipe), ""))
    tree = _plain(asdict(given))  # with every key, so that overrides may name what the recipe leaves out
    for key, value in map(_split, overrides):
        _assign(tree, key.split("."), value, key)
    return check_value(kind, tree)


def sampler_from(overrides: Sequence[str]) -> Sampler:
    """A sampler by `key=value` over the defaults.

    Raises:
        VarkdError: as `load_run`.
    """
    tree = _plain(asdict(Sampler()))
    for key, value in map(_split, overrides):
        _assign(tree, key.split("."), value, key)
    return check_value(Sampler, tree)


def dump_value(value: Any) -> str:
    """A frozen dataclass as YAML that `read_value` reads back to an equal value."""
    return dump_tree(asdict(value))


def dump_tree(tree: Tree) -> str:
    """Mappings, lists and plain values as YAML, in their order."""
    return yaml.safe_dump(_plain(tree), sort_keys=False, width=100)


def read_value(kind: type[T], path: Path) -> T:
    """What `dump_value` wrote."""
    return check_value(kind, _read_yaml(path))


def read_recipe(recipe: str | Path) -> Tree:
    """The YAML of a recipe path or of a recipe that ships with varkd."""
    path = Path(recipe)
    if not path.is_file():
        shipped = {
            found.relative_to(folder).with_suffix("").as_posix(): found
            for folder in _recipe_folders()
            for found in sorted(folder.rglob("*.yaml"))
        }
        name = str(recipe).removesuffix(".yaml")
        if name not in shipped:
            raise VarkdError(
                f"no recipe '{recipe}': neither a file nor one that ships with varkd; {did_you_mean(name, shipped)}"
            )
        path = shipped[name]
    tree = _read_yaml(path)
    if not isinstance(tree, dict):
        raise VarkdError(f"{path}: a recipe is a mapping of keys to values")
    return _expanded(tree)


def _expanded(tree: Any) -> Any:
    """The tree with `~` expanded where a path stands."""
    if not isinstance(tree, dict):
        return tree
    return {
        key: expand(value) if key in ("out", *PATHS) and isinstance(value, str) else _expanded(value)
        for key, value in tree.items()
    }


def _recipe_folders() -> list[Path]:
    package = Path(__file__).parent
    return [folder for folder in (package / "recipes", package.parents[1] / "recipes") if folder.is_dir()]


def _read_yaml(path: Path) -> Any:
    try:
        with read_errors(path, "is not valid YAML: it is no UTF-8 text"):
            text = path.read_text(encoding="utf-8")
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise VarkdError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None


def _preset(shown: Any, in_recipe: Any, in_override: Any) -> tuple[str, Tree]:
    """The preset's name and its method tree, with the recipe's own changes merged in; `shown`: by `varkd show`."""
    changes = dict(in_recipe) if isinstance(in_recipe, dict) else {}
    name = in_override or changes.pop("preset", None) or (in_recipe if isinstance(in_recipe, str) else shown or "ce")
    if not isinstance(name, str) or name not in METHODS:
        raise VarkdError(f"unknown method '{name}': {did_you_mean(str(name), METHODS)} (`varkd methods` lists them)")
    tree = _plain(asdict(METHODS[name].method))
    return name, _merge(tree, changes if not in_override else {}, "method")


def _split(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise VarkdError(f"'{override}' is not key=value (example: train.updates=500)")
    if key.split(".")[-1] in ("out", *PATHS):
        text = expand(text)
    if text == "" or key in _TEXT:  # paths and names are text, whatever they look like
        return key, None if text in ("", "null") and "None" in _TEXT.get(key, "None") else text
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise VarkdError(f"cannot read the value of '{override}'") from None
    return key, _number(value) if isinstance(value, str) else value


def _number(text: str) -> Any:
    """YAML 1.1 reads 1e-3 as text; people write learning rates like that."""
    try:
        return float(text)
    except ValueError:
        return text


def _assign(tree: Any, path: list[str], value: Any, key: str) -> None:
    for depth, segment in enumerate(path[:-1]):
        tree = _descend(tree, segment, ".".join(path[: depth + 1]))
    last = path[-1]
    if isinstance(tree, list):
        index = _index(tree, last, key)
        tree[index] = _merged_value(tree[index], value, key)
    elif isinstance(tree, dict) and last in tree:
        tree[last] = _merged_value(tree[last], value, key)
    else:
        known = tree if isinstance(tree, dict) else {}
        raise VarkdError(f"unknown key '{key}': {did_you_mean(last, known)}")


def _descend(tree: Any, segment: str, key: str) -> Any:
    if isinstance(tree, list):
        return tree[_index(tree, segment, key)]
    if isinstance(tree, dict) and segment in tree:
        return tree[segment]
    raise VarkdError(f"unknown key '{key}': {did_you_mean(segment, tree if isinstance(tree, dict) else {})}")


def _index(items: list[Any], segment: str, key: str) -> int:
    """A list item by its position, or by its `name` (terms)."""
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    if segment in names:
        return names.index(segment)
    if segment.isdigit() and int(segment) < len(items):
        return int(segment)
    raise VarkdError(
        f"unknown key '{key}': the list has {len(items)} items"
        + (f" named {', '.join(map(str, names))}" if any(names) else "")
    )


def _merge(base: Tree, update: Tree, where: str) -> Tree:
    merged = dict(base)
    for key, value in update.items():
        path = f"{where}.{key}" if where else str(key)
        if not base:  # a mapping by names of the user's own, such as the methods of a study
            merged[str(key)] = value
            continue
        if key not in base:
            raise VarkdError(f"unknown key '{path}': {did_you_mean(str(key), base)}")
        merged[key] = _merged_value(base[key], value, path)
    return merged


def _merged_value(old: Any, new: Any, path: str) -> Any:
    """Mappings merge key by key, unless the new one is of another kind (then it replaces the old one whole)."""
    same_kind = isinstance(new, dict) and isinstance(old, dict) and new.get("kind", old.get("kind")) == old.get("kind")
    if same_kind:
        return _merge(old, new, path)
    if isinstance(old, dict) and "kind" in old and isinstance(new, str):
        return {"kind": new}  # method.terms.kd.divergence=reverse_kl
    if isinstance(old, str) and isinstance(new, float | int) and not isinstance(new, bool):
        return str(new)
    return new


def _plain(value: Any) -> Any:
    """Tuples as lists, recursively: what YAML can hold."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _leaves(tree: Any, where: str = "") -> list[tuple[str, Any]]:
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, list):
        items = [(item.get("name", i) if isinstance(item, dict) else i, item) for i, item in enumerate(tree)]
    else:
        return [(where, tree)]
    return [leaf for key, item in items for leaf in _leaves(item, f"{where}.{key}" if where else str(key))]


_ADAPTERS: dict[type, TypeAdapter[Any]] = {}


def _adapter(kind: type) -> TypeAdapter[Any]:
    """The validator of a dataclass: unknown keys are refused at every depth."""
    if kind not in _ADAPTERS:
        _forbid_extra(kind, set())
        _ADAPTERS[kind] = TypeAdapter(kind)
    return _ADAPTERS[kind]


def _forbid_extra(kind: Any, seen: set[Any]) -> None:
    """Mark every dataclass reachable from `kind` as closed. Plain dataclasses ignore unknown keys otherwise."""
    import typing

    if kind in seen:
        return
    seen.add(kind)
    if is_dataclass(kind):
        kind.__pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[attr-defined]
        hints = typing.get_type_hints(kind)
        for item in fields(kind):
            _forbid_extra(hints[item.name], seen)
    for argument in typing.get_args(kind):
        if not isinstance(argument, str | int | float | bool):
            _forbid_extra(argument, seen)


def _one_line(error: ValidationError) -> str:
    """The most telling of pydantic's complaints: in a union, the one about the member whose `kind` was asked for."""
    errors = error.errors(include_url=False)
    about_kind = {tuple(e["loc"][:-1]) for e in errors if e["type"] == "literal_error" and e["loc"][-1] == "kind"}
    relevant = [e for e in errors if not any(e["loc"][: len(prefix)] == prefix for prefix in about_kind)]
    if not relevant:
        kinds = sorted({str(e.get("ctx", {})["expected"]).strip("'") for e in errors if e["type"] == "literal_error"})
        bad = next(e for e in errors if e["type"] == "literal_error")
        return f"{_where(bad['loc'])}: unknown kind '{bad['input']}': {did_you_mean(str(bad['input']), kinds)}"
    first = max(relevant, key=lambda e: (e["type"] == "value_error", len(e["loc"])))
    message = first["msg"].removeprefix("Value error, ")
    return f"{_where(first['loc'])}: {message} (got {first['input']!r})" if first["type"] != "value_error" else message


def _where(location: tuple[Any, ...]) -> str:
    """A pydantic location without the names of union members."""
    return ".".join(str(part) for part in location if not (isinstance(part, str) and part[:1].isupper()))
