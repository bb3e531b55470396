"""A run as one value: what is merged, what is refused, and that what is written is read back."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from varkd.config import RunConfig, check, differences, dump, load_run, read_recipe, read_run, resolve
from varkd.distill.bestof import BestOf
from varkd.distill.divergences import JSD, Decoupled, ForwardKL
from varkd.distill.mixture import Mixture
from varkd.distill.prefixes import MixtureSampling, Rollout, SpeculativeSampling
from varkd.distill.replay import Replay
from varkd.distill.schedule import LinearSchedule
from varkd.distill.selection import Accepted, Confidence, EntropyWeight, Random
from varkd.distill.spaces import Clusters, TopK
from varkd.errors import VarkdError
from varkd.methods import METHODS

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml") if not path.stem.startswith("study-"))


@pytest.mark.parametrize("name", METHODS)
def test_every_preset_survives_writing_and_reading(name: str, tmp_path: Path):
    run = resolve({"method": name, "train": {"optim": {"lr": 1e-7}}, "name": "über"})
    (tmp_path / "run.yaml").write_text(dump(run))
    again = read_run(tmp_path)
    assert again == run and dump(again) == dump(run)
    assert again.preset == name and again.method == METHODS[name].method
    assert type(again.method.contexts) is type(METHODS[name].method.contexts)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("method", [None, *METHODS])
def test_every_recipe_resolves_with_every_method(recipe: str, method: str | None):
    run = load_run(recipe, [f"method={method}"] if method else [])
    assert run.preset == (method or "ce") and run.train.updates >= 200


def test_there_are_recipes():
    assert {"digits-teacher", "digits-student", "cifar10-teacher", "cifar10-student"} <= set(RECIPES)


def test_the_last_word_wins(tmp_path: Path):
    (tmp_path / "r.yaml").write_text("seed: 1\ntrain: {updates: 7, optim: {lr: 0.5}}\nmethod: kd\n")
    run = load_run(tmp_path / "r.yaml", ["train.updates=8", "train.updates=9", "name=x"])
    assert (run.seed, run.train.updates, run.train.optim.lr, run.name) == (1, 9, 0.5, "x")
    assert run.train.batch_size == RunConfig().train.batch_size
    assert run.preset == "kd" and load_run(tmp_path / "r.yaml", ["method=ce"]).preset == "ce"


def test_a_recipe_changes_a_preset(tmp_path: Path):
    recipe = {"method": {"preset": "skd", "contexts": {"top_k": 3}}}
    run = resolve(recipe, ["method.contexts.top_p=0.5"])
    assert run.method.contexts == SpeculativeSampling(top_k=3, top_p=0.5) != METHODS["skd"].method.contexts
    assert recipe == {"method": {"preset": "skd", "contexts": {"top_k": 3}}}, "the argument is not touched"


def test_another_kind_replaces_the_old_one():
    run = resolve({}, ["method=best_of_n", "method.contexts.shares.1.contexts={kind: rollout, by: teacher}"])
    assert isinstance(run.method.contexts, Mixture) and run.method.contexts.shares[1].contexts == Rollout("teacher")
    run = resolve({"method": {"preset": "gkd", "contexts": {"kind": "replay", "every": 3}}})
    assert run.method.contexts == Replay(every=3)


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("method.terms.student.weight=2", lambda m: m.terms[1].weight == 2.0),
        ("method.terms.1.weight=2", lambda m: m.terms[1].weight == 2.0),
        ("method.terms.student.divergence=forward_kl", lambda m: m.terms[1].divergence == ForwardKL()),
        ("method.terms.student.divergence={kind: jsd, beta: 0.3}", lambda m: m.terms[1].divergence == JSD(0.3)),
        ("method.terms.student.space.count=4", lambda m: m.terms[1].space == Clusters(count=4)),
        ("method.terms.anchor.selection.quantile=0.25", lambda m: m.terms[0].selection.quantile == 0.25),
        ("method.terms.anchor.selection.quantile.end=0.9", lambda m: m.terms[0].selection.quantile.end == 0.9),
        ("method.terms.student.on=[student, data]", lambda m: m.terms[1].on == ("student", "data")),
        ("method.contexts.shares.1.contexts.every=9",
         lambda m: m.contexts.shares[1].contexts.every == 9),
        ("method.terms.anchor.weight={start: 1, end: 0}", lambda m: m.terms[0].weight == LinearSchedule(1, 0)),
    ],
)  # fmt: skip
def test_overrides_reach_into_terms(override: str, read):
    gate = "method.terms.anchor.selection={kind: confidence, quantile: {start: 0, end: 0.5}}"
    before, run = (resolve({}, ["method=best_of_n_clusters", gate, *more]) for more in ([], [override]))
    assert read(run.method) and not read(before.method)
    assert isinstance(run.method.contexts, Mixture) and isinstance(run.method.terms[0].selection, Confidence)
    place = override.split("=")[0].replace("terms.1", "terms.student").rpartition(".")[0]
    assert all(line.startswith(place) for line in differences(before, run)), "nothing else changed"


_BEST = "{kind: best_of, count: 2, rollout: {kind: mixture_sampling, alpha: 0.3}}"


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("method.terms.student.selection={kind: entropy_weight, threshold: 0.4}", EntropyWeight(0.4)),
        ("method.terms.student.selection={kind: entropy_weight, threshold: null}", EntropyWeight(None)),
        ("method.terms.student.selection={kind: random, quantile: {start: 0, end: 0.5}}",
         Random(LinearSchedule(0, 0.5))),
        ("method.terms.student.selection={kind: accepted, rule: neighbors}", Accepted("neighbors")),
        ("method.terms.student.selection=entropy_weight", EntropyWeight()),
        ("method.terms.anchor.space={kind: top_k, count: 9, of: student}", TopK(9, "student")),
        ("method.terms.anchor.divergence={kind: decoupled, part: target}", Decoupled("target")),
        ("method.terms.student.space={kind: clusters, assignment: random}", Clusters(assignment="random")),
        ("method.contexts={kind: replay, rollout: {kind: best_of}}", Replay(BestOf())),
        (f"method.contexts.shares.1.contexts={_BEST}", BestOf(MixtureSampling(alpha=0.3), 2)),
        (f"method.contexts.shares.1.contexts.rollout={_BEST}", BestOf(MixtureSampling(alpha=0.3), 2)),
    ],
)  # fmt: skip
def test_the_parts_of_varkd_can_be_exchanged(override: str, value: Any, tmp_path: Path):
    run = resolve({}, ["method=best_of_n", override])
    found: Any = run.method
    for name in override.split("=")[0].split(".")[1:]:
        found = next(t for t in found if t.name == name) if name in ("student", "anchor") else (
            found[int(name)] if name.isdigit() else getattr(found, name))  # fmt: skip
    assert found == value
    (tmp_path / "run.yaml").write_text(dump(run))
    assert read_run(tmp_path) == run


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("method.terms.student.space=top_k", "count"),
        ("method.terms.student.selection={kind: entropy_wieght}", "unknown kind 'entropy_wieght'.*entropy_weight"),
        ("method.terms.student.space={kind: top_k, count: 0}", "count must be at least 1"),
        ("method.terms.student.space={kind: top_k, count: many}", "count"),
        ("method.terms.student.divergence=embedding_moments", "unknown kind 'embedding_moments'"),
        ("method.terms.student.credit=reward", "sampled rewards"),
    ],
)
def test_parts_that_do_not_fit_are_named(override: str, complaint: str):
    best = "method.contexts.shares.1.contexts={kind: best_of}"
    with pytest.raises(VarkdError, match=complaint):
        resolve({}, ["method=best_of_n_clusters", best, override])


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 1e-3), ("1.5e-3", 1.5e-3), ("1E-3", 1e-3), ("2e+2", 200.0), ("3", 3.0), ("0.1", 0.1)]
)
def test_numbers_are_read_as_people_write_them(text: str, value: float):
    assert resolve({}, [f"train.optim.lr={text}"]).train.optim.lr == value
    assert resolve(yaml.safe_load(f"train: {{optim: {{lr: {text}}}}}")).train.optim.lr == value


@pytest.mark.parametrize(
    ("override", "value"), [("name=3", "3"), ("name=true", "true"), ("name=1e3", "1e3"), ("name=2024-01", "2024-01"),
                            ("name=a=b", "a=b"), ("name=", None), ("name=null", None), ("name=run: 1", "run: 1")]
)  # fmt: skip
def test_a_name_is_text_whatever_it_looks_like(override: str, value: str | None):
    assert resolve({}, [override]).name == value


def test_a_preset_is_more_than_its_name():
    """A run must not call itself `kd` and do something else."""
    with pytest.raises(VarkdError, match="give method=kd"):
        resolve({}, ["preset=kd"])
    assert resolve({"preset": "kd"}).method == METHODS["kd"].method


@pytest.mark.parametrize(
    "out", ["3", "1e3", "007", "0x10", "yes", "2024-01-02", "a/b=c", "a~", "runs/[x]", "a: b", "1_000"]
)
def test_a_path_is_text_whatever_it_looks_like(out: str):
    assert resolve({}, [f"out={out}"]).out == out


def test_whole_numbers_stay_whole():
    run = resolve({}, ["train.updates=1e3", "seed=5"])
    assert run.train.updates == 1000 and type(run.train.updates) is int
    with pytest.raises(VarkdError, match=r"train\.updates"):
        resolve({}, ["train.updates=10.5"])


def test_differences_name_the_keys():
    first = resolve({}, ["method=best_of_n", "out=a", "device=cpu", "name=a"])
    second = resolve({}, ["method=best_of_n", "out=b", "device=cuda", "name=b", "train.optim.lr=0.5",
                          "method.terms.student.weight=2"])  # fmt: skip
    assert differences(first, first) == []
    assert sorted(differences(first, second)) == [
        "method.terms.student.weight: 1.0 -> 2.0", "train.optim.lr: 0.001 -> 0.5"
    ]  # fmt: skip
    assert any(line.startswith("preset: best_of_n -> kd") for line in differences(first, resolve({}, ["method=kd"])))


def _dictionaries(tree: Any, path: tuple = ()) -> list[tuple]:
    """The paths of all mappings in a tree."""
    found = [path] if isinstance(tree, dict) else []
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    return found + [inner for key, value in items for inner in _dictionaries(value, (*path, key))]


def _listed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _listed(item) for key, item in value.items()}
    return [_listed(item) for item in value] if isinstance(value, list | tuple) else value


@settings(max_examples=60, deadline=None)
@given(data=st.data(), preset=st.sampled_from(sorted(METHODS)), key=st.text("abcdefgh_", min_size=1, max_size=6))
def test_unknown_keys_are_refused_at_any_depth(data: st.DataObject, preset: str, key: str):
    """In a full tree (as run.yaml is read back), in a recipe and on the command line."""
    full = _listed(asdict(resolve({"method": preset})))
    path = data.draw(st.sampled_from(_dictionaries(full)))
    node = full
    for step in path:
        node = node[step]
    if key in node:
        return
    node[key] = 1
    with pytest.raises(VarkdError) as refused:
        check(full)
    assert "\n" not in str(refused.value)
    dotted = ".".join(map(str, (*path, key)))
    with pytest.raises(VarkdError, match="unknown key") as refused:
        resolve({"method": preset}, [f"{dotted}=1"])
    assert "\n" not in str(refused.value)
    if path and not any(isinstance(step, int) for step in path) and path[0] != "method":
        recipe: dict = {}
        inner = recipe
        for step in path:
            inner = inner.setdefault(step, {})
        inner[key] = 1
        with pytest.raises(VarkdError, match="unknown key"):
            resolve({"method": preset, **recipe})


@pytest.mark.parametrize("name", ["digits-teacher", "digits-teacher.yaml", "recipes/digits-teacher.yaml"])
def test_recipes_are_found_by_name_and_by_path(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    assert read_recipe(name)["name"] == "teacher"


def test_a_folder_without_a_run(tmp_path: Path):
    with pytest.raises(VarkdError, match="not a run folder"):
        read_run(tmp_path)


@pytest.mark.parametrize("content", ["", "3", "[]", "{}", "train: {updates: 3}"])
def test_a_run_yaml_that_is_none_is_one_line(tmp_path: Path, content: str):
    (tmp_path / "run.yaml").write_text(content)
    try:
        assert read_run(tmp_path) is not None
        assert content in ("{}", "train: {updates: 3}"), "what is left out keeps its default"
    except VarkdError as error:
        assert "\n" not in str(error)
        assert content in ("", "3", "[]")
