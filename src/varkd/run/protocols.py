"""How each family's official evaluation draws its 50,000 images, as values: labels, file order, seeds, pixels, sampler.

Read in the repositories' own scripts (docs/evaluation.md names them). What our sampler cannot repeat, the official
random number generators above all, stands in `departures`: numbers agree in distribution, not image by image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from varkd.backbones import zoo
from varkd.backbones.protocol import Backbone
from varkd.backbones.published import PUBLISHED, Published
from varkd.errors import VarkdError
from varkd.rollout import Sampler
from varkd.run.drawing import Drawing
from varkd.tokenizers.protocol import Tokenizer
from varkd.world import Rng

PUBLISHED_NUM = 50_000
RANKS = 8
"""The processes of the official scripts of ARPG and RAR, which their file order shows."""

Labels = Literal["random", "balanced", "balanced by rank"]


@dataclass(frozen=True)
class Family:
    """One family's evaluation.

    Attributes:
        labels: drawn uniformly; as many of each class, in a shuffled file; or those with the official order of eight
            ranks, each with a contiguous share of 0..K-1 repeated, whose images interleave.
        seed: the official one (ours where none is published).
        size: side that images are judged at; larger ones are resized before rounding, bicubic without antialiasing.
        settings: sampler values that hold for all models of the family where the zoo has none.
        departures: what the official script does that we do not.
    """

    script: str
    labels: Labels
    seed: int
    size: int | None
    settings: Mapping[str, Any]
    departures: tuple[str, ...] = ()


_NOISE = "images come from our counter-based noise, not from the official generators"
_LOW = "the official network runs in bfloat16, here in float32"
FAMILIES: dict[str, Family] = {
    "llamagen": Family(
        "autoregressive/sample/sample_c2i_ddp.py", "random", 0, 256, {"top_k": 0, "top_p": 1.0, "temperature": 1.0},
        (_NOISE, _LOW),
    ),
    "var": Family(
        "none is published: README and demo_sample.ipynb", "balanced", 0, None,
        {"guidance": 2.5, "top_k": 900, "top_p": 0.96, "temperature": 1.0},
        (_NOISE, "the demo runs under float16 autocast, here float32", "seed and file order are not published"),
    ),
    "randar": Family(
        "sample_c2i.py", "random", 0, 256, {"top_k": 0, "top_p": 1.0, "temperature": 1.0, "steps": 88}, (_NOISE, _LOW)
    ),
    "arpg": Family(
        "sample_c2i_ddp.py", "balanced by rank", 0, 256,
        {"top_k": 0, "top_p": 1.0, "temperature": 1.0, "steps": 64, "step_schedule": "cosine"},
        (_NOISE, _LOW, "one random order for each image, officially for each batch"),
    ),
    "rar": Family(
        "sample_imagenet_rar.py", "balanced by rank", 42, None, {"top_k": 0, "top_p": 1.0},
        (_NOISE, "TF32 is allowed officially, here it is not"),
    ),
}  # fmt: skip
OWN = Family("varkd's own", "balanced", 1234, None, {})
PROTOCOLS = (*FAMILIES, "own")


@dataclass(frozen=True)
class Plan:
    """A protocol applied to one model: what is drawn, and what a person should know before believing the number."""

    name: str
    family: Family
    model_name: str | None
    drawing: Drawing
    official: str | None
    published: Published | None

    def card(self) -> dict[str, Any]:
        """Every choice by name."""
        drawing = self.drawing
        published = None if self.published is None else vars(self.published)
        by_rank = self.family.labels == "balanced by rank"
        resize = f"bicubic to {drawing.resize}, no antialiasing, before rounding"
        return {
            "protocol": self.name,
            "model": self.model_name,
            "script": self.family.script,
            "official": self.official,
            "num": drawing.num,
            "labels": self.family.labels,
            "seed": drawing.seed,
            "sampler": vars(drawing.sampler),
            "resize": "none" if drawing.resize is None else resize,
            "uint8": pixel_rule(drawing.tokenizer),
            "file_order": f"interleaved by {RANKS} ranks" if by_rank else drawing.order,
            "published": published,
            "departures": list(self.family.departures),
        }


def plan(
    name: str,
    model: Backbone,
    tokenizer: Tokenizer,
    num: int = PUBLISHED_NUM,
    *,
    seed: int | None = None,
    batch_size: int = 250,
    changes: Mapping[str, Any] | None = None,
    own: Sampler | None = None,
) -> Plan:
    """The evaluation of `model` under a family's protocol (or "own": the run's sampler).

    A model of the zoo takes the published settings; another one (a student) the family's, with what these leave open
    (guidance, number of steps) from `own`.

    Args:
        changes: sampler values given by hand, which win.

    Raises:
        VarkdError: an unknown protocol, one of another family, or a guidance scale that nobody states.
    """
    if name not in PROTOCOLS:
        raise VarkdError(f"unknown protocol '{name}': known: {', '.join(PROTOCOLS)}")
    if name not in ("own", model.family):
        raise VarkdError(
            f"protocol '{name}' is for {name} models, this one is {model.family}: use --protocol {model.family}, or own"
        )
    family = OWN if name == "own" else FAMILIES[name]
    entry = zoo_entry(model, tokenizer)
    settings = dict(family.settings)
    official = None
    if name != "own" and entry is not None:
        settings |= {key: value for key, value in entry.sampling.items() if value is not None}
        official = entry.official
    settings |= changes or {}
    if name != "own" and "guidance" not in settings and (entry is not None or own is None):
        raise VarkdError(
            f"nobody states the guidance scale of {entry.name if entry else 'this model'}: give "
            "--guidance, or find it with --search-guidance"
        )
    chosen = replace(own or Sampler(), **settings)
    resize = family.size if family.size is not None and tokenizer.image_shape[1] > family.size else None
    own_seed = family.seed if seed is None else seed
    label_N = labels(family.labels, num, model.num_classes, own_seed)
    order: Literal["given", "shuffled"] = "shuffled" if family.labels == "balanced" else "given"
    drawing = Drawing(model, tokenizer, label_N, chosen, own_seed, batch_size, resize, order)
    published = PUBLISHED[entry.name] if entry is not None and name != "own" else None
    return Plan(name, family, entry.name if entry else None, drawing, official, published)


def zoo_entry(model: Backbone, tokenizer: Tokenizer) -> zoo.Entry | None:
    """The published model of these very sizes, classes, codes and resolution; None for any other."""
    config = vars(model.config)
    if model.num_classes != zoo.NUM_CLASSES:
        return None
    found = [
        known
        for known in zoo.with_sizes(model.family, config)
        if known.resolution == tokenizer.image_shape[1] and known.codes == model.sequence_length
    ]
    return found[0] if len(found) == 1 else None


def pixel_rule(tokenizer: Tokenizer) -> str:
    """How decoded numbers become uint8, in words: the tokenizer's official rule."""
    rounds = type(tokenizer).to_uint8 is Tokenizer.to_uint8
    return "clamp(127.5 x + 128), truncated" if rounds else "clamp(x), 255 (x + 1) / 2, truncated"


