"""Saving and loading backbones: `config.json` (family, sizes, tokenizer hash) beside `model.safetensors`.

A run folder loads like an exported model: its `checkpoints/selected.json` names the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from varkd.backbones.arpg import ARPG
from varkd.backbones.llamagen import LlamaGen
from varkd.backbones.protocol import Backbone
from varkd.backbones.quantized import dequantized
from varkd.backbones.randar import RandAR
from varkd.backbones.rar import RAR
from varkd.backbones.var import VAR
from varkd.containers import check_finite, read_tensors
from varkd.errors import VarkdError, did_you_mean
from varkd.files import file_hash, read_json
from varkd.types import state_hash

FAMILIES: dict[str, type[Backbone]] = {model.family: model for model in (LlamaGen, VAR, ARPG, RandAR, RAR)}


def family_class(family: str) -> type[Backbone]:
    """The class of a family.

    Raises:
        VarkdError: there is no such family.
    """
    if family not in FAMILIES:
        raise VarkdError(f"unknown backbone family '{family}': {did_you_mean(family, FAMILIES)}")
    return FAMILIES[family]


def build(
    family: str,
    sizes: dict[str, Any],
    dropout: float = 0.0,
    seed: int = 0,
    device: str = "cpu",
    quantizer: Mapping[str, Tensor] | None = None,
) -> Backbone:
    """A freshly initialized backbone. Weights depend on `seed` only; no global generator is touched.

    `quantizer` holds the frozen tensors of the tokenizer that a next-scale backbone reads its codes with
    (`Tokenizer.quantizer`); other families have no use for it.

    Raises:
        VarkdError: unknown family, or a size that it does not have.
    """
    with torch.device("meta"):
        model = _construct(family, sizes, dropout)
    model.to_empty(device="cpu")
    model.initialize(torch.Generator().manual_seed(seed))
    if quantizer:
        model.set_quantizer(quantizer)
    return model.to(device)


def _construct(family: str, sizes: dict[str, Any], dropout: float) -> Backbone:
    model_class: Any = family_class(family)
    sizes = {name: tuple(value) if isinstance(value, list) else value for name, value in sizes.items()}
    try:
        return model_class(model_class.config_class(**sizes), dropout)
    except (TypeError, RuntimeError, OverflowError) as error:
        reason = " ".join(str(error).split()).replace("__init__() ", "")[:200]
        raise VarkdError(f"{family}: {reason}") from None


def save_backbone(model: Backbone, folder: str | Path, tokenizer_hash: str | None = None) -> None:
    """Export `model` as one that was trained on codes of the tokenizer `tokenizer_hash`."""
    model.tokenizer_hash = tokenizer_hash
    model.save(folder)


def load_backbone(folder: str | Path, device: str = "cpu", step: int | None = None) -> tuple[Backbone, dict[str, Any]]:
    """Load an exported model or a run folder: the model in eval mode, and its `config.json`.

    A run folder gives its selected weights, or with `step` the averaged weights of that checkpoint.

    Raises:
        VarkdError: no such folder, an unknown family, a truncated file, or weights of other shapes.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise VarkdError(f"no model at {folder}: give a run folder or an exported model folder")
    info = read_json(folder / "config.json")
    if not isinstance(info, dict):
        raise VarkdError(f"{folder / 'config.json'} does not describe a model: copy or export it again")
    sizes = sizes_of(info)
    with torch.device("meta"):
        model = _construct(info.get("family", "?"), sizes, dropout=0.0)
    path = weights_path(folder) if step is None else checkpoint_path(folder, step) / "ema.safetensors"
    check_hash(path)
    load_weights(model, path)
    model.tokenizer_hash = info.get("tokenizer_hash")
    model.class_names = tuple(info["class_names"]) if info.get("class_names") else None
    return model.to(device).eval(), info


def sizes_of(info: dict[str, Any]) -> dict[str, Any]:
    """The fields of a model's config among those of its `config.json`."""
    return {name: value for name, value in info.items() if name not in ("family", "tokenizer_hash", "class_names")}


def with_classes(model: Backbone, index: Sequence[int], names: Sequence[str]) -> Backbone:
    """The same model of some of its classes, in this order: their rows of the class table and the null label's."""
    config = {field.name: getattr(model.config, field.name) for field in fields(model.config)}
    with torch.device("meta"):
        chosen = _construct(model.family, {**config, "num_classes": len(index)}, dropout=0.0)
    name, first = model.class_rows(model.config)
    state = model.state_dict()
    table, last = state[name], first + model.num_classes
    rows = table[first:last][torch.tensor(index, device=table.device)]
    chosen.load_state_dict({**state, name: torch.cat([table[:first], rows, table[last:]])}, assign=True)
    chosen.tokenizer_hash, chosen.class_names = model.tokenizer_hash, tuple(names)
    return chosen.requires_grad_(next(model.parameters()).requires_grad).train(model.training)


def load_weights(model: Backbone, path: Path) -> None:
    """Load a safetensors file into `model`, strictly.

    Raises:
        VarkdError: missing or truncated file, missing or unexpected tensors, other shapes, weights that are no numbers.
    """
    state = dequantized(read_tensors(path, "copy or export it again"), str(path))
    check_state(model, state, str(path))
    check_finite(state, str(path))
    model.load_state_dict(state, assign=True)


def check_state(model: Backbone, state: dict[str, Tensor], origin: str) -> None:
    """Raise `VarkdError` naming the first difference between `state` and what `model` needs."""
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    for name in sorted({**wanted, **found}):
        if wanted.get(name) != found.get(name):
            raise VarkdError(
                f"{origin} does not fit this {model.family}: '{name}' is {found.get(name, 'missing')}, "
                f"the model needs {wanted.get(name, 'no such tensor')}"
            )


def weights_hash(model: Backbone) -> str:
    """Names a model by family, sizes and weights."""
    # The field is younger than recorded names; where it is True, its tensor tells the models apart.
    sizes = repr((model.family, model.config)).replace(", guidance_conditioned=False", "")
    return state_hash(sizes, model.state_dict())


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of an update stands in a run folder."""
    return folder / "checkpoints" / f"step-{step:08d}"


def check_hash(path: Path) -> None:
    """Raise `VarkdError` where a file of a checkpoint is not what was written (by a bit that flipped, or a person)."""
    state = path.with_name("state.json")
    expected = read_json(state).get("sha256", {}).get(path.name) if state.is_file() else None
    if expected is not None and path.is_file() and file_hash(path) != expected:
        raise VarkdError(
            f"{path} is not what was written (its hash differs): move {path.parent} away to go on from "
            "the checkpoint before it"
        )


def weights_path(folder: Path) -> Path:
    """The file of a model folder's weights, or of a run folder's selected ones.

    Raises:
        VarkdError: there is none.
    """
    if (folder / "model.safetensors").is_file():
        return folder / "model.safetensors"
    selected = folder / "checkpoints" / "selected.json"
    if not selected.is_file():
        raise VarkdError(f"{folder} holds neither model.safetensors nor a finished checkpoint: train it first")
    choice = read_json(selected)
    chosen = folder / "checkpoints" / choice["checkpoint"]
    if not chosen.is_dir():
        raise VarkdError(
            f"{chosen} is gone, which {selected} names: run the same `varkd train` again, it goes on from "
            "the newest checkpoint that is there"
        )
    return chosen / f"{choice['weights']}.safetensors"
