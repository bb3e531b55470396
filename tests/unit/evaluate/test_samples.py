import dataclasses
import math
import time

import pytest
import torch

from varkd.errors import VarkdError
from varkd.evaluate.features import FeatureConfig, FeatureNet, features_of
from varkd.evaluate.fid import frechet_distance, gaussian
from varkd.evaluate.samples import (
    COPY_QUANTILE,
    ReferenceSet,
    _nearest,
    _pixels,
    floors,
    load_reference,
    reference_set,
    sample_metrics,
)

NAMES = ["fd", "precision", "recall", "accuracy", "class_entropy", "nearest", "copies"]


@pytest.fixture(scope="module")
def real(digits):
    validation = digits[1]
    return validation.batch(range(len(validation))), torch.from_numpy(validation.labels)


@pytest.fixture(scope="module")
def metrics_of(reference, fitted):
    return lambda images, labels, **options: sample_metrics(images, labels, reference, fitted[0], **options)


@pytest.fixture(scope="module")
def real_metrics(real, metrics_of):
    return metrics_of(*real)


def test_the_object_is_the_one_of_the_architecture(real_metrics):
    assert list(real_metrics) == NAMES
    for name, estimate in real_metrics.items():
        assert list(estimate)[:3] == ["value", "low", "high"], name
        assert estimate["low"] <= estimate["value"] <= estimate["high"], name
    draws = torch.tensor(real_metrics["fd"]["draws"], dtype=torch.float64)
    assert draws.quantile(0.5).item() == pytest.approx(real_metrics["fd"]["value"], rel=1e-4)
    assert draws.quantile(0.975).item() == pytest.approx(real_metrics["fd"]["high"], rel=1e-4)


def test_unseen_real_images_score_as_real_ones_should(real_metrics, fitted):
    values = {name: estimate["value"] for name, estimate in real_metrics.items()}
    assert values["accuracy"] == fitted[1]["accuracy"]
    assert values["precision"] > 0.8
    assert values["recall"] > 0.6
    assert math.log(10) - 0.05 < values["class_entropy"] <= math.log(10)
    assert values["copies"] == pytest.approx(COPY_QUANTILE, abs=0.01)
    assert values["copies"] > 0


def test_memorized_images_win_the_distance_and_are_found_out(digits, metrics_of, real_metrics):
    train = digits[0]
    index = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:180]
    memorized = metrics_of(train.batch(index), torch.from_numpy(train.labels)[index])
    assert memorized["fd"]["value"] < real_metrics["fd"]["high"]
    assert memorized["copies"]["value"] == 1
    assert memorized["copies"]["low"] > 0.95
    assert memorized["nearest"] == {"value": 0, "low": 0, "high": 0}


def test_noise_is_told_from_digits(real, metrics_of, real_metrics):
    noise = torch.randint(0, 256, real[0].shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    measured = metrics_of(noise, real[1])
    assert measured["fd"]["low"] > 5 * real_metrics["fd"]["high"]
    assert measured["precision"]["high"] < real_metrics["precision"]["low"]
    assert measured["accuracy"]["high"] < 0.4
    assert measured["nearest"]["low"] > real_metrics["nearest"]["high"]
    assert measured["copies"]["value"] == 0
    assert measured["copies"]["high"] > 0  # none of 180 is not proof of none


def test_one_class_only_has_little_entropy_and_wrong_labels_no_accuracy(real, metrics_of):
    images, labels = real
    zeros = metrics_of(images[labels == 0], labels[labels == 0])
    assert zeros["class_entropy"]["high"] < 1.4
    assert zeros["recall"]["value"] < 0.3
    assert metrics_of(images, (labels + 1) % 10)["accuracy"]["value"] < 0.1


def test_the_distance_is_the_plain_one_and_the_seed_decides_the_interval(
    real, metrics_of, reference, fitted, real_metrics
):
    features = features_of(fitted[0], real[0])[0]
    expected = frechet_distance(*gaussian(features), *gaussian(reference.features_NF))
    assert real_metrics["fd"]["value"] == pytest.approx(expected)
    assert metrics_of(*real) == real_metrics
    other = metrics_of(*real, seed=1)
    assert other["fd"]["value"] == real_metrics["fd"]["value"]
    assert other["fd"]["high"] != real_metrics["fd"]["high"]


def test_the_reference_names_itself(reference, digits, fitted):
    described = reference.describe()
    assert described["name"] == "digits"
    assert described["num"] == len(digits[0]) == reference.num
    assert described["copy_distance"] == reference.copy_distance > 0
    small = reference_set(*digits, fitted[0], max_images=100, seed=1, quiet=True)
    assert small.describe()["num"] == 100
    assert small.key != reference.key


def test_the_cache_is_read_when_it_fits_and_rebuilt_when_not(reference, digits, fitted, tmp_path):
    cache = tmp_path / "reference"
    built = reference_set(*digits, fitted[0], cache=cache, quiet=True)
    written = (cache / "reference.safetensors").stat().st_mtime_ns
    read = reference_set(*digits, fitted[0], cache=cache, quiet=True)
    assert (cache / "reference.safetensors").stat().st_mtime_ns == written
    for field in dataclasses.fields(ReferenceSet):
        one, two, three = (getattr(found, field.name) for found in (built, read, reference))
        equal = torch.equal(one, two) and torch.equal(one, three) if torch.is_tensor(one) else one == two == three
        assert equal, field.name
    assert reference_set(*digits, fitted[0], cache=cache, max_images=100, quiet=True).num == 100
    assert load_reference(cache).num == 100


@pytest.mark.parametrize("file", ["config.json", "reference.safetensors"])
def test_a_damaged_cache_is_one_line(digits, fitted, tmp_path, file):
    reference_set(*digits, fitted[0], cache=tmp_path / "r", max_images=50, quiet=True)
    path = tmp_path / "r" / file
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    with pytest.raises(VarkdError) as caught:
        load_reference(tmp_path / "r")
    assert "\n" not in str(caught.value)


def test_nearest_is_what_loops_find(monkeypatch):
    monkeypatch.setattr("varkd.evaluate.samples._ROWS", 6)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (20, 3, 4, 5), generator=generator, dtype=torch.uint8)
    train = torch.randint(0, 256, (31, 3, 4, 5), generator=generator, dtype=torch.uint8)
    train[7] = images[3]
    train[30] = images[4].flip(2)
    for flips in (False, True):
        found = _nearest(images, train.flatten(1), flips, torch.device("cpu"))
        for image, distance in zip(images, found.tolist(), strict=True):
            views = [image, image.flip(2)] if flips else [image]
            all_distances = [((view.double() - row) / 255).square().mean().sqrt() for view in views for row in train]
            assert distance == pytest.approx(min(all_distances).item())
        assert found[3] == 0
        assert (found[4] == 0) == flips


