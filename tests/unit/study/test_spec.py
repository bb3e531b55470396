"""A study's recipe: what it resolves to, and every mistake in it before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from varkd.cli import main
from varkd.errors import VarkdError
from varkd.methods import METHODS
from varkd.study.spec import Study, claim, load_study, recipe_run, student_run

SMALL: dict[str, Any] = {"pairs": {"digits": {}}, "methods": {"ce": None, "kd": None}}


def recipe(folder: Path, **changes: Any) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**SMALL, **changes}, sort_keys=False))
    return path


def study(folder: Path, **changes: Any) -> Study:
    return load_study(recipe(folder, **changes))


def test_a_method_is_a_preset_with_changes(tmp_path: Path):
    found = study(tmp_path, methods={
        "ce": None, "hot": {"preset": "kd", "set": ["method.terms.kd.space.temperature=2", "train.optim.lr*=0.5"]},
    })  # fmt: skip
    run = student_run(found, "digits", "hot", ("train.optim.lr*=0.1",), seed=7, updates=40, folder="somewhere")
    assert run.preset == "kd" and run.seed == 7 and run.out == "somewhere"
    assert run.method.terms[0].space.temperature == 2  # type: ignore[union-attr]
    assert run.train.optim.lr == pytest.approx(6e-3 * 0.5 * 0.1)
    assert run.train.updates == 40 and run.train.checkpoint_every == 2 and run.train.keep >= 20
    assert run.evaluation == found.evaluation


def test_teacher_and_start_follow_the_pair(tmp_path: Path):
    found = study(tmp_path, pairs={"d": {"teacher_set": ["model.dim=48"], "student_set": ["model.dim=24"],
                                         "start_updates": 9}})  # fmt: skip
    teacher, start = (recipe_run(found, "d", role, 3, role) for role in ("teacher", "student"))  # type: ignore[arg-type]
    assert (teacher.model.dim, teacher.train.updates) == (48, 500)
    assert (start.model.dim, start.train.updates, start.preset) == (24, 9, "ce")
    assert student_run(found, "d", "kd", (), 3, 5, "x").model.dim == 24


def test_roles_come_from_what_presets_say_of_themselves(tmp_path: Path):
    names = ("ce", "varkd", "best_of_n_select", "best_of_n_random_select")
    found = study(tmp_path, methods={**dict.fromkeys(names), "mine": {"preset": "varkd", "role": "ablation"}})
    assert [found.role(name) for name in (*names, "mine")] == ["baseline", "varkd", "ablation", "control", "ablation"]


def test_every_preset_may_be_studied(tmp_path: Path):
    found = study(tmp_path, methods=dict.fromkeys(METHODS), sweep=[[]])
    assert found.methods_of("digits") == tuple(METHODS)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"methods": {"kdd": None}}, "unknown preset 'kdd': did you mean 'kd'"),
        ({"methods": {}}, "needs pairs:, methods: and seeds:"),
        ({"seeds": [0, 100]}, "validation_seed 100 is a reported seed"),
        ({"search_sampling_seed": 1234}, "search_sampling_seed must differ"),
        ({"temperatures": [0.0]}, "temperatures above 0"),
        ({"updates": 0}, "updates must be at least 1"),
        ({"methods": {"kd": {"sweep": [[]]}}}, "the same budget for all"),
        ({"pairs": {"digits": {"methods": ["gkd"]}}}, "'gkd' is no method of this study"),
        ({"pairs": {"digits": {"student": "digit-student"}}}, "did you mean 'digits-student'"),
        ({"methods": {"kd": {"set": ["method.terms.kd.wait=1"]}}}, "did you mean 'weight'"),
        ({"sweep": [["train.optim.lr*=fast"]]}, "could be multiplied"),
        ({"sweep": [["train.precision*=2"]]}, "could be multiplied"),
        ({"updates": "many"}, "updates"),
        ({"metods": {}}, "did you mean 'methods'"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict, message: str):
    assert main(["study", str(recipe(tmp_path, **changes)), f"out={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_study_may_grow_but_not_change(tmp_path: Path):
    first = study(tmp_path)
    claim(first, tmp_path / "out")
    claim(study(tmp_path, methods={"ce": None, "kd": None, "gkd": None}, seeds=[0, 1, 2, 3], workers=1),
          tmp_path / "out")  # fmt: skip
    for changes in ({"updates": 7}, {"methods": {"ce": None}}, {"seeds": [0]}):
        with pytest.raises(VarkdError, match="holds a study with other settings"):
            claim(study(tmp_path, **changes), tmp_path / "out")


def test_foreign_folders_are_left_alone(tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("do not touch")
    with pytest.raises(VarkdError, match="not a study's folder"):
        claim(study(tmp_path), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]
