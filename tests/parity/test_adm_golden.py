"""ADM's evaluator, number for number: TensorFlow's own run of it, a float64 network, and closed float64 formulas.

The goldens are of random weights and images that `adm_inputs` makes again. Each mistake of `MISTAKES` is made on
purpose and must be seen.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file
from torch import Tensor

import adm_inputs as inputs
from varkd import metrics
from varkd.evaluate import inception as network
from varkd.evaluate.inception import SPATIAL_CHANNELS, Inception, Taps, normalized, tf1_resize
from varkd.evaluate.manifolds import _Points, radii

GOLDEN = Path(__file__).parents[1] / "golden" / "evaluation"
FEATURE_TOLERANCE, SOFTMAX_TOLERANCE = 5e-5, 2e-4
SEED = 21


def facts(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / f"{name}.json").read_text())


IMAGES = facts("inception")["images"]
TENSORS = load_file(GOLDEN / "inception.safetensors")
RADII = load_file(GOLDEN / "precision_recall.safetensors")
FRECHET, MANIFOLDS = facts("frechet")["cases"], facts("precision_recall")["cases"]
POINTS = inputs.pr_cases(SEED, tuple(facts("precision_recall")["sizes"]))


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return {name: torch.from_numpy(value) for name, value in inputs.weights(1).items()}


@pytest.fixture(scope="module")
def net(state: dict[str, Tensor]) -> Inception:
    return Inception(state, "random")


@pytest.fixture(scope="module")
def net64(state: dict[str, Tensor]) -> Inception:
    return Inception(state, "random", torch.float64)


def image(row: int) -> Tensor:
    about = IMAGES[row]
    pixels = inputs.image(about["seed"], about["index"], about["size"])
    assert inputs.sha256(pixels) == about["sha256"]
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def error(found: Tensor, golden: np.ndarray) -> float:
    """The largest error over the golden's largest value."""
    return float(np.abs(found[0].double().numpy() - golden).max() / np.abs(golden).max())


@pytest.mark.parametrize("row", range(6))
def test_the_resize_has_tensorflows_bits(row: int):
    resized = tf1_resize(image(row))
    for stage, pixels in (("resized", resized), ("normalized", normalized(resized))):
        assert inputs.sha256(pixels[0].permute(1, 2, 0).contiguous().numpy()) == IMAGES[row][f"{stage}_sha256"]


@pytest.mark.parametrize("row", range(6))
def test_features_and_logits_in_float32(net: Inception, row: int):
    taps = net(image(row))
    logits = net.logits(taps.pool_BF)
    assert error(taps.pool_BF, TENSORS["pool3"][row]) < FEATURE_TOLERANCE
    assert error(taps.spatial_BF, TENSORS["spatial"][row]) < FEATURE_TOLERANCE
    assert error(logits, TENSORS["logits_unbiased"][row]) < FEATURE_TOLERANCE
    assert error(logits.softmax(1), TENSORS["softmax"][row]) < SOFTMAX_TOLERANCE
    assert error(taps.pool_BF, TENSORS["tf.pool3"][row]) < 7e-5
    assert error(taps.spatial_BF, TENSORS["tf.spatial"][row]) < FEATURE_TOLERANCE
    assert error(logits.softmax(1), TENSORS["tf.softmax"][row]) < SOFTMAX_TOLERANCE
    assert error(logits.softmax(1), TENSORS["softmax_with_bias_WRONG"][row]) > 100 * SOFTMAX_TOLERANCE


@pytest.mark.parametrize("row", range(6))
def test_features_and_logits_in_float64(net64: Inception, row: int):
    taps = net64(image(row))
    assert error(taps.pool_BF, TENSORS["pool3"][row]) < 1e-9
    assert error(taps.spatial_BF, TENSORS["spatial"][row]) < 1e-9
    assert error(net64.logits(taps.pool_BF), TENSORS["logits_unbiased"][row]) < 1e-9


def half_pixel(images: Tensor) -> Tensor:
    return F.interpolate(images.float(), (299, 299), mode="bilinear", align_corners=False)


def spatial_of(letter: str, channels: slice = slice(SPATIAL_CHANNELS), order: tuple[int, ...] = (0, 2, 3, 1)):
    def taps(self: Inception, images: Tensor) -> Taps:
        hidden = self.mixed_6a(self.mixed_5(self.stem(images)))
        spatial = hidden
        for name, block in self.mixed_6.items():
            hidden = block(hidden)
            if name == letter:
                spatial = hidden[:, :192][:, channels].permute(*order).flatten(1)
        return Taps(self.mixed_7c(self.mixed_7b(self.mixed_7a(hidden))).mean((2, 3)), spatial)

    return taps


