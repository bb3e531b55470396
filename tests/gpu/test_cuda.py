"""One update of every family and kind of method on a CUDA device, against the same update on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import varkd
from varkd import graphs
from varkd.backbones.protocol import Backbone
from varkd.backbones.store import FAMILIES, build
from varkd.rollout import Sampler, rollout
from varkd.types import Condition

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
VOCAB, CLASSES, ROWS = 32, 3, 8
SIZES = {"vocab_size": VOCAB, "num_classes": CLASSES, "num_layers": 2, "dim": 32, "num_heads": 2}
CODEBOOK_VE = torch.randn(VOCAB, 3, generator=torch.Generator().manual_seed(0))
PRESETS = ("ce", "kd", "gkd", "seqkd_prefix", "varkd", "varkd_jsd", "best_of_n", "distillm", "minillm", "taid", "eopd")
IN_FLOAT64 = {"rtol": 1e-5, "atol": 1e-6}


def toy(family: str, seed: int) -> Backbone:
    draw = torch.Generator().manual_seed(9)
    quantizer = {"codebook": torch.randn(VOCAB, 4, generator=draw),
                 "phi.weight": torch.randn(2, 4, 4, 3, 3, generator=draw), "phi.bias": torch.zeros(2, 4)}  # fmt: skip
    grid: dict[str, Any] = {"scales": (1, 2, 3), "code_dim": 4, "num_phi": 2} if family == "var" else {"grid": (4, 4)}
    model = build(family, {**SIZES, **grid}, quantizer=quantizer if family == "var" else None).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return model


def update(name: str, family: str, device: str, dtype: torch.dtype, precision: Any) -> tuple[float, torch.Tensor]:
    student, teacher = toy(family, 1).to(device, dtype), toy(family, 2).to(device, dtype).eval().requires_grad_(False)
    distiller = varkd.Distiller(name, student, teacher, CODEBOOK_VE, updates=2, precision=precision)
    draw = torch.Generator().manual_seed(1)
    codes_BL = torch.randint(VOCAB, (ROWS, student.sequence_length), generator=draw)
    batch = varkd.Batch(codes_BL, torch.randint(CLASSES, (ROWS,), generator=draw), torch.arange(ROWS)).to(device)
    loss, stats = distiller(batch)
    loss.backward()
    distiller.update(loss, stats)
    grad = student.head.weight.grad
    assert grad is not None
    return float(loss.detach()), grad.double().cpu()


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("name", PRESETS)
def test_an_update_on_cuda_is_the_one_on_the_cpu(name: str, family: str):
    """In float64 the same codes are drawn from the same random numbers, so losses and gradients agree."""
    loss, grad = update(name, family, "cpu", torch.float64, "fp32")
    cuda_loss, cuda_grad = update(name, family, "cuda", torch.float64, "fp32")
    assert cuda_loss == pytest.approx(loss, rel=1e-5, abs=1e-8)
    torch.testing.assert_close(cuda_grad, grad, **IN_FLOAT64)


def test_parallel_rollouts_draw_the_codes_of_the_cpu():
    uniform_BL, label_B = (
        torch.rand(ROWS, 16, generator=torch.Generator().manual_seed(3)),
        torch.zeros(ROWS, dtype=torch.long),
    )
    codes = []
    for device in ("cpu", "cuda"):
        model = toy("llamagen", 1).to(device)
        sampler = Sampler(guidance=1.5, parallel="zipar", window=2)
        condition = Condition(label_B.to(device))
        samples = rollout(model, condition, model.plan(ROWS), sampler, uniform_BL.to(device))
        codes.append(samples.codes_BL.cpu())
    assert codes[0].equal(codes[1])


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("name", ["kd", "kd_reverse", "ce"])
def test_bfloat16_is_near(name: str, family: str):
    loss, _ = update(name, family, "cuda", torch.float32, "fp32")
    rounded, grad = update(name, family, "cuda", torch.float32, "bf16")
    assert rounded == pytest.approx(loss, rel=0.05) and bool(grad.isfinite().all())


@pytest.mark.parametrize("name", ["gkd", "varkd", "best_of_n"])
def test_sampling_methods_run_in_bfloat16(name: str):
    loss, grad = update(name, "llamagen", "cuda", torch.float32, "bf16")
    assert loss > 0 and bool(grad.isfinite().all()) and float(grad.abs().max()) > 0


# ---- captured decodes

SAMPLERS = {
    "plain": Sampler(),
    "guided": Sampler(guidance=2.0, top_k=9, top_p=0.95, temperature=0.9),
    "parallel": Sampler(guidance=1.5, parallel="auto", window=2),
}


def decode(model: Backbone, sampler: Sampler, seed: int, kept: int = 0) -> torch.Tensor:
    draw, length = torch.Generator().manual_seed(seed), model.sequence_length
    plan = sampler.plan(model, varkd.Rng(seed), torch.arange(ROWS, device="cuda"))
    uniform_BL, codes_BL = (
        torch.rand(ROWS, length, generator=draw),
        torch.randint(VOCAB, (ROWS, length), generator=draw),
    )
    most_B1 = torch.full((ROWS, 1), kept) if kept > 4 else torch.randint(kept + 1, (ROWS, 1), generator=draw)
    most_B1[0] = kept if kept > 4 else 0  # as many steps for all seeds, which makes them one graph
    label_B = torch.randint(CLASSES, (ROWS,), generator=draw)
    condition, codes_BL = Condition(label_B.cuda()), codes_BL.cuda()
    return rollout(model, condition, plan, sampler, uniform_BL.cuda(), codes_BL, plan.rank_BL < most_B1.cuda()).codes_BL


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("name", sorted(SAMPLERS))
@pytest.mark.parametrize("kept", [3, 9])
def test_a_captured_decode_draws_the_codes_of_a_plain_one(
    family: str, name: str, kept: int, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
):
    """Also after the weights have changed in place; in float64, so that rounding decides no code."""
    model, sampler = toy(family, 1).cuda(), SAMPLERS[name]
    for seed in range(3):
        captured = decode(model, sampler, seed, kept)
        with monkeypatch.context() as off:
            off.setenv("VARKD_CUDA_GRAPHS", "0")
            assert captured.equal(decode(model, sampler, seed, kept)), seed
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.9)
    assert graphs._MODELS[model].graphs and not graphs._MODELS[model].refused, [str(w.message) for w in recwarn]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_captured_decodes_under_autocast(family: str, monkeypatch: pytest.MonkeyPatch):
    """Rounded weights are part of the graph: they follow the weights, and code around the decode does not see them."""
    model = toy(family, 1).float().cuda()
    for seed in range(4):
        with torch.autocast("cuda", torch.bfloat16):
            before = model.head(torch.ones(1, model.head.in_features, device="cuda"))
            captured = decode(model, Sampler(), seed)
            after = model.head(torch.ones(1, model.head.in_features, device="cuda"))
        assert before.equal(after)
        monkeypatch.setenv("VARKD_CUDA_GRAPHS", "0")
        with torch.autocast("cuda", torch.bfloat16):
            plain = decode(model, Sampler(), seed)
        monkeypatch.delenv("VARKD_CUDA_GRAPHS")
        assert (captured == plain).double().mean() > 0.97  # kernels may round differently
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.9)


def test_training_with_captured_rollouts_is_training_without(monkeypatch: pytest.MonkeyPatch):
    weights = []
    for setting in ("1", "0"):
        monkeypatch.setenv("VARKD_CUDA_GRAPHS", setting)
        student, teacher = toy("llamagen", 1).cuda(), toy("llamagen", 2).cuda().eval().requires_grad_(False)
        distiller = varkd.Distiller("varkd", student, teacher, CODEBOOK_VE, updates=6)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        draw = torch.Generator().manual_seed(1)
        for _ in range(6):
            codes_BL = torch.randint(VOCAB, (ROWS, student.sequence_length), generator=draw)
            batch = varkd.Batch(codes_BL, torch.zeros(ROWS).long(), torch.arange(ROWS)).to("cuda")
            loss, stats = distiller(batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            distiller.update(loss, stats)
        weights.append(student.head.weight.detach().clone())
    torch.testing.assert_close(*weights, rtol=1e-8, atol=1e-10)
