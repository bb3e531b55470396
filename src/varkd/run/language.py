"""A teacher and a student of text, trained here by the same loop as every image model: what images are set beside.

A LlamaGen on a grid of one row and one class is a plain language model, so that tokens, divergences and contexts are
the same objects for both. The pair is kept in its folder: a second analysis finds it, an interrupted one resumes.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from varkd.backbones.protocol import Backbone
from varkd.backbones.store import build, load_backbone
from varkd.config import ModelConfig
from varkd.data.text import Text, read_text
from varkd.evaluate.agreement import cross_entropy
from varkd.files import read_json, write_json
from varkd.train.distiller import Distiller
from varkd.train.loop import Job, TrainConfig, train
from varkd.train.optim import OptimizerConfig
from varkd.types import Batch
from varkd.world import Rng

_HELD_OUT = 128  # sequences that the loop looks at


def _train() -> TrainConfig:
    optim = OptimizerConfig(lr=4e-3, warmup=20, ema=0.97)
    return TrainConfig(updates=900, batch_size=16, label_drop=0.0, validate_every=100, checkpoint_every=300,
                 tensorboard=False, optim=optim)  # fmt: skip


@dataclass(frozen=True)
class Language:
    """Sizes of the pair: by default about one or two minutes on a CPU."""

    vocab_size: int = 384
    length: int = 64
    teacher: ModelConfig = ModelConfig(num_layers=4, dim=96, num_heads=4, ffn_dim=256)
    student: ModelConfig = ModelConfig(num_layers=2, dim=40, num_heads=2, ffn_dim=104)
    train: TrainConfig = field(default_factory=_train)
    seed: int = 0

    @classmethod
    def of(cls, updates: int) -> Language:
        """The default pair, trained for so many updates."""
        return cls(train=replace(_train(), updates=updates))


@dataclass(frozen=True)
class TextBatches:
    """Random training sequences as a function of the step."""

    codes_NL: Tensor
    batch_size: int
    seed: int

    def batch(self, step: int) -> Batch:
        generator = Rng(self.seed, step).generator("text")
        index_B = torch.randint(len(self.codes_NL), (self.batch_size,), generator=generator)
        return text_batch(self.codes_NL[index_B])


def text_batch(codes_BL: Tensor) -> Batch:
    """Sequences of the one class."""
    return Batch(codes_BL, torch.zeros(len(codes_BL), dtype=torch.long), torch.arange(len(codes_BL)))


@dataclass(frozen=True)
class Pair:
    """The trained pair and the text that it was trained on."""

    teacher: Backbone
    student: Backbone
    text: Text


def language_pair(folder: Path, settings: Language, device: torch.device, quiet: bool = False) -> Pair:
    """Read the pair from `folder`, or train it there; a pair of other settings is replaced."""
    text = read_text(settings.vocab_size, settings.length, seed=settings.seed)
    wanted = json.loads(json.dumps({"text": text.hash, **asdict(settings)}))
    path = folder / "settings.json"
    if path.is_file() and read_json(path) != wanted:
        for name in ("teacher", "student"):
            shutil.rmtree(folder / name, ignore_errors=True)
    write_json(path, wanted)
    teacher = _trained(folder / "teacher", "ce", settings.teacher, None, text, settings, device, quiet)
    student = _trained(folder / "student", "kd", settings.student, teacher, text, settings, device, quiet)
    return Pair(teacher, student, text)


def _trained(
    folder: Path, method: str, sizes: ModelConfig, teacher: Backbone | None, text: Text, settings: Language,
    device: torch.device, quiet: bool,
) -> Backbone:  # fmt: skip
    if not _is_done(folder):
        shape = {"vocab_size": len(text.symbols), "num_classes": 1, "grid": (1, settings.length)}
        chosen = {name: getattr(sizes, name) for name in ("num_layers", "dim", "num_heads", "ffn_dim")}
        new = lambda: build(sizes.family, {**shape, **chosen}, seed=settings.seed).to(device)
        student = new()
        student.tokenizer_hash = text.hash
        write_json(folder / "config.json", student.describe())
        held_out = text_batch(text.validation_ML[:_HELD_OUT])
        batches = TextBatches(text.train_NL, settings.train.batch_size, settings.seed)
        label = f"language {folder.name}"
        distiller = Distiller(method, student, teacher, updates=settings.train.updates, seed=settings.seed,
                              label_drop=settings.train.label_drop, codebook_tables={})  # fmt: skip
        validate = lambda model: {"ce": cross_entropy(model, [held_out], device)}
        train(Job(distiller, batches, settings.train, folder, new, validate, label=label, quiet=quiet))
    return load_backbone(folder, str(device))[0].requires_grad_(False)


def _is_done(folder: Path) -> bool:
    return (folder / "status.json").is_file() and read_json(folder / "status.json")["state"] == "done"
