"""`varkd bench` as a whole, at its tiniest, against a slow reference laid out as a checkout of LlamaGen."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from official_llamagen import write_checkout
from varkd.bench.official import Checkout
from varkd.cli import main
from varkd.errors import VarkdError
from varkd.run.benchmarking import _ends, bench

SCHEMA = {"group", "what", "ours_s", "theirs", "theirs_s", "time_ratio", "ours_peak", "theirs_peak", "peak_ratio",
          "bound_s", "bound_ratio", "repeats", "same", "left_out", "note"}  # fmt: skip
TINY = ["bench", "--size", "tiny", "--device", "cpu", "--repeats", "1"]
OFFICIAL = ("autoregressive", "utils", "models", "dist")


@pytest.fixture(autouse=True)
def own_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test imports its own checkout, and none of the packages that may or may not be installed."""
    for name in list(sys.modules):
        if name.split(".")[0] in OFFICIAL:
            monkeypatch.delitem(sys.modules, name)
    for name in ("liger_kernel", "trl"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.fixture
def forget_checkouts():
    yield
    for name in list(sys.modules):
        if name.split(".")[0] in OFFICIAL:
            del sys.modules[name]


@pytest.mark.usefixtures("forget_checkouts")
def test_everything_at_its_tiniest(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    checkout = write_checkout(tmp_path / "official")
    assert main([*TINY, "--llamagen", str(checkout), "--json", str(tmp_path / "rows.json")]) == 0
    told, shown = json.loads((tmp_path / "rows.json").read_text()), capsys.readouterr().out
    rows = told["rows"]
    assert told["size"] == "tiny" and told["machine"]["bandwidth"] > 0
    assert list(dict.fromkeys(row["group"] for row in rows)) == ["loss", "rollout", "step"]
    for row in rows:
        assert set(row) == SCHEMA and row["what"] in shown and row["ours_s"] > 0 and row["repeats"] == 1
        assert row["bound_ratio"] == pytest.approx(row["ours_s"] / row["bound_s"])
        if row["theirs_s"] is not None:
            assert row["time_ratio"] == pytest.approx(row["theirs_s"] / row["ours_s"])
    compared = [row for row in rows if row["theirs"] == "official"]
    assert len(compared) == 4 and all(row["same"] for row in compared)
    (greedy,) = [row["note"] for row in compared if "greedy" in row["note"]]
    assert greedy.endswith("greedy codes 100.0% equal")
    notes = "\n".join(row["note"] for row in rows)
    assert notes.count("pip install 'varkd[bench]'") == 2 and "of the measured peak (MFU)" in notes
    assert not list(checkout.rglob("__pycache__"))


@pytest.mark.usefixtures("forget_checkouts")
def test_other_code_that_computes_something_else_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    checkout = write_checkout(tmp_path / "official")
    model = checkout / "autoregressive/models/gpt.py"
    model.write_text(model.read_text().replace("F.silu", "F.gelu"))
    assert main([*TINY, "rollout", "--llamagen", str(checkout)]) == 1
    assert "DIFFERENT: logits differ to" in capsys.readouterr().out


@pytest.mark.usefixtures("forget_checkouts")
def test_a_checkout_that_needs_more_is_a_note(tmp_path: Path):
    checkout = write_checkout(tmp_path / "official")
    model = checkout / "autoregressive/models/gpt.py"
    model.write_text("import a_package_of_theirs\n" + model.read_text())
    rows = bench(["rollout"], device="cpu", size="tiny", repeats=1, llamagen=checkout, say=lambda line: None)
    told = [row for row in rows if row.theirs == "official"]
    assert told and all(row.ours_s and row.theirs_s is None and not row.failed for row in told)
    assert all("needs the package a_package_of_theirs, which is not installed" in row.note for row in told)


@pytest.mark.usefixtures("forget_checkouts")
def test_other_packages_may_be_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A package `utils` anywhere on the path hides the official folder of that name, which is none."""
    (tmp_path / "elsewhere/utils").mkdir(parents=True)
    (tmp_path / "elsewhere/utils/__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))
    checkout = Checkout.of_llamagen(write_checkout(tmp_path / "official"))
    with pytest.raises(VarkdError, match="needs its own 'utils', but another package goes by that name"):
        checkout.modules("autoregressive.models.gpt")


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (["--llamagen", "nowhere"], "no checkout of the official LlamaGen at nowhere (it has no autoregressive/"),
        (["--var", "."], "no checkout of the official VAR at . (it has no models/var.py)"),
        (["--llamagen-compile"], "give --llamagen PATH too"),
        (["losses"], "did you mean 'loss'?"),
        (["--repeats", "0"], "give at least 1"),
        (["--budget", "0"], "above 0"),
        (["--device", "tpu?"], "use auto, cpu or cuda"),
    ],
)  # fmt: skip
def test_what_a_person_can_put_right_is_one_line(
    words: list[str], advice: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "--size", "tiny", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and advice in err and len(err.splitlines()) == 1


def test_a_budget_leaves_cases_out(capsys: pytest.CaptureFixture[str]):
    assert main([*TINY, "step", "--budget", "1e-6"]) == 0
    assert capsys.readouterr().out.count("left out: 1e-06 s were over (--budget)") == 4


def test_groups_share_the_budget():
    """What one group leaves is the next one's, and the last one ends with the budget."""
    assert _ends(["step", "loss", "rollout"], 100.0) == {"loss": 25.0, "rollout": 75.0, "step": 100.0}
    assert _ends(["rollout", "step"], 90.0) == {"rollout": pytest.approx(60.0), "step": 90.0}


@pytest.mark.parametrize("name", ["llamagen", "var"])
@pytest.mark.usefixtures("forget_checkouts")
def test_the_true_official_code(name: str):
    """With a checkout at hand: VARKD_LLAMAGEN=PATH VARKD_VAR=PATH pytest ..."""
    path = os.environ.get(f"VARKD_{name.upper()}")
    if not path:
        pytest.skip(f"VARKD_{name.upper()} names no checkout")
    given: dict[str, Path] = {name: Path(path)}
    rows = bench(["rollout"], device="cpu", size="tiny", repeats=1, say=lambda line: None, **given)  # type: ignore[arg-type]
    told = [row for row in rows if row.theirs == "official"]
    assert told and all(row.same and row.theirs_s for row in told), [row.note for row in told]
