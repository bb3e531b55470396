"""What adds up along a sequence: accumulated error, the excess of a student's own prefixes, and two risks.

R(l) = sum_{t <= l} E_S[KL(q || p)_t] is what a student has strayed after l codes of its own samples; l e(l) is the same
sum on data prefixes. ExAccErr(l) = (R(l) - l e(l)) / (l e(l)) is the share that exposure bias adds (Arora et al. 2022,
2204.01171): 0 where errors do not feed on each other, and growing with l where they do.
The risks are f-DISTILL's (Wen et al. 2023, 2307.15190): R_llh = E_S[-log p] / T is small for a student that stays on
the teacher's modes, R_cvg = E_P[-log q] / T for one that leaves none of them out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from varkd.evaluate.intervals import Curve, Estimate, centered_bootstrap, centered_curve


def accumulated(error_NL: Tensor, resamples: int = 200, seed: int = 0) -> Curve:
    """R(l) for l = 1 .. L, from errors by generation rank."""
    sums_NL = error_NL.double().cumsum(1)
    return centered_curve(lambda counts_RN: counts_RN @ sums_NL / len(sums_NL), len(sums_NL), resamples, seed)


def excess_accumulated(student_NL: Tensor, data_NL: Tensor, resamples: int = 200, seed: int = 0) -> Curve:
    """ExAccErr(l) as a share. Row i of both has the same label, so resamples draw pairs.

    0 where the data errors add up to nothing and so do the student's.
    """
    student, data = student_NL.double().cumsum(1), data_NL.double().cumsum(1)

    def statistic(counts_RN: Tensor) -> Tensor:
        top_RL, bottom_RL = counts_RN @ student, counts_RN @ data
        return (top_RL - bottom_RL) / bottom_RL.clamp_min(1e-9)

    return centered_curve(statistic, len(student), resamples, seed)


def risk(surprise_NL: Tensor, resamples: int = 200, seed: int = 0) -> Estimate:
    """The mean of -log of the other model over codes, in nats per code."""
    mean_N = surprise_NL.double().mean(1)
    return centered_bootstrap(lambda counts_RN: counts_RN @ mean_N / len(mean_N), len(mean_N), resamples, seed)


def difference(first_NL: Tensor, second_NL: Tensor, resamples: int = 200, seed: int = 0) -> Curve:
    """Mean of `first` minus mean of `second`, position by position, over pairs of rows."""
    gap_NL = torch.as_tensor(first_NL).double() - second_NL.double()
    return centered_curve(lambda counts_RN: counts_RN @ gap_NL / len(gap_NL), len(gap_NL), resamples, seed)
