"""Files about rules instead of one model: filters, schedules at full size, and the names and shapes of all weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from varkd.backbones.llamagen import LlamaGen, LlamaGenConfig
from varkd.backbones.protocol import Nucleus
from varkd.errors import VarkdError
from varkd.rollout import filter_logits
from varkd.tokenizers.vq import VQ, VQConfig
from varkd.verify import llamagen
from varkd.verify.golden import Check, Golden, compare

_SCHEDULES = {"llamagen": llamagen.schedule}


def filters(golden: Golden) -> Iterator[Check]:
    """top-k and top-p by the rule of `case`, bit for bit; LlamaGen's file adds probabilities under a temperature."""
    rules: dict[str, Nucleus] = {"llamagen": "descending", "var": "ascending"}
    if golden.info["case"] not in rules:
        raise VarkdError(f"no check for the filter rule of '{golden.info['case']}'; known: {sorted(rules)}")
    rule, runs = rules[golden.info["case"]], golden.info["runs"]
    for pair in runs["pairs"]:
        top_p = pair["top_p"] or 1.0  # 0 is VAR's way to say "off"
        yield golden.compare(pair["key"], filter_logits(golden["logits"], pair["top_k"], top_p, rule), "exact")
    for tie in runs["ties"]:
        yield golden.compare(tie["key"], filter_logits(golden["logits_ties"], tie["top_k"], 1.0, rule), "exact")
    for run in runs.get("probs", []):
        logits = golden["logits"] / run["temperature"]
        ours = filter_logits(logits, run["top_k"], run["top_p"], rule).softmax(-1)
        yield golden.compare(run["key"], ours, golden.info["tolerance"]["probs"])


def schedules(info: dict[str, Any]) -> Iterator[Check]:
    """Codes per step and guidance per step at full size."""
    if info["case"] not in _SCHEDULES:
        raise VarkdError(f"no check for the schedule of '{info['case']}'; known: {sorted(_SCHEDULES)}")
    for entry in info["schedules"]:
        sizes, guidance_S = _SCHEDULES[info["case"]](entry["params"])
        name = ", ".join(f"{key} {value}" for key, value in entry["params"].items())
        theirs = torch.tensor(entry["tokens_per_step"])
        yield compare(f"tokens per step ({name})", torch.tensor(sizes), theirs, "exact")
        theirs = torch.tensor(entry["guidance_per_step"])
        yield compare(f"guidance ({name})", guidance_S, theirs, info["tolerance"]["guidance_per_step"])


def shapes(info: dict[str, Any]) -> Iterator[Check]:
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
