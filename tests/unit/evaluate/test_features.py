import json

import numpy as np
import pytest
import torch

from varkd.errors import VarkdError
from varkd.evaluate.features import (
    FeatureConfig,
    FeatureNet,
    FitFeatures,
    _augment,
    features_of,
    fit_features,
    load_features,
    save_features,
    turned,
)


class Noise:
    """An image set of two brightnesses; with `classes`, they are the labels."""

    name, split, fingerprint = "noise", "train", "0"

    def __init__(self, num=64, shape=(3, 12, 10), classes=True):
        generator = np.random.default_rng(0)
        self.image_shape, self.class_names = shape, ("dark", "light") if classes else ("all",)
        bright = np.arange(num) % 2
        self.labels = bright if classes else np.zeros(num, np.int64)
        gradient = np.linspace(0, 60, shape[1])[:, None] + np.linspace(0, 40, shape[2])
        noisy = generator.integers(0, 40, (num, *shape)) + gradient + 100 * bright[:, None, None, None]
        self.images = torch.from_numpy(noisy.astype(np.uint8))

    def __len__(self):
        return len(self.images)

    def batch(self, indices):
        return self.images[torch.as_tensor(indices)]


def test_digits_are_learnt_and_the_record_says_how(digits, fitted):
    net, record = fitted
    train, validation = digits
    logits = features_of(net, validation)[1]
    accuracy = (logits.argmax(1).numpy() == validation.labels).mean()
    assert record["accuracy"] == record["task_accuracy"] == pytest.approx(accuracy)
    assert accuracy > 0.9
    assert record["task"] == "classes"
    assert record["name"] == "varkd features of digits"
    assert record["hash"] == net.hash
    assert (record["num_train"], record["num_validation"]) == (len(train), len(validation))
    assert record["epochs"] == pytest.approx(200 * 64 / len(train))
    assert not net.training


def test_features_are_standardized_on_the_data(digits, fitted):
    features = features_of(fitted[0], digits[0])[0]
    assert features.shape == (len(digits[0]), 16)
    assert features.dtype == torch.float64
    assert features.mean(0).abs().max() < 0.6
    assert 0.5 < features.std(0).min() < features.std(0).max() < 2


def test_logits_come_from_the_features(fitted, digits):
    net = fitted[0]
    images = digits[1].batch(range(8)).float() / 127.5 - 1
    with torch.inference_mode():
        torch.testing.assert_close(net(images), net.logits(net.features(images)))


def test_batch_size_and_kind_of_input_do_not_matter(fitted, digits):
    validation = digits[1]
    images = validation.batch(range(len(validation)))
    torch.testing.assert_close(features_of(fitted[0], validation, 7), features_of(fitted[0], images), atol=1e-5, rtol=0)


def test_the_seed_decides_and_global_state_is_left_alone(digits):
    fit = FitFeatures(updates=3, batch_size=32, width=4, feature_dim=4)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = fit_features(*digits, fit, quiet=True)[0].hash
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(6)
    assert fit_features(*digits, fit, quiet=True)[0].hash == first
    other = FitFeatures(updates=3, batch_size=32, width=4, feature_dim=4, seed=1)
    assert fit_features(*digits, other, quiet=True)[0].hash != first


@pytest.mark.parametrize("shape", [(3, 12, 10), (1, 9, 9)])
def test_one_class_is_learnt_by_turns(shape):
    images = Noise(shape=shape, classes=False)
    net, record = fit_features(images, images, FitFeatures(updates=40, batch_size=32, width=4), quiet=True)  # type: ignore[arg-type]
    assert record["task"] == net.config.task == "turns"
    assert record["accuracy"] is None
    assert record["task_accuracy"] > 0.7
    assert features_of(net, images)[1].shape == (64, 4)  # type: ignore[arg-type]


def test_small_data_is_not_repeated_for_ever():
    assert FitFeatures(updates=100, max_epochs=10, batch_size=32).updates_for(64) == 20
    assert FitFeatures(updates=100, max_epochs=10, batch_size=32).updates_for(10_000) == 100
    assert FitFeatures(updates=100, max_epochs=10, batch_size=32).updates_for(5) == 10


