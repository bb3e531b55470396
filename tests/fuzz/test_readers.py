"""Damaged files end in one line: no crash, no hang. A short, seeded run of `readers.py`, which searches further."""

from __future__ import annotations

import random
import warnings
from pathlib import Path

import pytest
from readers import READERS, Reader, attempt, damaged

INPUTS = 60


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_damage_is_one_line(reader: Reader, tmp_path: Path):
    reader.make(tmp_path)
    good = (tmp_path / reader.path).read_bytes()
    assert attempt(reader, tmp_path, good) == reader.good
    chance = random.Random(reader.name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcomes = {attempt(reader, tmp_path, damaged(good, chance)) for _ in range(INPUTS)}
    # Simple pictures have no checksums: other pixels are pixels.
    assert "refused" in outcomes or reader.path.endswith((".gif", ".bmp", ".tif"))
