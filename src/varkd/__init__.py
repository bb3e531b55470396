"""varkd: compress visual autoregressive image models by knowledge distillation.

The names below are the public library; they load on first use, so that `import varkd` (and `varkd --help`) stays
instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from varkd.backbones.llamagen import LlamaGen, LlamaGenConfig
    from varkd.backbones.protocol import Backbone
    from varkd.backbones.store import save_backbone as save
    from varkd.data.codes import CodeDataset
    from varkd.data.images import ImageSet, open_images
    from varkd.data.loader import Loader
    from varkd.distill.loss import LossInputs, denominators, distill_loss
    from varkd.distill.method import Method, Term
    from varkd.distill.scene import Scene
    from varkd.errors import VarkdError
    from varkd.methods import METHODS
    from varkd.rollout import Sampler, rollout
    from varkd.run.models import load
    from varkd.run.official import export, load_official
    from varkd.tokenizers.store import load_tokenizer, save_tokenizer
    from varkd.types import Batch, Condition, Context, Part, Plan
    from varkd.world import Rng, World

_WHERE = {
    "backbones.llamagen": ("LlamaGen", "LlamaGenConfig"),
    "backbones.protocol": ("Backbone",),
    "data.codes": ("CodeDataset",),
    "data.images": ("ImageSet", "open_images"),
    "data.loader": ("Loader",),
    "distill.scene": ("Scene",),
    "distill.loss": ("LossInputs", "denominators", "distill_loss"),
    "distill.method": ("Method", "Term"),
    "errors": ("VarkdError",),
    "methods": ("METHODS",),
    "rollout": ("Sampler", "rollout"),
    "run.models": ("load",),
    "run.official": ("export", "load_official"),
    "tokenizers.store": ("load_tokenizer", "save_tokenizer"),
    "types": ("Batch", "Condition", "Context", "Part", "Plan"),
    "world": ("Rng", "World"),
}
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names}

__all__ = [
    "METHODS", "Backbone", "Batch", "CodeDataset", "Condition", "Context", "ImageSet", "LlamaGen", "LlamaGenConfig",
    "Loader", "LossInputs", "Method", "Part", "Plan", "Rng", "Sampler", "Scene", "Term", "VarkdError", "World",
    "denominators", "distill_loss", "export", "load", "load_official", "load_tokenizer", "open_images", "rollout",
    "save", "save_tokenizer",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "save":
        return import_module("varkd.backbones.store").save_backbone
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'varkd' has no attribute '{name}'")
    return getattr(import_module(f"varkd.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
