"""Fits a `vq` or a `multiscale` tokenizer by reconstruction: the losses of VQ-VAE (arXiv 1711.00937, eq. 3).

    loss = |x - x'| + (x - x')^2 + codebook |sg(z) - e|^2 + commitment |z - sg(e)|^2

    vq          z is a normalized latent, e its nearest normalized codebook row
    multiscale  z is the latent map, e the sum of the scales so far; the mean over scales (VAR, arXiv 2404.02905)

The decoder sees e (of the last scale) and passes its gradient straight through to z. Codes that are hardly used are
restarted from vectors of the current batch that were looked up: latents, or what coarser scales left over of them.
There is no perceptual and no adversarial loss: this is a tokenizer for small images, judged by its PSNR.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from varkd.data.images import ImageSet
from varkd.errors import VarkdError
from varkd.progress import bar
from varkd.tokenizers.multiscale import MultiScale, MultiScaleConfig
from varkd.tokenizers.protocol import Tokenizer, to_unit
from varkd.tokenizers.vq import VQ, VQConfig
from varkd.train.encode import psnr
from varkd.train.optim import OptimizerConfig
from varkd.world import Rng

_VALIDATION_BATCH = 256
Fitted = VQ | MultiScale


@dataclass(frozen=True)
class FitConfig:
    """How long and how to train.

    `warmup` is a share of the steps; the learning rate then falls along a cosine to zero. Every `restart_every` steps
    of the first `restart_until` share, a code used less than `restart_below` times the uniform share starts afresh.
    `flip` mirrors half of the images. `bf16` runs the convolutions in bfloat16 autocast.
    """

    steps: int = 1600
    batch_size: int = 64
    lr: float = 2e-3
    warmup: float = 0.05
    weight_decay: float = 1e-4
    grad_clip: float = 1.0
    codebook: float = 1.0
    commitment: float = 0.25
    restart_every: int = 25
    restart_until: float = 0.75
    restart_below: float = 0.05
    flip: bool = True
    bf16: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "restart_every"):
            if getattr(self, name) < 1:
                raise VarkdError(f"tokenizer fit: {name} must be at least 1, got {getattr(self, name)}")


def fit_tokenizer(
    train: ImageSet,
    validation: ImageSet,
    config: VQConfig | MultiScaleConfig,
    fit: FitConfig,
    *,
    device: torch.device | str = "cpu",
    quiet: bool = False,
) -> tuple[Fitted, dict[str, Any]]:
    """Train a tokenizer on `train` and measure it on `validation`.

    Returns the tokenizer (in evaluation mode) and its record, plain JSON: `psnr` (mean dB on validation), `num`,
    `codes_used` (share of the codebook that validation uses), `perplexity` (of the codes' distribution), `loss` (last
    step), `restarts`, `seconds` (training only), `fit` (the settings).

    Raises:
        VarkdError: an image set is empty or has another image shape than `config`, or the loss is not finite.
    """
    model = _build(config, fit.seed).to(device).train()
    for name, images in (("training", train), ("validation", validation)):
        if not len(images) or tuple(images.image_shape) != model.image_shape:
            raise VarkdError(
                f"tokenizer fit: need {name} images of shape {model.image_shape}, "
                f"got {len(images)} of shape {tuple(images.image_shape)}"
            )
    begun = time.monotonic()
    loss, restarts = _train(model, train, fit, torch.device(device), quiet)
    seconds = time.monotonic() - begun
    record = measure(model.eval(), validation, quiet=quiet)
    record |= {"loss": loss, "restarts": restarts, "seconds": seconds, "fit": asdict(fit)}
    return model, record


@torch.no_grad()
def measure(tokenizer: Tokenizer, images: ImageSet, *, quiet: bool = False) -> dict[str, Any]:
    """Reconstruct all images: `psnr` (mean dB over images), `num`, `codes_used` (share of V), `perplexity`."""
    device = tokenizer.codebook_VE.device
    count_V = torch.zeros(tokenizer.vocab_size, dtype=torch.int64)
    total = 0.0
    with bar("reconstruct", len(images), quiet) as running:
        for start in range(0, len(images), _VALIDATION_BATCH):
            stop = min(start + _VALIDATION_BATCH, len(images))
            batch = images.batch(np.arange(start, stop)).to(device)
            codes_BL = tokenizer.encode(to_unit(batch))
            total += float(psnr(batch, tokenizer.to_uint8(tokenizer.decode(codes_BL))).double().sum())
            count_V += torch.bincount(codes_BL.flatten().cpu(), minlength=tokenizer.vocab_size)
            running.update(stop)
    return {
        "psnr": total / len(images),
        "num": len(images),
        "codes_used": float((count_V > 0).double().mean()),
        "perplexity": _perplexity(count_V),
    }


def _build(config: VQConfig | MultiScaleConfig, seed: int) -> Fitted:
    # torch.nn initializes from the global CPU generator: seed it for this block only.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return VQ(config) if isinstance(config, VQConfig) else MultiScale(config)


def _train(model: Fitted, train: ImageSet, fit: FitConfig, device: torch.device, quiet: bool) -> tuple[float, int]:
    """The training loop: (last loss, number of restarted codes)."""
    optim = OptimizerConfig(
        fit.lr, round(fit.warmup * fit.steps), 0.0, fit.weight_decay, betas=(0.9, 0.99), clip=fit.grad_clip
    )
    optimizer = optim.build(model)
    restarter = Restarter(model.quantize.embedding.weight, optimizer, fit)
    loss = torch.tensor(0.0)
    with bar("tokenizer", fit.steps, quiet) as running:
        for step, indices in enumerate(_batches(len(train), fit), 1):
            rng = Rng(fit.seed, step)
            images = to_unit(train.batch(indices).to(device))
            if fit.flip:
                flip_B = torch.rand(len(images), generator=rng.generator("flip")).to(device) < 0.5
                images = torch.where(flip_B[:, None, None, None], images.flip(3), images)
            if step == 1:
                restarter.begin(_first_latents(model, images, fit), rng)
            loss, found = _loss(model, images, fit)
            if not math.isfinite(loss.item()):
                raise VarkdError(f"tokenizer fit: the loss is {loss.item()} at step {step}: lower lr ({fit.lr})")
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip)
            for group in optimizer.param_groups:
                group["lr"] = optim.lr_at(step - 1, fit.steps)
            optimizer.step()
            restarter.observe(step, found.latents_NE, found.codes_BL, rng)
            running.update(step, f"loss {loss.item():.4f}")
    return loss.item(), restarter.restarts


class Reconstruction(NamedTuple):
    """What one step of a tokenizer gives the loss and the restarts."""

    images: Tensor
    codebook: Tensor
    commitment: Tensor
    latents_NE: Tensor
    codes_BL: Tensor


def _loss(model: Fitted, images: Tensor, fit: FitConfig) -> tuple[Tensor, Reconstruction]:
    """The loss of images in [-1, 1], and what it was made of."""
    found = _RECONSTRUCT[type(model)](model, images, torch.autocast(images.device.type, torch.bfloat16, fit.bf16))
    error = found.images.float() - images
    loss = error.abs().mean() + error.square().mean()
    return loss + fit.codebook * found.codebook + fit.commitment * found.commitment, found


def _reconstruct_vq(model: VQ, images: Tensor, autocast: torch.autocast) -> Reconstruction:
    with autocast:
        latents = model.latents(images)
    unit = F.normalize(latents.float(), dim=1)
    entries, codes_BL = model.quantize_latents(unit)
    with autocast:
        reconstructed = model.decode_entries(unit + (entries - unit).detach())
    codebook, commitment = F.mse_loss(entries, unit.detach()), F.mse_loss(unit, entries.detach())
    return Reconstruction(reconstructed, codebook, commitment, _rows(unit), codes_BL)


def _reconstruct_multiscale(model: MultiScale, images: Tensor, autocast: torch.autocast) -> Reconstruction:
    """VAR's: the sum of the scales is compared with the latents after every scale, and passed on after the last."""
    with autocast:
        latents = model.latents(images)
    latents = latents.float()
    scales = model.quantize_latents(latents)
    with autocast:
        reconstructed = model.decode_features(latents + (scales[-1].features_BEPP - latents).detach())
    codebook = torch.stack([F.mse_loss(scale.features_BEPP, latents.detach()) for scale in scales]).mean()
    commitment = torch.stack([F.mse_loss(latents, scale.features_BEPP.detach()) for scale in scales]).mean()
    rows_NE = torch.cat([scale.rows_BnE.flatten(0, 1) for scale in scales])
    codes_BL = torch.cat([scale.codes_Bn for scale in scales], dim=1)
    return Reconstruction(reconstructed, codebook, commitment, rows_NE, codes_BL)


