"""What the app computes: samples, continuations of an image, the training images nearest to a sample."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from varkd import pictures
from varkd.backbones.protocol import Backbone
from varkd.config import read_run
from varkd.data.codes import CodeDataset
from varkd.data.images import pixels_of
from varkd.errors import VarkdError
from varkd.evaluate.diagnostics import Sequences, completed
from varkd.rollout import Sampler
from varkd.run.data import pick_device
from varkd.run.models import load_trained, open_model
from varkd.run.panels import kept_mask, kept_positions
from varkd.sampling import generate_with_codes
from varkd.tokenizers.protocol import to_unit
from varkd.types import Condition
from varkd.world import Rng

_NEAREST_CHUNK = 65_536


@dataclass(frozen=True)
class Shown:
    """What one model made: uint8 images (N, H, W, C), its codes (N, L), seconds; or why it could not."""

    images_NHWC: NDArray[np.uint8] | None
    codes_NL: Tensor | None = None
    seconds: float = 0.0
    refusal: str | None = None


@dataclass(frozen=True)
class Candidate:
    """One model of the app."""

    name: str
    model: Backbone

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())


class Playground:
    """Models of the same codes, which draw with the same noise.

    Args:
        folders: run folders, or model folders beside at least one run folder (whose codes they are given).

    Raises:
        VarkdError: no run among them, or models of other codes.
    """

    def __init__(self, folders: Sequence[Path], device: str = "auto") -> None:
        runs = [folder for folder in folders if (folder / "run.yaml").is_file()]
        if not runs:
            raise VarkdError(f"{folders[0]} is not a run folder: give at least one, whose codes the models share")
        self.device = pick_device(device)
        run, self.codes, _ = load_trained(runs[0], "cpu")
        self.sampler: Sampler = run.evaluation.sampler
        names = _names(folders)
        self.candidates = [
            Candidate(name, open_model(folder, self.codes, device=str(self.device)).requires_grad_(False))
            for name, folder in zip(names, folders, strict=True)
        ]
        self.tokenizer = self.codes.tokenizer.to(self.device).eval()

    @property
    def class_names(self) -> list[str]:
        return self.codes.manifest["class_names"]

    def sample(self, label: int | None, num: int, seed: int, sampler: Sampler) -> list[Shown]:
        """`num` images of a class (None: of all classes in turn) by every model, with the same noise."""
        label_N = torch.arange(num) % len(self.class_names) if label is None else torch.full((num,), label)

        def draw(model: Backbone) -> tuple[Tensor, Tensor]:
            return generate_with_codes(model, self.tokenizer, label_N, sampler, seed, quiet=True)

        return [self._timed(candidate.model, draw) for candidate in self.candidates]

    def continued(
        self, image: Image.Image, label: int, share: float, num: int, seed: int, sampler: Sampler
    ) -> tuple[NDArray[np.uint8], list[Shown]]:
        """The image as its codes show it, and `num` continuations by every model of a `share` of these codes.

        Kept codes are tinted, but for next-scale models, whose codes have no place of their own.
        """
        channels, side, _ = self.codes.manifest["image_shape"]
        pixels_HWC = pixels_of(image, channels, side)
        image_BCHW = torch.from_numpy(pixels_HWC.copy()).permute(2, 0, 1).unsqueeze(0).to(self.device)
        codes_BL = self.tokenizer.encode(to_unit(image_BCHW))
        row_N = torch.arange(num, device=self.device)

        def complete(model: Backbone) -> tuple[Tensor, Tensor]:
            plan = sampler.plan(model, Rng(seed), row_N)
            like = Sequences(codes_BL.expand(num, -1), Condition(row_N * 0 + label), plan)
            kept_NL = kept_positions(plan, share)
            made = completed(model, like, kept_NL, sampler, seed)
            images = self.decoded(made.codes_BL)
            mask = kept_mask(kept_NL, self.codes.layout, images.shape)
            return torch.from_numpy(pictures.tinted(images, mask)).permute(0, 3, 1, 2), made.codes_BL.cpu()

        shown = [self._timed(candidate.model, complete) for candidate in self.candidates]
        return self.decoded(codes_BL)[0], shown

    def nearest(self, codes_L: Tensor, num: int = 8) -> tuple[NDArray[np.uint8], list[float]]:
        """The training images nearest to a sample, as their codes show them, and their distances.

        Distance: the root mean square over positions of the distance between codebook vectors; 0 is a copy.
        """
        codebook_VE = self.tokenizer.codebook_VE.float().cpu()
        distance_LV = torch.cdist(codebook_VE[codes_L], codebook_VE).square()
        data = self.training_codes
        found = []
        for begin in range(0, len(data), _NEAREST_CHUNK):
            index = np.arange(begin, min(begin + _NEAREST_CHUNK, len(data)))
            codes_NL = data.codes(index, np.zeros_like(index))
            found.append(distance_LV.expand(len(index), -1, -1).gather(2, codes_NL.unsqueeze(2)).squeeze(2).mean(1))
        best = torch.cat(found).topk(min(num, len(data)), largest=False)
        chosen = best.indices.numpy()
        images = self.decoded(data.codes(chosen, np.zeros_like(chosen)))
        return images, best.values.clamp_min(0).sqrt().tolist()

    @cached_property
    def training_codes(self) -> CodeDataset:
        return self.codes.split("train")

    def example(self, index: int) -> tuple[NDArray[np.uint8], int]:
        """An image of the validation split (as its codes show it) and its label; `index` wraps around."""
        data = self.codes.split("validation")
        chosen = np.array([index % len(data)])
        codes_BL = data.codes(chosen, np.zeros_like(chosen))
        return self.decoded(codes_BL)[0], int(data.labels[chosen[0]])

    def decoded(self, codes_NL: Tensor) -> NDArray[np.uint8]:
        """Images of codes: uint8 (N, H, W, C)."""
        return _nhwc(self._decoded(codes_NL.to(self.device)))

    def _timed(self, model: Backbone, run: Callable[[Backbone], tuple[Tensor, Tensor]]) -> Shown:
        """A model that cannot decode as asked says so in its own place; the others go on."""
        begun = time.perf_counter()
        try:
            images, codes_NL = run(model)
        except VarkdError as error:
            return Shown(None, refusal=str(error))
        return Shown(_nhwc(images), codes_NL, time.perf_counter() - begun)

    @torch.no_grad()
    def _decoded(self, codes_BL: Tensor) -> Tensor:
        return self.tokenizer.to_uint8(self.tokenizer.decode(codes_BL)).cpu()


def _names(folders: Sequence[Path]) -> list[str]:
    """What the models are called: the runs' own names, else folders, with as much of the path as tells them apart."""
    names = [read_run(folder).name if (folder / "run.yaml").is_file() else "" for folder in folders]
    names = [name or folder.resolve().name for name, folder in zip(names, folders, strict=True)]
    return [
        name if names.count(name) == 1 else "/".join(folder.resolve().parts[-2:])
        for name, folder in zip(names, folders, strict=True)
    ]


def _nhwc(images_BCHW: Tensor) -> NDArray[np.uint8]:
    return images_BCHW.permute(0, 2, 3, 1).contiguous().numpy()
