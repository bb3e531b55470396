"""Log-probabilities: normalized, mixed, merged, and renormalized without leaving log space.

Outcomes of probability 0 are -inf. They contribute exactly 0 and get no gradient, nowhere a NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(logits: Tensor) -> Tensor:
    """Logits in float32 at least."""
    return logits if logits.dtype == torch.float64 else logits.float()


def log_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities in float32 at least: bfloat16 loses three digits over thousands of codes."""
    return (at_least_float32(logits) if temperature == 1 else at_least_float32(logits) / temperature).log_softmax(-1)


def to_logits(gradient_NK: Tensor, logp_NK: Tensor) -> Tensor:
    """Carry a gradient with respect to log-probabilities back through their log-softmax, in place: g - q sum g."""
    return gradient_NK.addcmul_(logp_NK.exp(), gradient_NK.sum(1, keepdim=True), value=-1)


def log_mixture(first_NK: Tensor, second_NK: Tensor, share: float | Tensor) -> Tensor:
    """log(share first + (1 - share) second); a share per row is (N, 1), strictly between 0 and 1."""
    if isinstance(share, float | int) and share in (0, 1):
        return first_NK if share else second_NK
    share = torch.as_tensor(share, dtype=first_NK.dtype, device=first_NK.device)
    if not (first_NK.requires_grad or second_NK.requires_grad):  # what both exclude has only a gradient to spoil
        return torch.logaddexp(first_NK + share.log(), second_NK + torch.log1p(-share))
    excluded = torch.isneginf(first_NK) & torch.isneginf(second_NK)
    first_NK, second_NK = (torch.where(excluded, 0.0, logp) for logp in (first_NK, second_NK))
    mixture = torch.logaddexp(first_NK + share.log(), second_NK + torch.log1p(-share))
    return torch.where(excluded, -torch.inf, mixture)


def log_mass(logp: Tensor) -> Tensor:
    """logsumexp over the last axis, which stays with length 1: -inf, and no NaN gradient, where all is excluded."""
    empty = torch.isneginf(logp).all(-1, keepdim=True)
    mass = torch.where(empty, 0.0, logp).logsumexp(-1, keepdim=True)
    return torch.where(empty, -torch.inf, mass)


def renormalized(logp_NK: Tensor) -> Tensor:
    """Log-probabilities that sum to 1 over the outcomes that are left; -inf throughout where none is."""
    mass_N1 = log_mass(logp_NK)
    return logp_NK - torch.where(torch.isneginf(mass_N1), 0.0, mass_N1)


def cluster_logp(logp_NV: Tensor, members_KM: Tensor) -> Tensor:
    """Log-mass of every cluster (N, K): a segment-wise logsumexp, which does not underflow."""
    if members_KM.numel() > 4 * logp_NV.shape[1]:  # sizes so unequal that padding would cost more than it saves
        return _scattered_logp(logp_NV, members_KM)
    padded = torch.cat([logp_NV, logp_NV.new_full((len(logp_NV), 1), -torch.inf)], dim=1)
    return log_mass(padded[:, members_KM]).squeeze(-1)


def _scattered_logp(logp_NV: Tensor, members_KM: Tensor) -> Tensor:
    """`cluster_logp` without padding: every code adds its mass to its cluster, relative to the largest one there."""
    count, vocab_size = len(members_KM), logp_NV.shape[1]
    cluster_V = torch.arange(count, device=members_KM.device).unsqueeze(1).expand_as(members_KM).flatten()
    cluster_V = cluster_V.new_zeros(vocab_size + 1).scatter(0, members_KM.flatten(), cluster_V)[:-1]
    blank_NK = logp_NV.new_full((len(logp_NV), count), -torch.inf)
    peak_NK = blank_NK.scatter_reduce(1, cluster_V.expand_as(logp_NV), logp_NV.detach(), "amax")
    empty_NK = torch.isneginf(peak_NK)
    peak_NK = torch.where(empty_NK, 0.0, peak_NK)
    mass_NK = torch.zeros_like(peak_NK).index_add(1, cluster_V, (logp_NV - peak_NK[:, cluster_V]).exp())
    return torch.where(empty_NK, -torch.inf, torch.where(empty_NK, 1.0, mass_NK).log() + peak_NK)
