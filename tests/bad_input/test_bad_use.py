"""Sampling and evaluating what is not there: exit code 2, one line that says what to do, nothing half-written."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mistakes import Refused

from tiny_runs import train


@pytest.mark.parametrize("verb", ["sample", "evaluate", "report"])
@pytest.mark.parametrize("what", ["missing", "empty", "codes", "file"])
def test_what_is_not_a_run(tmp_path: Path, codes: Path, refused: Refused, verb: str, what: str):
    place = codes if what == "codes" else tmp_path / what
    if what == "empty":
        place.mkdir()
    if what == "file":
        place.write_text("")
    more = [] if verb == "evaluate" else ["--out", tmp_path / "out"]
    refused([verb, place, *more], str(place), untouched=tmp_path)


@pytest.mark.parametrize("options", [["--temperature", "0"], ["--num", "10"]])
def test_options_do_not_hide_what_is_not_a_run(tmp_path: Path, refused: Refused, options: list[str]):
    refused(["evaluate", tmp_path / "none", *options], "not a run folder")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--labels", "3", "10"], ["label 10", "0..9"]),
        (["--labels", "-1"], ["label -1"]),
        (["--num", "0"], ["num=0"]),
        (["--temperature", "-1"], ["temperature"]),
        (["--top-p", "1.5"], ["top_p"]),
        (["--top-k", "-2"], ["top_k"]),
        (["--batch-size", "0"], ["batch"]),
        (["--device", "tpu"], ["device=tpu"]),
    ],
    ids=lambda value: " ".join(value) if str(value[0]).startswith("--") else "",
)
def test_sampling_what_cannot_be(tmp_path: Path, teacher: Path, refused: Refused, options: list[str], words: list[str]):
    refused(["sample", teacher, "--out", tmp_path / "out", *options], *words, untouched=tmp_path)


def test_evaluating_too_few(teacher: Path, refused: Refused):
    refused(["evaluate", teacher, "--num", "0"], "num_samples must be at least 1", untouched=teacher)


def test_a_run_that_is_not_finished(tmp_path: Path, codes: Path, refused: Refused):
    run = train(tmp_path / "run", codes, "train.updates=1")
    shutil.rmtree(run / "checkpoints")
    refused(["sample", run, "--out", tmp_path / "out"], "train it first", untouched=tmp_path)


_BARE = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError("No module named " + name, name=name)
sys.meta_path.insert(0, Blocked())
from varkd.cli import main
sys.exit(main({arguments!r}))
"""


@pytest.mark.parametrize(("library", "extra", "arguments"), [
    ("sklearn", "demo", ["encode", "digits", "--tokenizer", "pixels", "--out", "codes"]),
    ("datasets", "data", ["encode", "x.parquet", "--tokenizer", "pixels", "--out", "codes"]),
    ("matplotlib", "report", ["report", "run", "--out", "report"]),
])  # fmt: skip
def test_a_bare_install_says_which_extra_is_missing(
    library: str, extra: str, arguments: list[str], tmp_path: Path, codes: Path
):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    code = _BARE.format(blocked={library}, arguments=arguments)
    if library == "matplotlib":
        train(tmp_path / "run", codes)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip().endswith(
        f"varkd: error: this needs {library}, which is not installed: pip install 'varkd[{extra}]'"
    )
    assert "Traceback" not in done.stderr and not (tmp_path / "codes").exists()
