"""Verbs that turn one model into another, or hand it on: zoo, convert, export, publish."""

from __future__ import annotations

import argparse

from varkd.cli.options import Verbs, add_verb, chosen, place, sampler_changes, sampler_options
from varkd.errors import VarkdError


def add(verbs: Verbs) -> None:
    _zoo(add_verb(verbs, "zoo", _run_zoo, "list the published models that varkd reads"))
    _convert(add_verb(verbs, "convert", _run_convert, "an official checkpoint -> a model folder, with a key report"))
    _shrink(add_verb(verbs, "shrink", _run_shrink, "a student cut out of its teacher, by importance on data"))
    _export(add_verb(verbs, "export", _run_export, "the model of a run -> a model folder, or an official file"))
    _quantize(
        add_verb(verbs, "quantize", _run_quantize, "the model of a run -> the same with int8, int4 or bf16 weights")
    )
    _publish(add_verb(verbs, "publish", _run_publish, "a run -> a folder or hub repository that runs in diffusers"))


def _zoo(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--json", action="store_true", help="machine-readable, with sizes and sampling settings")
    verb.add_argument("--tokenizers", action="store_true", help="list the published tokenizers instead")


def _run_zoo(arguments: argparse.Namespace) -> None:
    import json

    from varkd.backbones import zoo

    if arguments.json:
        print(json.dumps(zoo.describe(arguments.tokenizers), indent=1))
    else:
        print(zoo.format_tokenizers() if arguments.tokenizers else zoo.format_zoo())


def _convert(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("file", type=place, help="the official file (.pt, .pth, .bin, .safetensors), or an FSDP folder")
    verb.add_argument("--out", type=place, required=True, help="model folder")
    verb.add_argument("--family", default=None, help="default: recognized by the tensors")
    verb.add_argument("--model", default=None, metavar="NAME", help="which model of `varkd zoo` the weights are")
    verb.add_argument("--heads", type=int, default=None, help="attention heads, where neither file nor zoo tells")
    verb.add_argument("--grid", type=int, nargs="+", default=None, metavar="SIDE", help="codes per column (and row)")
    verb.add_argument("--scales", type=int, nargs="+", default=None, metavar="SIDE", help="var: sides of the maps")
    verb.add_argument("--num-classes", type=int, default=None, help="replace the class table by a new one for so many")
    verb.add_argument("--seed", type=int, default=0, help="of the new class table")
    verb.add_argument("--tokenizer", type=place, default=None, help="tokenizer folder: needed for var, else recorded")
    verb.add_argument("--weights", choices=("model", "ema"), default="model", help="which of the weights in the file")


def _run_convert(arguments: argparse.Namespace) -> None:
    from varkd.run.official import convert_file

    names = ("family", "model", "heads", "grid", "scales", "num_classes", "seed", "tokenizer", "weights")
    lines = convert_file(arguments.file, arguments.out, **chosen(arguments, *names))
    print("\n".join([*lines, str(arguments.out)]))


def _run_export(arguments: argparse.Namespace) -> None:
    places = [place for place in (arguments.out, arguments.onnx, arguments.web) if place is not None]
    if len(places) != 1:
        raise VarkdError("give one of --out, --onnx and --web")
    if arguments.out is not None:
        from varkd.run.official import export

        told = export(arguments.run_folder, arguments.out, arguments.official)
    else:
        from varkd.run.portable import export_portable

        web = arguments.web is not None
        told = export_portable(arguments.run_folder, places[0], web=web, runtime=arguments.runtime)
    print(f"{told}\n{places[0]}")


def _export(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("run_folder", type=place, metavar="RUN", help="run folder (its selected weights) or model folder")
    verb.add_argument("--out", type=place, default=None, help="model folder, or with --official a file")
    verb.add_argument(
        "--onnx", type=place, default=None, metavar="DIR", help="ONNX graphs that onnxruntime samples from"
    )
    verb.add_argument("--web", type=place, default=None, metavar="DIR", help="a page that samples in the browser")
    verb.add_argument(
        "--runtime",
        type=place,
        default=None,
        metavar="DIR",
        help="--web: an unpacked onnxruntime-web package (default: downloaded once)",
    )
    verb.add_argument("--official", action="store_true", help="write the file that the family's official code loads")


def _quantize(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("run_folder", type=place, metavar="RUN", help="run folder (its selected weights) or model folder")
    verb.add_argument("--out", type=place, required=True, help="new folder, which every verb reads like RUN")
    verb.add_argument("--weights", choices=("int8", "int4", "bf16"), required=True, help="of the linear layers")


def _run_quantize(arguments: argparse.Namespace) -> None:
    from varkd.run.quantizing import quantize_run

    print(f"{quantize_run(arguments.run_folder, arguments.out, arguments.weights)}\n{arguments.out}")


def _shrink(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("teacher", type=place, metavar="TEACHER", help="run folder or model folder")
    verb.add_argument("--data", type=place, required=True, help="codes folder that importance is measured on")
    verb.add_argument("--out", type=place, required=True, help="new model folder, for init=")
    verb.add_argument(
        "--params",
        type=float,
        default=None,
        metavar="SHARE",
        help="share of the parameters that stays, depth and width alike (instead of sizes)",
    )
    verb.add_argument("--layers", type=int, default=None, help="blocks that stay (default: all)")
    verb.add_argument("--dim", type=int, default=None, help="width; a multiple of the teacher's width of a head")
    verb.add_argument("--heads", type=int, default=None, help="heads that stay (default: as --dim says)")
    verb.add_argument("--ffn", type=int, default=None, help="FFN neurons that stay (default: all)")
    verb.add_argument("--num", type=int, default=256, help="sequences to measure on (default: %(default)s)")
    verb.add_argument("--device", default="auto")


def _run_shrink(arguments: argparse.Namespace) -> None:
    from varkd.run.shrinking import shrink_run

    names = ("params", "layers", "dim", "heads", "ffn", "num", "device")
    lines = shrink_run(arguments.teacher, arguments.data, arguments.out, **chosen(arguments, *names))
    print("\n".join([*lines, str(arguments.out)]))


def _publish(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("run_folder", type=place, metavar="RUN", help="run folder, or a model folder with --tokenizer")
    verb.add_argument("--to", required=True, metavar="DIR|hub:OWNER/NAME", help="folder, or repository of the hub")
    verb.add_argument("--tokenizer", type=place, default=None, metavar="DIR", help="of a model folder that is no run")
    verb.add_argument("--license", default=None, metavar="ID", help="such as apache-2.0 (default: none stated)")
    verb.add_argument(
        "--base-model", default=None, metavar="OWNER/NAME", help="hub repository that the weights come from"
    )
    verb.add_argument("--name", default=None, help="title of the card (default: the run's or the repository's)")
    verb.add_argument("--rows", type=int, default=4, help="rows of the sample grid (default: %(default)s)")
    verb.add_argument("--seed", type=int, default=0, help="of the sample grid (default: %(default)s)")
    verb.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    verb.add_argument("--device", default="auto")
    sampler_options(verb)


def _run_publish(arguments: argparse.Namespace) -> None:
    from dataclasses import replace

    from varkd.run.publish import default_sampler, publish

    given = sampler_changes(arguments)
    sampler = replace(default_sampler(arguments.run_folder), **given) if given else None
    names = ("tokenizer", "license", "base_model", "name", "rows", "seed", "private", "device")
    print(publish(arguments.run_folder, arguments.to, sampler=sampler, **chosen(arguments, *names)))
