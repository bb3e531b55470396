"""What the families that predict codes in any order share: drawing an order, and refusing what cannot be one."""

from __future__ import annotations

import torch
from torch import Tensor

from varkd.errors import VarkdError
from varkd.types import Plan
from varkd.world import Rng

KINDS = ("random", "raster")
"""The orders that a config may ask for: a permutation per row, or every row in raster order."""


def choose_order(
    family: str, kind: str, shape: tuple[int, int], rng: Rng | None, row_B: Tensor | None, order_BL: Tensor | None
) -> Tensor:
    """The order of a batch, int64 of `shape` (B, L): the one asked for, else raster, else drawn (stream "order").

    Raises:
        VarkdError: another shape is asked for, or there is nothing to draw from.
    """
    if order_BL is not None:
        if tuple(order_BL.shape) != shape:
            raise VarkdError(f"{family}: the order must be of shape {shape}, got {tuple(order_BL.shape)}")
        return order_BL
    if kind == "raster":
        return torch.arange(shape[1]).expand(shape)
    if rng is None or row_B is None:
        raise VarkdError(f"{family} decodes in random order: give rng and row_B to draw it from, or order_BL")
    return rng.uniform("order", row_B, shape[1]).argsort(dim=1, stable=True)


def check_order(family: str, plan: Plan, length: int) -> None:
    """Raise `VarkdError` unless every row of the order is a permutation of all `length` positions."""
    if plan.order_BL.shape[1] != length:
        raise VarkdError(f"{family} predicts {length} codes; this plan has {plan.order_BL.shape[1]}")
    every = torch.arange(length, device=plan.order_BL.device)
    if not torch.equal(plan.order_BL.sort(dim=1).values, every.expand_as(plan.order_BL)):
        raise VarkdError(f"{family}: an order must name each of the {length} positions exactly once per row")


def check_steps(family: str, steps: int, length: int) -> None:
    """Raise `VarkdError` unless `length` codes can be shared among `steps` steps."""
    if not 1 <= steps <= length:
        raise VarkdError(f"{family}: {length} codes can be decoded in 1 to {length} steps, not in {steps}")


def prefix_codes(plan: Plan, codes_BL: Tensor | None, steps: int) -> Tensor:
    """The codes of the first `steps` steps, by generation rank: (B, n), n = 0 for no steps.

    Raises:
        VarkdError: too few codes are given, or no step is left to predict.
    """
    if steps == 0:
        return plan.order_BL[:, :0]
    count = sum(plan.sizes[:steps])
    if codes_BL is None or codes_BL.shape[1] < count:
        raise VarkdError(f"start: {steps} prefix steps need {count} prefix codes by generation rank")
    if not 0 < steps < len(plan.sizes):
        raise VarkdError(f"start: prefix_steps must lie in [0, {len(plan.sizes)}), got {steps}")
    return codes_BL[:, :count]
