"""Check our modules against golden files: `python -m varkd.verify FILE.safetensors ...` (or schedule-*, shapes-*.json).

A golden file holds the weights of a tiny upstream model and the numbers that the upstream code computed with them; the
JSON beside it describes sizes, sampler runs and tolerances. Every tensor must be used: a key that no check reads is a
failure, so that nothing passes by being ignored. Prints the largest error per tensor; exit code 1 beyond tolerance.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from varkd.backbones.llamagen import LlamaGen, LlamaGenConfig
from varkd.backbones.protocol import Backbone
from varkd.errors import VarkdError
from varkd.files import read_json
from varkd.rollout import Sampler, double, filter_logits, guidance_schedule, guide, rollout
from varkd.tokenizers.vq import VQ, VQConfig
from varkd.types import Condition, Plan


@dataclass(frozen=True)
class Check:
    """One compared tensor (or number): the largest absolute error, and whether it is within tolerance."""

    key: str
    error: float
    passed: bool


class Golden:
    """The tensors of one file; remembers which were read."""

    def __init__(self, path: Path) -> None:
        self.info: dict[str, Any] = read_json(path.with_suffix(".json"))
        try:
            self.tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise VarkdError(f"cannot read {path}: {error}") from None
        self.used: set[str] = set()

    def __getitem__(self, key: str) -> Tensor:
        if key not in self.tensors:
            raise VarkdError(f"golden file lacks the tensor '{key}'")
        self.used.add(key)
        return self.tensors[key]

    def state(self, prefix: str = "state.") -> dict[str, Tensor]:
        """The tensors under a prefix as a state dict."""
        return {key.removeprefix(prefix): self[key] for key in self.tensors if key.startswith(prefix)}

    def compare(self, key: str, ours: Tensor, tolerance: Any) -> Check:
        return compare(key, ours, self[key], tolerance)


def compare(key: str, ours: Tensor, theirs: Tensor, tolerance: Any) -> Check:
    """`tolerance` is {"atol", "rtol"}, or anything else for "must be equal"."""
    if ours.shape != theirs.shape:
        return Check(f"{key}: shape {tuple(ours.shape)} against {tuple(theirs.shape)}", float("inf"), False)
    same = ours == theirs  # also true where both are -inf
    difference = torch.where(same, 0.0, (ours.double() - theirs.double()).abs())
    allowed = 0.0
    if isinstance(tolerance, dict):
        allowed = tolerance["atol"] + tolerance["rtol"] * theirs.double().abs()
    near = difference.isfinite() & (difference <= allowed)  # the tolerance of an infinite number is infinite
    return Check(key, float(difference.max()), bool((same | near).all()))


def verify(path: str | Path) -> list[Check]:
    """All checks of one golden file.

    Raises:
        VarkdError: the file cannot be read or its family is unknown.
    """
    path = Path(path)
    info = read_json(path.with_suffix(".json"))
    family = info.get("family")
    if family in _WITHOUT_TENSORS:
        return list(_WITHOUT_TENSORS[family](info))
    if family not in _WITH_TENSORS:
        raise VarkdError(
            f"{path}: no check for the family '{family}'; known: {sorted({**_WITH_TENSORS, **_WITHOUT_TENSORS})}"
        )
    golden = Golden(path.with_suffix(".safetensors"))
    checks = list(_WITH_TENSORS[family](golden))
    unread = sorted(set(golden.tensors) - golden.used)
    return checks + [Check(f"{key}: in the file but not checked", float("inf"), False) for key in unread]


@torch.no_grad()
def _llamagen(golden: Golden) -> Iterator[Check]:
    size = golden.info["config"]
    config = LlamaGenConfig(
        size["vocab_size"], size["num_classes"], (size["grid"], size["grid"]), size["n_layer"], size["dim"],
        size["n_head"], None, size["rope_base"], size["norm_eps"],
    )  # fmt: skip
    model = LlamaGen(config).eval()
    model.load_state_dict(golden.state())
    codes_BL, condition = golden["codes"], Condition(golden["labels"])
    plan = model.plan(len(codes_BL))
    tolerance = golden.info["tolerance"]
    yield golden.compare("tf.logits", model.head(model(codes_BL, condition, plan)), tolerance["tf"])
    for name, run in golden.info["runs"].items():
        sampler = Sampler(guidance=run["cfg_scale"], guidance_interval=run["cfg_interval"])
        if run["kind"] == "argmax":
            greedy = Sampler(temperature=0, guidance=sampler.guidance, guidance_interval=sampler.guidance_interval)
            codes = rollout(model, condition, plan, greedy, torch.zeros(plan.order_BL.shape)).codes_BL
            yield golden.compare(f"{name}.codes", codes, "exact")
        else:
            yield golden.compare(f"{name}.guidance", guidance_schedule(sampler, plan), tolerance["runs"])
            logits = forced_logits(model, golden[run["codes"]], condition, plan, sampler)
            yield golden.compare(f"{name}.logits", logits, tolerance["runs"])


def forced_logits(model: Backbone, codes_BL: Tensor, condition: Condition, plan: Plan, sampler: Sampler) -> Tensor:
    """The guided logits (B, L, V) that the cached decode loop would sample from, with `codes_BL` fed back instead."""
    guidance_S = guidance_schedule(sampler, plan)
    stacked_condition, stacked_plan = double(model, condition, plan)
    by_rank = codes_BL.gather(1, plan.order_BL)
    state, hidden = model.start(stacked_condition, stacked_plan)
    logits, done = [], 0
    for index, size in enumerate(plan.sizes):
        logits.append(guide(model.head(hidden), float(guidance_S[index])))
        codes_Bn = by_rank[:, done : done + size]
        done += size
        if done < by_rank.shape[1]:
            hidden = model.step(state, torch.cat([codes_Bn, codes_Bn]))
    ranked = torch.cat(logits, dim=1)
    return ranked.gather(1, plan.rank_BL.unsqueeze(-1).expand_as(ranked))


@torch.no_grad()
def _llamagen_vq(golden: Golden) -> Iterator[Check]:
    model, tolerance = VQ(_vq_config(golden.info["config"])).eval(), golden.info["tolerance"]
    model.load_state_dict(golden.state())
    latents = model.latents(golden["encode.images"])
    yield golden.compare("encode.latents", latents, tolerance["latents"])
    entries, codes_BL = model.quantise(latents)
    yield golden.compare("encode.codes", codes_BL, "exact")
    yield golden.compare("encode.quant", entries, tolerance["latents"])
    yield golden.compare("recon.images", model.decode(codes_BL), tolerance["images"])
    decode_codes = golden["decode.codes"]
    grid = golden["decode.entries"].shape[2:]
    entries = model.codebook_VE[decode_codes].transpose(1, 2).unflatten(2, grid)
    yield golden.compare("decode.entries", entries, tolerance["latents"])
    images = model.decode(decode_codes)
    yield golden.compare("decode.images", images, tolerance["images"])
    levels = (images * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).int()
    off = (levels - golden["decode.uint8"].int()).abs()
    few = int((off > 0).sum()) <= max(1, off.numel() // 1000)
    yield Check("decode.uint8", float(off.max()), int(off.max()) <= 1 and few)


def _vq_config(size: dict[str, Any]) -> VQConfig:
    return VQConfig(
        image_size=size["image"], ch=size["ch"], ch_mult=tuple(size["ch_mult"]), z_channels=size["z_channels"],
        num_res_blocks=size["num_res_blocks"], decoder_res_blocks=size["decoder_res_blocks"],
        vocab_size=size["codebook_size"], codebook_dim=size["codebook_embed_dim"],
    )  # fmt: skip


def _filter_llamagen(golden: Golden) -> Iterator[Check]:
    runs, tolerance = golden.info["runs"], golden.info["tolerance"]
    for pair in runs["pairs"]:
        ours = filter_logits(golden["logits"], pair["top_k"], pair["top_p"])
        yield golden.compare(pair["key"], ours, "exact")
    for tie in runs["ties"]:
        yield golden.compare(tie["key"], filter_logits(golden["logits_ties"], tie["top_k"]), "exact")
    for run in runs["probs"]:
        ours = filter_logits(golden["logits"] / run["temperature"], run["top_k"], run["top_p"]).softmax(-1)
        yield golden.compare(run["key"], ours, tolerance["probs"])


def _filter(golden: Golden) -> Iterator[Check]:
    if golden.info["case"] != "llamagen":
        raise VarkdError(f"no check for the filter rule of '{golden.info['case']}'")
    yield from _filter_llamagen(golden)


def _schedule(info: dict[str, Any]) -> Iterator[Check]:
    if info["case"] != "llamagen":
        raise VarkdError(f"no check for the schedule of '{info['case']}'")
    for schedule in info["schedules"]:
        params = schedule["params"]
        plan = Plan(torch.arange(params["N"]).unsqueeze(0), (1,) * params["N"])
        sampler = Sampler(guidance=params["cfg_scale"], guidance_interval=params["cfg_interval"])
        name = ", ".join(f"{key} {value}" for key, value in params.items())
        sizes, theirs = torch.tensor(plan.sizes), torch.tensor(schedule["tokens_per_step"])
        yield compare(f"tokens per step ({name})", sizes, theirs, "exact")
        theirs = torch.tensor(schedule["guidance_per_step"])
        yield compare(
            f"guidance ({name})", guidance_schedule(sampler, plan), theirs, info["tolerance"]["guidance_per_step"]
        )


def _shapes(info: dict[str, Any]) -> Iterator[Check]:
    if info["case"] != "llamagen":
        raise VarkdError(f"no check for the shapes of '{info['case']}'")
    for name, model in info["models"].items():
        ours = _vq16_shapes() if name == "VQ-16" else _llamagen_shapes(model["keys"])
        theirs = _expand(model["keys"])
        wrong = {key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)}
        yield Check(f"{name} ({len(theirs)} tensors)", float(len(wrong)), not wrong)


def _llamagen_shapes(keys: dict[str, Any]) -> dict[str, list[int]]:
    (vocab_size, dim), _ = keys["tok_embeddings.weight"]
    (num_labels, _), _ = keys["cls_embedding.embedding_table.weight"]
    num_layers = keys["layers.{i}.attention.wo.weight"][1]
    heads = dim // 100 if dim == 3200 else dim // 64  # the 3B model alone has heads of width 100
    config = LlamaGenConfig(vocab_size, num_labels - 1, (16, 16), num_layers, dim, heads)
    with torch.device("meta"):
        return {key: list(value.shape) for key, value in LlamaGen(config).state_dict().items()}


def _vq16_shapes() -> dict[str, list[int]]:
    with torch.device("meta"):
        return {key: list(value.shape) for key, value in VQ(VQConfig()).state_dict().items()}


def _expand(keys: dict[str, Any]) -> dict[str, list[int]]:
    shapes = {}
    for key, value in keys.items():
        if "{i}" in key:
            shapes.update({key.replace("{i}", str(i)): value[0] for i in range(value[1])})
        else:
            shapes[key] = value[0] if isinstance(value[0], list) else value
    return shapes


_WITH_TENSORS: dict[str, Callable[[Golden], Iterator[Check]]] = {
    "llamagen": _llamagen, "llamagen_vq": _llamagen_vq, "filter": _filter,
}  # fmt: skip
_WITHOUT_TENSORS: dict[str, Callable[[dict[str, Any]], Iterator[Check]]] = {"schedule": _schedule, "shapes": _shapes}


def main(paths: Sequence[str]) -> int:
    """Print one line per tensor and one per file; 1 when anything is beyond tolerance or cannot be checked."""
    failed = not paths
    for path in paths:
        try:
            checks = verify(path)
        except VarkdError as error:
            print(f"FAIL {path}: {error}")
            failed = True
            continue
        for check in checks:
            print(f"{'ok  ' if check.passed else 'FAIL'} {check.error:9.2e}  {check.key}")
        passed = all(check.passed for check in checks)
        failed |= not passed
        print(f"{'ok  ' if passed else 'FAIL'} {path}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