def test_turns_are_distinct_rearrangements():
    for shape in ((1, 3, 3), (1, 2, 3)):
        image = torch.arange(int(np.prod(shape))).reshape(shape).byte()
        views = turned(image.expand(4, *shape), torch.arange(4))
        assert torch.equal(views[0], image)
        assert len({tuple(view.flatten().tolist()) for view in views}) == 4
        assert all(torch.equal(view.flatten().sort().values, image.flatten()) for view in views)


def test_augmentation_shifts_and_mirrors():
    images = torch.arange(64).reshape(1, 1, 8, 8).byte().expand(200, -1, -1, -1)
    generator = torch.Generator().manual_seed(0)
    plain = {tuple(image.flatten().tolist()) for image in _augment(images, False, generator)}
    assert len(plain) == 9  # -1, 0, 1 in either direction
    assert all(list(image[::8]) == sorted(image[::8]) and image[0] <= image[7] for image in plain)
    both = {tuple(image.flatten().tolist()) for image in _augment(images, True, generator)}
    assert len(both) == 18
    assert plain < both


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (3, 64, 64), (3, 33, 48), (1, 100, 20)])
def test_any_reasonable_shape_goes_through(shape):
    net = FeatureNet(FeatureConfig(shape, 5, width=2, feature_dim=6)).eval()
    assert net.features(torch.zeros(2, *shape)).shape == (2, 6)
    assert net(torch.zeros(2, *shape)).shape == (2, 5)


@pytest.mark.parametrize("shape", [(3, 7, 8), (2, 8, 8), (4, 32, 32)])
def test_shapes_that_are_refused(shape):
    with pytest.raises(VarkdError, match="1 or 3 channels"):
        FeatureConfig(shape, 5)


def test_images_of_another_kind_are_refused(fitted):
    for images in (torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(4, 1, 8, 8)):
        with pytest.raises(VarkdError, match="takes uint8 images"):
            features_of(fitted[0], images)
    with pytest.raises(VarkdError, match="no images"):
        features_of(fitted[0], torch.zeros(0, 1, 8, 8, dtype=torch.uint8))


def test_splits_that_do_not_fit_are_refused(digits):
    with pytest.raises(VarkdError, match="differ in image shape or classes"):
        fit_features(digits[0], Noise())  # type: ignore[arg-type]
    with pytest.raises(VarkdError, match="2 images in each split"):
        fit_features(Noise(), Noise(num=1))  # type: ignore[arg-type]
    with pytest.raises(VarkdError, match="updates and max_epochs >= 1"):
        fit_features(*digits, FitFeatures(updates=0))


def test_a_diverging_fit_is_one_line(digits):
    with pytest.raises(VarkdError, match="diverged"):
        fit_features(*digits, FitFeatures(updates=30, width=4, learning_rate=1e38), quiet=True)


def test_saved_and_loaded_is_the_same(fitted, digits, tmp_path):
    net, record = fitted
    save_features(net, record, tmp_path / "features")
    loaded, record_again = load_features(tmp_path / "features")
    assert loaded.config == net.config
    assert loaded.hash == net.hash
    assert record_again == record
    assert not loaded.training
    torch.testing.assert_close(features_of(loaded, digits[1]), features_of(net, digits[1]), rtol=0, atol=0)


def _truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "damage, message",
    [
        (_truncate, "damaged"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no such file"),
        (lambda folder: (folder / "fit.json").unlink(), "no such file"),
        (lambda folder: _edit(folder, kind="pixels"), "does not hold a feature network"),
        (lambda folder: _edit(folder, width=16), "damaged"),
        (lambda folder: _edit(folder, surprise=1), "damaged"),
        (lambda folder: _edit(folder, image_shape=[1, 9, 9]), "hash"),
        (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "does not hold a feature network"),
    ],
)
def test_damage_is_one_line(fitted, tmp_path, damage, message):
    folder = tmp_path / "features"
    save_features(*fitted, folder)
    damage(folder)
    with pytest.raises(VarkdError, match=message) as caught:
        load_features(folder)
    assert "\n" not in str(caught.value)
