"""A golden file, and how a tensor of ours is compared with one of its tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from varkd.backbones.protocol import Backbone
from varkd.errors import VarkdError
from varkd.files import read_json
from varkd.rollout import Sampler, apply_cfg, guidance_per_step, rollout, with_null_branch
from varkd.types import Condition, Plan


@dataclass(frozen=True)
class Check:
    """One compared tensor (or number): the largest absolute error, and whether it is within tolerance."""

    key: str
    error: float
    passed: bool


class Golden:
    """The tensors of one file; remembers which were read."""

    def __init__(self, path: Path) -> None:
        self.info: dict[str, Any] = read_json(path.with_suffix(".json"))
        try:
            self.tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise VarkdError(f"cannot read {path}: {error}") from None
        self.used: set[str] = set()

    def __getitem__(self, key: str) -> Tensor:
        if key not in self.tensors:
            raise VarkdError(f"golden file lacks the tensor '{key}'")
        self.used.add(key)
        return self.tensors[key]

    def state(self, prefix: str = "state.") -> dict[str, Tensor]:
        """The tensors under a prefix as a state dict."""
        return {key.removeprefix(prefix): self[key] for key in self.tensors if key.startswith(prefix)}

    def compare(self, key: str, ours: Tensor, tolerance: Any) -> Check:
        return compare(key, ours, self[key], tolerance)


def compare(key: str, ours: Tensor, theirs: Tensor, tolerance: Any) -> Check:
    """`tolerance` is {"atol", "rtol"}, or anything else for "must be equal"."""
    if ours.shape != theirs.shape:
        return Check(f"{key}: shape {tuple(ours.shape)} against {tuple(theirs.shape)}", float("inf"), False)
    same = ours == theirs  # also true where both are -inf
    difference = torch.where(same, 0.0, (ours.double() - theirs.double()).abs())
    allowed = 0.0
    if isinstance(tolerance, dict):
        allowed = tolerance["atol"] + tolerance["rtol"] * theirs.double().abs()
    near = difference.isfinite() & (difference <= allowed)  # the tolerance of an infinite number is infinite
    return Check(key, float(difference.max()), bool((same | near).all()))


def forced_logits(model: Backbone, codes_BL: Tensor, condition: Condition, plan: Plan, sampler: Sampler) -> Tensor:
    """The guided logits (B, L, V) that the cached decode loop would sample from, with `codes_BL` fed back instead.

    By generation rank.
    """
    guidance_S = guidance_per_step(sampler, plan, model.guidance)
    stacked_condition, stacked_plan = with_null_branch(model, condition, plan)
    by_rank = codes_BL.gather(1, plan.order_BL)
    state, hidden = model.start(stacked_condition, stacked_plan)
    logits, done = [], 0
    for index, size in enumerate(plan.sizes):
        logits.append(apply_cfg(model.head(hidden), float(guidance_S[index])))
        codes_Bn = by_rank[:, done : done + size]
        done += size
        if done < by_rank.shape[1]:
            hidden = model.step(state, torch.cat([codes_Bn, codes_Bn]))
    return torch.cat(logits, dim=1)


def in_order(raster_BLV: Tensor, plan: Plan) -> Tensor:
    """Raster-aligned rows -> by generation rank (what golden files call order-aligned)."""
    return raster_BLV.gather(1, plan.order_BL.unsqueeze(-1).expand_as(raster_BLV))


def greedy_codes(model: Backbone, condition: Condition, plan: Plan, sampler: Sampler) -> Tensor:
    """What the decode loop makes with argmax instead of sampling, raster (B, L)."""
    greedy = replace(sampler, temperature=0.0)
    return rollout(model, condition, plan, greedy, torch.zeros(plan.order_BL.shape)).codes_BL


def per_code(guidance_S: Tensor, plan: Plan) -> Tensor:
    """Guidance per step -> per generation rank (L,)."""
    return guidance_S.repeat_interleave(torch.tensor(plan.sizes))


def official_state(model: Backbone, state: Mapping[str, Tensor]) -> Check:
    """What we would write is what was loaded, tensor for tensor."""
    back = model.official_state()
    same = back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)
    return Check("official state", float(not same), same)


def described(ours: Mapping[str, Any], size: Mapping[str, Any]) -> Iterator[Check]:
    """Every size of ours against the file's description."""
    for name, value in ours.items():
        yield Check(f"config.{name}", float(size[name] != value), size[name] == value)