def labels(kind: Labels, num: int, num_classes: int, seed: int) -> Tensor:
    """Class labels int64 (N,), in the order of the file for "random" and "balanced by rank"."""
    if kind == "random":
        return torch.randint(num_classes, (num,), generator=Rng(seed).generator("labels"))
    if kind == "balanced":
        return torch.arange(num) % num_classes
    place_N = torch.arange(num)
    share = -(-num // RANKS)
    return (place_N % RANKS * share + place_N // RANKS) % num_classes


def format_card(plan: Plan) -> str:
    """The card as text, the published numbers last."""
    card = plan.card()
    published, departures = card.pop("published"), card.pop("departures")
    lines = []
    for name, value in card.items():
        shown = ", ".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, dict) else value
        lines.append(f"{name:<12}{'-' if shown is None else shown}")
    if published:
        names = {"fid": "FID", "inception_score": "IS", "precision": "P", "recall": "R", "paper_fid": "paper's FID"}
        values = [f"{short} {published[name]:g}" for name, short in names.items() if published[name] is not None]
        lines.append(f"{'published':<12}{', '.join(values)} ({published['source']})")
    else:
        lines.append(f"{'published':<12}nothing for this model")
    return "\n".join([*lines, *(f"{'departure':<12}{text}" for text in departures)])
