"""What every source of images comes down to: rows of encoded bytes with labels, in one or two splits."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from varkd.errors import VarkdError

VALIDATION_NAMES = ("validation", "val", "valid", "test")  # in the order of preference


@dataclass(frozen=True)
class ImageRows:
    """The labeled images of one split, still encoded. `name(i)` says where row i lies, for messages.

    `keys` name images that are files of their own (class and file name): who is held out follows from them, so that
    images which come or go move no other one to the other split. None: the rows of one fixed file.
    """

    encoded: Callable[[int], bytes]
    name: Callable[[int], str]
    label_N: NDArray[np.int64]
    keys: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.label_N)

    def key(self, row: int) -> str:
        """Names a row among the others, also in a record on disk."""
        return str(row) if self.keys is None else self.keys[row]

    def without(self, keys: Collection[str]) -> ImageRows:
        """The rows whose `key` is none of these."""
        left_N = np.array([row for row in range(len(self)) if self.key(row) not in set(keys)], dtype=np.int64)
        kept = None if self.keys is None else tuple(self.keys[row] for row in left_N)
        return ImageRows(
            lambda row: self.encoded(int(left_N[row])),
            lambda row: self.name(int(left_N[row])),
            self.label_N[left_N],
            kept,
        )


@dataclass(frozen=True)
class Source:
    """All rows of a source; `validation` is None where the source has no split of its own.

    `skipped` counts files by their endings that were not read as images.
    """

    train: ImageRows
    validation: ImageRows | None
    class_names: tuple[str, ...]
    skipped: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        name: str,
        train: ImageRows,
        validation: ImageRows | None,
        class_names: tuple[str, ...],
        skipped: Mapping[str, int] | None = None,
    ) -> Source:
        """Check the labels.

        Raises:
            VarkdError: no images, or a label that is negative or has no class name.
        """
        splits = {"train": train} if validation is None else {"train": train, "validation": validation}
        for split, rows in splits.items():
            if len(rows) == 0:
                raise VarkdError(f"no images in the {split} split of {name}: nothing to read")
        for rows in splits.values():
            wrong = np.flatnonzero((rows.label_N < 0) | (rows.label_N >= len(class_names)))
            if len(wrong):
                row = int(wrong[0])
                raise VarkdError(
                    f"label {rows.label_N[row]} of {rows.name(row)} is outside 0..{len(class_names) - 1} "
                    f"({len(class_names)} classes): repair the labels or the class names"
                )
        return cls(train, validation, class_names, skipped or {})
