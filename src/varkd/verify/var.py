"""VAR: residual inputs, teacher forcing, guided runs, greedy codes, residual features, guidance, official buffers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from varkd.backbones.var import VAR, VARConfig, scales_of
from varkd.residual import phi_index
from varkd.rollout import Sampler, guidance_per_step
from varkd.types import Condition, Plan
from varkd.verify.golden import Check, Golden, compare, forced_logits, greedy_codes, per_code


@torch.no_grad()
def checks(golden: Golden) -> Iterator[Check]:
    size, tolerance = golden.info["config"], golden.info["tolerance"]
    model = _load(golden)
    yield from _official_files(golden, model)
    unused = torch.zeros(len(model.config.scales), model.config.vocab_size)  # how often a fresh tokenizer used a code
    yield golden.compare("vq_state.quantize.ema_vocab_hit_SV", unused, "exact")
    codes_BL, condition = golden["codes"], Condition(golden["labels"])
    plan = model.plan(len(codes_BL))
    indices = phi_index(len(model.config.scales), model.config.num_phi)
    yield _equal("phi_index_per_scale", indices, size["phi_index_per_scale"])
    yield golden.compare("tf.inputs", model.quantizer.inputs(codes_BL), tolerance["tf"])
    yield golden.compare("tf.logits", model.head(model(codes_BL, condition, plan)), tolerance["tf"])
    for name, run in golden.info["runs"].items():
        sampler = Sampler(guidance=run["cfg"] + 1)
        made_BL = codes_BL
        if run["kind"] == "argmax":
            made_BL = greedy_codes(model, condition, plan, sampler)
            yield golden.compare(f"{name}.codes", made_BL, "exact")
        else:
            guidance_S = guidance_per_step(sampler, plan, model.guidance)
            yield golden.compare(f"{name}.guidance", per_code(guidance_S, plan), tolerance["runs"])
            made_BL = golden[run["codes"]]
            logits = forced_logits(model, made_BL, condition, plan, sampler)
            yield golden.compare(f"{name}.logits", logits, tolerance["runs"])
        *_, features = model.quantizer.features(made_BL)
        yield golden.compare(f"{name}.f_hat", features, tolerance["runs"])


def schedule(params: dict[str, Any]) -> tuple[tuple[int, ...], Tensor]:
    """Codes per step and guidance per step of one `schedule-var.json` entry."""
    scales = params["patch_nums"]
    sizes = VARConfig(1, 1, tuple(scales), 1, 1, 1, 1).sizes
    plan = Plan(torch.arange(sum(sizes)).unsqueeze(0), sizes)
    if phi_index(len(scales), 4) != params["phi_index_per_scale"]:
        return (), torch.empty(0)  # passes for nothing
    return plan.sizes, guidance_per_step(Sampler(guidance=params["cfg"] + 1), plan, VAR.guidance)


def _load(golden: Golden) -> VAR:
    """The model under its official names, and the quantizer out of the tokenizer's tensors."""
    size = golden.info["config"]
    config = VARConfig(
        size["vocab_size"],
        size["num_classes"],
        tuple(size["patch_nums"]),
        size["code_dim"],
        size["depth"],
        size["embed_dim"],
        size["num_heads"],
        None,
        size["shared_aln"],
        size["share_quant_resi"],
        size["norm_eps"],
    )
    model = VAR(config).eval()
    wanted = set(model.official_state()) & set(model.state_dict())
    state = {name: value for name, value in golden.state().items() if name in wanted}
    parts = golden.state("vq_state.quantize.")
    phis = [f"quant_resi.qresi_ls.{index}" for index in range(config.num_phi)]
    quantizer = {
        "quantizer_codebook": parts["embedding.weight"],
        "quantizer_phi_weight": torch.stack([parts[f"{phi}.weight"] for phi in phis]),
        "quantizer_phi_bias": torch.stack([parts[f"{phi}.bias"] for phi in phis]),
    }
    model.load_state_dict({**state, **quantizer})
    return model


def _official_files(golden: Golden, model: VAR) -> Iterator[Check]:
    """What we would write is what the official code wrote, and its sizes can be read off."""
    ours, theirs = model.official_state(), golden.state()
    yield _equal("official names", sorted(ours), sorted(theirs))
    kinds = {name: value.dtype for name, value in theirs.items()}
    yield _equal("official types", {name: value.dtype for name, value in ours.items()}, kinds)
    for name in sorted(set(ours) & set(theirs)):
        yield compare(f"state.{name}", ours[name], theirs[name], "exact")
    inferred = VAR.infer({name: tuple(value.shape) for name, value in theirs.items()})
    config = {name: getattr(model.config, name) for name in inferred}
    yield _equal("inferred sizes", inferred, {**config, "ffn_dim": model.config.ffn_width})
    yield _equal("inferred scales", scales_of(theirs["lvl_1L"]), tuple(model.config.scales))


def _equal(key: str, ours: object, theirs: object) -> Check:
    return Check(key, 0.0 if ours == theirs else float("inf"), ours == theirs)