_RECONSTRUCT: dict[type[Fitted], Callable[..., Reconstruction]] = {
    VQ: _reconstruct_vq,
    MultiScale: _reconstruct_multiscale,
}


class Restarter:
    """Counts how often each code is used and restarts those that are hardly used, from latents of the batch."""

    def __init__(self, embedding: Tensor, optimizer: torch.optim.Optimizer, fit: FitConfig) -> None:
        self.embedding, self.optimizer, self.fit = embedding, optimizer, fit
        self.count_V = torch.zeros(len(embedding), dtype=torch.int64, device=embedding.device)
        self.restarts = 0

    def begin(self, latents_NE: Tensor, rng: Rng) -> None:
        """Start the whole codebook on latents."""
        self._restart(torch.arange(len(self.embedding)), latents_NE, rng)

    def observe(self, step: int, latents_NE: Tensor, codes_BL: Tensor, rng: Rng) -> None:
        """Count the codes of one step; at the end of a window, restart the dead ones."""
        self.count_V += torch.bincount(codes_BL.flatten(), minlength=len(self.count_V))
        if step % self.fit.restart_every:
            return
        if step <= self.fit.restart_until * self.fit.steps:
            floor = self.fit.restart_below * float(self.count_V.sum()) / len(self.count_V)
            dead = (self.count_V <= floor).nonzero().flatten()
            self._restart(dead, latents_NE, rng)
            self.restarts += len(dead)
        self.count_V.zero_()

    @torch.no_grad()
    def _restart(self, codes: Tensor, latents_NE: Tensor, rng: Rng) -> None:
        chosen = torch.randint(len(latents_NE), (len(codes),), generator=rng.generator("restart"))
        codes = codes.to(self.embedding.device)
        self.embedding[codes] = latents_NE.detach()[chosen.to(latents_NE.device)]
        for name, moment in self.optimizer.state.get(self.embedding, {}).items():
            if name != "step":
                moment[codes] = 0


@torch.no_grad()
def _first_latents(model: Fitted, images: Tensor, fit: FitConfig) -> Tensor:
    """Rows to start the codebook on: while it is zero, the coarser scales of a multi-scale one take nothing off."""
    model.quantize.embedding.weight.zero_()
    return _loss(model, images, fit)[1].latents_NE


def _rows(vectors_BEhw: Tensor) -> Tensor:
    return vectors_BEhw.movedim(1, -1).flatten(0, 2).detach()


def _batches(num: int, fit: FitConfig) -> Iterator[NDArray[np.int64]]:
    """`fit.steps` batches of indices from one permutation after another."""
    waiting = np.empty(0, np.int64)
    epoch = 0
    for _ in range(fit.steps):
        while len(waiting) < fit.batch_size:
            generator = Rng(fit.seed, epoch).generator("permutation")
            waiting = np.concatenate([waiting, torch.randperm(num, generator=generator).numpy()])
            epoch += 1
        yield waiting[: fit.batch_size]
        waiting = waiting[fit.batch_size :]


def _perplexity(count_V: Tensor) -> float:
    share_V = count_V.double() / count_V.sum()
    return float(torch.special.entr(share_V).sum().exp())
