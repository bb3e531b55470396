"""Tokenizer folders: `config.json` (kind, the config's fields, hash) and `model.safetensors` when there are weights.

Nothing is ever unpickled: folders are JSON and safetensors, and official `.pt` files go through PyTorch's
weights-only reader.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from varkd.errors import VarkdError, did_you_mean
from varkd.files import atomic_folder, read_json, write_json
from varkd.tokenizers.pixels import Pixels, PixelsConfig
from varkd.tokenizers.protocol import Tokenizer
from varkd.tokenizers.vq import VQ, VQConfig

KINDS: dict[str, tuple[type[Tokenizer], type]] = {"pixels": (Pixels, PixelsConfig), "vq": (VQ, VQConfig)}
_CONFIG, _WEIGHTS, _FIT = "config.json", "model.safetensors", "fit.json"
T = TypeVar("T", bound=Tokenizer)
_OFFICIAL_GROUPS = 32  # the one size that no shape tells


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path, fit: dict[str, Any] | None = None) -> None:
    """Write a tokenizer folder atomically; `fit` (the record of its training) becomes `fit.json`.

    Raises:
        VarkdError: `folder` holds something else than a tokenizer, or cannot be written.
    """
    folder = Path(folder)
    own = {_CONFIG, _WEIGHTS, _FIT}
    if folder.exists() and (not folder.is_dir() or {file.name for file in folder.iterdir()} - own):
        raise VarkdError(f"{folder} holds other files than a tokenizer's: choose a new folder")
    with atomic_folder(folder) as temporary:
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


def load_vq_official(path: str | Path, image_size: int) -> VQ:
    """Read an official LlamaGen tokenizer (`vq_ds16_c2i.pt`, `vq_ds8_c2i.pt`, ...); sizes follow from the shapes.

    Raises:
        VarkdError: no such file, not a plain file of tensors (anything else is refused unread), or not this network.
    """
    path = Path(path)
    if not path.is_file():
        raise VarkdError(f"no such file: {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about unusual pickles, two lines before our one
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged or hostile file raises is not bounded
        reason = type(error).__name__
        raise VarkdError(f"{path} is not a plain PyTorch file of tensors ({reason}): download it again") from error
    state = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise VarkdError(f"{path} holds no state dict (looked under 'model' and at the top)")
    with torch.device("meta"):
        tokenizer = VQ(_infer_config(state, image_size, path))
    return _assign(tokenizer, {name: value.float() for name, value in state.items()}, path)


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
        if not _looks_like(values[name], default):
            raise VarkdError(f"field '{name}' in {path} should look like {default!r}, got {settings[name]!r}")
    return config(**values)


def _looks_like(value: Any, example: Any) -> bool:
    if isinstance(example, tuple):
        return isinstance(value, tuple) and all(_looks_like(item, example[0]) for item in value)
    return type(value) is type(example)


def _with_state(module: type[Tokenizer], config: Any, path: Path) -> Tokenizer:
    """Build `module` with the weights at `path`, or as it is when it has none."""
    with torch.device("meta"):
        empty = module(config)
    if not empty.state_dict():
        return module(config).eval()
    try:
        state = load_file(path)
    except FileNotFoundError:
        raise VarkdError(f"no such file: {path}: the tokenizer folder is incomplete") from None
    except (SafetensorError, OSError) as error:
        raise VarkdError(f"{path} cannot be read ({error}): it may be truncated") from None
    return _assign(empty, state, path)


def _assign(tokenizer: T, state: dict[str, Tensor], path: Path) -> T:
    """Give a tokenizer on the meta device exactly these tensors."""
    wanted = {name: tuple(value.shape) for name, value in tokenizer.state_dict().items()}
    for name in sorted(wanted.keys() | state.keys()):
        if name not in state or name not in wanted:
            verb = "lacks" if name in wanted else "has an unexpected"
            raise VarkdError(f"{path} {verb} tensor '{name}': it belongs to another tokenizer config")
        if tuple(state[name].shape) != wanted[name]:
            raise VarkdError(f"'{name}' in {path} has shape {tuple(state[name].shape)}, the config says {wanted[name]}")
    tokenizer.load_state_dict(state, strict=True, assign=True)
    return tokenizer.requires_grad_(False).eval()


def _infer_config(state: dict[str, Tensor], image_size: int, path: Path) -> VQConfig:
    """The sizes that the shapes of an official state dict determine."""
    try:
        ch, channels = state["encoder.conv_in.weight"].shape[:2]
        levels = _count(state, r"encoder\.conv_blocks\.(\d+)\.")
        widths = [len(state[f"encoder.conv_blocks.{level}.res.0.conv1.bias"]) for level in range(levels)]
        vocab_size, codebook_dim = state["quantize.embedding.weight"].shape
        return VQConfig(
            image_size, channels, ch, tuple(width // ch for width in widths), len(state["encoder.conv_out.bias"]),
            _count(state, r"encoder\.conv_blocks\.0\.res\.(\d+)\."),
            _count(state, r"decoder\.conv_blocks\.0\.res\.(\d+)\."),
            vocab_size, codebook_dim, _OFFICIAL_GROUPS, attention="encoder.mid.1.q.weight" in state,
        )  # fmt: skip
    except KeyError as error:
        raise VarkdError(f"{path} is not a LlamaGen VQ tokenizer: it lacks the tensor {error}") from None
    except VarkdError as error:
        raise VarkdError(f"{path} does not fit: {error}") from None


def _count(state: dict[str, Tensor], pattern: str) -> int:
    return len({match[1] for name in state if (match := re.match(pattern, name))})
