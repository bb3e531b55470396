"""`varkd evaluate IMAGES --reference REF`: ADM's numbers for images from anywhere, and comparisons of such results."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from varkd.config import read_run
from varkd.errors import VarkdError
from varkd.evaluate.adm import AdmResult, adm, compare, format_result
from varkd.evaluate.inception import Inception
from varkd.evaluate.inception_files import load_inception
from varkd.evaluate.manifolds import Mode
from varkd.evaluate.reference import Reference, open_reference, save_reference
from varkd.files import read_json, write_json
from varkd.rollout import Sampler
from varkd.run.data import rank_device
from varkd.run.official_evaluation import evaluate_plan, open_candidate, plan_of, search_guidance
from varkd.run.protocols import PUBLISHED_NUM, format_card
from varkd.world import World


def judge_images(samples: Path, judge: Judge) -> AdmResult:
    """ADM's numbers of a folder or an .npz.

    Raises:
        VarkdError: see `varkd.metrics.adm`.
    """
    return adm(
        samples,
        judge.reference,
        judge.net,
        mode=judge.mode,
        resamples=judge.resamples,
        extras=judge.extras,
        world=judge.world,
        quiet=judge.quiet,
    )


@dataclass(frozen=True)
class Judge:
    """The network and the reference of an evaluation, and its options."""

    net: Inception
    reference: Reference
    mode: Mode
    resamples: int
    extras: bool
    world: World
    quiet: bool

    @classmethod
    def of(cls, arguments: argparse.Namespace, world: World) -> Judge:
        """As the options say; the reference is built, and saved where they ask.

        Raises:
            VarkdError: there is nothing to judge or no reference, or weights or reference are damaged.
        """
        samples = arguments.run_folder
        if not samples.exists():
            raise VarkdError(f"{samples} is not a run folder, an .npz file or a folder of images")
        if arguments.reference is None and arguments.protocol:
            raise VarkdError(
                "samples are judged against a reference: give --reference FILE, such as VIRTUAL_imagenet256_labeled.npz"
            )
        if arguments.reference is None:
            raise VarkdError(
                f"{samples} is not a run folder, and images are judged against a reference: give "
                "--reference FILE, such as VIRTUAL_imagenet256_labeled.npz"
            )
        net = load_inception(arguments.inception, device=rank_device(arguments.device, world))
        reference = open_reference(arguments.reference, net, world=world, quiet=arguments.json)
        if arguments.save_reference is not None and world.is_main:
            save_reference(reference, arguments.save_reference)
        return cls(net, reference, arguments.distances, arguments.resamples, arguments.extras, world, arguments.json)


def compared_with(result: AdmResult, name: str, other: Path) -> str:
    """The numbers of a result beside those of a saved one, as text.

    Raises:
        VarkdError: no result there, or one of another protocol.
    """
    rows = compare({name: result, str(other): AdmResult.from_json(read_json(other))})
    names = list(dict.fromkeys(key for row in rows.values() for key in row))
    lines = [f"{'':<13}" + "".join(f"{Path(label).name:>24}" for label in rows)]
    shown = lambda value: "-" if value is None else f"{value:.4f}"
    lines += [f"{key:<13}" + "".join(f"{shown(row.get(key)):>24}" for row in rows.values()) for key in names]
    return "\n".join(lines)


SamplerOf = Callable[[argparse.Namespace], Sampler | None]


def evaluate_verb(arguments: argparse.Namespace, sampler_of: SamplerOf) -> None:
    """`varkd evaluate`, parsed: a run under our own protocol, or images under ADM's."""
    if arguments.reference or arguments.protocol or not (arguments.run_folder / "run.yaml").is_file():
        _judge(arguments)
        return
    from varkd.report.tables import comparison_table, format_text_table
    from varkd.run.evaluation import evaluate_run

    given = {"num_samples": arguments.num, "seed": arguments.seed, "sampler": sampler_of(arguments)}
    settings = replace(read_run(arguments.run_folder).evaluation, **{k: v for k, v in given.items() if v is not None})
    metrics = evaluate_run(
        arguments.run_folder,
        features=arguments.features,
        teacher=arguments.teacher,
        settings=settings,
        device=arguments.device,
    )
    print(format_text_table(comparison_table([metrics])))
    print(arguments.run_folder / "metrics.json")


def _judge(arguments: argparse.Namespace) -> None:
    world = World.from_environment()
    try:
        if arguments.protocol is None and _has_model(arguments.run_folder):
            arguments.protocol = "own"
        if arguments.protocol is None:
            result, more = judge_images(arguments.run_folder, Judge.of(arguments, world)), {}
        else:
            result, more = _draw_and_judge(arguments, world)
    finally:
        world.close()
    if world.is_main:
        show(result, arguments, more)


def _has_model(folder: Path) -> bool:
    return (folder / "run.yaml").is_file()


def _draw_and_judge(arguments: argparse.Namespace, world: World) -> tuple[AdmResult, dict[str, Any]]:
    judge, more = Judge.of(arguments, world), {}
    candidate = open_candidate(arguments.run_folder, arguments.tokenizer, str(rank_device(arguments.device, world)))
    name, options = arguments.protocol, {"batch_size": arguments.batch_size, "seed": arguments.seed}
    changes = _changes(arguments)
    if arguments.search_guidance is not None:
        changes["guidance"], more["search"] = search_guidance(
            candidate,
            name,
            judge.reference,
            judge.net,
            arguments.search_guidance,
            num=arguments.search_num,
            changes=changes,
            world=world,
            quiet=judge.quiet,
            **options,
        )
    chosen = plan_of(candidate, name, num=arguments.num or PUBLISHED_NUM, changes=changes, **options)
    if world.is_main and not arguments.json:
        print(format_card(chosen), end="\n\n")
    result = evaluate_plan(
        candidate,
        chosen,
        judge.reference,
        judge.net,
        mode=judge.mode,
        resamples=judge.resamples,
        extras=judge.extras,
        world=world,
        quiet=judge.quiet,
    )
    return result, {**more, "card": chosen.card()}


def _changes(arguments: argparse.Namespace) -> dict[str, Any]:
    """The sampler options that were given."""
    given = {field.name: getattr(arguments, field.name, None) for field in fields(Sampler)}
    return {name: value for name, value in given.items() if value is not None}


def show(result: AdmResult, arguments: argparse.Namespace, more: Mapping[str, Any] | None = None) -> None:
    """Print a result as the options ask, and write it where they say."""
    record = {**result.to_json(), **(more or {})}
    beside = compared_with(result, str(arguments.run_folder), arguments.compare) if arguments.compare else None
    if arguments.out is not None:
        write_json(arguments.out, record)
    if arguments.json:
        for warning in result.warnings:
            print(f"varkd: warning: {warning}", file=sys.stderr)
        print(json.dumps(record))
    else:
        print(format_result(result))
    if beside is not None:
        print(beside)
