"""Every golden file passes `varkd.verify`, and `varkd.verify` notices damage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from varkd.errors import VarkdError
from varkd.verify.__main__ import main
from varkd.verify.check import verify
from varkd.verify.golden import compare

GOLDEN = Path(__file__).parents[1] / "golden"
FILES = sorted(GOLDEN.glob("*.safetensors"))
WITH_MODEL = [path for path in FILES if not path.name.startswith("filter")]


def test_the_golden_files_are_here():
    assert {path.name.split("-")[0] for path in FILES} >= {"llamagen", "llamagen_vq", "filter"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_parity(path: Path):
    checks = verify(path)
    assert checks and not [check for check in checks if not check.passed]


@pytest.fixture
def copy(tmp_path: Path):
    def make(path: Path, **changes: torch.Tensor | None) -> Path:
        target = tmp_path / path.name
        shutil.copy(path.with_suffix(".json"), target.with_suffix(".json"))
        tensors = {**load_file(path), **changes}
        save_file({name: value.contiguous() for name, value in tensors.items() if value is not None}, target)
        return target

    return make


def failures(path: Path) -> list[str]:
    try:
        return [check.key for check in verify(path) if not check.passed]
    except VarkdError as error:  # an order that is no permutation cannot even be run
        return [str(error)]


@pytest.mark.parametrize("path", WITH_MODEL, ids=lambda path: path.stem)
def test_a_changed_weight_fails(path: Path, copy):
    tensors = load_file(path)
    last = ("output.weight", "head.weight", "lm_head.weight", "decoder.conv_out.weight")
    (name,) = [f"state.{name}" for name in last if f"state.{name}" in tensors]
    weight = tensors[name].clone()
    weight.view(-1)[0] += 0.05
    assert failures(copy(path, **{name: weight}))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_compared_tensor_is_really_compared(path: Path, copy):
    """Shift a number or two of one tensor at a time: that tensor, or one computed from it, must fail."""
    tensors = load_file(path)
    for name in [name for name in tensors if not name.startswith("state.")]:
        changed = tensors[name].clone()
        if changed.dtype == torch.uint8:
            changed.view(-1)[:64] = changed.view(-1)[:64].bitwise_xor(64)
        elif name.startswith("vq_state."):
            changed += 0.5  # all of it: a codebook row that no code uses cannot be seen
        elif changed.is_floating_point():
            changed.view(-1)[changed.argmax()] += 0.5  # the largest one passes every filter
        else:
            # Two of them: the code that is generated last is seen by none, and it may be the first one.
            changed.view(-1)[:2] = (changed.view(-1)[:2] + 1) % 2
        assert failures(copy(path, **{name: changed})), f"{name} may be anything"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_tensor_that_nothing_reads_fails(path: Path, copy):
    assert failures(copy(path, extra=torch.zeros(2))) == ["extra: in the file but not checked"]


def test_missing_tensors_and_files_are_named(copy, tmp_path: Path):
    path = copy(next(path for path in FILES if path.name.startswith("llamagen-")), **{"tf.logits": None})
    with pytest.raises(VarkdError, match=r"tf\.logits"):
        verify(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(VarkdError, match="cannot read"):
        verify(path)
    path.with_suffix(".json").write_text(json.dumps({"family": "nonsense"}))
    with pytest.raises(VarkdError, match="no check for the family"):
        verify(path)
    with pytest.raises(VarkdError):
        verify(tmp_path / "nowhere.safetensors")


def test_exit_codes(copy, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    good = FILES[0]
    assert main([str(good)]) == 0
    assert capsys.readouterr().out.strip().endswith(f"ok   {good}")
    bad = copy(good, extra=torch.zeros(2))
    assert main([str(bad), str(good)]) == 1
    assert main([str(tmp_path / "nowhere.safetensors")]) == 1
    assert "FAIL" in capsys.readouterr().out
    assert main([]) == 1  # nothing checked is not a pass


def test_comparison():
    theirs = torch.tensor([1.0, -torch.inf, 100.0])
    tolerance = {"atol": 1e-3, "rtol": 1e-3}
    assert compare("x", theirs.clone(), theirs, "exact").passed
    assert compare("x", theirs + 0.0015, theirs, tolerance).passed
    assert not compare("x", theirs + 0.0015, theirs, "exact").passed
    assert not compare("x", theirs + 0.3, theirs, tolerance).passed
    assert not compare("x", torch.tensor([1.0, 5.0, 100.0]), theirs, tolerance).passed
    assert not compare("x", torch.tensor([torch.nan, -torch.inf, 100.0]), theirs, tolerance).passed
    assert not compare("x", theirs[:2], theirs, tolerance).passed
