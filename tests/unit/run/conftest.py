"""Codes and a teacher for tiny runs, and a feature network that is fitted for a moment only."""

from functools import partial

import pytest

from tiny_runs import codes, scale_codes, teacher

__all__ = ["codes", "scale_codes", "teacher"]


@pytest.fixture(autouse=True)
def quick_features(monkeypatch: pytest.MonkeyPatch) -> None:
    from varkd.evaluate.features import FitFeatures
    from varkd.run import evaluation

    monkeypatch.setattr(evaluation, "FitFeatures", partial(FitFeatures, updates=25))
