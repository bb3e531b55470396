"""torch.compile for the transformer blocks, where the machine can."""

from __future__ import annotations

import torch

from varkd.backbones.protocol import Backbone
from varkd.progress import console


def compile_blocks(*models: Backbone | None, backend: str = "inductor") -> bool:
    """Let the blocks of each model be compiled at their first forward pass; a model has one kind of block or two.

    Returns whether torch.compile works here.

    Where torch.compile does not work (no C++ compiler, no Triton), one line says why and everything runs as before.
    """
    reason = _obstacle(backend)
    if reason:
        console.print(f"note: train.compile has no effect, torch.compile does not work here: {reason}", markup=False)
        return False
    for model in models:
        for block in [] if model is None else model.transformer_blocks:
            block.compile(backend=backend)
    return True


def _obstacle(backend: str) -> str | None:
    """Why a trivial function cannot be compiled here, in one line; None where it can."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.compile(lambda x: x.sin() + 1, backend=backend)(torch.ones(8, device=device))
    except Exception as error:  # whatever compilers raise
        return str(error).strip().split("\n")[0] or type(error).__name__
    return None
