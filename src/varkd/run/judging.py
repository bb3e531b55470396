"""`varkd evaluate IMAGES --reference REF`: ADM's numbers for images from anywhere, and comparisons of such results."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from varkd.config import read_run
from varkd.errors import VarkdError
from varkd.evaluate.adm import AdmResult, adm, compare, format_result
from varkd.evaluate.inception_files import load_inception
from varkd.evaluate.manifolds import Mode
from varkd.evaluate.reference import open_reference, save_reference
from varkd.files import read_json, write_json
from varkd.rollout import Sampler
from varkd.run.data import pick_device
from varkd.world import World


def judge_images(
    samples: Path, reference: Path | None, *, inception: Path | None = None, mode: Mode = "adm", resamples: int = 200,
    extras: bool = False, save_reference_to: Path | None = None, device: str = "auto", world: World | None = None,
    quiet: bool = False,
) -> AdmResult:  # fmt: skip
    """ADM's numbers of a folder or an .npz.

    Args:
        save_reference_to: a folder that keeps the reference's statistics and features, for later runs.

    Raises:
        VarkdError: no reference was given, or see `varkd.metrics.adm`.
    """
    if not samples.exists():
        raise VarkdError(f"{samples} is not a run folder, an .npz file or a folder of images")
    if reference is None:
        raise VarkdError(f"{samples} is not a run folder, and images are judged against a reference: give --reference "
                         "FILE, such as VIRTUAL_imagenet256_labeled.npz or a folder of real images")  # fmt: skip
    world = world or World()
    net = load_inception(inception, device=pick_device(device))
    real = open_reference(reference, net, world=world, quiet=quiet)
    if save_reference_to is not None and world.is_main:
        save_reference(real, save_reference_to)
    return adm(samples, real, net, mode=mode, resamples=resamples, extras=extras, world=world, quiet=quiet)


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


def evaluate_verb(arguments: argparse.Namespace, sampler_of: Callable[[argparse.Namespace], Sampler | None]) -> None:
    """`varkd evaluate`, parsed: a run under our own protocol, or images under ADM's."""
    if arguments.reference or not (arguments.run_folder / "run.yaml").is_file():
        _judge(arguments)
        return
    from varkd.report.tables import comparison_table, format_text_table
    from varkd.run.evaluation import evaluate_run

    given = {"num_samples": arguments.num, "seed": arguments.seed, "sampler": sampler_of(arguments)}
    settings = replace(read_run(arguments.run_folder).evaluation, **{k: v for k, v in given.items() if v is not None})
    metrics = evaluate_run(arguments.run_folder, features=arguments.features, teacher=arguments.teacher,
                           settings=settings, device=arguments.device)  # fmt: skip
    print(format_text_table(comparison_table([metrics])))
    print(arguments.run_folder / "metrics.json")


def _judge(arguments: argparse.Namespace) -> None:
    world = World.from_environment()
    try:
        result = judge_images(
            arguments.run_folder, arguments.reference, inception=arguments.inception, mode=arguments.distances,
            resamples=arguments.resamples, extras=arguments.extras, save_reference_to=arguments.save_reference,
            device=arguments.device, world=world, quiet=arguments.json,
        )  # fmt: skip
    finally:
        world.close()
    if world.is_main:
        show(result, arguments)


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
