"""Scalars per position that selections and reweighting read, from one no-grad pass over chunks of rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from varkd.distill.spaces import Clusters, Products, cluster_logp, log_softmax

Scores = dict[str, Tensor]


def chunks(num_rows: int, chunk_rows: int) -> Iterator[slice]:
    """Slices of at most `chunk_rows` rows."""
    for begin in range(0, num_rows, chunk_rows):
        yield slice(begin, min(begin + chunk_rows, num_rows))


@torch.no_grad()
def teacher_scores(
    names: Iterable[str], head: nn.Linear, hidden_ND: Tensor, products: Products, chunk_rows: int
) -> Scores:
    """Confidence scores of the teacher, higher = surer, float32 (N,) each.

    `max_prob`: max p; `entropy`: -H(p) / ln V, in [-1, 0]; `margin`: p_(1) - p_(2); `cluster_mass:<key>`: the mass of
    the likeliest cluster, which is robust to mass split among near-duplicates.
    """
    functions = {name: _confidence(name, products) for name in sorted(set(names))}
    found: dict[str, list[Tensor]] = {name: [] for name in functions}
    for rows in chunks(len(hidden_ND), chunk_rows) if functions else ():
        logp_NV = log_softmax(head(hidden_ND[rows]))
        for name, function in functions.items():
            found[name].append(function(logp_NV).float())
    empty = hidden_ND.new_zeros(0, dtype=torch.float32)
    return {name: torch.cat(parts) if parts else empty for name, parts in found.items()}


def cluster_mass_name(space: Clusters) -> str:
    """The name of the score that measures confidence in the clusters of `space`."""
    return f"cluster_mass:{space.key}"


@torch.no_grad()
def code_logp(head: nn.Linear, hidden_BLD: Tensor, codes_BL: Tensor, chunk_rows: int) -> Tensor:
    """log-probability (nats, float32 (B, L)) that a model gives to each code."""
    hidden_ND, code_N = hidden_BLD.flatten(0, 1), codes_BL.flatten()
    parts = [
        log_softmax(head(hidden_ND[rows])).gather(1, code_N[rows].unsqueeze(1)).squeeze(1).float()
        for rows in chunks(len(code_N), chunk_rows)
    ]
    return torch.cat(parts).view(codes_BL.shape)


def _confidence(name: str, products: Products) -> Callable[[Tensor], Tensor]:
    if name == "max_prob":
        return lambda logp: logp.max(-1).values.exp()
    if name == "entropy":
        return lambda logp: -torch.special.entr(logp.exp()).sum(-1) / math.log(logp.shape[-1])
    if name == "margin":
        return lambda logp: -logp.exp().topk(2).values.diff(dim=-1).squeeze(-1)
    if name.startswith("cluster_mass:"):
        members = products[name.removeprefix("cluster_mass:") + "/members"]
        return lambda logp: cluster_logp(logp, members).max(-1).values.exp()
    raise ValueError(f"unknown score '{name}'")
