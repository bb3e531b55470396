"""ADM's numbers on a GPU are those of the CPU: the goldens' own tolerances, whatever TF32 is set to."""

from __future__ import annotations

import pytest
import torch

import adm_inputs as inputs
from varkd import metrics
from varkd.evaluate.inception import Inception

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_features_do_not_depend_on_the_device_or_on_tf32():
    state = {name: torch.from_numpy(value) for name, value in inputs.weights(1).items()}
    images = torch.from_numpy(inputs.images(11, 0, 4, 256)).permute(0, 3, 1, 2)
    golden = Inception(state, "random", torch.float64)(images)
    net = Inception(state, "random").cuda()
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        taps = net(images)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    for found, expected in zip(taps, golden, strict=True):
        assert float((found.cpu().double() - expected).abs().max() / expected.abs().max()) < 1e-4


@pytest.mark.parametrize("mode", ["adm", "float32"])
def test_precision_and_recall_are_those_of_the_cpu(mode: metrics.Mode):
    for case, (reference, samples) in inputs.pr_cases(21, (500, 600)).items():
        cpu = [torch.from_numpy(points) for points in (reference, samples)]
        here = metrics.precision_recall(*cpu, mode=mode)
        there = metrics.precision_recall(*(points.cuda() for points in cpu), mode=mode)
        assert there == pytest.approx(here, abs=0.01), case


def test_distances_are_those_of_the_cpu():
    for case, (x1, x2) in inputs.frechet_cases(21).items():
        cpu = [torch.from_numpy(x) for x in (x1, x2)]
        there = metrics.frechet_distance(*(x.cuda() for x in cpu))
        assert there == pytest.approx(metrics.frechet_distance(*cpu), rel=1e-6, abs=1e-6), case
