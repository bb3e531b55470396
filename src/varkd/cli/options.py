"""What verbs share: how one is declared, and the options that several have; imports nothing heavy."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from varkd.folders import expand

if TYPE_CHECKING:
    from varkd.rollout import Sampler

Verbs = Any
"""The object that `add_subparsers` returns: argparse keeps its class private."""


def add_verb(
    verbs: Verbs, name: str, run: Callable[[argparse.Namespace], int | None], text: str
) -> argparse.ArgumentParser:
    added = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    added.set_defaults(run=run)
    return added


def chosen(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The values of some options, by name: what a function behind a verb takes."""
    return {name: getattr(arguments, name) for name in names}


def place(text: str) -> Path:
    """A path of the command line; `~` is the home folder."""
    return Path(expand(text))


def adm_options(verb: argparse.ArgumentParser) -> None:
    """The options of `varkd evaluate` that concern ADM's numbers."""
    group = verb.add_argument_group("ADM's FID, sFID, IS, precision and recall (docs/evaluation.md)")
    group.add_argument(
        "--reference",
        type=place,
        default=None,
        metavar="REF",
        help="OpenAI's .npz, a folder of real images, or what --save-reference wrote",
    )
    group.add_argument(
        "--inception",
        type=place,
        default=None,
        metavar="FILE",
        help="weights of the 2015 Inception network (default: downloaded once)",
    )
    group.add_argument(
        "--distances",
        choices=("adm", "float32"),
        default="adm",
        help="precision and recall: rounded to float16 as published, or not",
    )
    group.add_argument("--resamples", type=int, default=200, help="bootstrap draws behind intervals, 0 for none")
    group.add_argument("--extras", action="store_true", help="KID and FID-infinity too")
    group.add_argument(
        "--save-reference", type=place, default=None, metavar="DIR", help="keep the reference's features"
    )
    group.add_argument(
        "--compare",
        type=place,
        default=None,
        metavar="JSON",
        help="an earlier result: printed beside, refused under another protocol",
    )
    group.add_argument(
        "--protocol",
        choices=("llamagen", "var", "arpg", "randar", "rar", "own"),
        default=None,
        help="draw samples as the family's official evaluation does (own: as the run)",
    )
    group.add_argument("--tokenizer", type=place, default=None, metavar="DIR", help="of a model folder that is no run")
    group.add_argument(
        "--search-guidance",
        type=float,
        nargs="*",
        default=None,
        metavar="SCALE",
        help="find the scale first, on 10,000 samples of another seed",
    )
    group.add_argument("--search-num", type=int, default=10_000, help="samples of that search (default: %(default)s)")
    group.add_argument("--batch-size", type=int, default=250, help="images drawn at a time (default: %(default)s)")
    group.add_argument("--json", action="store_true", help="print one JSON object")
    group.add_argument("--out", type=place, default=None, metavar="JSON", help="write the result there too")


def sampler_options(verb: argparse.ArgumentParser) -> None:
    """How codes are drawn, for every verb that samples."""
    text = "(default: the run's own)"
    verb.add_argument("--temperature", type=float, default=None, help=f"0 is greedy {text}")
    verb.add_argument("--top-k", type=int, default=None, help=f"0 keeps all codes {text}")
    verb.add_argument("--top-p", type=float, default=None, help=f"1 keeps all codes {text}")
    verb.add_argument(
        "--guidance",
        type=float,
        default=None,
        help=f"largest classifier-free guidance scale, 1 is off; it moves along the family's own schedule {text}",
    )
    verb.add_argument("--guidance-power", type=float, default=None, help=f"rar: shape of the schedule {text}")
    verb.add_argument("--steps", type=int, default=None, help=f"decode in parallel in this many steps {text}")
    verb.add_argument("--step-schedule", default=None, help=f"arpg: arccos or cosine {text}")
    verb.add_argument(
        "--parallel",
        choices=("off", "zipar", "auto"),
        default=None,
        help=f"zipar decodes rows of the grid at once (llamagen) {text}",
    )
    verb.add_argument("--window", type=int, default=None, help=f"zipar: codes between a row and the next {text}")


def sampler_of(arguments: argparse.Namespace) -> Sampler | None:
    """The run's sampler with the given options changed, or None when none is given."""
    from dataclasses import replace

    from varkd.config import read_run

    given = sampler_changes(arguments)
    return replace(read_run(arguments.run_folder).evaluation.sampler, **given) if given else None


def sampler_changes(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of `sampler_options` that are given."""
    names = (
        "temperature",
        "top_k",
        "top_p",
        "guidance",
        "guidance_power",
        "steps",
        "step_schedule",
        "parallel",
        "window",
    )
    return {name: value for name, value in ((name, getattr(arguments, name)) for name in names) if value is not None}
