"""Sequences of text codes, to set images beside language: the texts that come with Python, in byte-pair codes.

The texts are the topics of `pydoc` (English and code, about 0.7 MB), which are on every machine that runs varkd.
Byte-pair encoding as in Sennrich et al. 2016 (1508.07909): the most frequent pair of neighboring symbols becomes a new
symbol until the vocabulary is full. A word keeps the space before it; pairs do not cross words.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from varkd.errors import VarkdError
from varkd.files import sha256_of
from varkd.world import Rng

_WORD = re.compile(r" ?\S+|\s+")
_LEARNT_FROM = 4000  # of the most frequent words; the rare ones change no merge that matters


@dataclass(frozen=True)
class Text:
    """Sequences of `length` codes: train and held-out ones come from different topics. `hash` names the codes."""

    symbols: tuple[str, ...]
    train_NL: Tensor
    validation_ML: Tensor

    @property
    def hash(self) -> str:
        parts = (self.train_NL, self.validation_ML)
        return sha256_of("\0".join(self.symbols).encode(), *(part.numpy().tobytes() for part in parts))

    def decode(self, codes_L: Tensor) -> str:
        return "".join(self.symbols[code] for code in codes_L.tolist())


def read_text(vocab_size: int = 384, length: int = 64, held_out: float = 0.1, seed: int = 0) -> Text:
    """The texts of `pydoc` in at most `vocab_size` byte-pair codes, cut into sequences without overlap.

    Raises:
        VarkdError: a vocabulary smaller than the alphabet, or sequences longer than the held-out text.
    """
    from pydoc_data.topics import topics

    # The texts hold a few typographic signs; one symbol stands for all of them.
    texts = [topic.encode("ascii", "replace").decode() for _, topic in sorted(topics.items())]
    shuffled = torch.randperm(len(texts), generator=Rng(seed).generator("text")).tolist()
    cut = max(1, int(held_out * len(texts)))
    parts = ["".join(texts[i] for i in sorted(chosen)) for chosen in (shuffled[cut:], shuffled[:cut])]
    symbols, merges = learn_pairs(Counter(_WORD.findall(parts[0])), vocab_size, set("".join(parts)))
    train, validation = (_sequences(encode(part, symbols, merges), length) for part in parts)
    if min(len(train), len(validation)) < 2:
        raise VarkdError(f"the texts hold fewer than two held-out sequences of {length} codes: take shorter ones")
    return Text(tuple(symbols), train, validation)


Pairs = list[tuple[str, str]]


def learn_pairs(words: Counter[str], vocab_size: int, alphabet: set[str]) -> tuple[list[str], Pairs]:
    """The symbols (the alphabet first) and the merges in the order in which they were learnt.

    Raises:
        VarkdError: the alphabet alone is larger than the vocabulary.
    """
    symbols, merges = sorted(alphabet), []
    if len(symbols) > vocab_size:
        raise VarkdError(f"the text has {len(symbols)} different characters: give at least so many codes")
    pieces = {word: tuple(word) for word, _ in words.most_common(_LEARNT_FROM)}
    while len(symbols) < vocab_size:
        counts: Counter[tuple[str, str]] = Counter()
        for word, parts in pieces.items():
            for pair in pairwise(parts):
                counts[pair] += words[word]
        if not counts:
            break
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        if "".join(best) not in symbols:  # two ways to make one symbol are two merges
            symbols.append("".join(best))
        pieces = {word: _merged(parts, best) for word, parts in pieces.items()}
    return symbols, merges


def encode(text: str, symbols: list[str], merges: Pairs) -> list[int]:
    """The codes of a text; every word is merged once."""
    code_of = {symbol: code for code, symbol in enumerate(symbols)}
    rank = {pair: place for place, pair in enumerate(merges)}
    known: dict[str, list[int]] = {}
    codes: list[int] = []
    for word in _WORD.findall(text):
        if word not in known:
            parts = tuple(word)
            while pairs := [pair for pair in pairwise(parts) if pair in rank]:
                parts = _merged(parts, min(pairs, key=rank.__getitem__))
            known[word] = [code_of[part] for part in parts]
        codes.extend(known[word])
    return codes


def _merged(parts: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    if pair[0] not in parts:
        return parts
    found, place = [], 0
    while place < len(parts):
        together = parts[place : place + 2] == pair
        found.append(parts[place] + parts[place + 1] if together else parts[place])
        place += 2 if together else 1
    return tuple(found)


def _sequences(codes: list[int], length: int) -> Tensor:
    whole = len(codes) // length
    return torch.tensor(codes[: whole * length], dtype=torch.long).view(whole, length)
