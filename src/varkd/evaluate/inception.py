"""The Inception network of 2015-12-05 as ADM's evaluator runs it: TF1 resize, 1,008 outputs, two feature taps.

The architecture is Inception-v3 (Szegedy et al. 2015, 1512.00567) without the auxiliary head, as TensorFlow published
it: batch normalization with eps 0.001, average pools that leave the padding out of the divisor, and a max pool in the
last block. Batch normalization is folded into the convolutions in float64, 1x1 convolutions that read the same input
run as one, and the pooled 1x1 branch is convolved before it is pooled (the two commute): the same function, faster.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varkd.errors import VarkdError

SIDE = 299
POOL_DIM, NUM_OUTPUTS = 2048, 1008
SPATIAL_CHANNELS, SPATIAL_SIDE = 7, 17
SPATIAL_DIM = SPATIAL_SIDE * SPATIAL_SIDE * SPATIAL_CHANNELS
_EPS = 1e-3
_BN = ("weight", "bias", "running_mean", "running_var")


class Taps(NamedTuple):
    """What the metrics read: `pool_BF` (B, 2048) and `spatial_BF` (B, 2023; index (y * 17 + x) * 7 + channel)."""

    pool_BF: Tensor
    spatial_BF: Tensor


class Inception(nn.Module):
    """uint8 images (B, 3, H, W) of any size -> `Taps`; `logits` gives the class scores without bias."""

    fc_weight: Tensor

    def __init__(self, state: Mapping[str, Tensor], weights_hash: str, dtype: torch.dtype = torch.float32) -> None:
        """Build from a state dict of 472 tensors in torch-fidelity's names.

        Raises:
            VarkdError: a tensor is missing, of another shape, or not known (see `check_state`).
        """
        super().__init__()
        state = check_state(state)
        self.hash, self.dtype = weights_hash, dtype

        def conv(*names: str, stride: int = 1, padding: int | tuple[int, int] = 0) -> _Conv:
            return _Conv(state, names, stride, padding, dtype)

        self.stem = nn.Sequential(
            conv("Conv2d_1a_3x3", stride=2),
            conv("Conv2d_2a_3x3"),
            conv("Conv2d_2b_3x3", padding=1),
            nn.MaxPool2d(3, 2),
            conv("Conv2d_3b_1x1"),
            conv("Conv2d_4a_3x3"),
            nn.MaxPool2d(3, 2),
        )
        self.mixed_5 = nn.Sequential(*(_Mixed5(conv, f"Mixed_5{letter}") for letter in "bcd"))
        self.mixed_6a = _Mixed6a(conv)
        self.mixed_6 = nn.ModuleDict({letter: _Mixed6(conv, f"Mixed_6{letter}") for letter in "bcde"})
        self.mixed_7a = _Mixed7a(conv)
        self.mixed_7b = _Mixed7(conv, "Mixed_7b", "average")
        self.mixed_7c = _Mixed7(conv, "Mixed_7c", "max")
        self.register_buffer("fc_weight", state["fc.weight"].to(dtype))
        self.eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        return self.fc_weight.device

    @torch.inference_mode()
    def forward(self, images_BCHW: Tensor) -> Taps:
        """Taps of uint8 RGB images (B, 3, H, W), in the dtype of the network.

        Raises:
            VarkdError: images that are not uint8 of three channels.
        """
        if images_BCHW.dtype != torch.uint8 or images_BCHW.ndim != 4 or images_BCHW.shape[1] != 3:
            raise VarkdError(
                f"Inception takes uint8 images (B, 3, H, W), not {tuple(images_BCHW.shape)} "
                f"{str(images_BCHW.dtype).removeprefix('torch.')}"
            )
        with full_precision():
            return self.taps(normalized(tf1_resize(images_BCHW.to(self.device))).to(self.dtype))

    def taps(self, images: Tensor) -> Taps:
        """Taps of images that are resized and normalized already: (B, 3, 299, 299)."""
        hidden = images.contiguous(memory_format=torch.channels_last)
        hidden = self.mixed_6a(self.mixed_5(self.stem(hidden)))
        spatial = hidden
        for letter, block in self.mixed_6.items():
            hidden = block(hidden)
            if letter == "d":  # ADM's mixed_6/conv: the 1x1 branch, the first of the concatenated ones, after its ReLU
                spatial = hidden[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        hidden = self.mixed_7c(self.mixed_7b(self.mixed_7a(hidden)))
        return Taps(hidden.mean((2, 3)), spatial.contiguous())

    def logits(self, pool_BF: Tensor) -> Tensor:
        """pool_3 @ softmax/weights, without the bias: (B, 1008), as ADM's Inception Score has it."""
        with full_precision():
            return pool_BF @ self.fc_weight.to(pool_BF).T


