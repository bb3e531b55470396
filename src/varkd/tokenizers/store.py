"""Tokenizer folders: `config.json` (kind, the config's fields, hash) and `model.safetensors` when there are weights.

Nothing is ever unpickled: folders are JSON and safetensors, and official files go through `varkd.containers`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save
from torch import Tensor

from varkd.containers import check_finite, read_state, read_tensors
from varkd.errors import VarkdError, did_you_mean
from varkd.files import atomic_folder, read_json, write_json
from varkd.folders import Own, json_with
from varkd.tokenizers.maskgit import MaskGIT, MaskGITConfig
from varkd.tokenizers.multiscale import MultiScale, MultiScaleConfig
from varkd.tokenizers.pixels import Pixels, PixelsConfig
from varkd.tokenizers.protocol import Tokenizer
from varkd.tokenizers.vq import VQ, VQConfig

KINDS: dict[str, tuple[type[Tokenizer], type]] = {
    "pixels": (Pixels, PixelsConfig),
    "vq": (VQ, VQConfig),
    "multiscale": (MultiScale, MultiScaleConfig),
    "maskgit": (MaskGIT, MaskGITConfig),
}
_CONFIG, _WEIGHTS, _FIT = "config.json", "model.safetensors", "fit.json"
TOKENIZER = Own("a tokenizer", (_CONFIG,), json_with("hash", kind=tuple(KINDS)), (_WEIGHTS, _FIT))
T = TypeVar("T", bound=Tokenizer)
_SIGNATURE_KEYS = {
    "vq": ("encoder.conv_blocks.0.res.0.conv1.weight",),
    "multiscale": ("encoder.down.0.block.0.conv1.weight", "encoder.mid.block_1.conv1.weight"),
    "maskgit": ("encoder.down.0.block.0.conv1.weight", "encoder.mid.0.conv1.weight"),
}
"""Tensors by which a state dict is recognized."""
_MOST_BLOCKS = 1000  # a damaged number would be built for hours


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path, fit: dict[str, Any] | None = None) -> None:
    """Write a tokenizer folder atomically; `fit` (the record of its training) becomes `fit.json`.

    Raises:
        VarkdError: `folder` holds something else than a tokenizer, or cannot be written.
    """
    folder = Path(folder)
    with atomic_folder(folder, TOKENIZER) as temporary:
        settings = {"kind": tokenizer.kind, **asdict(tokenizer.config), "hash": tokenizer.hash}
        write_json(temporary / _CONFIG, settings)
        if state := tokenizer.state_dict():
            (temporary / _WEIGHTS).write_bytes(save({name: state[name].cpu().contiguous() for name in state}))
        if fit is not None:
            write_json(temporary / _FIT, fit)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Read a tokenizer folder: on the CPU, in evaluation mode, its parameters without gradients.

    Raises:
        VarkdError: the folder is missing or incomplete, of an unknown kind, has other weights than its config says, or
            was changed after it was saved (its hash differs).
    """
    folder = Path(folder)
    if not (folder / _CONFIG).is_file():
        raise VarkdError(f"no tokenizer in {folder} (no {_CONFIG}): make one with `varkd tokenizer fit`")
    settings = read_json(folder / _CONFIG)
    if not isinstance(settings, dict) or not isinstance(settings.get("hash"), str):
        raise VarkdError(f"{folder / _CONFIG} is not a tokenizer's config: it needs a kind and a hash")
    saved_hash, kind = settings.pop("hash"), str(settings.pop("kind", None))
    if kind not in KINDS:
        raise VarkdError(f"unknown tokenizer kind '{kind}' in {folder / _CONFIG}: {did_you_mean(kind, KINDS)}")
    module, config = KINDS[kind]
    tokenizer = _with_state(module, _config(config, settings, folder / _CONFIG), folder / _WEIGHTS)
    if tokenizer.hash != saved_hash:
        raise VarkdError(
            f"the tokenizer in {folder} was changed after it was saved (hash {tokenizer.hash[:12]} instead of "
            f"{saved_hash[:12]}): restore it, or fit and encode again"
        )
    return tokenizer