def padded_average(hidden: Tensor) -> Tensor:
    return F.avg_pool2d(hidden, 3, 1, 1)


@contextmanager
def instead(owner: Any, name: str, value: Any) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, value)
        yield


MISTAKES: dict[str, tuple[Any, str, Any]] = {
    "resize half_pixel": (network, "tf1_resize", half_pixel),
    "resize rounded": (network, "tf1_resize", lambda images: tf1_resize(images).round()),
    "normalise x/255*2-1": (network, "normalized", lambda images: images / 255 * 2 - 1),
    "spatial from Mixed_6e": (Inception, "taps", spatial_of("e")),
    "spatial from Mixed_6c": (Inception, "taps", spatial_of("c")),
    "spatial last 7 channels": (Inception, "taps", spatial_of("d", slice(-SPATIAL_CHANNELS, None))),
    "spatial NCHW order": (Inception, "taps", spatial_of("d", order=(0, 1, 2, 3))),
    "BN eps 1e-5": (network, "_EPS", 1e-5),
    "count_include_pad=True": (network, "_average_pool", padded_average),
    "Mixed_7c average pool": (network.F, "max_pool2d", None),
}


def average_in_7c(hidden: Tensor, size: int, stride: int, padding: int = 0, *_: Any, **__: Any) -> Tensor:
    return network._average_pool(hidden) if padding else torch.max_pool2d(hidden, size, stride)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_seen(state: dict[str, Tensor], mistake: str):
    """On image 0, the mistaken network is as wrong as the golden table says, far outside the tolerance."""
    owner, name, value = MISTAKES[mistake]
    with instead(owner, name, value or average_in_7c):
        taps = Inception(state, "random")(image(0))
    expected = facts("mutations")[mistake]["size256_row0"]
    found = [error(taps.pool_BF, TENSORS["pool3"][0]), error(taps.spatial_BF, TENSORS["spatial"][0])]
    assert max(found) > 100 * FEATURE_TOLERANCE
    for own, golden in zip(found, expected, strict=True):
        if golden > FEATURE_TOLERANCE:
            assert own == pytest.approx(golden, rel=0.1)


def test_a_bfloat16_network_is_seen(state: dict[str, Tensor]):
    taps = Inception(state, "random", torch.bfloat16)(image(1))
    assert error(taps.pool_BF.float(), TENSORS["pool3"][1]) > 100 * FEATURE_TOLERANCE


@pytest.mark.parametrize("case", FRECHET)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_frechet_distances(case: str, dtype: torch.dtype):
    x1, x2 = (torch.from_numpy(x).to(dtype) for x in inputs.frechet_cases(SEED)[case])
    found = metrics.frechet_distance(x1, x2)
    if case.startswith("identical"):
        assert abs(found) < (1e-6 if case.endswith("lt_d") else 1e-9)
        return
    targets = [FRECHET[case][name] for name in ("adm_evaluator", "psd_float64_stats")]
    assert min(abs(found - target) for target in targets) < 1e-6 * max(1.0, targets[0])
    assert found == pytest.approx(targets[0], rel=1e-5)


