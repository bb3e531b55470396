"""Which check belongs to which golden file, and that every tensor of the file is used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from varkd.errors import VarkdError
from varkd.files import read_json
from varkd.verify import arpg, llamagen, randar, rar, rules, tokenizers, var
from varkd.verify.golden import Check, Golden


def verify(path: str | Path) -> list[Check]:
    """All checks of one golden file.

    Raises:
        VarkdError: the file cannot be read or its family is unknown.
    """
    path = Path(path)
    info = read_json(path.with_suffix(".json"))
    family = info.get("family")
    if family in _WITHOUT_TENSORS:
        return list(_WITHOUT_TENSORS[family](info))
    if family not in _WITH_TENSORS:
        raise VarkdError(
            f"{path}: no check for the family '{family}'; known: {sorted({**_WITH_TENSORS, **_WITHOUT_TENSORS})}"
        )
    golden = Golden(path.with_suffix(".safetensors"))
    checks = list(_WITH_TENSORS[family](golden))
    unread = sorted(set(golden.tensors) - golden.used)
    return checks + [Check(f"{key}: in the file but not checked", float("inf"), False) for key in unread]


_WITH_TENSORS: dict[str, Callable[[Golden], Iterator[Check]]] = {
    "llamagen": llamagen.checks,
    "arpg": arpg.checks,
    "randar": randar.checks,
    "rar": rar.checks,
    "var": var.checks,
    "llamagen_vq": tokenizers.llamagen_vq,
    "var_vqvae": tokenizers.var_vqvae,
    "maskgit_vqgan": tokenizers.maskgit_vqgan,
    "filter": rules.filters,
}
_WITHOUT_TENSORS: dict[str, Callable[[dict[str, Any]], Iterator[Check]]] = {
    "schedule": rules.schedules,
    "shapes": rules.shapes,
}
