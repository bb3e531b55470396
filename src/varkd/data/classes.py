"""Which class of a model is which class of the data: by name, or by a file that says so.

A model knows the names of the classes that it was trained on. A model of more classes (ImageNet's thousand) can teach a
data set of some of them; official files hold no names, so there a file has to say who is who (`--class-map`):

    a JSON object    {"tabby cat": 281, ...}, or {"281": ["n02123045", "tabby"], ...} (imagenet_class_index.json)
    a JSON list      the model's names in the order of their numbers, each a text or a list of synonyms
    lines of text    in the order of their numbers: a WordNet id or name, then (after a space) names between commas
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from varkd.errors import VarkdError, did_you_mean
from varkd.files import read_errors


def are_numbers(names: Sequence[str]) -> bool:
    """Whether the names are "0", "1", ..: numbers of a data set that has no names say nothing of its classes."""
    return list(names) == [str(number) for number in range(len(names))]


def match_classes(
    known: Sequence[str] | None, num_known: int, names: Sequence[str], class_map: Sequence[int] | None
) -> list[int] | None:
    """For each class of the data its number in a model of `num_known` classes; None where they are the same.

    Args:
        known: the model's class names, None where it does not tell.
        names: the data's class names.
        class_map: the model's numbers of the data's classes (`read_class_map`), for a model without these names.

    Raises:
        VarkdError: nothing tells which class is which.
    """
    named = known is not None and not (are_numbers(known) and are_numbers(names))
    if known is not None and list(known) == list(names):
        return None
    if known is not None and named and set(names) <= set(known):
        return [list(known).index(name) for name in names]
    if class_map is not None:
        if max(class_map) >= num_known:
            raise VarkdError(
                f"the class map names class {max(class_map)}, but this model has {num_known} classes: "
                "encode with the --class-map of this model"
            )
        return None if list(class_map) == list(range(num_known)) else list(class_map)
    if num_known == len(names) and (known is None or are_numbers(known) or are_numbers(names)):
        return None
    missing = "" if known is None or not named else f" (it knows no '{next(n for n in names if n not in known)}')"
    raise VarkdError(
        f"this model has {num_known} classes{missing}, the data {len(names)} ({', '.join(names[:3])}): "
        "say which is which by `varkd encode --class-map FILE`"
    )


def read_class_map(path: Path, names: Sequence[str]) -> list[int]:
    """The model's number of every class of the data, by a file (its forms stand above).

    Raises:
        VarkdError: no such file, none of these forms, a class that it does not name, or one number for two classes.
    """
    number_of: dict[str, int] = {}
    for number, synonyms in _entries(path):
        for name in synonyms:
            number_of.setdefault(_plain(name), number)
    missing = [name for name in names if _plain(name) not in number_of]
    if missing:
        raise VarkdError(
            f"{path} does not name {len(missing)} of {len(names)} classes, '{missing[0]}' first: "
            f"{did_you_mean(_plain(missing[0]), list(number_of)[:2000])}"
        )
    numbers = [number_of[_plain(name)] for name in names]
    for name, number in zip(names, numbers, strict=True):
        if numbers.count(number) > 1:
            raise VarkdError(f"{path} gives '{name}' and another class the same number {number}: tell them apart")
    return numbers


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", " ")


def _entries(path: Path) -> list[tuple[int, list[str]]]:
    """(number, names) of every class in the file."""
    with read_errors(path, "is no text: give a JSON or text file of class names"):
        text = path.read_text(encoding="utf-8")
    if path.suffix != ".json":
        return [(number, _words(line)) for number, line in enumerate(filter(None, map(str.strip, text.splitlines())))]
    try:
        content: Any = json.loads(text)
        if isinstance(content, list):
            return [(number, _texts(value)) for number, value in enumerate(content)]
        by_name = all(isinstance(value, int) for value in content.values())
        entries = [(value, [name]) if by_name else (int(name), _texts(value)) for name, value in content.items()]
    except (ValueError, TypeError, AttributeError) as error:
        raise VarkdError(f"{path} is no class map ({error}): give names and numbers, see docs/data.md") from None
    if any(number < 0 for number, _ in entries):
        raise VarkdError(f"{path} holds a negative class number: classes count from 0")
    return entries


def _words(line: str) -> list[str]:
    first, _, rest = line.partition(" ")
    return [line, first, *rest.split(",")]


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value, *value.split(",")]
    if isinstance(value, Iterable) and all(isinstance(item, str) for item in value):
        return list(value)
    raise TypeError(f"{value!r} is no name")
