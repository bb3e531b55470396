"""Weight-only quantization: what the weights of linear layers become (torchao decides), and how files hold them.

A file holds the integers of a weight `X` as `X:int8` (N, K) or `X:int4` (N, K/2, two to a byte) and its scales as
`X:scale` (N, K/group), bfloat16; all other parameters are bfloat16. Reading needs no torchao: the weights come back as
integers times scales.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from varkd.errors import VarkdError

Bits = Literal["int8", "int4"]
GROUP = 32
"""int4: weights of a row that share a scale, at most (a divisor of the row's length). int8: the whole row shares it."""
_SMALLEST_GROUP = 8


def group_size(row_length: int, bits: Bits) -> int:
    """How many weights of a row share one scale."""
    return row_length if bits == "int8" else math.gcd(row_length, GROUP)


@contextmanager
def rounded_weights(model: nn.Module, bits: Bits | None) -> Iterator[None]:
    """Quantization-aware training: inside, linear layers have the values that they will have once quantized.

    Run forward and backward inside and the optimizer outside: the gradient at the rounded weights moves the exact ones
    (the straight-through estimator, arXiv 1308.3432). The exact weights come back at the end. FSDP's shards hold whole
    rows, so each is rounded where it lies. None changes nothing.
    """
    kept = [] if bits is None else [(weight, weight.clone()) for weight in _weights(model, bits)]
    if bits is not None:
        round_weights_(model, bits)
    try:
        yield
    finally:
        for weight, exact in kept:
            weight.copy_(exact)


def round_weights_(model: nn.Module, bits: Bits) -> None:
    """Replace the weights of linear layers, in place, by the values that they have once quantized."""
    for weight_NK in _weights(model, bits):
        weight_NK.copy_(_quantize(weight_NK, bits).dequantize())


def _weights(model: nn.Module, bits: Bits) -> list[Tensor]:
    """This rank's part of every weight that is quantized, (N, K) each, sharing memory with the model."""
    weights = [layer.weight.detach() for layer in model.modules() if is_quantized(layer, bits)]
    local = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights]
    return [weight for weight in local if weight.numel()]


def is_quantized(layer: nn.Module, bits: Bits) -> TypeGuard[nn.Linear]:
    """Linear layers, the head included, unless rows do not divide into groups of at least 8."""
    return isinstance(layer, nn.Linear) and group_size(layer.in_features, bits) >= _SMALLEST_GROUP


def quantized_state(model: nn.Module, bits: Bits | Literal["bf16"]) -> dict[str, Tensor]:
    """The tensors of a quantized model's file, on the CPU."""
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    state |= {name: state[name].to(torch.bfloat16) for name, _ in model.named_parameters()}
    for name, layer in model.named_modules():
        if bits != "bf16" and is_quantized(layer, bits):
            weight = _quantize(layer.weight.detach().cpu(), bits)
            del state[f"{name}.weight"]
            integers_NK = weight.qdata if bits == "int8" else _pack(weight.qdata)
            state |= {f"{name}.weight:{bits}": integers_NK, f"{name}.weight:scale": weight.scale}
    return {name: value.contiguous() for name, value in state.items()}


def dequantized(state: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:
    """The state of a file with every quantized weight as a bfloat16 tensor (N, K); other states as they are.

    Raises:
        VarkdError: integers without their scales, or of another shape.
    """
    plain = {name: value for name, value in state.items() if ":" not in name}
    for name in state:
        weight, _, kind = name.rpartition(":")
        if kind not in ("int8", "int4"):
            continue
        scale = state.get(f"{weight}:scale")
        integers_NK = state[name] if kind == "int8" else _unpack(state[name])
        if scale is None or scale.ndim != 2 or len(scale) != len(integers_NK) or integers_NK.shape[1] % scale.shape[1]:
            raise VarkdError(f"{origin}: the scales of '{weight}' are missing or do not fit: quantize or copy it again")
        grouped = integers_NK.unflatten(1, (scale.shape[1], -1)).to(scale.dtype)
        plain[weight] = (grouped * scale.unsqueeze(-1)).flatten(1)
    return plain


def _quantize(weight_NK: Tensor, bits: Bits) -> Any:
    """torchao's symmetric rounding of the bfloat16 weight: `qdata` int8 (N, K), `scale` bfloat16 (N, K/group)."""
    logging.getLogger("torchao").setLevel(logging.ERROR)  # it reports every kernel that this machine lacks
    from torchao.quantization import IntxUnpackedToInt8Tensor

    block: Any = (1, group_size(weight_NK.shape[1], bits))
    return IntxUnpackedToInt8Tensor.from_hp(weight_NK.to(torch.bfloat16), block, getattr(torch, bits))


def _pack(integers_NK: Tensor) -> Tensor:
    """int4 values in -8..7, two to a byte: the even columns below, the odd ones above."""
    shifted = (integers_NK + 8).to(torch.uint8)
    return shifted[:, 0::2] | (shifted[:, 1::2] << 4)


def _unpack(packed_NH: Tensor) -> Tensor:
    halves = torch.stack((packed_NH & 15, packed_NH >> 4), dim=-1)
    return halves.flatten(1).to(torch.int8) - 8