def load_official(
    path: str | Path, image_size: int, kind: str | None = None, scales: Sequence[int] | None = None
) -> Tokenizer:
    """Read a published tokenizer: LlamaGen's VQ, VAR's multi-scale VQVAE, or MaskGIT-VQGAN; sizes follow from shapes.

    The file may be anything that `containers.read_state` unwraps. Usage statistics of the codebook are left out: they
    say nothing of the codes, and files with and without them shall have one hash.

    Args:
        image_size: side of the images; the networks take any, but a grid of codes has one size.
        kind: `vq`, `multiscale` or `maskgit`; None recognizes it by its tensors.
        scales: sides of a multi-scale tokenizer's maps, where `image_size` is none of the published ones.

    Raises:
        VarkdError: as `containers.read_state`; no such tokenizer in the file, or sizes that do not fit it.
    """
    if kind is not None and kind not in _SIGNATURE_KEYS:
        raise VarkdError(f"no official tokenizers of kind '{kind}': {did_you_mean(kind, _SIGNATURE_KEYS)}")
    state = read_state(path, "tokenizer").state
    found = _recognize(state, Path(path))
    if kind not in (None, found):
        raise VarkdError(f"{path} is a tokenizer of kind {found}, not {kind}: leave out --kind")
    if scales is not None and found != "multiscale":
        raise VarkdError(f"{path} is a tokenizer of kind {found}, with one grid of codes: leave out --scales")
    module, config_class = KINDS[found]
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    try:
        config = config_class.infer(shapes, image_size, **({} if scales is None else {"scales": scales}))
    except KeyError as error:
        raise VarkdError(f"{path} is not a whole {found} tokenizer: it lacks the tensor {error}") from None
    except VarkdError as error:
        raise VarkdError(f"{path} does not fit: {error}") from None
    except ValueError:  # another number of axes
        raise VarkdError(f"{path} is not a {found} tokenizer: its tensors have other shapes") from None
    with torch.device("meta"):
        tokenizer = module(config)
    unused = {name: torch.zeros(value.shape) for name, value in tokenizer.named_buffers()}
    return _assign(tokenizer, {name: value.float() for name, value in state.items()} | unused, Path(path))


def _recognize(state: Mapping[str, Tensor], path: Path) -> str:
    for kind, names in _SIGNATURE_KEYS.items():
        if all(name in state for name in names):
            return kind
    found = ", ".join(list(state)[:3])
    raise VarkdError(
        f"{path} is no tokenizer that varkd knows ({', '.join(_SIGNATURE_KEYS)}); its tensors begin with {found}: "
        "give the file of the tokenizer itself"
    )


def _config(config: type, settings: dict[str, Any], path: Path) -> Any:
    """Rebuild a frozen config from JSON; the default of each field says what its value looks like."""
    defaults = {field.name: field.default for field in fields(config)}
    for name in settings:
        if name not in defaults:
            raise VarkdError(f"unknown field '{name}' in {path}: {did_you_mean(name, defaults)}")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    for name, default in defaults.items():
        if name not in values:
            raise VarkdError(f"{path} lacks the field '{name}'")
        value = settings[name]
        if name.endswith("res_blocks") and isinstance(value, int) and value > _MOST_BLOCKS:
            raise VarkdError(f"field '{name}' in {path} asks for {value} blocks: copy the folder again")
        if not _looks_like(values[name], default):
            raise VarkdError(f"field '{name}' in {path} should look like {default!r}, got {settings[name]!r}")
    return config(**values)


def _looks_like(value: Any, example: Any) -> bool:
    if isinstance(example, tuple):
        return isinstance(value, tuple) and all(_looks_like(item, example[0]) for item in value)
    return type(value) is type(example)


def _with_state(module: type[Tokenizer], config: Any, path: Path) -> Tokenizer:
    """Build `module` with the weights at `path`, or as it is when it has none."""
    try:
        with torch.device("meta"):
            empty = module(config)
    except (TypeError, RuntimeError, OverflowError) as error:
        raise VarkdError(
            f"{path.with_name(_CONFIG)} has sizes that no tokenizer can have: copy the folder again"
        ) from error
    if not empty.state_dict():
        return module(config).eval()
    return _assign(empty, read_tensors(path, "copy the tokenizer folder again, or fit it again"), path)


def _assign(tokenizer: T, state: dict[str, Tensor], path: Path) -> T:
    """Give a tokenizer on the meta device exactly these tensors."""
    wanted = {name: tuple(value.shape) for name, value in tokenizer.state_dict().items()}
    for name in sorted(wanted.keys() | state.keys()):
        if name not in state or name not in wanted:
            verb = "lacks" if name in wanted else "has an unexpected"
            raise VarkdError(f"{path} {verb} tensor '{name}': it belongs to another tokenizer config")
        if tuple(state[name].shape) != wanted[name]:
            raise VarkdError(f"'{name}' in {path} has shape {tuple(state[name].shape)}, the config says {wanted[name]}")
    check_finite(state, str(path))
    tokenizer.load_state_dict(state, strict=True, assign=True)
    return tokenizer.requires_grad_(False).eval()
