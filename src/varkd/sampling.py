"""From labels to images: rollouts in batches, decoded by the tokenizer. The one place where images are generated."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from varkd.backbones.protocol import Backbone
from varkd.errors import VarkdError
from varkd.progress import bar
from varkd.rollout import Sampler, rollout
from varkd.tokenizers.protocol import Tokenizer
from varkd.types import Condition
from varkd.world import Rng


def generate(
    model: Backbone,
    tokenizer: Tokenizer,
    labels: Sequence[int] | Tensor,
    sampler: Sampler | None = None,
    seed: int = 0,
    batch_size: int = 250,
) -> Tensor:
    """Generate one image per label.

    Image i depends on (seed, i, label, model, sampler) only, so models that are compared share their noise.

    Args:
        labels: class indices; `model.null_label` samples without a class.
        sampler: temperature, filters, guidance; plain sampling by default.

    Returns:
        uint8 (N, C, H, W) on the CPU.

    Raises:
        VarkdError: a label that the model does not have, or codes of another tokenizer.
    """
    label_B = torch.as_tensor(labels, dtype=torch.long).flatten().cpu()
    if len(label_B) == 0 or int(label_B.min()) < 0 or int(label_B.max()) > model.null_label:
        raise VarkdError(f"generate: give at least one label, each in 0..{model.null_label}")
    if model.tokenizer_hash is not None and model.tokenizer_hash != tokenizer.hash:
        raise VarkdError(
            f"this model speaks the codes of tokenizer {model.tokenizer_hash[:12]}, "
            f"not of {tokenizer.hash[:12]}: pass the tokenizer that it was trained with"
        )
    return generate_with_codes(model, tokenizer, label_B, sampler or Sampler(), seed, batch_size, quiet=True)[0]


@torch.no_grad()
def generate_with_codes(
    model: Backbone,
    tokenizer: Tokenizer,
    label_B: Tensor,
    sampler: Sampler,
    seed: int,
    batch_size: int = 250,
    label: str = "sample",
    quiet: bool = False,
    first_row: int = 0,
    resize: int | None = None,
) -> tuple[Tensor, Tensor]:
    """As `generate`: the images, and their codes int64 (N, L), both on the CPU.

    Args:
        first_row: the index of the first image among all that are drawn, which its noise depends on.
        resize: side that decoded images are resized to before they become uint8: bicubic without antialiasing, as
            LlamaGen's evaluation takes 384 pixels to 256.
    """
    tokenizer = tokenizer.to(model.device).eval()
    images, codes = [], []
    with bar(label, len(label_B), quiet) as running:
        for begin in range(0, len(label_B), batch_size):
            end = min(begin + batch_size, len(label_B))
            codes_BL = sample_codes(model, label_B[begin:end], sampler, seed, first_row + begin)
            decoded = tokenizer.decode(codes_BL)
            if resize is not None and resize != decoded.shape[-1]:
                decoded = F.interpolate(decoded, (resize, resize), mode="bicubic")
            images.append(tokenizer.to_uint8(decoded).cpu())
            codes.append(codes_BL.cpu())
            running.update(end)
    return torch.cat(images), torch.cat(codes)


@torch.no_grad()
def sample_codes(model: Backbone, label_B: Tensor, sampler: Sampler, seed: int, first_row: int = 0) -> Tensor:
    """One batch of codes, int64 (B, L), on the model's device; `first_row` as in `generate_with_codes`."""
    device, rng = model.device, Rng(seed)
    row_B = torch.arange(first_row, first_row + len(label_B), device=device)
    plan = sampler.plan(model, rng, row_B)
    uniform_BL = rng.uniform("sample", row_B, plan.order_BL.shape[1])
    return rollout(model, Condition(label_B.to(device)), plan, sampler, uniform_BL).codes_BL
