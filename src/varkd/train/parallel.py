"""Several processes under `torchrun`: the only file that names FSDP.

A model is sharded layer by layer with `fully_shard` on a (replicate, shard) mesh. FSDP's hooks fire on `forward` only,
so the methods that decode are registered as forward methods too; the root group, which holds embeddings and head, stays
unsharded from forward to backward, so the chunked loss can use the head directly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from varkd.backbones.protocol import Backbone, SlotDecoder
from varkd.errors import VarkdError
from varkd.world import World

_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def distribute(model: Backbone, world: World, replicas: int = 1) -> Backbone:
    """Shard `model` in place over all ranks, `replicas` times over (1 = shards span the whole world).

    Raises:
        VarkdError: the number of ranks is not a multiple of `replicas`.
    """
    if world.size == 1:
        return model
    if world.size % replicas:
        raise VarkdError(f"{world.size} ranks cannot hold {replicas} replicas of equal size")
    device = next(model.parameters()).device.type
    shape = (replicas, world.size // replicas)
    mesh = init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard"))
    mesh = mesh["shard"] if replicas == 1 else mesh
    for layer in model.transformer_blocks:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    slots = ("prefill", "run_slots") if isinstance(model, SlotDecoder) else ()
    for name in ("start", "step", *slots):
        register_fsdp_forward_method(model, name)
    return model


@contextmanager
def gathered(*models: nn.Module | None) -> Iterator[None]:
    """Hold the whole weights of sharded models, so that no forward pass inside communicates.

    Sampling needs it twice over: ranks may sample unequally often (one may hold no student row in a step), which would
    pair up collectives that do not belong together; and gathering anew for every decoded code would be slow.
    """
    modules = [m for model in models if model is not None for m in model.modules() if isinstance(m, FSDPModule)]
    for module in modules:
        module.unshard()
        module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(module not in models, recurse=False)  # the roots stay, see `distribute`
            module.reshard()


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Clip the global gradient norm over all shards; returns the norm before clipping, a scalar on the device."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def full_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole copies on the CPU of possibly sharded tensors. Every rank must call it."""
    whole = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in whole.items()}


def frozen_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Copies on the CPU of the buffers in a model's state: with averaged parameters they make a whole state dict.

    Buffers are never sharded, so every rank has them.
    """
    kept = model.state_dict().keys()
    return {name: value.detach().cpu().clone() for name, value in model.named_buffers() if name in kept}


def like(tensor: Tensor, pattern: Tensor) -> Tensor:
    """A whole tensor laid out (device, sharding) like `pattern`."""
    if isinstance(pattern, DTensor):
        return distribute_tensor(tensor.to(pattern.device), pattern.device_mesh, pattern.placements)
    return tensor.to(pattern.device)


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """The whole state dict on the CPU (complete on rank 0)."""
    return cast(dict[str, Tensor], get_model_state_dict(model, options=_FULL))


def load_model_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load a whole state dict, strictly, into a possibly sharded model."""
    set_model_state_dict(
        model, cast(dict[str, Any], state), options=StateDictOptions(full_state_dict=True, strict=True)
    )


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The whole optimizer state as `{parameter name}/{entry}` -> tensor (complete on rank 0)."""
    state = cast(dict[str, Any], get_optimizer_state_dict(model, optimizer, options=_FULL))
    entries = state.get("state", {}).items()  # the other ranks get nothing
    return {f"{name}/{entry}": value for name, values in entries for entry, value in _entries(values)}


def load_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, flat: Mapping[str, Tensor]) -> None:
    """The inverse of `optimizer_state`."""
    everywhere = StateDictOptions(full_state_dict=True)
    state: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=everywhere)
    state["state"] = {}
    for key, value in flat.items():
        name, _, entry = key.rpartition("/")
        state["state"].setdefault(name, {})[entry] = value
    set_optimizer_state_dict(model, optimizer, state, options=everywhere)


def _entries(entries: Any) -> list[tuple[str, Tensor]]:
    return [(entry, torch.as_tensor(value)) for entry, value in entries.items()]
