"""Which codes look alike, by the tokenizer's `codebook_VE`: the vectors as its quantizer compares them."""

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
