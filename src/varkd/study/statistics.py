"""Intervals over seeds and samples together, and paired differences. NumPy only.

A mean over seeds moves for two reasons: other seeds, and other samples of the same models. Both are redrawn: seeds with
replacement (their spread widened by sqrt(n / (n - 1)), for the bootstrap of n values is too narrow by that), samples by
the draws that the evaluation kept. Runs under comparison share seeds, labels and noise, so their difference is drawn
pair by pair, and is much surer than the difference of two intervals. With one seed only the samples are redrawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_RESAMPLES = 2000
Array = NDArray[np.float64]


def mean_estimate(value_S: Sequence[float], draw_SR: Sequence[Sequence[float]] | None = None) -> dict[str, float]:
    """The mean over S seeds with its 95 % interval; `draw_SR` holds each seed's bootstrap draws over samples."""
    values = np.asarray(value_S, float)
    noise_RS = np.zeros((_RESAMPLES, len(values)))
    if draw_SR is not None:
        draws = np.asarray(draw_SR, float)
        turns = np.random.default_rng(1).integers(draws.shape[1], size=_RESAMPLES)
        noise_RS = (draws - np.median(draws, axis=1, keepdims=True))[:, turns].T
    return _interval(float(values.mean()), _seed_noise(values) + noise_RS.mean(axis=1))


def paired_difference(
    first_S: Sequence[float],
    second_S: Sequence[float],
    draw_SR: tuple[Sequence[Sequence[float]], Sequence[Sequence[float]]] | None = None,
) -> dict[str, float]:
    """first - second, paired by seed, and by sample where the draws of both are given."""
    difference = [a - b for a, b in zip(first_S, second_S, strict=True)]
    draws = None if draw_SR is None else np.asarray(draw_SR[0], float) - np.asarray(draw_SR[1], float)
    return mean_estimate(difference, None if draws is None else draws.tolist())


def wins(first_S: Sequence[float], second_S: Sequence[float]) -> tuple[int, int]:
    """On how many seeds the first is lower, and on how many it is higher."""
    pairs = list(zip(first_S, second_S, strict=True))
    return sum(a < b for a, b in pairs), sum(a > b for a, b in pairs)


def _seed_noise(value_S: Array) -> Array:
    """How far the mean moves with other seeds, in each resample."""
    num = len(value_S)
    if num < 2:
        return np.zeros(_RESAMPLES)
    chosen = np.random.default_rng(0).integers(num, size=(_RESAMPLES, num))
    moved: Array = value_S[chosen].mean(axis=1) - value_S.mean()
    return moved * np.sqrt(num / (num - 1))


def _interval(value: float, noise_R: Array) -> dict[str, Any]:
    low, high = np.quantile(noise_R - np.median(noise_R), [0.025, 0.975])
    return {"value": value, "low": min(value, value + float(low)), "high": max(value, value + float(high))}
