"""Every preset trains, on two families that read a prefix differently."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tiny_runs import log, train
from varkd.methods import METHODS

QUICK = ("train.updates=2", "train.validate_every=2", "train.checkpoint_every=2", "train.batch_size=4")


@pytest.mark.parametrize("family", ["llamagen", "arpg"])
@pytest.mark.parametrize("name", METHODS)
def test_a_preset_trains(tmp_path: Path, codes: Path, teacher: Path, name: str, family: str):
    """An ARPG student in raster order may learn from the LlamaGen teacher."""
    model = ("model.family=arpg", "model.order=raster", "model.num_layers=2") if family == "arpg" else ()
    run = train(tmp_path / "run", codes, *QUICK, *model, f"method={name}", f"teacher={teacher}")
    lines = [line for line in log(run) if line["split"] == "train"]
    assert len(lines) == 2
    terms = {term.name for term in METHODS[name].method.terms}
    for line in lines:
        assert all(math.isfinite(value) for key, value in line.items() if key != "split")
        assert any(f"terms/{term}" in line for term in terms)
