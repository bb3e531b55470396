"""The Inception Score (Salimans et al. 2016, 1606.03498) as ADM's evaluator computes it.

    exp(mean_i KL(p(y | x_i) || mean_j p(y | x_j)))

over consecutive chunks of 5,000 images in file order (the last may be short and weighs the same), and the mean over
chunks; softmax over all 1,008 outputs of the 2015 network, without bias. The order of the file therefore matters: a
class-sorted one loses most of its score.
"""

from __future__ import annotations

import torch
from torch import Tensor

from varkd.errors import VarkdError
from varkd.evaluate.intervals import Estimate
from varkd.world import Rng

CHUNK = 5000
_ROWS = 2048


def inception_score(logits_NC: Tensor, chunk: int = CHUNK) -> float:
    """The score of unbiased logits (N, C), in float64.

    Raises:
        VarkdError: no rows, or logits that are not finite.
    """
    _check(logits_NC, chunk)
    scores = [_score(*_probabilities(rows)) for rows in logits_NC.split(chunk)]
    return sum(scores) / len(scores)


def inception_score_interval(logits_NC: Tensor, resamples: int, seed: int = 0, chunk: int = CHUNK) -> Estimate:
    """The score and its centered 95 % bootstrap interval: images are drawn anew within each chunk."""
    _check(logits_NC, chunk)
    value = inception_score(logits_NC, chunk)
    generator = Rng(seed).generator("inception score")
    chunks, drawn_R = logits_NC.split(chunk), torch.zeros(resamples, dtype=torch.float64)
    for rows in chunks:
        probability_NC, negative_entropy_N = (part.cpu() for part in _probabilities(rows))
        chosen_RN = torch.randint(len(rows), (resamples, len(rows)), generator=generator)
        ones = torch.ones((), dtype=torch.float64).expand(chosen_RN.shape)
        share_RN = torch.zeros(chosen_RN.shape, dtype=torch.float64).scatter_add_(1, chosen_RN, ones) / len(rows)
        drawn_R += _of_means(share_RN @ probability_NC, share_RN @ negative_entropy_N) / len(chunks)
    shifted = drawn_R - drawn_R.quantile(0.5) + value
    low, high = (float(shifted.quantile(tail)) for tail in (0.025, 0.975))
    return Estimate(value, max(1.0, min(low, value)), max(high, value))


def _check(logits_NC: Tensor, chunk: int) -> None:
    if logits_NC.ndim != 2 or not len(logits_NC) or chunk < 1:
        raise VarkdError(f"an Inception Score needs logits (N, C) of at least one image, not {tuple(logits_NC.shape)}")
    if not logits_NC.isfinite().all():
        raise VarkdError("some logits are not finite: the images or the network hold NaN or infinity")


def _probabilities(logits_NC: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities (N, C) and sum p log p (N,), float64."""
    logp = torch.cat([rows.double().log_softmax(1) for rows in logits_NC.split(_ROWS)])
    probability = logp.exp()
    return probability, (probability * logp).sum(1)


def _score(probability_NC: Tensor, negative_entropy_N: Tensor) -> float:
    return float(_of_means(probability_NC.mean(0), negative_entropy_N.mean()))


def _of_means(mean_C: Tensor, negative_entropy: Tensor) -> Tensor:
    """The score from mean probabilities (..., C) and mean sum p log p (...)."""
    return (negative_entropy + torch.special.entr(mean_C).sum(-1)).exp()
