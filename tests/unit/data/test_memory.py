"""Images in memory: lists, PyTorch data sets and `datasets`, through the same path as files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

import varkd
from varkd.data.images import open_images
from varkd.errors import VarkdError

PIXELS_NHW = np.random.default_rng(0).integers(0, 17, (24, 8, 8)).astype(np.uint8) * 15
LABELS = [row % 3 for row in range(24)]


class Items(torch.utils.data.Dataset):
    classes = ("a", "b", "c")

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(PIXELS_NHW[index]), LABELS[index]


def table() -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    pictures = [Image.fromarray(pixels) for pixels in PIXELS_NHW]
    return datasets.Dataset.from_dict({"image": pictures, "label": LABELS}, features=features)


FORMS: dict[str, Any] = {
    "list": lambda: [(pixels, label) for pixels, label in zip(PIXELS_NHW, LABELS, strict=True)],
    "channels": lambda: [(pixels[:, :, None], label) for pixels, label in zip(PIXELS_NHW, LABELS, strict=True)],
    "torch": Items,
    "datasets": table,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_images(form: str):
    images = FORMS[form]()
    found = []
    for split in ("train", "validation"):
        opened = open_images(images, split, validation=0.25)
        assert opened.image_shape == (1, 8, 8) and len(opened.class_names) == 3
        if form in ("torch", "datasets"):
            assert opened.class_names == ("a", "b", "c")
        found += [(label, pixels[0].numpy().tobytes()) for label, pixels in
                  zip(opened.labels.tolist(), opened.batch(range(len(opened))), strict=True)]  # fmt: skip
    assert sorted(found) == sorted((label, pixels.tobytes()) for label, pixels in zip(LABELS, PIXELS_NHW, strict=True))


def test_images_in_memory_become_codes_that_train(tmp_path: Path):
    manifest = varkd.encode(Items(), "pixels", tmp_path / "codes", quiet=True, device="cpu")
    assert manifest["source"]["name"] == "24 images in memory (Items)" and manifest["class_names"] == ["a", "b", "c"]
    codes = varkd.CodeDataset(tmp_path / "codes")
    assert codes.num_classes == 3 and len(codes) == 22
    again = varkd.encode(Items(), "pixels", tmp_path / "codes", quiet=True, device="cpu")
    assert again == manifest


@pytest.mark.parametrize(("images", "words"), [
    ([], "there is nothing to read"),
    ([(PIXELS_NHW[0].astype(float), 0)] * 2, r"image \d of .* is float64 \(8, 8\): give a PIL image, or uint8"),
    ([PIXELS_NHW[0]] * 2, "give \\(image, label\\) items"),
    ([(PIXELS_NHW[0], "cat")] * 2, "labels that are numbers from 0"),
    ([{"picture": PIXELS_NHW[0], "label": 0}] * 2, "its columns are picture, label"),
    ([(PIXELS_NHW[0], -1)] * 2, "label -1 of image 0"),
])  # fmt: skip
def test_what_is_no_source_is_refused(images: Any, words: str):
    with pytest.raises(VarkdError, match=words):
        open_images(images, "train").batch([0])
