"""Official files in and out: `varkd convert`, `varkd export`, `varkd.load_official`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from varkd.backbones.official import KeyReport, convert
from varkd.backbones.protocol import MODEL, Backbone
from varkd.backbones.store import load_backbone, save_backbone
from varkd.containers import Weights, check_finite, read_state
from varkd.errors import VarkdError
from varkd.files import atomic_file
from varkd.folders import contents
from varkd.run.data import pick_device
from varkd.tokenizers.protocol import Tokenizer
from varkd.tokenizers.store import load_tokenizer

_KEY = {"llamagen": "model", "arpg": "state_dict"}
"""Under which key a family's official PyTorch file holds the weights; the others hold them at the top."""
_PICKLES = (".pt", ".pth", ".bin")


def load_official(
    path: str | Path,
    family: str | None = None,
    *,
    heads: int | None = None,
    grid: int | Sequence[int] | None = None,
    scales: Sequence[int] | None = None,
    model: str | None = None,
    num_classes: int | None = None,
    tokenizer: str | Path | None = None,
    weights: Weights = "model",
    seed: int = 0,
    device: str = "auto",
) -> Backbone:
    """`varkd.load_official`: an official checkpoint as a backbone, float32, in evaluation mode.

    Args:
        path: the file as published (`c2i_L_256.pt`, `var_d16.pth`, ...), a trainer's file, or an FSDP folder.
        family: None recognizes it by its tensors.
        heads, grid, scales, model: what shapes do not tell, where the file name and `varkd zoo` do not either; `grid`
            may be one number.
        num_classes: replace the class table by one for so many classes, drawn from `seed`.
        tokenizer: folder of the tokenizer; a VAR cannot read its own codes without.
        weights: "ema" for the moving average, where the file holds one.

    Raises:
        VarkdError: as `containers.read_state` and `backbones.official.convert`, or the tokenizer does not fit.
    """
    loaded = _load(
        Path(path),
        family,
        heads=heads,
        grid=grid,
        scales=scales,
        model=model,
        num_classes=num_classes,
        tokenizer=tokenizer,
        weights=weights,
        seed=seed,
    )[0]
    return loaded.to(pick_device(device))


def convert_file(path: Path, out: Path, family: str | None = None, **options: Any) -> list[str]:
    """`varkd convert`: an official checkpoint -> a model folder. Takes `load_official`'s options; returns the report.

    Raises:
        VarkdError: as `load_official`, or `out` holds something.
    """
    check_new(out)
    model, lines, tokenizer_hash = _load(path, family, **options)
    save_backbone(model, out, tokenizer_hash)
    return lines


def export(source: Path, out: Path, official: bool = False) -> str:
    """`varkd export`: a run or model folder -> a model folder, or a file in the family's official layout.

    Returns a line for a person.

    Raises:
        VarkdError: no model there, `out` holds something, or its name does not say how to write it.
    """
    check_new(out)
    if official and out.suffix not in (*_PICKLES, ".safetensors"):
        raise VarkdError(f"--out {out}: an official file ends in {', '.join(_PICKLES)} or .safetensors")
    model, info = load_backbone(source)
    if official and model.guidance_conditioned:
        raise VarkdError(
            f"{source} reads the guidance scale, which official files have no place for: export a model "
            "folder (without --official)"
        )
    if not official:
        save_backbone(model, out, info.get("tokenizer_hash"))
        return f"{model.family}: {len(model.state_dict())} tensors"
    state = {name: value.detach().contiguous() for name, value in model.official_state().items()}
    layout = write_official(state, model.family, out)
    return f"{model.family}: {len(state)} tensors, {layout}"


def write_official(state: dict[str, Tensor], family: str, out: Path) -> str:
    """Write weights the way a family's official code reads them; returns the layout in words.

    Raises:
        VarkdError: RandAR's code reads safetensors only.
    """
    if out.suffix == ".safetensors":
        with atomic_file(out) as temporary:
            save_file({name: value.clone() for name, value in state.items()}, temporary)
        return "safetensors"
    if family == "randar":
        raise VarkdError(f"--out {out}: RandAR's official code reads safetensors, so name the file *.safetensors")
    key = _KEY.get(family)
    with atomic_file(out) as temporary:
        torch.save({key: state} if key else state, temporary)
    return f"under '{key}'" if key else "a raw state dict"


def check_new(out: Path) -> None:
    """Refuse to write over anything but an empty folder."""
    if out.is_dir() and contents(out):
        raise VarkdError(f"{out} is not empty: choose a new folder")
    if out.is_file():
        raise VarkdError(f"{out} exists: choose a new name")
    MODEL.check_replaceable(out)


def _load(
    path: Path,
    family: str | None,
    *,
    grid: int | Sequence[int] | None = None,
    scales: Sequence[int] | None = None,
    tokenizer: str | Path | None = None,
    weights: Weights = "model",
    **options: Any,
) -> tuple[Backbone, list[str], str | None]:
    """The model, the report, and the tokenizer's hash."""
    codes = load_tokenizer(tokenizer) if tokenizer is not None else None
    container = read_state(path, weights)
    if scales is None and codes is not None and "pos_1LC" in container.state and "lvl_1L" not in container.state:
        scales = codes.scales  # a VAR without its buffers
    model, report = convert(
        container.state,
        family,
        grid=_sides(grid),
        scales=scales,
        file_name=path.name,
        quantizer=codes.quantizer if codes is not None else None,
        **options,
    )
    check_finite(model.state_dict(), str(path))
    if codes is not None:
        _check_tokenizer(model, codes)
    return model, _lines(path, container.layout, container.notes, report, model), codes.hash if codes else None


def _lines(path: Path, layout: str, notes: Sequence[str], report: KeyReport, model: Backbone) -> list[str]:
    params = sum(parameter.numel() for parameter in model.parameters())
    where = "" if layout == "raw" else f" ('{layout}')"
    return [f"{path.name}{where}: {params / 1e6:,.1f}M parameters", *notes, *report.lines()]


def _sides(grid: int | Sequence[int] | None) -> tuple[int, ...] | None:
    if grid is None:
        return None
    sides = (grid,) if isinstance(grid, int) else tuple(grid)
    sides = sides * 2 if len(sides) == 1 else sides
    if len(sides) != 2 or min(sides) < 1:
        raise VarkdError(f"--grid takes one or two sides of at least 1, got {' '.join(map(str, sides)) or 'none'}")
    return sides


def _check_tokenizer(model: Backbone, codes: Tokenizer) -> None:
    """The tokenizer must speak of the same codes, laid out alike."""
    ours = {
        "codes": model.vocab_size,
        **{name: tuple(getattr(model.config, name)) for name in ("grid", "scales") if hasattr(model.config, name)},
    }
    theirs = {"codes": codes.vocab_size, **({"scales": codes.scales} if codes.scales else {"grid": codes.grid})}
    if ours != theirs:
        raise VarkdError(
            f"the tokenizer has {_sizes(theirs)}, but this {model.family} model {_sizes(ours)}: give the "
            "tokenizer (and --image-size at `varkd tokenizer import`) of this model"
        )


def _sizes(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
