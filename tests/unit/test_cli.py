"""The command line: help without weight, what is shown can be run, and exit codes."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from varkd import cli
from varkd.cli import main
from varkd.config import load_run, read_run, resolve
from varkd.methods import METHODS

VERBS = ["demo", "tokenizer", "tokenizer fit", "tokenizer import", "encode", "teach", "train", "sample", "evaluate",
         "analyze", "study", "report", "show", "methods", "zoo", "convert", "export", "publish", "reproduce",
         "quantize", "app", "shrink", "plan", "bench"]  # fmt: skip
_HELP = """
import json, sys
from varkd.cli import main
codes = {}
for verb in json.loads(sys.argv[1]):
    try:
        main([*verb.split(), "--help"])
    except SystemExit as end:
        codes[verb] = end.code
    print("=====")
names = ("torch", "numpy", "pydantic", "yaml", "datasets", "matplotlib", "sklearn", "rich")
heavy = [name for name in names if name in sys.modules]
print(json.dumps([codes, heavy]), file=sys.stderr)
"""


def test_the_help_of_every_verb_imports_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", _HELP, json.dumps(VERBS)], capture_output=True, text=True, check=True)
    codes, heavy = json.loads(done.stderr)
    assert codes == dict.fromkeys(VERBS, 0) and heavy == []
    texts = done.stdout.split("=====")[:-1]
    assert len(texts) == len(VERBS)
    for verb, text in zip(VERBS, texts, strict=True):
        assert text.strip().startswith(f"usage: varkd {verb}"), verb
        assert len(text.splitlines()) > 4


def test_the_list_of_verbs_is_complete():
    (actions,) = [action for action in cli.parser()._actions if isinstance(action.choices, dict)]
    assert isinstance(actions.choices, dict)
    assert set(actions.choices) == {verb.split()[0] for verb in VERBS}


@pytest.mark.parametrize("method", METHODS)
def test_what_is_shown_is_the_run(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    overrides = [f"method={method}", "out=runs/x", "train.optim.lr=1e-4", "name=12"]
    assert main(["show", "digits-student", *overrides]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"# {method}: {METHODS[method].summary}\n") and METHODS[method].equation in shown
    asked = load_run("digits-student", overrides)
    (tmp_path / "run.yaml").write_text(shown)
    assert read_run(tmp_path) == asked
    again = {key: value for key, value in yaml.safe_load(shown).items() if key not in ("method", "preset")}
    assert resolve({**again, "method": method}) == asked


def test_what_is_shown_is_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """`varkd show ... > recipe.yaml` is how a person begins one."""
    assert main(["show", "digits-student", "method=best_of_n", "method.contexts.shares.1.contexts.every=3"]) == 0
    (tmp_path / "recipe.yaml").write_text(capsys.readouterr().out)
    assert load_run(tmp_path / "recipe.yaml") == load_run(
        "digits-student", ["method=best_of_n", "method.contexts.shares.1.contexts.every=3"]
    )


def test_a_wrong_command_line_is_2(capsys: pytest.CaptureFixture[str]):
    for wrong in (["nonsense"], [], ["train"], ["encode", "digits"], ["sample", "x", "--num", "many"]):
        with pytest.raises(SystemExit) as end:
            main(wrong)
        assert end.value.code == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith("varkd")


def test_the_version(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert not end.value.code and capsys.readouterr().out.startswith("varkd 0.")


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def run(arguments: object) -> int:
        raise error

    monkeypatch.setattr(cli.training, "_run_methods", run)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "varkd: interrupted"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 2, "varkd: error: the disk is full"),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), 2, "varkd: error: the disk is full"),
    ],
)
def test_what_strikes_anywhere_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, said: str
):
    raising(monkeypatch, error)
    assert main(["methods"]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(said)


@pytest.mark.parametrize("error", [OSError("a bug"), TypeError("a bug"), ValueError("a bug")])
def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch, error: Exception):
    raising(monkeypatch, error)
    with pytest.raises(type(error)):
        main(["methods"])


def test_a_reader_who_has_seen_enough(tmp_path: Path):
    """`varkd methods | head -1`: no traceback."""
    command = f"{sys.executable} -m varkd.cli methods 2>{tmp_path / 'said'} | head -c 1 > {os.devnull}"
    subprocess.run(["bash", "-c", command], check=True)
    assert (tmp_path / "said").read_text() == ""


def test_a_run_is_shown_in_words_that_follow_its_overrides(capsys: pytest.CaptureFixture[str]):
    """As comments before the YAML, which stays what it was."""
    overrides = ["method=kd_ce", "method.terms.kd.divergence=reverse_kl", "method.terms.ce.weight=0.25"]
    assert main(["show", "digits-student", *overrides]) == 0
    lines = capsys.readouterr().out.splitlines()
    words = [line.removeprefix("# ").removeprefix("#") for line in lines[: lines.index("out: ''")]]
    assert [line.startswith("#") for line in lines] == [index < len(words) for index in range(len(lines))]
    assert "changed from the preset: method.terms.kd.divergence.kind: forward_kl -> reverse_kl" in words
    assert "changed from the preset: method.terms.ce.weight: 0.5 -> 0.25" in words
    assert "  compares: reverse KL, KL(q || p) = sum q (log q - log p)" in words
    assert "  weight 1/4, mean on data rows over all their positions" in words
    assert {"prefixes:", "target:", "term kd:", "term ce:", "adapts:", "cost:", "families:"} <= set(words)


def test_a_preset_as_it_stands_is_not_called_changed(capsys: pytest.CaptureFixture[str]):
    assert main(["show", "digits-student", "method=best_of_n", "train.updates=7"]) == 0
    assert "changed" not in capsys.readouterr().out


def test_some_methods_alone(capsys: pytest.CaptureFixture[str]):
    assert main(["methods", "gkd", "skd"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if not line.startswith(" ")] == ["gkd", "skd"]
    assert main(["methods", "akl", "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == ["akl"]
    assert main(["methods", "gdk"]) == 2
    assert capsys.readouterr().err == "varkd: error: unknown method 'gdk': did you mean 'gkd'?\n"
