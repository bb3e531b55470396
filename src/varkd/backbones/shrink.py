"""A smaller model cut out of a larger one: blocks, width with heads, and FFN neurons, by importance on data.

After Minitron (arXiv 2407.14679) and ShortGPT (arXiv 2403.03853). A block's score is how much it turns its input (1 -
the mean cosine of input and output), a residual channel's its mean magnitude where layers read it, a head's the mean
norm of its output, an FFN neuron's its mean magnitude. All are measured once, on the whole model. Heads keep their
width, so the number of heads and `dim` change together.

Each family says what the axes of its parameters are (`Backbone.axes`). Where channels go, the gain of a norm is
multiplied by the ratio of the root mean squares of the remaining and of all channels, so that the remaining ones keep
their size; norms without a gain of their own (VAR, and RAR's last) are left alone.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varkd.backbones.layers import RMSNorm
from varkd.backbones.protocol import Backbone
from varkd.errors import VarkdError
from varkd.types import Batch
from varkd.world import Rng

_AXIS = re.compile(r"(?P<times>\d*)(?P<kind>[DHNF])(:(?P<group>.+))?")


@dataclass(frozen=True)
class Sizes:
    """What can be made smaller."""

    num_layers: int
    num_heads: int
    dim: int
    ffn_dim: int

    @classmethod
    def of(cls, model: Backbone) -> Sizes:
        config = model.config
        return cls(config.num_layers, config.num_heads, config.dim, config.ffn_width)


@dataclass
class Importance:
    """Scores of everything that can go: higher stays. Keys are module paths; sums over `count` slots become means.

    `moment` is E[x^2] of each channel where a norm reads it (of x minus its mean over channels for LayerNorm).
    """

    blocks: dict[str, float] = field(default_factory=dict)
    channel_D: Tensor = field(default_factory=lambda: torch.zeros(0))
    heads: dict[str, Tensor] = field(default_factory=dict)
    neurons: dict[str, Tensor] = field(default_factory=dict)
    moment: dict[str, Tensor] = field(default_factory=dict)


def shrink(model: Backbone, sizes: Sizes, importance: Importance) -> Backbone:
    """The part of `model` that matters most: a new model of `sizes`, in the same dtype, on the CPU.

    Raises:
        VarkdError: sizes that are no smaller model of this family.
    """
    small = blank(model, sizes)
    kept = _Kept.of(model, sizes, importance)
    state = {}
    for name, value in model.state_dict().items():
        new_name = kept.renamed(name)
        if new_name is not None:
            state[new_name] = kept.sliced(name, value.detach().cpu()).clone()
    for path, gain in kept.gains.items():
        state[kept.renamed(f"{path}.weight")] *= gain
    small.load_state_dict(state, assign=True)
    small.tokenizer_hash, small.class_names = model.tokenizer_hash, model.class_names
    return small.requires_grad_().eval()


def sizes_of(
    model: Backbone,
    num_layers: int | None = None,
    dim: int | None = None,
    num_heads: int | None = None,
    ffn_dim: int | None = None,
) -> Sizes:
    """The given sizes, the rest as in `model`; `dim` and `num_heads` give each other.

    Raises:
        VarkdError: one is larger than the model's, or `dim` is no whole number of its heads.
    """
    whole, width = Sizes.of(model), model.config.dim // model.config.num_heads
    if dim is not None and dim % width:
        raise VarkdError(f"dim {dim}: the heads of this model are {width} wide and stay so; take a multiple of {width}")
    if dim is not None and num_heads is not None and dim != num_heads * width:
        raise VarkdError(
            f"dim {dim} and {num_heads} heads: the heads of this model are {width} wide and stay so; give "
            f"one of the two, or dim {num_heads * width}"
        )
    heads = num_heads or (dim // width if dim is not None else whole.num_heads)
    sizes = Sizes(num_layers or whole.num_layers, heads, heads * width, ffn_dim or whole.ffn_dim)
    for name, most in vars(whole).items():
        if not 1 <= getattr(sizes, name) <= most:
            raise VarkdError(f"{name} {getattr(sizes, name)}: this model has {most}; take 1 to {most}")
    blank(model, sizes)
    return sizes


def sizes_for(model: Backbone, share: float) -> Sizes:
    """Sizes with about `share` of the parameters: depth, width and FFN by the same factor, as published families grow.

    Raises:
        VarkdError: `share` is outside (0, 1].
    """
    if not 0 < share <= 1:
        raise VarkdError(f"params {share}: take a share of the model's parameters, above 0 and at most 1")
    whole, wanted = Sizes.of(model), share * count(model)
    width, step = model.config.dim // model.config.num_heads, len(model.stacks)
    options = []
    for heads in range(1, whole.num_heads + 1):
        factor = heads / whole.num_heads
        ffn_dim = max(8, round(whole.ffn_dim * factor / 8) * 8)
        for num_layers in range(step, whole.num_layers + 1, step):
            sizes = Sizes(num_layers, heads, heads * width, min(ffn_dim, whole.ffn_dim))
            off = abs(count(blank(model, sizes)) - wanted) / wanted
            options.append((off > 0.1, abs(num_layers / whole.num_layers - factor), off, sizes))
    best = min(options, key=lambda option: option[:3])
    return best[3] if best[0] is False else min(options, key=lambda option: option[2])[3]


def blank(model: Backbone, sizes: Sizes) -> Backbone:
    """A model of the same family without weights (on the meta device)."""
    model_class: Any = type(model)
    with torch.device("meta"):
        return model_class(replace(model.config, **vars(sizes)), 0.0)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def measure(model: Backbone, batches: Iterable[Batch]) -> Importance:
    """Run data through the model and score its parts."""
    found = _Measurement(model)
    with ExitStack() as stack:
        for hook in found.hooks():
            stack.callback(hook.remove)
        for batch in batches:
            batch = batch.to(model.device)
            hidden_BLD = model(batch.codes_BL, batch.condition, model.plan(len(batch), Rng(0), batch.row_B))
            found.add("channel", "", hidden_BLD.abs())  # what the head reads
    return found.importance()


class _Measurement:
    """Running sums of what the hooks see."""

    def __init__(self, model: Backbone) -> None:
        self.model = model
        self.sums: dict[tuple[str, str], Tensor] = {}
        self.counts: defaultdict[tuple[str, str], int] = defaultdict(int)

    def add(self, kind: str, key: str, value: Tensor) -> None:
        """Values of one kind, the last axis apart, averaged over everything else."""
        flat_NK = value.double().flatten(0, -2)
        self.sums[kind, key] = self.sums.get((kind, key), 0) + flat_NK.sum(0).cpu()
        self.counts[kind, key] += len(flat_NK)

    def means(self, kind: str) -> dict[str, Tensor]:
        return {key: value / self.counts[found, key] for (found, key), value in self.sums.items() if found == kind}

    def importance(self) -> Importance:
        channel_D = torch.stack(list(self.means("channel").values())).sum(0)
        blocks = {key: 1 - float(value) for key, value in self.means("cosine").items()}
        return Importance(blocks, channel_D, self.means("head"), self.means("neuron"), self.means("moment"))

    def hooks(self) -> Iterable[Any]:
        for name, module in self.model.named_modules():
            if module in self.model.transformer_blocks:
                yield module.register_forward_hook(self._block(name))
            elif isinstance(module, nn.Linear):
                yield from self._linear(module, self.model.axes_of(f"{name}.weight"))
            elif isinstance(module, RMSNorm | nn.LayerNorm) and self.model.axes_of(f"{name}.weight") == ("D",):
                yield module.register_forward_pre_hook(self._norm(name, isinstance(module, nn.LayerNorm)))

    def _block(self, name: str) -> Any:
        def see(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            del module
            self.add("cosine", name, F.cosine_similarity(inputs[0].double(), output.double(), dim=-1).unsqueeze(-1))

        return see

    def _linear(self, module: nn.Linear, axes: tuple[str, ...]) -> Iterable[Any]:
        """What a layer reads says what is worth reading: heads, neurons, or channels."""
        out, into = (_AXIS.fullmatch(axis) for axis in axes)
        if into is None:
            return
        group, heads = into["group"] or "", self.model.config.num_heads
        if into["kind"] == "H":
            norms = lambda x: x.unflatten(-1, (heads, -1)).double().norm(dim=-1)
            yield module.register_forward_pre_hook(lambda _, inputs: self.add("head", group, norms(inputs[0])))
        elif into["kind"] == "F":
            yield module.register_forward_pre_hook(lambda _, inputs: self.add("neuron", group, inputs[0].abs()))
        elif out is not None and out["kind"] in "HF":
            key = out["group"] or ""
            yield module.register_forward_pre_hook(lambda _, inputs: self.add("channel", key, inputs[0].abs()))

    def _norm(self, name: str, centered: bool) -> Any:
        def see(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            del module
            x = inputs[0].double()
            self.add("moment", name, (x - x.mean(-1, keepdim=True) if centered else x).square())

        return see


@dataclass(frozen=True)
class _Kept:
    """What stays: `blocks` old path -> new path, channels, and heads and neurons by their group."""

    model: Backbone
    blocks: dict[str, str]
    channel_D: Tensor
    heads: dict[str, Tensor]
    neurons: dict[str, Tensor]
    gains: dict[str, float]

    @classmethod
    def of(cls, model: Backbone, sizes: Sizes, importance: Importance) -> _Kept:
        blocks: dict[str, str] = {}
        for stack in model.stacks:
            scores = {path: score for path, score in importance.blocks.items() if path.rpartition(".")[0] == stack}
            best = _largest(torch.tensor(list(scores.values())), sizes.num_layers // len(model.stacks))
            blocks |= {list(scores)[old]: f"{stack}.{new}" for new, old in enumerate(best.tolist())}
        width = model.channel_block
        by_block = importance.channel_D.unflatten(0, (-1, width)).sum(1)
        channel_D = _lanes(_largest(by_block, sizes.dim // width), width)
        gains = {
            path: float((moment_D[channel_D].mean() / moment_D.mean()).sqrt())
            for path, moment_D in importance.moment.items()
            if len(channel_D) < len(moment_D) and _is_kept(path, importance.blocks, blocks)
        }
        return cls(
            model,
            blocks,
            channel_D,
            {group: _largest(score_H, sizes.num_heads) for group, score_H in importance.heads.items()},
            {group: _largest(score_F, sizes.ffn_dim) for group, score_F in importance.neurons.items()},
            gains,
        )

    def renamed(self, name: str) -> str | None:
        """A tensor's name in the small model; None where its block is gone."""
        for stack in self.model.stacks:
            if match := re.match(rf"({re.escape(stack)}\.\d+)\.", name):
                new = self.blocks.get(match[1])
                return None if new is None else f"{new}{name[len(match[1]) :]}"
        return name

    def sliced(self, name: str, value: Tensor) -> Tensor:
        for axis, label in enumerate(self.model.axes_of(name)):
            if match := _AXIS.fullmatch(label):
                value = value.index_select(axis, self._index(match, value.shape[axis]))
        return value

    def _index(self, axis: re.Match[str], length: int) -> Tensor:
        times, group = int(axis["times"] or 1), axis["group"] or ""
        if axis["kind"] == "D":
            index = self.channel_D
        elif axis["kind"] == "F":
            index = self.neurons[group]
        else:
            config = self.model.config
            index = self.heads[group] if axis["kind"] == "N" else _lanes(self.heads[group], config.head_dim)
        return torch.cat([index + copy * (length // times) for copy in range(times)])


def _is_kept(path: str, blocks: Iterable[str], kept: dict[str, str]) -> bool:
    owner = next((block for block in blocks if path.startswith(f"{block}.")), None)
    return owner is None or owner in kept


def _largest(score_K: Tensor, num: int) -> Tensor:
    """The indices of the `num` largest scores, ascending; of equal ones the first."""
    return torch.argsort(score_K, descending=True, stable=True)[:num].sort().values


def _lanes(index_K: Tensor, width: int) -> Tensor:
    return (index_K.unsqueeze(1) * width + torch.arange(width)).flatten()
