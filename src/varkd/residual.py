"""Multi-scale residual codes (VAR, arXiv 2404.02905, algorithms 1 and 2): from codes to the running feature map.

The tokenizer and the backbone of VAR read the same codes, so the mathematics stands here once. Scale k of S holds
p_k x p_k codes. With e the codebook, phi a convolution and P the last side:

    h_k = phi_i(k)(bicubic(e[codes_k], P)),   f_k = f_(k-1) + h_k,   phi(x) = (1 - r) x + r conv3x3(x)

and the input of scale k + 1 is f_k, area-averaged to p_(k+1) x p_(k+1).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

RATIO = 0.5
"""r above: the official share of the convolution."""


def phi_index(num_scales: int, num_phi: int) -> list[int]:
    """Which of the shared convolutions serves each scale: the nearest of `num_phi` ticks.

    The official ticks are float64; with ten scales, two of the distances are ties that only float64 rounding decides.
    """
    ticks = np.linspace(1 / 3 / num_phi, 1 - 1 / 3 / num_phi, num_phi)
    places = np.arange(num_scales) / max(1, num_scales - 1)
    return [int(np.argmin(np.abs(ticks - place))) for place in places]


@dataclass(frozen=True)
class Quantizer:
    """The frozen tensors: the codebook and the K shared convolutions; `scales` are the sides of the maps."""

    codebook_VE: Tensor
    weight_KEE33: Tensor
    bias_KE: Tensor
    scales: tuple[int, ...]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], scales: Sequence[int]) -> Quantizer:
        return cls(tensors["codebook"], tensors["phi.weight"], tensors["phi.bias"], tuple(scales))

    def tensors(self) -> dict[str, Tensor]:
        """The names under which `Tokenizer.quantizer` hands them on."""
        return {"codebook": self.codebook_VE, "phi.weight": self.weight_KEE33, "phi.bias": self.bias_KE}

    def split(self, codes_BL: Tensor) -> list[Tensor]:
        """Codes of all scales, concatenated coarse to fine -> one (B, p * p) tensor a scale."""
        return list(codes_BL.split([side * side for side in self.scales], dim=1))

    def contribution(self, entries_BEpp: Tensor, scale: int) -> Tensor:
        """h of one scale from its codebook rows (B, E, p, p): (B, E, P, P)."""
        last = self.scales[-1]
        if entries_BEpp.shape[-1] != last:
            entries_BEpp = F.interpolate(entries_BEpp, size=(last, last), mode="bicubic")
        phi = phi_index(len(self.scales), len(self.weight_KEE33))[scale]
        convolved = F.conv2d(entries_BEpp, self.weight_KEE33[phi], self.bias_KE[phi], padding=1)
        return entries_BEpp * (1 - RATIO) + convolved * RATIO

    def entries(self, codes_Bn: Tensor, scale: int) -> Tensor:
        """The codebook rows of one scale's codes, float32 at least: (B, E, p, p)."""
        side = self.scales[scale]
        return F.embedding(codes_Bn, self.codebook_VE).transpose(1, 2).unflatten(2, (side, side))

    def add(self, features_BEPP: Tensor, codes_Bn: Tensor, scale: int) -> Tensor:
        """f after one more scale. Always in the precision of the codebook: autocast is off."""
        with torch.autocast(codes_Bn.device.type, enabled=False):
            return features_BEPP + self.contribution(self.entries(codes_Bn, scale), scale)

    def zeros(self, batch_size: int) -> Tensor:
        """f before the first scale: (B, E, P, P)."""
        last = self.scales[-1]
        return self.codebook_VE.new_zeros(batch_size, self.codebook_VE.shape[1], last, last)

    def features(self, codes_BL: Tensor) -> Iterator[Tensor]:
        """f after each scale."""
        features = self.zeros(len(codes_BL))
        for scale, codes_Bn in enumerate(self.split(codes_BL)):
            features = self.add(features, codes_Bn, scale)
            yield features

    def next_input(self, features_BEPP: Tensor, scale: int) -> Tensor:
        """What a backbone reads before it predicts `scale`: f, area-averaged to that side, (B, p * p, E)."""
        side = self.scales[scale]
        if side != features_BEPP.shape[-1]:
            features_BEPP = F.interpolate(features_BEPP, size=(side, side), mode="area")
        return features_BEPP.flatten(2).transpose(1, 2)

    def inputs(self, codes_BL: Tensor) -> Tensor:
        """Teacher forcing: the inputs of scales 1.. from given codes, (B, L - p_0^2, E)."""
        found = [self.codebook_VE.new_zeros(len(codes_BL), 0, self.codebook_VE.shape[1])]
        # The range comes first: it ends before the features of the last scale, which nothing reads, are computed.
        for scale, features in zip(range(1, len(self.scales)), self.features(codes_BL), strict=False):
            found.append(self.next_input(features, scale))
        return torch.cat(found, dim=1)
