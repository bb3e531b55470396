"""Class-conditional images from an autoregressive model of image codes, for `DiffusionPipeline.from_pretrained`.

    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    images = pipe(class_labels=[0, 1, 2], seed=0).images

Beside this file lie `model/` (a transformer that predicts codes step by step, with a KV cache) and `tokenizer/` (codes
to images). This file draws the codes. Every code costs one uniform number, pushed through the inverse CDF, and the
numbers of image i are a function of (seed, i): the same seed gives the same codes as `varkd.generate`, which this file
does without.

    B images   L codes of an image   n codes of one decoding step   V codes in the codebook
"""

# pyright: reportPrivateImportUsage=false, reportIncompatibleMethodOverride=false

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput  # pyright: ignore[reportMissingImports]
from PIL import Image
from torch import Tensor

SAMPLER: dict[str, Any] = {
    "temperature": 1.0, "top_k": 0, "top_p": 1.0, "guidance": 1.0, "guidance_schedule": "family",
    "guidance_interval": -1, "guidance_start": 1.0, "guidance_power": 1.0, "steps": None, "step_schedule": None,
}  # fmt: skip


class AutoregressivePipeline(DiffusionPipeline):
    """Labels -> codes -> images.

    Args:
        model, tokenizer: the modules in the folders of those names.
        id2label: class names by label.
        sampler: the settings (`SAMPLER`) that calls start from: those behind the published samples.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: torch.nn.Module,
        id2label: dict[str, str] | None = None,
        sampler: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(model=model, tokenizer=tokenizer)
        self.register_to_config(id2label=id2label, sampler=sampler)
        self.label_of = {name: int(label) for label, name in (id2label or {}).items()}
        self.sampler = {**SAMPLER, **(sampler or {})}

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str],
        guidance_scale: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        num_inference_steps: int | None = None,
        seed: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        batch_size: int = 250,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Generate one image per label.

        Args:
            class_labels: labels or class names; the label behind the last class samples without a class.
            guidance_scale: largest scale s of null + s (cond - null); 1 is off. It moves along the family's schedule.
            temperature, top_k, top_p: 0 is greedy; 0 and 1 keep every code.
            num_inference_steps: decode in parallel in so many steps, where the model can.
            seed: what image i depends on, besides its label and i. Without one it is drawn from `generator` (one of
                your own, or one for every image), else from PyTorch's global generator.
            batch_size: images decoded at a time.
            output_type: "pil", "np" (float32 (B, H, W, C) in [0, 1]), "pt" (float32 (B, C, H, W) in [0, 1]), or
                "latent" for the codes, int64 (B, L).
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type must be pil, np, pt or latent, got {output_type!r}")
        labels = self._labels([class_labels] if isinstance(class_labels, int | str) else class_labels)
        given = {
            "guidance": guidance_scale,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "steps": num_inference_steps,
        }
        sampler = {**self.sampler, **{name: value for name, value in given.items() if value is not None}}
        noise, found = _noise(seed, generator, len(labels)), []
        for begin in range(0, len(labels), batch_size):
            part = slice(begin, begin + batch_size)
            label_B = torch.tensor(labels[part], device=self.model.device)
            codes_BL = sample_codes(self.model, label_B, noise[part], sampler, self.progress_bar)
            found.append(codes_BL if output_type == "latent" else self._decode(codes_BL, output_type))
        images: Any = torch.cat(found) if output_type != "pil" else [image for batch in found for image in batch]
        if output_type == "np":
            images = images.permute(0, 2, 3, 1).cpu().numpy()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def save_pretrained(self, save_directory: Any, **unused: Any) -> None:
        """Refuse: diffusers would leave out the models, whose code lies in files of this folder."""
        raise ValueError(
            f"nothing written to {save_directory}: copy the folder or repository that this was loaded from"
        )

    def _labels(self, asked: Sequence[int | str]) -> list[int]:
        unknown = [name for name in asked if isinstance(name, str) and name not in self.label_of]
        if unknown:
            raise ValueError(f"no class {unknown[0]!r}; this model knows {', '.join(self.label_of) or 'no names'}")
        labels = [self.label_of[label] if isinstance(label, str) else int(label) for label in asked]
        if not labels or min(labels) < 0 or max(labels) > self.model.null_label:
            raise ValueError(f"give at least one label, each in 0..{self.model.null_label}")
        return labels

    def _decode(self, codes_BL: Tensor, output_type: str) -> Any:
        images_BCHW = self.tokenizer.decode(codes_BL)
        if output_type != "pil":
            return (images_BCHW.float() / 2 + 0.5).clamp(0, 1)
        arrays = self.tokenizer.to_uint8(images_BCHW).permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(array.squeeze(2) if array.shape[2] == 1 else array) for array in arrays]


def _noise(seed: int | None, generator: Any, num: int) -> list[tuple[int, int]]:
    """The (seed, row) that each image draws from."""
    if seed is None and isinstance(generator, Sequence):
        if len(generator) != num:
            raise ValueError(f"{num} labels, but {len(generator)} generators: give one, or one for every label")
        return [(_draw_seed(each), 0) for each in generator]
    seed = _draw_seed(generator) if seed is None else seed
    return [(seed, row) for row in range(num)]


def _draw_seed(generator: torch.Generator | None) -> int:
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**62, (1,), generator=generator, device=device))


def uniform(noise: Sequence[tuple[int, int]], stream: str, length: int) -> Tensor:
    """Numbers in [0, 1), float32 (B, length): a function of the stream's name and each image's (seed, row)."""

    def generator(seed: int, row: int) -> torch.Generator:
        digest = hashlib.blake2b(f"{seed}/0/{stream}/{row}".encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)

    return torch.stack([torch.rand(length, generator=generator(seed, row)) for seed, row in noise])


@torch.no_grad()
def sample_codes(
    model: Any, label_B: Tensor, noise: Sequence[tuple[int, int]], sampler: dict[str, Any], progress_bar: Any = None
) -> Tensor:
    """Draw the codes of one image per label: int64 (B, L), as the tokenizer decodes them."""
    sampler = {**SAMPLER, **sampler}
    sizes = model.step_sizes(sampler["steps"], sampler["step_schedule"])
    length, device = sum(sizes), label_B.device
    order_BL = torch.arange(length).expand(len(label_B), -1)
    if model.random_order:
        order_BL = uniform(noise, "order", length).argsort(dim=1, stable=True)
    order_BL, uniform_BL = order_BL.to(device), uniform(noise, "sample", length).to(device)
    guidance_B, scale_S = None, guidance_per_step(sampler, sizes, model.guidance)
    if model.guidance_conditioned:  # the scale is an input of the model: one pass, no null branch
        guidance_B = torch.full_like(label_B, sampler["guidance"], dtype=torch.float32)
        scale_S = [1.0] * len(sizes)
    guided = any(scale != 1 for scale in scale_S)

    def both(rows: Tensor, null: Tensor | None = None) -> Tensor:
        """The conditional rows and, below them, those of the null label."""
        return torch.cat([rows, rows if null is None else null]) if guided else rows

    null_B = torch.full_like(label_B, model.null_label)
    state, hidden = model.start(both(label_B, null_B), both(order_BL), sizes, guidance_B)
    codes_BL, done = torch.empty_like(order_BL), 0
    bar = progress_bar(total=len(sizes)) if progress_bar else None
    for scale, size in zip(scale_S, sizes, strict=True):
        logits = model.head(hidden)
        if guided:
            conditional, null = logits.float().chunk(2)
            logits = conditional if scale == 1 else null + scale * (conditional - null)
        codes_Bn = draw(logits, sampler, uniform_BL[:, done : done + size], model.nucleus)
        codes_BL[:, done : done + size] = codes_Bn
        done += size
        if done < length:
            hidden = model.step(state, both(codes_Bn))
        if bar is not None:
            bar.update()
    if bar is not None:
        bar.close()
    return codes_BL.gather(1, order_BL.argsort(dim=1))  # from the order of generation to raster order


def guidance_per_step(sampler: dict[str, Any], sizes: Sequence[int], family: str) -> list[float]:
    """The guidance scale of every decoding step; `family` is the schedule that "family" stands for.

    With g = `guidance`, N codes in S steps, and t codes decoded before a step that decodes n:

        constant        g, where g > 1; only for the first `guidance_interval` + 2 codes when that is >= 0 (LlamaGen)
        scales          1 + (g - 1) k / (S - 1) at scale k (VAR, g = cfg + 1)
        decoded_before  s0 + (g - s0) t / N, where g > 1; s0 = `guidance_start` (RandAR)
        decoded_after   1 + (g - 1) (t + n) / N (ARPG)
        power_cosine    1 + (g - 1) (1 - cos(pi (t / N)^power)) / 2, where g > 0; power = `guidance_power` (RAR)
    """
    kind = family if sampler["guidance_schedule"] == "family" else sampler["guidance_schedule"]
    g, start, cut = float(sampler["guidance"]), sampler["guidance_start"], sampler["guidance_interval"]
    sizes_S = torch.tensor(sizes, dtype=torch.float64)
    after_S = sizes_S.cumsum(0) / sizes_S.sum()
    before_S = after_S - sizes_S / sizes_S.sum()
    step_S = torch.arange(len(sizes), dtype=torch.float64)
    if (g <= 1 and kind in ("constant", "decoded_before")) or (g == 0 and kind == "power_cosine"):
        return [1.0] * len(sizes)  # the official codes switch guidance off there
    if kind == "constant":
        scale_S = torch.full_like(step_S, g)
        scale_S = scale_S.where((step_S <= cut + 1) | (cut < 0), torch.ones_like(scale_S))
    elif kind == "scales":
        scale_S = 1 + (g - 1) * step_S / max(1, len(sizes) - 1)
    elif kind == "decoded_before":
        scale_S = start + (g - start) * before_S
    elif kind == "decoded_after":
        scale_S = 1 + (g - 1) * after_S
    else:
        scale_S = 1 + (g - 1) * (1 - torch.cos(math.pi * before_S ** sampler["guidance_power"])) / 2
    return scale_S.float().tolist()


def draw(logits_BnV: Tensor, sampler: dict[str, Any], uniform_Bn: Tensor, nucleus: str) -> Tensor:
    """Codes (B, n): temperature, top-k, top-p, then the place where the CDF passes each uniform number."""
    if sampler["temperature"] == 0:
        return logits_BnV.argmax(-1)
    heated = logits_BnV.float() / max(sampler["temperature"], 1e-5)
    logp_BnV = keep_likely(heated, sampler["top_k"], sampler["top_p"], nucleus).log_softmax(-1)
    # In float64 u * total < total holds strictly, so a code that was filtered out is never reached by rounding.
    cdf = logp_BnV.double().exp().cumsum(-1)
    target = uniform_Bn.double().unsqueeze(-1) * cdf[..., -1:]
    return torch.searchsorted(cdf, target, right=True).squeeze(-1)


def keep_likely(logits: Tensor, top_k: int, top_p: float, nucleus: str) -> Tensor:
    """-inf below the k-th largest logit, then outside the nucleus of what is left.

    By the official rules: "descending" (LlamaGen) drops a code when those above it hold more than p, "ascending" (VAR)
    when it and those below it hold at most 1 - p, never the most likely one.
    """
    if top_k > 0:
        threshold = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if top_p >= 1:
        return logits
    ordered, index = logits.sort(dim=-1, descending=nucleus == "descending")
    mass = ordered.softmax(-1).cumsum(-1)
    if nucleus == "descending":
        mass = mass.roll(1, -1)  # strictly before each code
        mass[..., 0] = 0
        dropped = mass > top_p
    else:
        dropped = mass <= 1 - top_p
        dropped[..., -1] = False
    return logits.masked_fill(torch.zeros_like(dropped).scatter(-1, index, dropped), -torch.inf)