class _Conv(nn.Module):
    """Convolution, batch normalization and ReLU, for one or several units on the same input (outputs side by side)."""

    weight: Tensor
    bias: Tensor

    def __init__(
        self,
        state: Mapping[str, Tensor],
        names: Sequence[str],
        stride: int,
        padding: int | tuple[int, int],
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        folded = [_folded(state, name) for name in names]
        weight = torch.cat([weight for weight, _ in folded]).to(dtype)
        self.register_buffer("weight", weight.contiguous(memory_format=torch.channels_last))
        self.register_buffer("bias", torch.cat([bias for _, bias in folded]).to(dtype))
        self.widths = [len(bias) for _, bias in folded]
        self.stride, self.padding = stride, padding

    def linear(self, hidden: Tensor) -> Tensor:
        return F.conv2d(hidden, self.weight, self.bias, self.stride, self.padding)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden).relu_()

    def pooled(self, hidden: Tensor) -> list[Tensor]:
        """The units apart; the last one is average-pooled before its ReLU."""
        *others, last = self.linear(hidden).split(self.widths, dim=1)
        return [*(other.relu() for other in others), _average_pool(last).relu_()]


def _folded(state: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    gamma, beta, mean, variance = (state[f"{name}.bn.{part}"].double() for part in _BN)
    scale = gamma / (variance + _EPS).sqrt()
    return state[f"{name}.conv.weight"].double() * scale[:, None, None, None], beta - mean * scale


def _average_pool(hidden: Tensor) -> Tensor:
    return F.avg_pool2d(hidden, 3, 1, 1, count_include_pad=False)


class _Mixed5(nn.Module):
    def __init__(self, conv, name: str) -> None:
        super().__init__()
        entry = ("branch1x1", "branch5x5_1", "branch3x3dbl_1", "branch_pool")
        self.entry = conv(*(f"{name}.{branch}" for branch in entry))
        self.five = conv(f"{name}.branch5x5_2", padding=2)
        self.deep = nn.Sequential(*(conv(f"{name}.branch3x3dbl_{index}", padding=1) for index in (2, 3)))

    def forward(self, hidden: Tensor) -> Tensor:
        one, five, double, pool = self.entry.pooled(hidden)
        return torch.cat([one, self.five(five), self.deep(double), pool], 1)


class _Mixed6a(nn.Module):
    def __init__(self, conv) -> None:
        super().__init__()
        self.three = conv("Mixed_6a.branch3x3", stride=2)
        self.deep = nn.Sequential(
            conv("Mixed_6a.branch3x3dbl_1"),
            conv("Mixed_6a.branch3x3dbl_2", padding=1),
            conv("Mixed_6a.branch3x3dbl_3", stride=2),
        )

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.cat([self.three(hidden), self.deep(hidden), F.max_pool2d(hidden, 3, 2)], 1)


class _Mixed6(nn.Module):
    def __init__(self, conv, name: str) -> None:
        super().__init__()
        entry = ("branch1x1", "branch7x7_1", "branch7x7dbl_1", "branch_pool")
        self.entry = conv(*(f"{name}.{branch}" for branch in entry))
        wide, tall = {"padding": (0, 3)}, {"padding": (3, 0)}
        self.seven = nn.Sequential(conv(f"{name}.branch7x7_2", **wide), conv(f"{name}.branch7x7_3", **tall))
        shapes = zip((2, 3, 4, 5), (tall, wide, tall, wide), strict=True)
        self.deep = nn.Sequential(*(conv(f"{name}.branch7x7dbl_{index}", **shape) for index, shape in shapes))

    def forward(self, hidden: Tensor) -> Tensor:
        one, seven, double, pool = self.entry.pooled(hidden)
        return torch.cat([one, self.seven(seven), self.deep(double), pool], 1)


class _Mixed7a(nn.Module):
    def __init__(self, conv) -> None:
        super().__init__()
        self.entry = conv("Mixed_7a.branch3x3_1", "Mixed_7a.branch7x7x3_1")
        self.three = conv("Mixed_7a.branch3x3_2", stride=2)
        self.seven = nn.Sequential(
            conv("Mixed_7a.branch7x7x3_2", padding=(0, 3)),
            conv("Mixed_7a.branch7x7x3_3", padding=(3, 0)),
            conv("Mixed_7a.branch7x7x3_4", stride=2),
        )

    def forward(self, hidden: Tensor) -> Tensor:
        three, seven = self.entry(hidden).split(self.entry.widths, dim=1)
        return torch.cat([self.three(three), self.seven(seven), F.max_pool2d(hidden, 3, 2)], 1)


class _Mixed7(nn.Module):
    def __init__(self, conv, name: str, pool: str) -> None:
        super().__init__()
        entry = [f"{name}.{branch}" for branch in ("branch1x1", "branch3x3_1", "branch3x3dbl_1")]
        self.is_max = pool == "max"
        self.entry = conv(*entry) if self.is_max else conv(*entry, f"{name}.branch_pool")
        self.pool = conv(f"{name}.branch_pool") if self.is_max else nn.Identity()
        self.deep = conv(f"{name}.branch3x3dbl_2", padding=1)
        wide, tall = {"padding": (0, 1)}, {"padding": (1, 0)}
        self.three_a, self.three_b = conv(f"{name}.branch3x3_2a", **wide), conv(f"{name}.branch3x3_2b", **tall)
        self.deep_a, self.deep_b = conv(f"{name}.branch3x3dbl_3a", **wide), conv(f"{name}.branch3x3dbl_3b", **tall)

    def forward(self, hidden: Tensor) -> Tensor:
        if self.is_max:
            one, three, double = self.entry(hidden).split(self.entry.widths, dim=1)
            pool = self.pool(F.max_pool2d(hidden, 3, 1, 1))
        else:
            one, three, double, pool = self.entry.pooled(hidden)
        double = self.deep(double)
        return torch.cat(
            [one, self.three_a(three), self.three_b(three), self.deep_a(double), self.deep_b(double), pool], 1
        )


def tf1_resize(images_BCHW: Tensor, side: int = SIDE) -> Tensor:
    """TensorFlow 1's ResizeBilinear (corners not aligned, pixels not centered): float32 (B, C, side, side), 0..255.

    Output i reads input position i * in / out: no half-pixel shift, no antialiasing, nothing rounded. On a CPU the
    result has the very bits of TensorFlow's kernel; indices and weights are made there for other devices too.
    """
    hidden = images_BCHW.float()
    for axis in (3, 2):  # along x first, as the kernel does
        low, high, weight = (table.to(hidden.device) for table in _table(images_BCHW.shape[axis], side))
        first, second = hidden.index_select(axis, low), hidden.index_select(axis, high)
        hidden = first + (second - first) * (weight if axis == 3 else weight[:, None])
    return hidden


@lru_cache(maxsize=16)
def _table(size: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lower and upper index int64 and weight float32 of every output position, each (side,)."""
    scale = torch.tensor(size, dtype=torch.float32) / torch.tensor(side, dtype=torch.float32)
    center = torch.arange(side, dtype=torch.float32) * scale
    low = center.floor()
    return low.long(), (low.long() + 1).clamp(max=size - 1), center - low


def normalized(images: Tensor) -> Tensor:
    """(x - 128) / 128, the graph's own scaling of 0..255."""
    return (images - 128) * 0.0078125


@contextmanager
def full_precision() -> Iterator[None]:
    """No TF32 inside: features must not depend on a global flag."""
    allowed = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = allowed


def check_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The 472 tensors of the network without the 94 optional batch counters.

    Raises:
        VarkdError: the first tensor that is missing, unknown, of another shape or not of floating point.
    """
    shapes = expected_shapes()
    state = {name: value for name, value in state.items() if not name.endswith(".num_batches_tracked")}
    if missing := [name for name in shapes if name not in state]:
        raise VarkdError(
            f"these are not the weights of the 2015 Inception network: {len(missing)} of its 472 tensors "
            f"are missing, first {missing[0]}"
        )
    if unknown := [name for name in state if name not in shapes]:
        raise VarkdError(
            f"these are not the weights of the 2015 Inception network: {len(unknown)} tensors are not "
            f"its own, first {unknown[0]}"
        )
    for name, shape in shapes.items():
        if tuple(state[name].shape) != shape:
            raise VarkdError(
                f"{name} is {tuple(state[name].shape)}, the 2015 Inception network has {shape} "
                f"(torchvision's Inception-v3 is another network)"
            )
        if not state[name].is_floating_point() or not state[name].isfinite().all():
            raise VarkdError(f"{name} does not hold finite floating-point numbers: get the weights again")
    return {name: state[name] for name in shapes}


def expected_shapes() -> dict[str, tuple[int, ...]]:
    """Name and shape of the 472 tensors, in the order of the published files."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, num_in, num_out, height, width in conv_units():
        shapes[f"{name}.conv.weight"] = (num_out, num_in, height, width)
        shapes |= {f"{name}.bn.{part}": (num_out,) for part in _BN}
    return shapes | {"fc.weight": (NUM_OUTPUTS, POOL_DIM), "fc.bias": (NUM_OUTPUTS,)}


def conv_units() -> list[tuple[str, int, int, int, int]]:
    """(name, input channels, output channels, kernel height, kernel width) of the 94 convolutions."""
    units = [
        ("Conv2d_1a_3x3", 3, 32, 3, 3),
        ("Conv2d_2a_3x3", 32, 32, 3, 3),
        ("Conv2d_2b_3x3", 32, 64, 3, 3),
        ("Conv2d_3b_1x1", 64, 80, 1, 1),
        ("Conv2d_4a_3x3", 80, 192, 3, 3),
    ]

    def block(name: str, *rows: tuple[str, int, int, int, int]) -> None:
        units.extend((f"{name}.{row[0]}", *row[1:]) for row in rows)

    for letter, num, pool in (("b", 192, 32), ("c", 256, 64), ("d", 288, 64)):
        block(
            f"Mixed_5{letter}",
            ("branch1x1", num, 64, 1, 1),
            ("branch5x5_1", num, 48, 1, 1),
            ("branch5x5_2", 48, 64, 5, 5),
            ("branch3x3dbl_1", num, 64, 1, 1),
            ("branch3x3dbl_2", 64, 96, 3, 3),
            ("branch3x3dbl_3", 96, 96, 3, 3),
            ("branch_pool", num, pool, 1, 1),
        )
    block(
        "Mixed_6a",
        ("branch3x3", 288, 384, 3, 3),
        ("branch3x3dbl_1", 288, 64, 1, 1),
        ("branch3x3dbl_2", 64, 96, 3, 3),
        ("branch3x3dbl_3", 96, 96, 3, 3),
    )
    for letter, mid in (("b", 128), ("c", 160), ("d", 160), ("e", 192)):
        block(
            f"Mixed_6{letter}",
            ("branch1x1", 768, 192, 1, 1),
            ("branch7x7_1", 768, mid, 1, 1),
            ("branch7x7_2", mid, mid, 1, 7),
            ("branch7x7_3", mid, 192, 7, 1),
            ("branch7x7dbl_1", 768, mid, 1, 1),
            ("branch7x7dbl_2", mid, mid, 7, 1),
            ("branch7x7dbl_3", mid, mid, 1, 7),
            ("branch7x7dbl_4", mid, mid, 7, 1),
            ("branch7x7dbl_5", mid, 192, 1, 7),
            ("branch_pool", 768, 192, 1, 1),
        )
    block(
        "Mixed_7a",
        ("branch3x3_1", 768, 192, 1, 1),
        ("branch3x3_2", 192, 320, 3, 3),
        ("branch7x7x3_1", 768, 192, 1, 1),
        ("branch7x7x3_2", 192, 192, 1, 7),
        ("branch7x7x3_3", 192, 192, 7, 1),
        ("branch7x7x3_4", 192, 192, 3, 3),
    )
    for letter, num in (("b", 1280), ("c", 2048)):
        block(
            f"Mixed_7{letter}",
            ("branch1x1", num, 320, 1, 1),
            ("branch3x3_1", num, 384, 1, 1),
            ("branch3x3_2a", 384, 384, 1, 3),
            ("branch3x3_2b", 384, 384, 3, 1),
            ("branch3x3dbl_1", num, 448, 1, 1),
            ("branch3x3dbl_2", 448, 384, 3, 3),
            ("branch3x3dbl_3a", 384, 384, 1, 3),
            ("branch3x3dbl_3b", 384, 384, 3, 1),
            ("branch_pool", num, 192, 1, 1),
        )
    return units
