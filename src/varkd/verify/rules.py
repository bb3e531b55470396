"""Files about rules instead of one model: filters, schedules at full size, and the names and shapes of all weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from varkd.backbones import zoo
from varkd.backbones.official import blank_model
from varkd.backbones.protocol import Nucleus
from varkd.backbones.store import family_class
from varkd.errors import VarkdError
from varkd.rollout import filter_logits
from varkd.tokenizers.store import KINDS
from varkd.verify import arpg, llamagen, randar, rar, var
from varkd.verify.golden import Check, Golden, compare

_SCHEDULES = {
    "llamagen": llamagen.schedule,
    "var": var.schedule,
    "arpg": arpg.schedule,
    "randar": randar.schedule,
    "rar": rar.schedule,
}
_TOKENIZERS = {known.name: known for known in zoo.TOKENIZERS}


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
    """Names, shapes and numbers of parameters of published models, built without weights from the shapes alone."""
    for name, golden in info["models"].items():
        theirs = _expand(golden["keys"])
        ours, params, published = _tokenizer(name) if name in _TOKENIZERS else _backbone(info["case"], theirs)
        wrong = {key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)}
        yield Check(f"{name} ({len(theirs)} tensors)", float(len(wrong)), not wrong)
        wanted = {golden["n_parameters"], *published}
        yield Check(f"{name} ({params} parameters)", float(max(abs(params - n) for n in wanted)), wanted == {params})


_Built = tuple[dict[str, list[int]], int, set[int]]  # shapes of all tensors, parameters, and what the zoo says they are


def _backbone(family: str, theirs: dict[str, list[int]]) -> _Built:
    """What conversion makes of these tensors. The zoo stands in for what shapes do not tell (heads, grid)."""
    state = {key: torch.empty(shape, device="meta") for key, shape in theirs.items()}
    sizes = family_class(family).infer({key: tuple(shape) for key, shape in theirs.items()})
    entries = zoo.with_sizes(family, sizes)
    if not entries:
        raise VarkdError(f"no published {family} model has the sizes {sizes}")
    model, _ = blank_model(state, family, model=entries[0].name)
    ours = {key: list(value.shape) for key, value in model.official_state().items()}
    return ours, _parameters(model), {entry.params for entry in entries}


def _tokenizer(name: str) -> _Built:
    """The default sizes of our tokenizers are the published ones."""
    known = _TOKENIZERS[name]
    if known.kind not in KINDS:
        raise VarkdError(f"no tokenizer of the kind '{known.kind}' to compare {name} with")
    module, config = KINDS[known.kind]
    with torch.device("meta"):
        tokenizer = module(config())
    ours = {key: list(value.shape) for key, value in tokenizer.state_dict().items()}
    return ours, _parameters(tokenizer), {known.params}


def _parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _expand(keys: dict[str, Any]) -> dict[str, list[int]]:
    shapes = {}
    for key, value in keys.items():
        if "{i}" in key:
            shapes.update({key.replace("{i}", str(i)): value[0] for i in range(value[1])})
        else:
            shapes[key] = value[0] if isinstance(value[0], list) else value
    return shapes
