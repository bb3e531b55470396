"""The files that a published folder ships stand alone and compute, bit by bit, what varkd computes."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tiny_models import FAMILIES, tiny_model, tiny_tokenizer
from varkd.backbones import store
from varkd.backbones.protocol import Backbone
from varkd.publishing.folder import SHIPPED
from varkd.rollout import Sampler, guidance_per_step
from varkd.sampling import generate_with_codes
from varkd.tokenizers.store import KINDS, save_tokenizer
from varkd.types import Condition
from varkd.world import Rng

LABELS = [0, 1, 2, 3, 4, 5]  # 5 is the null label
SAMPLERS = {
    "plain": Sampler(),
    "greedy": Sampler(temperature=0),
    "filters": Sampler(temperature=0.8, top_k=9, top_p=0.7),
    "guided": Sampler(guidance=3.0),
    "guided filters": Sampler(guidance=2.5, temperature=1.1, top_k=12, top_p=0.8),
    "cut guidance": Sampler(guidance=2.0, guidance_schedule="constant", guidance_interval=3),
    "other schedule": Sampler(guidance=2.0, guidance_schedule="power_cosine", guidance_power=1.5),
}
PARALLEL = {
    "arpg": [Sampler(steps=5), Sampler(steps=5, step_schedule="cosine", guidance=2.0)],
    "randar": [Sampler(steps=5), Sampler(steps=6, guidance=2.0)],
}


def shipped(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A shipped file, imported from its path where neither varkd nor diffusers can be imported."""
    stub: Any = ModuleType("diffusers")
    stub.DiffusionPipeline = stub.ImagePipelineOutput = type("Stub", (), {})
    with monkeypatch.context() as patch:
        for blocked in [name for name in sys.modules if name.split(".")[0] == "varkd"]:
            patch.delitem(sys.modules, blocked)
        patch.setitem(sys.modules, "varkd", None)
        patch.setitem(sys.modules, "diffusers", stub)
        spec = importlib.util.spec_from_file_location(f"shipped_{name}", SHIPPED / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
    return module


def twin(model: Backbone, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The same model, loaded by the shipped file from what `save` wrote."""
    model.save(folder)
    module = shipped(f"modeling_{model.family}", monkeypatch)
    return getattr(module, type(model).__name__).from_pretrained(str(folder))


def codes_of(pipeline: ModuleType, model: Any, sampler: Sampler, seed: int) -> Tensor:
    noise = [(seed, row) for row in range(len(LABELS))]
    return pipeline.sample_codes(model, torch.tensor(LABELS), noise, asdict(sampler))


def test_every_family_and_every_tokenizer_ships():
    files = {path.stem for path in SHIPPED.glob("*.py")}
    assert files == {
        "pipeline",
        *(f"modeling_{name}" for name in store.FAMILIES),
        *(f"decoder_{name}" for name in KINDS),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_codes_are_those_of_varkd(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tokenizer = tiny_tokenizer(family)
    model = tiny_model(family, tokenizer)
    alone, pipeline = twin(model, tmp_path / "model", monkeypatch), shipped("pipeline", monkeypatch)
    for sampler in (*SAMPLERS.values(), *PARALLEL.get(family, [])):
        _, ours = generate_with_codes(model, tokenizer, torch.tensor(LABELS), sampler, seed=7, quiet=True)
        theirs = codes_of(pipeline, alone, sampler, seed=7)
        assert torch.equal(ours, theirs), sampler
        assert sampler.temperature == 0 or not torch.equal(ours, codes_of(pipeline, alone, sampler, seed=8))


@pytest.mark.parametrize(
    ("family", "sizes"),
    [(family, {"guidance_conditioned": True}) for family in FAMILIES]
    + [("var", {"shared_adaln": True}), ("rar", {"order": "random"}), ("arpg", {"order": "raster"}),
       ("randar", {"order": "raster"}), ("llamagen", {"ffn_dim": 40})],
)  # fmt: skip
def test_variants_of_a_family(family: str, sizes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tokenizer = tiny_tokenizer(family)
    model = tiny_model(family, tokenizer, **sizes)
    alone, pipeline = twin(model, tmp_path / "model", monkeypatch), shipped("pipeline", monkeypatch)
    sampler = Sampler(guidance=2.0, top_k=20)
    _, ours = generate_with_codes(model, tokenizer, torch.tensor(LABELS), sampler, seed=3, quiet=True)
    assert torch.equal(ours, codes_of(pipeline, alone, sampler, seed=3))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_are_those_of_varkd_in_every_step(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tokenizer = tiny_tokenizer(family)
    model = tiny_model(family, tokenizer)
    alone = twin(model, tmp_path / "model", monkeypatch)
    sampler = PARALLEL.get(family, [Sampler()])[0]
    label_B, row_B = torch.tensor([0, 3]), torch.arange(2)
    plan = sampler.plan(model, Rng(0), row_B)
    assert alone.step_sizes(sampler.steps, None) == list(plan.sizes)
    codes_BL = torch.randint(tokenizer.vocab_size, plan.order_BL.shape, generator=torch.Generator().manual_seed(0))
    (ours, hidden), (theirs, other) = (
        model.start(Condition(label_B), plan), alone.start(label_B, plan.order_BL, list(plan.sizes))
    )  # fmt: skip
    for step, codes_Bn in enumerate(codes_BL.split(plan.sizes, dim=1)):
        assert torch.equal(model.head(hidden), alone.head(other)), step
        if step + 1 < len(plan.sizes):
            hidden, other = model.step(ours, codes_Bn), alone.step(theirs, codes_Bn)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_images_are_those_of_varkd(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tokenizer = tiny_tokenizer(family)
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    module = shipped(f"decoder_{tokenizer.kind}", monkeypatch)
    alone = getattr(module, type(tokenizer).__name__).from_pretrained(str(tmp_path / "tokenizer"))
    codes_BL = torch.randint(tokenizer.vocab_size, (3, tokenizer.sequence_length))
    ours, theirs = tokenizer.decode(codes_BL), alone.decode(codes_BL)
    assert torch.equal(ours, theirs)
    assert torch.equal(tokenizer.to_uint8(ours), alone.to_uint8(theirs))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("family", ["constant", "scales", "decoded_before", "decoded_after", "power_cosine"])
def test_guidance_schedules(name: str, family: Any, monkeypatch: pytest.MonkeyPatch):
    tokenizer = tiny_tokenizer("arpg")
    plan = Sampler(steps=5).plan(tiny_model("arpg", tokenizer), Rng(0), torch.arange(1))
    ours = guidance_per_step(SAMPLERS[name], plan, family)
    settings = {**shipped("pipeline", monkeypatch).SAMPLER, **asdict(SAMPLERS[name])}
    theirs = shipped("pipeline", monkeypatch).guidance_per_step(settings, list(plan.sizes), family)
    assert ours.tolist() == theirs


def test_half_precision_keeps_what_must_stay_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tokenizer = tiny_tokenizer("var")
    alone = twin(tiny_model("var", tokenizer), tmp_path / "model", monkeypatch).to(torch.bfloat16)
    assert alone.dtype == torch.bfloat16 and alone.quantizer_codebook.dtype == torch.float32
    assert torch.equal(alone.quantizer_codebook, tokenizer.codebook_VE)
    codes = codes_of(shipped("pipeline", monkeypatch), alone, Sampler(guidance=2.0), seed=0)
    assert codes.shape == (6, 21) and int(codes.max()) < 32


@pytest.mark.parametrize(("family", "steps"), [("llamagen", 3), ("var", 5), ("arpg", 17), ("randar", 0), ("rar", 2)])
def test_steps_that_a_family_cannot_have(family: str, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    alone = twin(tiny_model(family, tiny_tokenizer(family)), tmp_path / "model", monkeypatch)
    with pytest.raises(ValueError, match="steps"):
        alone.step_sizes(steps, None)
