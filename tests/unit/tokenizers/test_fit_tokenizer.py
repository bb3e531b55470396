"""Fitting a tokenizer on a tiny synthetic set."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from varkd.errors import VarkdError
from varkd.tokenizers.multiscale import MultiScale, MultiScaleConfig
from varkd.tokenizers.pixels import Pixels, PixelsConfig
from varkd.tokenizers.protocol import to_unit
from varkd.tokenizers.vq import VQConfig
from varkd.train import fit_tokenizer as module
from varkd.train.encode import PSNR_CAP
from varkd.train.fit_tokenizer import FitConfig, Restarter, fit_tokenizer, measure
from varkd.world import Rng

TINY = VQConfig(image_size=8, ch=16, ch_mult=(1, 1), z_channels=16, num_res_blocks=1, decoder_res_blocks=1,
                vocab_size=32, codebook_dim=4, norm_groups=4, attention=False)  # fmt: skip
SCALES = MultiScaleConfig(image_size=8, ch=16, ch_mult=(1, 1), z_channels=8, num_res_blocks=1, decoder_res_blocks=1,
                          vocab_size=32, scales=(1, 2, 4), num_phi=2, norm_groups=4, attention=False)  # fmt: skip
BOTH = pytest.mark.parametrize("config", [TINY, SCALES], ids=["vq", "multiscale"])
FIT = FitConfig(steps=120, batch_size=16, lr=5e-3, restart_every=10)


class Ramps:
    """Color ramps of random direction: what the fit needs of an image set."""

    def __init__(self, num: int, seed: int, channels: int = 3) -> None:
        generator = torch.Generator().manual_seed(seed)
        slope = torch.randn(num, channels, 2, 1, 1, generator=generator) * 0.3
        offset = torch.randn(num, channels, 1, 1, generator=generator) * 0.4
        y, x = torch.meshgrid(torch.linspace(-1, 1, 8), torch.linspace(-1, 1, 8), indexing="ij")
        images = offset + slope[:, :, 0] * y + slope[:, :, 1] * x
        self.images = (images.clamp(-1, 1) * 127.5 + 127.5).to(torch.uint8)
        self.labels = np.zeros(num, np.int64)
        self.image_shape = (channels, 8, 8)

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices) -> Tensor:
        return self.images[torch.as_tensor(indices)]


@BOTH
def test_reconstruction_improves_clearly_and_the_codebook_is_used(config: VQConfig | MultiScaleConfig):
    model, record = fit_tokenizer(Ramps(64, 0), Ramps(24, 1), config, FIT, quiet=True)
    _, untrained = fit_tokenizer(Ramps(64, 0), Ramps(24, 1), config, replace(FIT, steps=1), quiet=True)
    assert record["psnr"] > untrained["psnr"] + 4  # the squared error falls to less than 40 %
    assert record["codes_used"] > 0.8 and 0.5 * 32 < record["perplexity"] <= 32
    assert record["num"] == 24 and not model.training
    assert json.loads(json.dumps(record, allow_nan=False)) == record


@BOTH
def test_the_seed_alone_decides(config: VQConfig | MultiScaleConfig):
    hashes = []
    for seed in (0, 0, 1):
        torch.rand(3)  # the global generator must not matter, nor be moved
        before = torch.random.get_rng_state()
        fit = replace(FIT, seed=seed, steps=12)
        hashes.append(fit_tokenizer(Ramps(64, 0), Ramps(24, 1), config, fit, quiet=True)[0].hash)
        assert torch.equal(torch.random.get_rng_state(), before)
    assert hashes[0] == hashes[1] != hashes[2]


@BOTH
def test_bf16_trains_too(config: VQConfig | MultiScaleConfig):
    sets, fit = (Ramps(64, 0), Ramps(24, 1)), replace(FIT, bf16=True)
    records = [fit_tokenizer(*sets, config, replace(fit, steps=steps), quiet=True)[1] for steps in (1, 60)]
    assert records[1]["psnr"] > records[0]["psnr"] + 2


def test_dead_codes_restart_on_latents_with_fresh_moments():
    embedding = torch.nn.Parameter(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)))
    optimizer = torch.optim.AdamW([embedding])
    embedding.sum().backward()
    optimizer.step()
    before, moment = embedding.detach().clone(), optimizer.state[embedding]["exp_avg"]
    latents = torch.randn(50, 4, generator=torch.Generator().manual_seed(1))
    restarter = Restarter(embedding, optimizer, FitConfig(steps=100, restart_every=2, restart_until=0.5))
    codes = torch.tensor([[0, 1, 3] * 20])
    restarter.observe(1, latents, codes, Rng(0, 1))
    assert torch.equal(embedding, before) and restarter.restarts == 0  # the window has not ended
    restarter.observe(2, latents, codes, Rng(0, 2))
    dead, alive = [2, 4, 5], [0, 1, 3]
    assert restarter.restarts == 3
    assert torch.equal(embedding[alive], before[alive]) and moment[alive].abs().min() > 0
    assert all((latents == embedding[code]).all(dim=1).any() for code in dead) and not moment[dead].any()
    after = embedding.detach().clone()
    restarter.observe(60, latents, codes, Rng(0, 60))  # too late in the training to restart anything
    assert torch.equal(embedding, after)


@BOTH
def test_restarts_bring_back_a_collapsed_codebook(config: VQConfig | MultiScaleConfig, monkeypatch: pytest.MonkeyPatch):
    def collapse(self: Restarter, latents_NE: Tensor, rng: Rng) -> None:
        with torch.no_grad():
            self.embedding[:] = -latents_NE.mean(dim=0)  # out of every latent's way
            self.embedding[0] *= -1

    monkeypatch.setattr(Restarter, "begin", collapse)
    sets, fit = (Ramps(64, 0), Ramps(24, 1)), replace(FIT, steps=40)
    _, without = fit_tokenizer(*sets, config, replace(fit, restart_until=0.0), quiet=True)
    _, restarted = fit_tokenizer(*sets, config, fit, quiet=True)
    assert without["restarts"] == 0 and restarted["restarts"] > 0
    assert restarted["codes_used"] > without["codes_used"] + 0.3


def test_the_loss_of_the_scales_is_that_of_var():
    """Codebook and commitment: the mean over scales of the distance between the sum so far and the latents."""
    model = module._build(SCALES, 0)
    images = to_unit(Ramps(4, 0).images)
    loss, found = module._loss(model, images, FIT)
    assert isinstance(model, MultiScale)
    latents = model.latents(images)
    scales = model.quantize_latents(latents)
    distance = torch.stack([(scale.features_BEPP - latents).square().mean() for scale in scales]).mean()
    error = model.decode(model.encode(images)) - images
    wanted = error.abs().mean() + error.square().mean() + (FIT.codebook + FIT.commitment) * distance
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert len(found.latents_NE) == found.codes_BL.numel() == 4 * 21


def test_a_loss_that_is_not_finite_stops_in_one_line():
    with pytest.raises(VarkdError, match=r"the loss is (nan|inf) at step \d+: lower lr") as caught:
        fit_tokenizer(Ramps(64, 0), Ramps(24, 1), TINY, replace(FIT, lr=1e30, warmup=0.0), quiet=True)
    assert "\n" not in str(caught.value)


def test_refuses_image_sets_that_do_not_fit():
    with pytest.raises(VarkdError, match=r"need training images of shape \(3, 8, 8\), got 0"):
        fit_tokenizer(Ramps(0, 0), Ramps(24, 1), TINY, FIT, quiet=True)
    with pytest.raises(VarkdError, match=r"need validation images of shape \(3, 8, 8\), got 24 .* \(1, 8, 8\)"):
        fit_tokenizer(Ramps(64, 0), Ramps(24, 1, channels=1), TINY, FIT, quiet=True)
    with pytest.raises(VarkdError, match="steps must be at least 1"):
        FitConfig(steps=0)


def test_measure_of_a_lossless_tokenizer():
    levels = Ramps(10, 0, channels=1)
    record = measure(Pixels(PixelsConfig(levels=256)), levels, quiet=True)
    assert record["psnr"] == PSNR_CAP
    counts = torch.bincount(levels.images.flatten().long(), minlength=256).double()
    assert record["codes_used"] == pytest.approx(float((counts > 0).double().mean()))
    share = counts[counts > 0] / counts.sum()
    assert record["perplexity"] == pytest.approx(math.exp(-float((share * share.log()).sum())))
