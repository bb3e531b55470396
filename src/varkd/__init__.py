"""varkd: compress visual autoregressive image models by knowledge distillation.

The names below are the public library; they load on first use, so that `import varkd` (and `varkd --help`) stays
instant. `varkd.parts` holds what methods are made of, `varkd.divergences` the divergences on plain logits.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from varkd.version import VERSION as __version__

if TYPE_CHECKING:
    from varkd import divergences, metrics, parts
    from varkd.backbones.arpg import ARPG, ARPGConfig
    from varkd.backbones.llamagen import LlamaGen, LlamaGenConfig
    from varkd.backbones.protocol import Backbone
    from varkd.backbones.randar import RandAR, RandARConfig
    from varkd.backbones.rar import RAR, RARConfig
    from varkd.backbones.store import build
    from varkd.backbones.var import VAR, VARConfig
    from varkd.data.codes import CodeDataset
    from varkd.data.images import ImageSet, open_images
    from varkd.data.loader import DataLoader
    from varkd.distill.method import Method, Term
    from varkd.distill.teachers import CachedTeacher, load_teacher_cache
    from varkd.errors import VarkdError
    from varkd.methods import METHODS
    from varkd.rollout import Sampler
    from varkd.run.data import encode
    from varkd.run.models import load
    from varkd.run.official import export, load_official
    from varkd.run.publish import publish
    from varkd.run.shrinking import shrink
    from varkd.run.teacher_samples import teach_samples
    from varkd.run.teaching import teach
    from varkd.sampling import generate
    from varkd.tokenizers.protocol import Tokenizer
    from varkd.tokenizers.store import load_tokenizer, save_tokenizer
    from varkd.train.distiller import Distiller
    from varkd.types import Batch, Condition, Plan
    from varkd.world import Rng, World

_MODULE_OF = {
    "ARPG": "backbones.arpg", "ARPGConfig": "backbones.arpg", "Backbone": "backbones.protocol", "Batch": "types",
    "CachedTeacher": "distill.teachers", "CodeDataset": "data.codes", "Condition": "types",
    "DataLoader": "data.loader", "Distiller": "train.distiller",
    "ImageSet": "data.images", "LlamaGen": "backbones.llamagen", "LlamaGenConfig": "backbones.llamagen",
    "METHODS": "methods", "Method": "distill.method", "Plan": "types", "RAR": "backbones.rar",
    "RARConfig": "backbones.rar", "RandAR": "backbones.randar", "RandARConfig": "backbones.randar", "Rng": "world",
    "Sampler": "rollout", "Term": "distill.method", "Tokenizer": "tokenizers.protocol",
    "VAR": "backbones.var", "VARConfig": "backbones.var",
    "VarkdError": "errors", "World": "world", "build": "backbones.store", "encode": "run.data",
    "export": "run.official", "generate": "sampling", "load": "run.models", "load_official": "run.official",
    "load_teacher_cache": "distill.teachers", "load_tokenizer": "tokenizers.store",
    "open_images": "data.images", "publish": "run.publish", "save_tokenizer": "tokenizers.store",
    "shrink": "run.shrinking", "teach": "run.teaching", "teach_samples": "run.teacher_samples",
}  # fmt: skip
_MODULES = ("divergences", "metrics", "parts")

__all__ = [
    "ARPG", "METHODS", "RAR", "VAR", "ARPGConfig", "Backbone", "Batch", "CachedTeacher", "CodeDataset", "Condition",
    "DataLoader", "Distiller", "ImageSet", "LlamaGen", "LlamaGenConfig", "Method", "Plan", "RARConfig", "RandAR",
    "RandARConfig", "Rng", "Sampler", "Term", "Tokenizer", "VARConfig", "VarkdError", "World", "__version__", "build",
    "divergences", "encode", "export", "generate", "load", "load_official", "load_teacher_cache", "load_tokenizer",
    "metrics", "open_images", "parts", "publish", "save_tokenizer", "shrink", "teach", "teach_samples",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"varkd.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'varkd' has no attribute '{name}'")
    return getattr(import_module(f"varkd.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
