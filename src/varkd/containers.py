"""Official weight files: what they hold, read without running anything that stands in them.

`.safetensors` files and PyTorch files (`.pt`, `.pth`, `.bin`). A PyTorch file is a pickle, which could run code; only
tensors, containers, numbers, strings and `argparse.Namespace` (LlamaGen's trainer writes its arguments) are let in,
and a file that asks for anything else is refused before it gets it. Official trainers wrap the weights in different
ways; every layout of docs/backbones.md is unwrapped here.
"""

from __future__ import annotations

import argparse
import codecs
import importlib
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from varkd.errors import VarkdError
from varkd.files import read_errors, read_json

Weights = Literal["model", "ema", "tokenizer"]
"""Which weights of a file that holds several: the model's own, their moving average, or the tokenizer's."""

_PLACES: dict[Weights, tuple[tuple[str, ...], ...]] = {
    "model": (("trainer", "var_wo_ddp"), ("model",), ("module",), ("state_dict",)),
    "ema": (("ema",),),
    "tokenizer": (("trainer", "vae_local"), ("model",), ("module",), ("state_dict",)),
}
_PREFIXES = ("module.", "_orig_mod.", "model.")  # DistributedDataParallel, torch.compile, PyTorch Lightning
_INDEX = ".safetensors.index.json"


@dataclass(frozen=True)
class Container:
    """The tensors of one file, where in it they stood, and what a person should know of it (one line a note).

    Tensors of a PyTorch file are mapped from disk, not copied: keep the file until they are converted or saved.
    """

    state: dict[str, Tensor]
    layout: str
    notes: list[str]


def read_state(path: str | Path, prefer: Weights = "model") -> Container:
    """The weights in an official file, in an FSDP folder (`consolidated.pth`), or in safetensors shards.

    Shards are named by their folder, by their index (`*.safetensors.index.json`), or by any of them.

    Args:
        prefer: the model's weights, their moving average where the trainer kept one ("ema"), or the tokenizer that
            VAR's trainer keeps beside the model ("tokenizer").

    Raises:
        VarkdError: no such file, a folder, something that was downloaded wrongly (a Git-LFS pointer, a web page, a
            truncated file), a pickle that wants more than tensors, or no such tensors inside.
    """
    path = _file_of(Path(path))
    content: dict[str, Any] = {}
    for part in _shards_of(path):
        content |= read_tensors(part, "download it again") if _is_safetensors(part) else _read_pickle(part)
    layout, state = _unwrap(content, prefer, path)
    notes = [f"not read: {', '.join(rest)}"] if (rest := _rest(content, layout)) else []
    if layout == "state_dict" and (others := sorted(name for name in state if not name.startswith("model."))):
        own = {name: value for name, value in state.items() if name.startswith("model.")}
        if own:  # PyTorch Lightning: the module's other parts (losses, metrics) stand beside the model
            notes.append(f"not read: {', '.join(others[:3])}{', ...' if len(others) > 3 else ''}")
            state = own
    if prefer == "model" and _is_state(content.get("ema")):
        notes.append("moving-average weights are there too: --weights ema reads them")
    return Container(_without_prefixes(state, path), layout, notes)


def _file_of(path: Path) -> Path:
    if path.is_dir():
        found = [path / "consolidated.pth", *sorted(path.glob(f"*{_INDEX}"))]
        path, folder = next((each for each in found if each.is_file()), path), path
        if path == folder:
            raise VarkdError(
                f"{folder} is a folder without consolidated.pth and without an index of shards: give the "
                "weight file itself"
            )
    if not path.is_file():
        raise VarkdError(f"no such file: {path}")
    return path


def _shards_of(path: Path) -> list[Path]:
    """All files of the weights: those of an index, where `path` is one or one of its shards."""
    shard = re.fullmatch(r"(.+)-\d{5}-of-\d{5}\.safetensors", path.name)
    index = path.with_name(f"{shard[1]}{_INDEX}") if shard else path
    if not index.name.endswith(_INDEX):
        return [path]
    if not index.is_file():
        raise VarkdError(f"{path} is one of several shards: download the others and {index.name} too")
    content = read_json(index)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in places.values()
    ):
        raise VarkdError(f"{index} is no index of shards (a weight_map of file names): download it again")
    shards = [index.with_name(name) for name in sorted(set(places.values()))]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise VarkdError(f"{index} names {missing[0]}, which is not there: download all {len(shards)} shards")
    return shards


def _is_safetensors(path: Path) -> bool:
    """By content; files that are no weights at all are refused here, by their first bytes."""
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise VarkdError(f"{path} is empty: download it again")
    if head.startswith(b"version https://git-lfs"):
        raise VarkdError(f"{path} is a Git-LFS pointer, not the weights: run `git lfs pull`, or download the file")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise VarkdError(f"{path} is a web page, not weights: download the file itself (the raw or resolve link)")
    return path.suffix == ".safetensors" or head[8:9] == b"{"


