"""Functions of tensors as CUDA graphs: the first call of a kind runs as it is, the second is captured, more replay it.

A decode launches hundreds of small kernels a step, each of which costs the CPU more than the GPU; a graph launches a
whole decode at once. It reads the weights where they lie, so it survives an optimizer step. Weights that have moved (a
sharded model that was gathered anew) are noticed, and such models are left to run as they are.
`VARKD_CUDA_GRAPHS=0` in the environment turns graphs off.
"""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor, nn

Inputs = tuple[Tensor | None, ...]
Function = Callable[..., tuple[Tensor, ...]]

_KEPT = 16
"""Graphs per model; the one that was not used for longest makes room for a new one."""
_MOVES = 2
"""How often a model's weights may move before it is left alone."""
_LOCK = threading.Lock()


@dataclass
class _Graph:
    graph: torch.cuda.CUDAGraph
    inputs: Inputs
    outputs: tuple[Tensor, ...]
    addresses: tuple[int, ...]

    def replay(self, inputs: Inputs) -> tuple[Tensor, ...]:
        for kept, new in zip(self.inputs, inputs, strict=True):
            if kept is not None and new is not None:
                kept.copy_(new)
        self.graph.replay()
        return tuple(output.clone() for output in self.outputs)


@dataclass
class _Kept:
    """What is known of one model: its graphs, the kinds that ran once, and the kinds that cannot be captured."""

    graphs: OrderedDict[Hashable, _Graph] = field(default_factory=OrderedDict)
    warm: set[Hashable] = field(default_factory=set)
    refused: set[Hashable] = field(default_factory=set)
    moves: int = 0


_MODELS: weakref.WeakKeyDictionary[nn.Module, _Kept] = weakref.WeakKeyDictionary()


def available(model: nn.Module, device: torch.device) -> bool:
    """Whether decodes of this model are captured: on CUDA, unless it is sharded or the environment says no."""
    if device.type != "cuda" or os.environ.get("VARKD_CUDA_GRAPHS") == "0":
        return False
    return all(type(parameter) is nn.Parameter for parameter in model.parameters())


def run(model: nn.Module, kind: Hashable, function: Function, inputs: Inputs) -> tuple[Tensor, ...]:
    """`function(*inputs)`, by a graph from the second call of this `kind` on.

    The function may depend on nothing but its inputs, the weights of `model`, `kind` and the state of autocast, must
    not wait for the device, and returns tensors that it made itself.
    """
    key = (kind, _mode(inputs), tuple(None if each is None else (each.shape, each.dtype) for each in inputs))
    with _LOCK:
        kept = _MODELS.setdefault(model, _Kept())
        if key in kept.refused or kept.moves > _MOVES:
            return function(*inputs)
        addresses = _addresses(model)
        graph = kept.graphs.get(key)
        if graph is not None and graph.addresses != addresses:
            kept.graphs.clear()
            kept.moves, graph = kept.moves + 1, None
        if graph is None and key not in kept.warm:  # libraries choose their kernels, and tables are made
            kept.warm.add(key)
            return function(*inputs)
        if graph is None:
            graph = _captured(function, inputs, addresses, next(iter(kept.graphs.values()), None))
            if graph is None:
                kept.refused.add(key)
                return function(*inputs)
            kept.graphs[key] = graph
            while len(kept.graphs) > _KEPT:
                kept.graphs.popitem(last=False)
        kept.graphs.move_to_end(key)
        return graph.replay(inputs)


def release(model: nn.Module) -> None:
    """Forget the graphs of a model and give their memory back."""
    with _LOCK:
        _MODELS.pop(model, None)


def _captured(function: Function, inputs: Inputs, addresses: tuple[int, ...], beside: _Graph | None) -> _Graph | None:
    """The graph of a call, or None, with a warning, where there is no memory for it or it cannot be captured.

    It shares the memory of the graph `beside` it: none keeps anything from one replay to the next but inputs and
    outputs. A pool dies with the last graph in it, so it is never kept by itself.
    """
    device = next(each.device for each in inputs if each is not None)
    pool = None if beside is None else beside.graph.pool()
    own, graph = tuple(None if each is None else each.clone() for each in inputs), torch.cuda.CUDAGraph()
    torch.clear_autocast_cache()  # weights rounded outside of the graph would be gone when it is replayed
    try:
        with torch.cuda.device(device), torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            outputs = function(*own)
    except RuntimeError as error:  # out of memory is one of these
        warnings.warn(f"no CUDA graph for this decode, which runs slower without: {error}".split("\n")[0], stacklevel=2)
        return None
    finally:
        torch.clear_autocast_cache()  # and weights rounded inside belong to the graph
    return _Graph(graph, own, outputs, addresses)


def _addresses(model: nn.Module) -> tuple[int, ...]:
    return tuple(each.data_ptr() for each in chain(model.parameters(), model.buffers()))


def _mode(inputs: Inputs) -> tuple[Hashable, ...]:
    """What PyTorch itself makes kernels depend on."""
    device = next(each.device for each in inputs if each is not None)
    autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
    return device, autocast, torch.is_inference_mode_enabled(), torch.get_float32_matmul_precision()
