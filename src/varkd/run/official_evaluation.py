"""`varkd evaluate MODEL --protocol NAME`: draw as a family's official evaluation does, and judge as ADM does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from varkd.backbones.protocol import Backbone
from varkd.backbones.store import load_backbone
from varkd.errors import VarkdError
from varkd.evaluate.adm import AdmResult, adm
from varkd.evaluate.inception import Inception
from varkd.evaluate.manifolds import Mode
from varkd.evaluate.reference import Reference
from varkd.files import read_json, write_json
from varkd.progress import console
from varkd.rollout import Sampler
from varkd.run.drawing import draw_to
from varkd.run.models import load_trained
from varkd.run.protocols import Plan, plan
from varkd.tokenizers.protocol import Tokenizer
from varkd.tokenizers.store import load_tokenizer
from varkd.world import World

SEARCH_NUM = 10_000
SCALES: dict[str, tuple[float, ...]] = {
    "constant": (1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0),
    "scales": (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0),
    "decoded_before": (1.0, 2.0, 3.0, 3.5, 4.0, 5.0, 6.0),
    "decoded_after": (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.5),
    "power_cosine": (1.0, 4.0, 7.0, 10.0, 13.0, 16.0),
}
"""What `--search-guidance` tries where no scales are given, by guidance schedule."""


@dataclass(frozen=True)
class Candidate:
    """A model to be judged; `own` is the sampler of its run (None: a model folder has none)."""

    folder: Path
    model: Backbone
    tokenizer: Tokenizer
    own: Sampler | None
    seed: int | None


def open_candidate(folder: Path, tokenizer: Path | None = None, device: str = "auto") -> Candidate:
    """A run folder, or a model folder (`varkd convert`, `varkd export`) with its tokenizer's folder.

    Raises:
        VarkdError: neither, or a tokenizer that is missing or another one than the model's.
    """
    if (folder / "run.yaml").is_file():
        run, codes, model = load_trained(folder, device)
        return Candidate(folder, model, codes.tokenizer, run.evaluation.sampler, run.evaluation.seed)
    model, info = load_backbone(folder, device)
    if tokenizer is None:
        raise VarkdError(f"{folder} is a model folder, not a run: give its tokenizer with --tokenizer DIR")
    found, recorded = load_tokenizer(tokenizer), info.get("tokenizer_hash")
    if recorded is not None and recorded != found.hash:
        raise VarkdError(
            f"the model in {folder} speaks the codes of tokenizer {recorded[:12]}, {tokenizer} is {found.hash[:12]}"
        )
    return Candidate(folder, model, found, None, None)


def plan_of(candidate: Candidate, name: str, **options: Any) -> Plan:
    """`protocols.plan` for a candidate; under "own" the seed is the run's."""
    if name == "own" and candidate.own is None:
        raise VarkdError(
            f"{candidate.folder} is no run, it has no protocol of its own: use --protocol {candidate.model.family}"
        )
    if name == "own" and options.get("seed") is None:
        options["seed"] = candidate.seed
    return plan(name, candidate.model, candidate.tokenizer, own=candidate.own, **options)


def evaluate_plan(
    candidate: Candidate,
    chosen: Plan,
    reference: Reference,
    net: Inception,
    *,
    mode: Mode = "adm",
    resamples: int = 200,
    extras: bool = False,
    world: World | None = None,
    quiet: bool = False,
    keep: bool = True,
) -> AdmResult:
    """Draw what the plan says into the candidate's `evaluation/PROTOCOL` (the same call resumes), and judge it.

    The result's protocol holds what was drawn, but not the sampler: models are compared each at its own settings.
    """
    world = world or World()
    drawing, card = chosen.drawing, chosen.card()
    name = chosen.name if keep else f"search-{chosen.name}-{drawing.sampler.guidance:g}"
    folder = candidate.folder / "evaluation" / name
    request = drawing.request("npz")
    if not _is_drawn(folder, request):
        draw_to(drawing, folder, about={"card": card}, world=world, quiet=quiet)
    result = adm(
        folder / "samples.npz", reference, net, mode=mode, resamples=resamples, extras=extras, world=world, quiet=quiet
    )
    drawn = {key: card[key] for key in ("protocol", "num", "labels", "seed", "resize", "uint8", "file_order")}
    result = replace(result, protocol={**result.protocol, "drawn": drawn})
    if world.is_main and keep:
        write_json(folder.with_suffix(".json"), {**result.to_json(), "card": card})
    return result


def _is_drawn(folder: Path, request: dict[str, Any]) -> bool:
    """Whether these very samples lie there already."""
    if not ((folder / "samples.npz").is_file() and (folder / "samples.json").is_file()):
        return False
    found = read_json(folder / "samples.json")
    return all(found.get(key) == value for key, value in request.items())


def search_guidance(
    candidate: Candidate,
    name: str,
    reference: Reference,
    net: Inception,
    scales: Sequence[float] = (),
    *,
    num: int = SEARCH_NUM,
    changes: Mapping[str, Any] | None = None,
    world: World | None = None,
    quiet: bool = False,
    **options: Any,
) -> tuple[float, list[dict[str, float]]]:
    """The guidance scale of the lowest FID on `num` samples of another seed than the one that is reported.

    FIDs of 10,000 samples are higher than of 50,000: they rank scales, and are not reported as results.

    Returns:
        The scale, and a row of scale and FID for each that was tried.
    """
    scales = tuple(scales) or SCALES[candidate.model.guidance]
    rows = []
    for scale in scales:
        chosen = plan_of(candidate, name, num=num, changes={**(changes or {}), "guidance": scale}, **options)
        drawing = replace(chosen.drawing, seed=chosen.drawing.seed + 1)
        result = evaluate_plan(
            candidate,
            replace(chosen, drawing=drawing),
            reference,
            net,
            resamples=0,
            world=world,
            quiet=quiet,
            keep=False,
        )
        rows.append({"guidance": scale, "fid": float(result["fid"] or 0.0)})
        if not quiet and (world is None or world.is_main):
            console.print(f"guidance {scale:g}: FID {rows[-1]['fid']:.3f} on {num} samples")
    return min(rows, key=lambda row: row["fid"])["guidance"], rows