def read_tensors(path: Path, advice: str = "copy or download it again") -> dict[str, Tensor]:
    """The tensors of a safetensors file; `advice` is what to do where it is damaged.

    Raises:
        VarkdError: it is missing, truncated, no safetensors file, or cannot be read.
    """
    with read_errors(path, f"is truncated or not a safetensors file: {advice}", (SafetensorError,)):
        path.open("rb").close()  # what the system refuses is clearer here
        return load_file(path)


def check_finite(state: Mapping[str, Tensor], origin: str) -> None:
    """Raise `VarkdError` where a weight is no number: whatever is computed with it is none either."""
    for name, value in state.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise VarkdError(
                f"{origin} holds weights that are not finite ('{name}'): the training that wrote it has "
                "diverged; take an earlier checkpoint"
            )


def _numpy_scalars() -> list[Any]:
    """What a number of numpy is pickled with (a step or a loss that a trainer keeps beside the weights)."""
    multiarray = importlib.import_module(
        "numpy._core.multiarray" if np.__version__[0] >= "2" else "numpy.core.multiarray"
    )
    kinds = {type(np.dtype(code)) for code in "?bhilqBHILQefd"}
    return [multiarray.scalar, (multiarray.scalar, "numpy.core.multiarray.scalar"), np.dtype, *kinds, codecs.encode]


def _read_pickle(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        is_zip = file.read(2) == b"PK"  # files before PyTorch 1.6 are bare pickles, which cannot be mapped
    allowed = [argparse.Namespace, *_numpy_scalars()]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(allowed):
            warnings.simplefilter("ignore")  # about unusual pickles, before our one line
            content = torch.load(str(path), map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # what a damaged or hostile file raises is not bounded
        if isinstance(error, OSError) and error.errno is not None:
            with read_errors(path):
                raise
        if wanted := re.search(r"GLOBAL (\S+)", str(error)):
            raise VarkdError(
                f"{path} is not a plain PyTorch file of tensors: it asks to import {wanted[1]}, which was refused; "
                "convert it to safetensors where it comes from"
            ) from None
        raise VarkdError(
            f"{path} is not a plain PyTorch file of tensors, or is truncated ({_line(error)}): download it again"
        ) from None
    if not isinstance(content, Mapping):
        raise VarkdError(f"{path} holds no tensors by name, but a {type(content).__name__}: give a file of weights")
    return dict(content)


def _line(error: Exception) -> str:
    """The kind of an error and the beginning of its text, without the addresses and the advice that follow."""
    text = str(error).strip().split("\n")[0].split(". ")[0]
    return f"{type(error).__name__}: {text[:100]}" if text else type(error).__name__


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(_is_weight(name, value[name]) for name in value)


def _is_weight(name: Any, value: Any) -> bool:
    """An ordinary tensor with data: not sparse, not quantized, not without storage."""
    ordinary = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized
    return isinstance(name, str) and ordinary and not value.is_meta


def _unwrap(content: dict[str, Any], prefer: Weights, path: Path) -> tuple[str, Mapping[str, Tensor]]:
    if prefer != "ema" and _is_state(content):
        return "raw", content
    for place in _PLACES[prefer]:
        value: Any = content
        for key in place:
            value = value.get(key) if isinstance(value, Mapping) else None
        if _is_state(value):
            return ".".join(place), value
    if prefer == "ema":
        raise VarkdError(f"{path} holds no moving-average weights ('ema'): leave --weights ema out")
    if _is_state(content.get("ema")):
        raise VarkdError(f"{path} holds moving-average weights only: read them with --weights ema")
    places = ", ".join(f"'{'.'.join(place)}'" for place in _PLACES[prefer])
    found = ", ".join(map(str, list(content)[:8])) or "nothing"
    raise VarkdError(f"{path} holds no state dict of tensors (looked at the top and under {places}; found {found})")


def _rest(content: Mapping[str, Any], layout: str) -> list[str]:
    return [] if layout == "raw" else sorted(str(key) for key in content if key != layout.split(".")[0])


def _without_prefixes(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Names as the bare module has them: wrappers put a prefix before every name."""
    names = list(state)
    while prefix := next((prefix for prefix in _PREFIXES if all(name.startswith(prefix) for name in names)), None):
        names = [name.removeprefix(prefix) for name in names]
    names = [name.replace("._orig_mod.", ".") for name in names]  # blocks compiled one by one
    if len(set(names)) < len(names):
        raise VarkdError(f"{path} holds some tensors both with and without a wrapper's prefix: save the bare model")
    return dict(zip(names, state.values(), strict=True))


def count_numbered(names: Iterable[str], pattern: str) -> int:
    """How many different numbers stand where `pattern` has its one group: the length of a numbered list of modules."""
    return len({found[1] for name in names if (found := re.match(pattern, name))})