def test_large_images_are_averaged_down_for_the_search():
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat_interleave(4, 2).repeat_interleave(2, 3)
    assert _pixels(images).shape == (1, 1, 32, 32)
    assert torch.equal(_pixels(images)[:, :, ::2], images[:, :, ::4])
    assert torch.equal(_pixels(images[..., :8, :8]), images[..., :8, :8])


def test_floors(digits, real, reference, fitted, real_metrics):
    images = real[0]
    blurred = (images.float() * 0.5 + images.roll(1, 3).float() * 0.5).to(torch.uint8)
    measured = floors(digits[1], blurred, reference, fitted[0])
    assert measured["fd_validation"] == pytest.approx(real_metrics["fd"]["value"])
    assert measured["fd_reconstruction"] > measured["fd_validation"]
    assert floors(images, None, reference, fitted[0]) == {
        "fd_validation": pytest.approx(measured["fd_validation"]),
        "fd_reconstruction": None,
    }


def test_a_network_without_classes_gives_null(digits, real):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = FeatureNet(FeatureConfig((1, 8, 8), 4, "turns", width=4, feature_dim=4)).eval()
    reference = reference_set(*digits, net, max_images=100, quiet=True)
    measured = sample_metrics(*real, reference, net, resamples=10)
    empty = {"value": None, "low": None, "high": None}
    assert measured["accuracy"] == measured["class_entropy"] == empty
    assert measured["accuracy"] is not measured["class_entropy"]
    assert measured["fd"]["value"] is not None


def test_bad_input_is_one_line(real, reference, fitted, digits):
    images, labels = real
    net = fitted[0]
    stranger = FeatureNet(FeatureConfig((1, 8, 8), 10, width=2, feature_dim=4)).eval()
    broken = FeatureNet(net.config).eval()
    torch.nn.init.constant_(broken.project.bias, float("nan"))
    cases = [
        (images[:1], labels[:1], reference, net, "at least 4 samples"),
        (images[:0], labels[:0], reference, net, "at least 4 samples"),
        (images, labels[:-1], reference, net, "as many labels"),
        (images, labels + 5, reference, net, "not among the 10 classes"),
        (images.repeat(1, 3, 1, 1), labels, reference, net, "takes uint8 images"),
        (images.float(), labels, reference, net, "takes uint8 images"),
        (images, labels, reference, stranger, "another feature network"),
        (images, labels, dataclasses.replace(reference, net_hash=broken.hash), broken, "not finite"),
    ]
    for *arguments, message in cases:
        with pytest.raises(VarkdError, match=message) as caught:
            sample_metrics(*arguments)
        assert "\n" not in str(caught.value)
    with pytest.raises(VarkdError, match="at least 4 training"):
        reference_set(_First(digits[0], 3), digits[1], net)  # type: ignore[arg-type]


class _First:
    def __init__(self, images, num):
        self.num, self.fingerprint, self.batch = num, images.fingerprint, images.batch

    def __len__(self):
        return self.num


def test_a_thousand_samples_take_seconds(real, metrics_of):
    images, labels = (torch.cat([part] * 6)[:1000] for part in real)
    begun = time.process_time()
    metrics_of(images, labels)
    assert time.process_time() - begun < 10
