"""Which class of a model is which class of the data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from varkd.data.classes import match_classes, read_class_map
from varkd.errors import VarkdError

ANIMALS = ("ant", "bee", "cat", "dog", "eel")
NUMBERS = tuple("01234")


@pytest.mark.parametrize(
    ("known", "num_known", "names", "class_map", "index"),
    [
        (ANIMALS, 5, ANIMALS, None, None),
        (ANIMALS, 5, ("dog", "bee"), None, [3, 1]),
        (ANIMALS, 5, ANIMALS[::-1], None, [4, 3, 2, 1, 0]),
        (ANIMALS, 5, ("dog", "bee"), [0, 2], [3, 1]),  # a name is surer than a number
        (ANIMALS, 5, ("yak", "gnu"), [0, 2], [0, 2]),
        (None, 5, ("yak", "gnu"), [4, 2], [4, 2]),
        (None, 2, ("yak", "gnu"), [0, 1], None),
        (None, 5, ANIMALS, None, None),  # an older or official model that tells nothing
        (NUMBERS, 5, NUMBERS, None, None),
        (NUMBERS, 5, ("0", "1", "3", "2", "4"), None, [0, 1, 3, 2, 4]),
        (NUMBERS, 5, ANIMALS, None, None),  # a data set without names: nothing to compare
    ],
)
def test_matching(known, num_known: int, names, class_map, index):
    assert match_classes(known, num_known, names, class_map) == index


@pytest.mark.parametrize(
    ("known", "num_known", "names", "class_map", "said"),
    [
        (ANIMALS, 5, ("yak", "gnu"), None, "knows no 'yak'"),
        (ANIMALS, 5, ("ant", "bee", "cat", "dog", "gnu"), None, "knows no 'gnu'"),
        (NUMBERS, 5, ("0", "1"), None, "5 classes, the data 2"),  # the first two of what?
        (None, 5, ("0", "1"), None, "--class-map"),
        (None, 5, ("yak", "gnu"), [1, 5], "class 5"),
    ],
)
def test_what_cannot_be_matched(known, num_known: int, names, class_map, said: str):
    with pytest.raises(VarkdError, match=said):
        match_classes(known, num_known, names, class_map)


FORMS = {
    "numbers.json": json.dumps({"tabby cat": 2, "dog": 3, "ant": 0}),
    "index.json": json.dumps({str(i): [f"n0000000{i}", n] for i, n in enumerate(("ant", "bee", "tabby cat", "dog"))}),
    "list.json": json.dumps(["ant", "bee", ["tabby cat", "tabby"], "dog"]),
    "synsets.txt": "n0 ant\nn1 bee, honeybee\nn2 tabby, tabby cat\nn3 dog\n",
    "names.txt": "ant\nbee\ntabby cat\ndog\n",
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_a_class_map(tmp_path: Path, form: str):
    (tmp_path / form).write_text(FORMS[form])
    assert read_class_map(tmp_path / form, ["Dog", "tabby_cat"]) == [3, 2]


def test_wordnet_ids(tmp_path: Path):
    (tmp_path / "synsets.txt").write_text(FORMS["synsets.txt"])
    assert read_class_map(tmp_path / "synsets.txt", ["n3", "n1"]) == [3, 1]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"dog": 3}', "does not name 1 of 2 classes, 'tabby cat' first"),
        ('{"dog": 3, "tabby cat": 3}', "the same number 3"),
        ('{"dog": -1, "tabby cat": 3}', "negative"),
        ("{", "no class map"),
        ("3", "no class map"),
        ('{"dog": "x", "tabby cat": {}}', "no class map"),
        ("[1, 2]", "no class map"),
        (None, "no such file"),
        (b"\xff\xfe", "is no text"),
    ],
)
def test_what_is_no_class_map(tmp_path: Path, content: str | bytes | None, said: str):
    path = tmp_path / "map.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(VarkdError, match=said) as caught:
        read_class_map(path, ["dog", "tabby cat"])
    assert "\n" not in str(caught.value)
