"""Digits and a feature network fitted to them in a second, shared by the tests of evaluation."""

import pytest

from varkd.data.images import ImageSet, open_images
from varkd.evaluate.features import FeatureNet, FitFeatures, fit_features
from varkd.evaluate.samples import ReferenceSet, reference_set

QUICK = FitFeatures(updates=200, batch_size=64, width=8, feature_dim=16)


@pytest.fixture(scope="session")
def digits() -> tuple[ImageSet, ImageSet]:
    return open_images("digits", "train"), open_images("digits", "validation")


@pytest.fixture(scope="session")
def fitted(digits) -> tuple[FeatureNet, dict]:
    return fit_features(*digits, QUICK, quiet=True)


@pytest.fixture(scope="session")
def reference(digits, fitted) -> ReferenceSet:
    return reference_set(*digits, fitted[0], quiet=True)