def test_the_divisor_of_the_covariance_is_seen():
    """With N instead of N - 1 a distance between 40 and 48 points of 64 features moves by percents."""
    x1, x2 = (torch.from_numpy(x) for x in inputs.frechet_cases(SEED)["n_lt_d"])
    own, other = metrics.frechet_distance(x1, x2), FRECHET["n_lt_d"]["adm_evaluator"]
    assert own == pytest.approx(other, rel=1e-6)
    mean = lambda x: x - x.mean(0)
    shrunk = [x.mean(0) + mean(x) * ((len(x) - 1) / len(x)) ** 0.5 for x in (x1, x2)]
    assert metrics.frechet_distance(*shrunk) != pytest.approx(other, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inception_scores(state: dict[str, Tensor], dtype: torch.dtype):
    golden = facts("inception_score")
    features = inputs.is_features(golden["features"]["seed"], golden["features"]["n"])
    assert inputs.sha256(features) == golden["features"]["sha256"]
    logits = torch.from_numpy(features).to(dtype) @ state["fc.weight"].to(dtype).T
    by_class = torch.from_numpy(np.argsort(np.arange(len(features)) % 20, kind="stable"))
    found = {
        "default_5000": metrics.inception_score(logits),
        "split_500": metrics.inception_score(logits, 500),
        "split_260": metrics.inception_score(logits, 260),
        "class_sorted_split_260": metrics.inception_score(logits[by_class], 260),
    }
    assert found == pytest.approx(golden["adm_evaluator"], rel=2e-6)
    assert found == pytest.approx(golden["float64"], rel=2e-6)
    for wrong in (logits + state["fc.bias"].to(dtype), logits[:, :1000]):
        assert metrics.inception_score(wrong) != pytest.approx(golden["adm_evaluator"]["default_5000"], rel=1e-3)


@pytest.mark.parametrize("case", MANIFOLDS)
def test_precision_and_recall(case: str):
    reference, samples = (torch.from_numpy(points) for points in POINTS[case])
    assert inputs.sha256(reference.numpy()) == MANIFOLDS[case]["sha256_ref"]
    steps = {"precision": 1 / len(samples), "recall": 1 / len(reference)}
    half = dict(zip(steps, metrics.precision_recall(reference, samples), strict=True))
    exact = dict(zip(steps, metrics.precision_recall(reference, samples, mode="float32"), strict=True))
    for name, step in steps.items():
        assert abs(half[name] - MANIFOLDS[case]["float16_rule"][name]) <= 2 * step + 1e-9
        assert abs(half[name] - MANIFOLDS[case]["adm_evaluator_tf_cpu"][name]) <= 0.01
        assert abs(exact[name] - MANIFOLDS[case]["float64_distances"][name]) <= step + 1e-9


@pytest.mark.parametrize("name", sorted(name for name in RADII if not name.endswith("_tf")))
def test_radii(name: str):
    """To one step of float16 at the size of the norms (two for 2,048 features), or to 1e-5 without rounding."""
    case, rest = name.split(".")
    _, side, kind = rest.split("_")
    points = torch.from_numpy(POINTS[case][0 if side == "ref" else 1])
    golden = torch.from_numpy(RADII[name]).double()
    if kind == "float64":
        assert torch.allclose(radii(_Points.of(points, "float32")), golden, rtol=1e-5, atol=1e-9)
        return
    step = 2.0 ** (points.square().sum(1).max().log2().floor() - 10)
    found = radii(_Points.of(points, "adm")).double()
    assert float((found - golden).abs().max()) <= step * (2 if points.shape[1] > 256 else 1)


def test_the_overflow_of_float16_falls_back_to_float32():
    reference, samples = (torch.from_numpy(points) for points in POINTS["fp16_overflow"])
    assert not _Points.of(reference, "adm").safe
    assert radii(_Points.of(samples, "adm")).isfinite().all()


@pytest.fixture(scope="module")
def images_on_disk(tmp_path_factory: pytest.TempPathFactory, net: Inception) -> Path:
    about, folder = facts("end_to_end"), tmp_path_factory.mktemp("adm")
    make = lambda part: inputs.images(about["image_seed"], about[part]["first"], about[part]["count"], about["size"])
    np.savez(folder / "plain.npz", make("ref_arr_0"))
    np.savez_compressed(folder / "sample.npz", make("sample"))
    virtual = metrics.open_reference(_saved(folder / "virtual.npz", make("virtual")), net)
    assert virtual.spatial is not None
    np.savez(folder / "stats.npz", make("ref_arr_0"), mu=virtual.pool.mean_F, sigma=virtual.pool.covariance_FF,
             mu_s=virtual.spatial.mean_F, sigma_s=virtual.spatial.covariance_FF)  # fmt: skip
    return folder


def _saved(path: Path, images: np.ndarray) -> Path:
    np.savez(path, images)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["plain", "stats"])
def test_end_to_end(images_on_disk: Path, net: Inception, reference: str):
    found = metrics.adm(images_on_disk / "sample.npz", images_on_disk / f"{reference}.npz", net, resamples=0)
    golden = facts("end_to_end")["adm_evaluator"][reference]
    assert found["fid"] == pytest.approx(golden["fid"], rel=1e-5)
    assert found["sfid"] == pytest.approx(golden["sfid"], rel=1e-5)
    assert found["is"] == pytest.approx(golden["inception_score"], rel=2e-6)
    assert found["precision"] == pytest.approx(golden["precision"], abs=0.07)
    assert found["recall"] == pytest.approx(golden["recall"], abs=0.07)
