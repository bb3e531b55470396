"""Verbs that train: train, study; and what they would do: show, methods."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from varkd.cli.options import Verbs, add_verb, place
from varkd.errors import VarkdError, did_you_mean


def add(verbs: Verbs) -> None:
    _train(add_verb(verbs, "train", _run_train, "train a teacher, or distil a student (the same command resumes)"))
    _study(
        add_verb(verbs, "study", _run_study, "methods x backbones x seeds under one budget (the same command resumes)")
    )
    _show(add_verb(verbs, "show", _run_show, "print a resolved run, its method in words"))
    _plan(add_verb(verbs, "plan", _run_plan, "what a run takes in memory, FLOPs and time, before it runs"))
    _methods(add_verb(verbs, "methods", _run_methods, "list the method presets"))
    _reproduce(add_verb(verbs, "reproduce", _run_reproduce, "the commands of a row of the paper's ImageNet table"))


def _train(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("recipe", help="a recipe file, or the name of one that ships with varkd (digits-teacher, ...)")
    verb.add_argument(
        "overrides", nargs="*", metavar="key=value", help="out=DIR data= teacher= method=NAME train.updates= ..."
    )
    verb.add_argument("--overwrite", action="store_true", help="start anew in a folder that holds another run")


def _run_train(arguments: argparse.Namespace) -> int:
    from varkd.config import load_run
    from varkd.run.training import train_run
    from varkd.train.loop import Stopped
    from varkd.world import World

    run, world = load_run(arguments.recipe, arguments.overrides), World.from_environment()
    try:
        progress = train_run(run, overwrite=arguments.overwrite)
    except Stopped as stopped:
        if world.is_main:
            print(f"varkd: {stopped}", file=sys.stderr)
        return stopped.exit_code
    finally:
        world.close()
    if world.is_main:
        print(f"{progress.step} updates in {progress.seconds:.0f} s\n{run.out}")
    return 0


def _study(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("recipe", help="a study's YAML file, or the name of one that ships with varkd (study-smoke, ...)")
    verb.add_argument("overrides", nargs="*", metavar="key=value", help="out=DIR workers=N executor=ray ...")


def _run_study(arguments: argparse.Namespace) -> None:
    from varkd.files import read_json
    from varkd.report.study import format_study
    from varkd.study.spec import load_study
    from varkd.study.study import run_study

    study = load_study(arguments.recipe, arguments.overrides)
    page = run_study(study)
    print(format_study(read_json(page.parents[1] / "results.json")))
    print(page)


def _show(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("recipe")
    verb.add_argument("overrides", nargs="*", metavar="key=value")


def _run_show(arguments: argparse.Namespace) -> None:
    from dataclasses import replace

    from varkd.config import differences, dump, load_run
    from varkd.distill.describe import explain
    from varkd.methods import METHODS

    run = load_run(arguments.recipe, arguments.overrides)
    preset = METHODS[run.preset]
    changes = differences(replace(run, method=preset.method), run)
    head = [f"{run.preset}: {preset.summary}", f"{preset.equation}   ({preset.source})"]
    told = [f"changed from the preset: {change}" for change in changes]
    if len(told) > 6:
        told = [f"changed from the preset in {len(told)} places"]
    words = [*head, *told, "", *explain(run.method)]
    print("\n".join(f"# {line}".rstrip() for line in words))
    print(dump(run), end="")


def _methods(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("names", nargs="*", metavar="NAME", help="only these presets (default: all)")
    verb.add_argument("--json", action="store_true", help="machine-readable")


def _run_methods(arguments: argparse.Namespace) -> None:
    import json

    from varkd.distill.describe import describe_presets, format_presets
    from varkd.methods import METHODS

    for name in arguments.names:
        if name not in METHODS:
            raise VarkdError(f"unknown method '{name}': {did_you_mean(name, METHODS)}")
    rows = describe_presets({name: METHODS[name] for name in arguments.names or METHODS})
    print(json.dumps(rows, indent=1) if arguments.json else format_presets(rows))


def _reproduce(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("row", help="llamagen-b-from-l, llamagen-l-from-xl, arpg-l-from-xl, ... (docs/imagenet.md)")
    verb.add_argument(
        "--images", type=place, default=Path("imagenet/train"), help="training images, a folder per class"
    )
    verb.add_argument("--downloads", type=place, default=Path("downloads"), help="folder of the official files")
    verb.add_argument("--out", type=place, default=Path("runs/imagenet"), help="folder of everything that is made")
    verb.add_argument("--gpus", type=int, default=8, help="of this machine (default: %(default)s)")
    verb.add_argument("--methods", nargs="+", default=["varkd"], help="second stages (default: varkd)")
    verb.add_argument("--dry-run", action="store_true", help="print the commands and what is missing; run nothing")


def _run_reproduce(arguments: argparse.Namespace) -> None:
    from varkd.run.reproduce import Places, describe, reproduce

    places = Places(arguments.images, arguments.downloads, arguments.out, arguments.gpus, tuple(arguments.methods))
    if arguments.dry_run:
        print(describe(arguments.row, places))
    else:
        reproduce(arguments.row, places)


def _plan(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("recipe", help="a recipe, as for `varkd train`")
    verb.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="as for `varkd train`; teacher= and init= may be names of `varkd zoo`",
    )
    verb.add_argument("--devices", type=int, default=1, help="that share the batch and the weights (FSDP)")
    verb.add_argument("--memory", type=float, default=None, metavar="GIB", help="of one device: what fits?")
    group = verb.add_argument_group("a device that is not this one (default: time shallow models here)")
    group.add_argument("--tflops", type=float, default=None, help="peak of its matrix products, in 10^12 a second")
    group.add_argument("--bandwidth", type=float, default=None, metavar="GB/S", help="of its memory")
    group.add_argument("--utilization", type=float, default=0.4, help="share of the peak that is reached (%(default)s)")
    verb.add_argument("--json", action="store_true", help="machine-readable")


def _run_plan(arguments: argparse.Namespace) -> None:
    import json

    from varkd.config import load_run
    from varkd.run.planning import Device, format_plan, plan_run

    if (arguments.tflops is None) != (arguments.bandwidth is None):
        raise VarkdError("a device has both --tflops and --bandwidth (an H100: 990 in bf16, and 3350)")
    machine = None
    if arguments.tflops is not None:
        machine = Device(arguments.tflops * 1e12, arguments.bandwidth * 1e9, arguments.utilization)
    run = load_run(arguments.recipe, arguments.overrides)
    plan = plan_run(run, devices=arguments.devices, machine=machine, memory=arguments.memory)
    print(json.dumps(plan, indent=1) if arguments.json else format_plan(plan))
