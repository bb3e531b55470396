"""Published image metrics as functions: `varkd.metrics.adm("samples.npz", "VIRTUAL_imagenet256_labeled.npz")`.

`adm` judges images as ADM's evaluator does, and its result carries the protocol. The other functions take features and
logits of any network. Features are float (N, F), logits float (N, C); all numbers are plain floats.
"""

from __future__ import annotations

from torch import Tensor

from varkd.evaluate.adm import AdmResult, adm, compare, protocol_differences
from varkd.evaluate.inception import Inception
from varkd.evaluate.inception_files import load_inception
from varkd.evaluate.inception_score import CHUNK
from varkd.evaluate.inception_score import inception_score as _inception_score
from varkd.evaluate.kernel_distance import fid_infinity as _fid_infinity
from varkd.evaluate.kernel_distance import kid as _kid
from varkd.evaluate.manifolds import NEIGHBORS, Mode
from varkd.evaluate.manifolds import precision_recall as _precision_recall
from varkd.evaluate.moments import frechet, gaussian_of
from varkd.evaluate.reference import Reference, open_reference, save_reference

__all__ = [
    "AdmResult", "Inception", "Reference", "adm", "compare", "fid_infinity", "frechet_distance", "inception_score",
    "kid", "load_inception", "open_reference", "precision_recall", "protocol_differences", "save_reference",
]  # fmt: skip


def frechet_distance(samples: Tensor, reference: Tensor) -> float:
    """The squared Fréchet distance of Gaussians fitted to features (N, F) and (M, F), float64 and not clamped.

    Raises:
        VarkdError: fewer than 2 rows, features of different widths, or values that are not finite.
    """
    return frechet(gaussian_of(samples), gaussian_of(reference))


def inception_score(logits: Tensor, chunk: int = CHUNK) -> float:
    """The Inception Score of logits (N, C) in file order: the mean over consecutive chunks, as in ADM.

    Raises:
        VarkdError: no rows, or logits that are not finite.
    """
    return _inception_score(logits, chunk)


def precision_recall(reference: Tensor, samples: Tensor, k: int = NEIGHBORS, mode: Mode = "adm") -> tuple[float, float]:
    """Precision and recall of features; mode "adm" rounds distances to float16 as published numbers do.

    Raises:
        VarkdError: no more than k points in a set, features of different widths or not finite, or an unknown mode.
    """
    found = _precision_recall(reference, samples, k, mode)
    return found.precision.value, found.recall.value


def kid(reference: Tensor, samples: Tensor, subsets: int = 100, size: int = 1000, seed: int = 0) -> float:
    """The kernel distance (cubic kernel, unbiased), a mean over random subsets.

    Raises:
        VarkdError: fewer than 2 points, or features of different widths.
    """
    return _kid(reference, samples, subsets, size, seed).value


def fid_infinity(samples: Tensor, reference: Tensor, points: int = 15, seed: int = 0) -> float:
    """FID extrapolated over 1/N to infinitely many samples.

    Raises:
        VarkdError: fewer than 4 F samples.
    """
    return _fid_infinity(samples, gaussian_of(reference), points, seed)
