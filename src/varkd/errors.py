"""The one exception that users are meant to see.

Everything a user can put right (a path, a shape, a name, a full disk) is raised as `VarkdError` with one line that
says what is wrong and what to do. The command line prints that line and exits with 2; programming errors keep their
traceback.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class VarkdError(ValueError):
    """Something the caller can put right. `str(error)` is one line, whatever names from files stand in it."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))


_EXTRA_OF = {"datasets": "data", "matplotlib": "report", "jinja2": "report", "sklearn": "demo",
             "tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio",
             "mlflow": "mlflow", "ray": "ray", "torchao": "quantize", "gradio": "app",
             "huggingface_hub": "hub", "onnx": "onnx", "onnxscript": "onnx",
             "liger_kernel": "bench", "triton": "bench", "trl": "bench", "transformers": "bench"}  # fmt: skip


def missing_extra(error: ModuleNotFoundError) -> str | None:
    """What to install where an optional library is missing; None where it is none of ours."""
    library = (error.name or "").split(".")[0]
    extra = _EXTRA_OF.get(library)
    return extra and f"this needs {library}, which is not installed: pip install 'varkd[{extra}]'"


def check_seed(name: str, seed: int) -> None:
    """Raise `VarkdError` unless generators take `seed`: 64 bits with a sign."""
    if not -(2**63) <= seed < 2**63:
        raise VarkdError(f"{name}={seed} is too large: give a seed below {2**63}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint for an unknown `name`: the closest of `known`, else all of them."""
    known = sorted(known)
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"
