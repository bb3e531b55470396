"""`varkd bench` on a CUDA device, at its tiniest: both sides of the loss agree, and every row of ours is there."""

from __future__ import annotations

import pytest
import torch

from varkd.run.benchmarking import bench

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_every_row_is_measured():
    rows = bench(device="cuda", size="tiny", repeats=1, budget=600.0, say=lambda line: None)
    assert rows and all(row.ours_s and row.ours_peak is not None and not row.failed for row in rows)
    plain = [row for row in rows if row.theirs == "plain autograd"]
    assert [row.same for row in plain] == [True, True]
