"""Official state dicts -> backbones, strictly: what a file does not determine is asked for, never guessed.

Sizes come from the shapes. What no shape tells (heads, grid, scales) comes from the caller, else from the published
models (`zoo`): by name, by file name, or when every published model with these shapes agrees. Every tensor is
accounted for in a `KeyReport`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from varkd.backbones import zoo
from varkd.backbones.protocol import Backbone
from varkd.backbones.store import family_class
from varkd.backbones.var import scales_of
from varkd.errors import VarkdError

_SIGNATURE_KEYS = {
    "pos_instruct_embeddings": "randar",
    "layers.to_k.weight": "arpg",
    "pos_1LC": "var",
    "target_aware_pos_embed": "rar",
    "cls_embedding.embedding_table.weight": "llamagen",
}
"""A tensor that only this family has, or (LlamaGen, which RandAR extends) none of those above it."""

_REFUSED = {
    "slot_embeddings.weight": "these are weights of Hita, which is not supported: its sequence has two vocabularies "
    "(128 holistic, then 441 image tokens), and its published sampler embeds one token otherwise than its training",
    "encoder_pos_embed_learned": "these are weights of xAR (or MAR), which is not supported: it has continuous tokens, "
    "so there is no distribution over codes to distil",
    "cls_embedding.uncond_embedding": "these are weights of a text-conditional LlamaGen, which is not supported: only "
    "class-conditional models are",
    "quantize.embedding.weight": "this is a tokenizer: use `varkd tokenizer import`",
}
_FLAGS = {"num_heads": "--heads H", "grid": "--grid ROWS COLUMNS", "scales": "--scales S1 S2 ..."}


@dataclass(frozen=True)
class KeyReport:
    """What became of every tensor of a file, and where each size came from.

    `dropped` are buffers that we recompute (`Backbone.official_extras`); `missing` and `unexpected` are refused by
    `check`; `wrong` are tensors of other shapes, with both shapes.
    """

    family: str
    used: tuple[str, ...]
    dropped: tuple[str, ...]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """A few short lines for a person."""
        counts = [f"{self.family}: {len(self.used)} tensors used"]
        for what in ("dropped", "missing", "unexpected", "wrong"):
            if names := getattr(self, what):
                counts.append(f"{len(names)} {what} ({_first(names)})")
        return [", ".join(counts), *self.notes]

    def check(self, hint: str) -> None:
        """Raise `VarkdError`, with the first few names, unless every tensor fits."""
        faults = [
            f"{len(names)} {what}: {_first(names)}"
            for what, names in (
                ("missing", self.missing),
                ("unexpected", self.unexpected),
                ("of another shape", self.wrong),
            )
            if names
        ]
        if faults:
            raise VarkdError(f"the tensors do not make a {self.family} model ({'; '.join(faults)}){hint}")


def recognize(state: Mapping[str, Tensor]) -> str:
    """The family of an official state dict, by its tensor names.

    Raises:
        VarkdError: a tokenizer, a family that varkd does not support (with the reason), or an unknown one.
    """
    for name, reason in _REFUSED.items():
        if name in state:
            raise VarkdError(reason)
    for name, family in _SIGNATURE_KEYS.items():
        if name in state:
            return family
    raise VarkdError(
        f"these tensors ({_first(sorted(state))}) belong to no family that varkd knows: "
        f"{', '.join(sorted(_SIGNATURE_KEYS.values()))}"
    )


def convert(
    state: Mapping[str, Tensor],
    family: str | None = None,
    *,
    heads: int | None = None,
    grid: Sequence[int] | None = None,
    scales: Sequence[int] | None = None,
    model: str | None = None,
    file_name: str | None = None,
    num_classes: int | None = None,
    quantizer: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> tuple[Backbone, KeyReport]:
    """A backbone with exactly the weights of an official state dict, copied to float32, in evaluation mode.

    Args:
        family: None recognizes it.
        heads, grid, scales: what shapes do not tell; needed where the zoo does not tell it either.
        model: the published model that these weights are ("LlamaGen-L-256"), or `file_name` of its official file.
        num_classes: another number of classes: their rows are drawn anew (normal, the spread of the old rows) from
            `seed`; the null label's row and all other weights are kept.
        quantizer: the tokenizer's frozen tensors (`Tokenizer.quantizer`); a next-scale model cannot do without.

    Raises:
        VarkdError: another family, tensors missing, unexpected or of other shapes, sizes that are not determined, or
            arguments that contradict the shapes.
    """
    family = family or recognize(state)
    blank, notes = blank_model(
        state, family, heads=heads, grid=grid, scales=scales, model=model, file_name=file_name, quantizer=quantizer
    )
    report = report_keys(blank, state, notes)
    report.check(_hint(state, family))
    weights = {name: _float32(state[name]) for name in report.used}
    if num_classes is not None and num_classes != blank.num_classes:
        note = _with_classes(weights, blank, num_classes, seed)
        config = {field.name: getattr(blank.config, field.name) for field in fields(blank.config)}
        blank = _on_meta(family, {**config, "num_classes": num_classes})
        report = KeyReport(family, report.used, report.dropped, notes=(*report.notes, note))
    own = {
        name: torch.zeros_like(value, device="cpu") for name, value in blank.state_dict().items() if name not in weights
    }
    if own and not quantizer:
        raise VarkdError(
            f"{family} reads its codes through its tokenizer: give --tokenizer DIR (made by `varkd tokenizer import`)"
        )
    blank.load_state_dict({**weights, **own}, strict=True, assign=True)
    if quantizer:
        blank.set_quantizer(quantizer)
    return blank.eval(), report


def blank_model(
    state: Mapping[str, Tensor],
    family: str,
    *,
    heads: int | None = None,
    grid: Sequence[int] | None = None,
    scales: Sequence[int] | None = None,
    model: str | None = None,
    file_name: str | None = None,
    quantizer: Mapping[str, Tensor] | None = None,
) -> tuple[Backbone, list[str]]:
    """The model that the tensors belong to, without weights (on the meta device), and where its sizes came from.

    Raises:
        VarkdError: as `convert`.
    """
    known = _inferred(state, family, quantizer)
    given = {"num_heads": heads, "grid": grid and tuple(grid), "scales": scales and tuple(scales)}
    sizes, notes = {**known}, []
    names = {field.name for field in fields(family_class(family).config_class)}
    for name, value in given.items():
        if value is None:
            continue
        flag = _FLAGS[name].split()[0]
        if name not in names:
            raise VarkdError(f"{family} models have no {name}: leave {flag} out")
        if known.get(name, value) != value:
            raise VarkdError(
                f"{flag} {_text(value)} contradicts the weights, which say {_text(known[name])}: leave {flag} out"
            )
        sizes[name] = value
    candidates = _candidates(family, known, model, file_name)
    for name in _open_fields(family, sizes):
        found = {candidate.config[name] for candidate in candidates}
        if len(found) == 1:
            sizes[name] = found.pop()
            notes.append(f"{name} {_text(sizes[name])}, as in {_first([candidate.name for candidate in candidates])}")
    if still_open := _open_fields(family, sizes):
        raise VarkdError(_what_to_give(family, still_open, candidates))
    return _on_meta(family, sizes), notes


def report_keys(model: Backbone, state: Mapping[str, Tensor], notes: Sequence[str] = ()) -> KeyReport:
    """Compare the tensors of `state` with those that the official file of `model` would hold."""
    wanted = {name: tuple(value.shape) for name, value in model.official_state().items() if not _is_extra(model, name)}
    found = {name: tuple(value.shape) for name, value in state.items()}
    other = [name for name in found if name not in wanted]
    wrong = [
        f"{name} {found[name]} instead of {wanted[name]}"
        for name in wanted
        if name in found and found[name] != wanted[name]
    ]
    return KeyReport(
        model.family,
        used=tuple(name for name in wanted if name in found),
        dropped=tuple(name for name in other if _is_extra(model, name)),
        missing=tuple(name for name in wanted if name not in found),
        unexpected=tuple(name for name in other if not _is_extra(model, name)),
        wrong=tuple(wrong),
        notes=tuple(notes),
    )


def _inferred(state: Mapping[str, Tensor], family: str, quantizer: Mapping[str, Tensor] | None) -> dict[str, Any]:
    """The sizes that the tensors (and the tokenizer's) determine."""
    try:
        sizes = family_class(family).infer({name: tuple(value.shape) for name, value in state.items()})
    except VarkdError:
        raise
    except (LookupError, ValueError, TypeError, ZeroDivisionError) as error:  # a tensor is missing or has other axes
        what = f"lacks the tensor {error}" if isinstance(error, KeyError) else "has tensors with other axes"
        raise VarkdError(f"this is no {family} state dict: it {what}{_hint(state, family)}") from None
    if family == "var" and "lvl_1L" in state and not state["lvl_1L"].is_meta:
        try:
            sizes["scales"] = scales_of(state["lvl_1L"])
        except RuntimeError:  # not small whole numbers
            raise VarkdError("lvl_1L does not count scales: this is not an official VAR file") from None
    if quantizer and family == "var":
        sizes["num_phi"] = len(quantizer["phi.weight"])
    return sizes


def _candidates(family: str, known: Mapping[str, Any], model: str | None, file_name: str | None) -> list[zoo.Entry]:
    """The published models that these weights can be: the named one, else that of the file name, else all that fit."""
    if model is not None:
        chosen = zoo.entry(model)
        same = {name: value for name, value in known.items() if name != "num_classes"}  # it may be fine-tuned
        if chosen.family != family or not zoo.agrees(chosen, same):
            fitting = [entry.name for entry in zoo.with_sizes(family, known)]
            which = f"these are the shapes of {_first(fitting)}" if fitting else f"this {family} model has other sizes"
            raise VarkdError(f"the weights are not those of {chosen.name}: {which}")
        return [chosen]
    fitting = zoo.with_sizes(family, known)
    return [entry for entry in fitting if entry.file == file_name] or fitting


def _open_fields(family: str, sizes: Mapping[str, Any]) -> list[str]:
    return [
        field.name
        for field in fields(family_class(family).config_class)
        if field.name not in sizes and field.default is MISSING and field.default_factory is MISSING
    ]


def _what_to_give(family: str, names: Sequence[str], candidates: Sequence[zoo.Entry]) -> str:
    flags = " and ".join(_FLAGS.get(name, name) for name in names)
    if candidates:
        either = " and ".join(candidate.name for candidate in candidates)
        return f"the weights do not tell {' and '.join(names)}: {either} have the same shapes; give --model or {flags}"
    return f"the weights do not tell {' and '.join(names)} of this {family} model: give {flags}"


def _on_meta(family: str, sizes: Mapping[str, Any]) -> Backbone:
    model_class: Any = family_class(family)
    with torch.device("meta"):
        return model_class(model_class.config_class(**sizes))


def _with_classes(weights: dict[str, Tensor], model: Backbone, num_classes: int, seed: int) -> str:
    """Replace the rows of the classes in `weights`; returns a note."""
    if num_classes < 1:
        raise VarkdError(f"--num-classes must be at least 1, got {num_classes}")
    name, first = model.class_rows(model.config)
    table, last = weights[name], first + model.num_classes
    std = float(table[first:last].std())
    rows = torch.randn(num_classes, table.shape[1], generator=torch.Generator().manual_seed(seed)) * std
    weights[name] = torch.cat([table[:first], rows, table[last:]])
    return (
        f"{model.num_classes} classes -> {num_classes}: rows of {name} drawn anew (std {std:.3g}, seed {seed}), "
        "the null label's row kept"
    )


def _is_extra(model: Backbone, name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in model.official_extras)


def _float32(value: Tensor) -> Tensor:
    """A copy of its own: official files are mapped from disk, and may share storage between tensors."""
    return value.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _hint(state: Mapping[str, Tensor], family: str) -> str:
    """What the tensors look like, where it is something else than what was asked for."""
    try:
        found = recognize(state)
    except VarkdError as error:
        return f": {error}"
    return f": they look like {found} (--family {found})" if found != family else ""


def _first(names: Sequence[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
