"""Which codes look alike, and mass blurred over them: log (K p) for a sparse kernel K, without leaving log space.

The codebook is the tokenizer's `codebook_VE`: the vectors as its quantizer compares them (normalized where it does).
K is column-stochastic: code v gives (K p)_u the share K_uv of its mass, u among the n codes nearest to v, v included.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def nearest_codes(codebook_VE: Tensor, count: int, chunk_rows: int = 1024) -> tuple[Tensor, Tensor]:
    """The `count` codes nearest to each code, itself first, and their squared distances: int64 and float64 (V, n)."""
    points = codebook_VE.detach().double().cpu()
    found = []
    for begin in range(0, len(points), chunk_rows):
        squared = torch.cdist(points[begin : begin + chunk_rows], points).square()
        squared.diagonal(begin).fill_(-1)  # a duplicate must not come before the code itself
        found.append(squared.topk(min(count, len(points)), dim=1, largest=False))
    squared_Vn = torch.cat([part.values for part in found]).clamp_min(0)
    return torch.cat([part.indices for part in found]), squared_Vn


def log_kernel(squared_Vn: Tensor, bandwidth: float) -> Tensor:
    """log K_uv of the neighbors u of every v, (V, n): a Gaussian of standard deviation `bandwidth`, rows sum to 1."""
    return (-squared_Vn / (2 * bandwidth**2)).log_softmax(1)


def displacement(squared_Vn: Tensor, bandwidth: float) -> float:
    """The mean over codes of the squared distance by which the kernel moves their mass."""
    return float((log_kernel(squared_Vn, bandwidth).exp() * squared_Vn).sum(1).mean())


def half_way_bandwidth(squared_Vn: Tensor) -> float:
    """The bandwidth whose displacement is the mean of (d/2)^2, d being the distance to the nearest other code.

    There the cells of two codes meet, so this is the order of the tokenizer's own quantization error. Displacement
    grows with the bandwidth, and two neighbors are enough to reach it.
    """
    target = float(squared_Vn[:, 1].mean()) / 4
    low, high = 1e-6, 1e3 * max(1.0, float(squared_Vn.max()) ** 0.5)
    for _ in range(100):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if displacement(squared_Vn, middle) < target else (low, middle)
    return high


def smoothed(logp_NV: Tensor, index_Vn: Tensor, log_weight_Vn: Tensor) -> Tensor:
    """log (K p) of every row, with gradient. -inf where no code with mass is near."""
    return _Smoothing.apply(logp_NV, index_Vn, log_weight_Vn.to(logp_NV.dtype))  # type: ignore[no-any-return]


class _Smoothing(torch.autograd.Function):
    """A logsumexp over incoming edges, one neighbor at a time: (N, V) memory instead of (N, V, n)."""

    @staticmethod
    def forward(ctx, logp_NV, index_Vn, log_weight_Vn):
        columns = list(zip(index_Vn.unbind(1), log_weight_Vn.unbind(1), strict=True))
        peak_NV = torch.full_like(logp_NV, -torch.inf)
        for target_V, weight_V in columns:
            peak_NV.scatter_reduce_(1, target_V.expand_as(logp_NV), logp_NV + weight_V, "amax")
        peak_NV = torch.where(torch.isneginf(peak_NV), 0.0, peak_NV)
        mass_NV = torch.zeros_like(logp_NV)
        for target_V, weight_V in columns:
            mass_NV.index_add_(1, target_V, (logp_NV + weight_V - peak_NV[:, target_V]).exp())
        out_NV = mass_NV.log() + peak_NV
        ctx.save_for_backward(logp_NV, out_NV, index_Vn, log_weight_Vn)
        return out_NV

    @staticmethod
    def backward(ctx, *grad_outputs):
        (grad_out_NV,) = grad_outputs
        logp_NV, out_NV, index_Vn, log_weight_Vn = ctx.saved_tensors
        safe_NV = torch.where(torch.isneginf(out_NV), 0.0, out_NV)  # nothing flows in there, so nothing flows back
        grad_NV = torch.zeros_like(logp_NV)
        for target_V, weight_V in zip(index_Vn.unbind(1), log_weight_Vn.unbind(1), strict=True):
            grad_NV += grad_out_NV[:, target_V] * (logp_NV + weight_V - safe_NV[:, target_V]).exp()
        return grad_NV, None, None
