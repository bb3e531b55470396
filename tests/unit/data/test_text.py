"""Byte-pair codes of the texts that come with Python."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from varkd.data.text import encode, learn_pairs, read_text
from varkd.errors import VarkdError


def test_the_most_frequent_pair_is_merged_first():
    symbols, merges = learn_pairs(Counter({"abab": 3, "abc": 2, "cc": 1}), 5, set("abc"))
    assert merges == [("a", "b"), ("ab", "ab")] and symbols == ["a", "b", "c", "ab", "abab"]


def test_codes_spell_the_text():
    text = "the cat\n   sat on the   mat, the end.\n"
    symbols, merges = learn_pairs(Counter(text.split(" ")), 30, set(text))
    codes = encode(text, symbols, merges)
    assert "".join(symbols[code] for code in codes) == text and len(codes) < len(text)


def test_merging_stops_when_nothing_is_left():
    symbols, merges = learn_pairs(Counter({"ab": 1}), 100, set("ab"))
    assert symbols == ["a", "b", "ab"] and len(merges) == 1


def test_the_texts_of_python():
    text = read_text(vocab_size=110, length=32)
    assert len(text.symbols) == 110 and text.train_NL.shape[1] == text.validation_ML.shape[1] == 32
    assert len(text.train_NL) > 4 * len(text.validation_ML) > 100
    assert int(text.train_NL.max()) < 110 and int(text.train_NL.min()) >= 0
    assert "the" in text.decode(text.train_NL[:20].flatten())
    again = read_text(vocab_size=110, length=32)
    assert again.hash == text.hash and torch.equal(again.train_NL, text.train_NL)
    assert read_text(vocab_size=110, length=32, seed=1).hash != text.hash


@pytest.mark.parametrize(("options", "words"), [({"vocab_size": 20}, "characters"), ({"length": 10**6}, "shorter")])
def test_what_cannot_be(options: dict, words: str):
    with pytest.raises(VarkdError, match=words):
        read_text(**{"vocab_size": 110, **options})
