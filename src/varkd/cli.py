"""The `varkd` command: parse, import what the verb needs, call it; nothing else.

Exit codes: 0 done; 2 something that the user can put right (one line on stderr); 128 + signal when stopped by one
(after saving; the same command resumes). `--help` imports neither torch nor numpy.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from varkd.errors import VarkdError, check_seed, did_you_mean, missing_extra
from varkd.files import refusal
from varkd.run.options import adm_options, export_options, place, reproduce_options, sampler_of, sampler_options
from varkd.version import VERSION

_DATA = ("digits, an image folder, .parquet or .tar files (one, train,validation, a folder or '*.tar' of them), or a "
         "Hugging Face id")  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    parsed = parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # arrows and names go through any terminal
    try:
        check_seed("--seed", getattr(parsed, "seed", None) or 0)
        return parsed.run(parsed) or 0
    except VarkdError as error:
        print(f"varkd: error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        advice = missing_extra(error)
        if advice is None:
            raise
        print(f"varkd: error: {advice}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("varkd: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader (head, less) has seen enough
        return 0
    except OSError as error:
        if error.errno is None:
            raise
        print(f"varkd: error: {refusal(error)}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="varkd", description="Compress visual autoregressive image models by knowledge distillation."
    )
    top.add_argument("--version", action="version", version=f"varkd {VERSION}")
    verbs = top.add_subparsers(title="verbs", metavar="VERB", required=True)
    _demo(_verb(verbs, "demo", _run_demo, "teacher, student and five methods on embedded real images, with a report"))
    _tokenizer(verbs)
    _encode(_verb(verbs, "encode", _run_encode, "images -> code shards, with a reconstruction check"))
    _train(_verb(verbs, "train", _run_train, "train a teacher, or distil a student (the same command resumes)"))
    _sample(_verb(verbs, "sample", _run_sample, "draw images from a run"))
    _evaluate(_verb(verbs, "evaluate", _run_evaluate, "measure a run: samples, agreement with the teacher, speed"))
    _analyze(
        _verb(verbs, "analyze", _run_analyze, "diagnose a student and its teacher, position by position, as a page")
    )
    _study(_verb(verbs, "study", _run_study, "methods x backbones x seeds under one budget (the same command resumes)"))
    _report(_verb(verbs, "report", _run_report, "one self-contained HTML page that compares runs"))
    _show(_verb(verbs, "show", _run_show, "print a resolved run, its method in words"))
    _methods(_verb(verbs, "methods", _run_methods, "list the method presets"))
    _zoo(_verb(verbs, "zoo", _run_zoo, "list the published models that varkd reads"))
    _convert(_verb(verbs, "convert", _run_convert, "an official checkpoint -> a model folder, with a key report"))
    export_options(_verb(verbs, "export", _run_export, "the model of a run -> a model folder, or an official file"))
    reproduce_options(_verb(verbs, "reproduce", _run_reproduce, "the commands of a row of the paper's ImageNet table"))
    return top


def _verb(verbs, name: str, run: Callable[[argparse.Namespace], int | None], text: str) -> argparse.ArgumentParser:
    verb = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    verb.set_defaults(run=run)
    return verb


def _demo(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--out", type=place, default=Path("runs/demo"), help="folder of the demo (default: %(default)s)")
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--overwrite", action="store_true", help="start anew instead of resuming or reusing")


def _run_demo(arguments: argparse.Namespace) -> None:
    from varkd.demo import demo

    demo(arguments.out, seed=arguments.seed, overwrite=arguments.overwrite)


def _tokenizer(verbs) -> None:
    text = "train a tokenizer on images, or import an official one"
    group = verbs.add_parser("tokenizer", help=text, description=text[0].upper() + text[1:] + ".")
    inner = group.add_subparsers(title="verbs", metavar="VERB", required=True)
    fit = _verb(inner, "fit", _run_tokenizer_fit, "train a tokenizer by reconstruction")
    fit.add_argument("data", help=_DATA)
    fit.add_argument("--out", type=place, required=True, help="folder of the tokenizer")
    fit.add_argument("--kind", choices=("vq", "multiscale"), default="vq", help="one grid of codes, or VAR's maps")
    fit.add_argument("--scales", type=int, nargs="+", default=None, metavar="SIDE",
                     help="multiscale: sides of the maps (default: 1 2 4 ... to the last)")  # fmt: skip
    fit.add_argument("--codes", type=int, default=512, dest="vocab_size", help="codebook size (default: %(default)s)")
    fit.add_argument("--downsampling", type=int, default=4, help="pixels per code side (default: %(default)s)")
    fit.add_argument("--steps", type=int, default=None, help="training steps")
    fit.add_argument("--no-flip", action="store_false", dest="flip", help="do not mirror training images")
    fit.add_argument("--overwrite", action="store_true")
    _image_options(fit)
    _tokenizer_import(_verb(inner, "import", _run_tokenizer_import, "an official tokenizer -> a tokenizer folder"))


def _tokenizer_import(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("file", type=place, help="vq_ds16_c2i.pt, vae_ch160v4096z32.pth, maskgit-vqgan-*.bin or the like")
    verb.add_argument("--out", type=place, required=True, help="folder of the tokenizer")
    verb.add_argument("--image-size", type=int, default=256, help="side of the images (default: %(default)s)")
    verb.add_argument("--kind", choices=("vq", "multiscale", "maskgit"), default=None,
                      help="LlamaGen's, VAR's or MaskGIT's (default: recognized by the tensors)")  # fmt: skip
    verb.add_argument("--scales", type=int, nargs="+", default=None, metavar="SIDE",
                      help="multiscale: sides of the maps (default: the published ones for 256 or 512)")  # fmt: skip
    verb.add_argument("--overwrite", action="store_true")


def _run_tokenizer_fit(arguments: argparse.Namespace) -> None:
    from varkd.run.data import fit

    names = ("kind", "scales", "vocab_size", "downsampling", "steps", "flip", "overwrite",
             "label", "skip_corrupt", "image_size", "validation", "seed", "device")  # fmt: skip
    record = fit(arguments.data, arguments.out, **_options(arguments, *names))
    print(f"PSNR {record['psnr']:.2f} dB on {record['num']} held-out images, {record['seconds']:.0f} s")
    print(f"{record['codes_used']:.0%} of the codes used\n{arguments.out}")


def _run_tokenizer_import(arguments: argparse.Namespace) -> None:
    from varkd.run.data import import_official

    options = _options(arguments, "image_size", "kind", "scales", "overwrite")
    tokenizer = import_official(arguments.file, arguments.out, **options)
    sides = [f"{side}x{side}" for side in tokenizer.scales or tokenizer.grid[:1]]
    where = f"maps of {', '.join(sides)}" if tokenizer.scales else f"a {sides[0]} grid"
    print(f"{tokenizer.kind}: {tokenizer.vocab_size} codes on {where}, hash {tokenizer.hash[:12]}\n{arguments.out}")


def _encode(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("data", help=_DATA)
    verb.add_argument("--tokenizer", required=True, help="tokenizer folder, or 'pixels' for small gray images")
    verb.add_argument("--out", type=place, required=True, help="codes folder")
    verb.add_argument("--flip", action="store_true", help="encode mirror images too")
    verb.add_argument("--shifts", type=int, default=0, help="encode shifts of up to this many pixels too")
    verb.add_argument("--ten-crop", type=float, default=None, metavar="RATIO",
                      help="LlamaGen's ten crops, of images this much larger (1.1)")  # fmt: skip
    verb.add_argument("--batch-size", type=int, default=256)
    verb.add_argument("--shard-size", type=int, default=4096, help="images per shard (default: %(default)s)")
    verb.add_argument("--class-map", type=place, default=None, metavar="FILE",
                      help="each class's number in a teacher of more classes: JSON or text (docs/data.md)")  # fmt: skip
    _image_options(verb)


def _run_encode(arguments: argparse.Namespace) -> None:
    from varkd.run.data import describe_codes, encode
    from varkd.world import World

    names = ("flip", "shifts", "ten_crop", "batch_size", "shard_size", "class_map", "label", "skip_corrupt",
             "image_size", "validation", "seed", "device")  # fmt: skip
    world = World.from_environment()
    try:
        encode(arguments.data, arguments.tokenizer, arguments.out, **_options(arguments, *names))
    finally:
        world.close()
    if world.is_main:
        print("\n".join([*describe_codes(arguments.out), str(arguments.out)]))


def _image_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--image-size", type=int, default=None, help="resize and center-crop to this side")
    verb.add_argument("--label", default=None, metavar="NAME", help="label column of a table (none: one class)")
    verb.add_argument("--skip-corrupt", action="store_true", help="leave out images that cannot be decoded")
    verb.add_argument("--validation", type=float, default=0.1, help="share held out where the data has no such split")
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--device", default="auto", help="auto, cpu or cuda")


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


def _sample(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("run_folder", type=place, metavar="RUN")
    verb.add_argument("--out", type=place, required=True, help="folder of the samples")
    verb.add_argument("--num", "--num-images", type=int, default=100, help="number of images (default: %(default)s; "
                      "under torchrun write --num-images: it takes --num for one of its own options)")  # fmt: skip
    verb.add_argument("--labels", type=int, nargs="+", default=None, help="class labels (default: all, balanced)")
    verb.add_argument("--seed", type=int, default=None)
    verb.add_argument("--batch-size", type=int, default=250)
    verb.add_argument("--format", choices=("npz", "png"), default="npz", help="one .npz, or a folder of PNGs")
    verb.add_argument("--device", default="auto")
    sampler_options(verb)


def _run_sample(arguments: argparse.Namespace) -> None:
    from varkd.run.sampling import sample_run
    from varkd.world import World

    options, world = _options(arguments, "seed", "labels", "batch_size", "device"), World.from_environment()
    try:
        out = sample_run(arguments.run_folder, arguments.out, arguments.num, sampler=sampler_of(arguments),
                         layout=arguments.format, world=world, **options)  # fmt: skip
    finally:
        world.close()
    if world.is_main:
        print(out)


def _evaluate(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("run_folder", type=place, metavar="RUN", help="a run; or, with --reference, an .npz or a folder")
    verb.add_argument("--num", "--num-images", type=int, default=None, help="number of samples (default: the run's)")
    verb.add_argument("--seed", type=int, default=None, help="sampling seed (default: the run's own)")
    verb.add_argument("--features", type=place, default=None, help="feature network folder (default: beside the codes)")
    verb.add_argument("--teacher", type=place, default=None, help="model to compare with (default: the run's teacher)")
    verb.add_argument("--device", default="auto")
    sampler_options(verb)
    adm_options(verb)


def _run_evaluate(arguments: argparse.Namespace) -> None:
    from varkd.run.judging import evaluate_verb

    evaluate_verb(arguments, sampler_of)


def _analyze(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("run_folder", type=place, metavar="RUN", help="a student's run folder, or a model folder")
    verb.add_argument("--out", type=place, required=True, help="folder of the page and of the CSV files")
    verb.add_argument("--teacher", type=place, default=None, help="teacher's run or model folder (default: the run's)")
    verb.add_argument("--second", type=place, default=None, help="a second teacher: do teachers agree with each other?")
    verb.add_argument("--data", type=place, default=None, help="codes folder (default: the run's own)")
    verb.add_argument("--num", type=int, default=1000, help="sequences in each context (default: %(default)s)")
    verb.add_argument("--split", choices=("validation", "train"), default="validation", help="where data come from")
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--device", default="auto", help="auto, cpu or cuda")


def _run_analyze(arguments: argparse.Namespace) -> None:
    from varkd.run.analysis import analyze_run

    names = ("teacher", "second", "data", "num", "split", "seed", "device")
    print(analyze_run(arguments.run_folder, arguments.out, **_options(arguments, *names)))


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


def _report(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("runs", type=place, nargs="+", metavar="RUN")
    verb.add_argument("--out", type=place, required=True, help="folder of the report")
    verb.add_argument("--title", default="varkd report")


def _run_report(arguments: argparse.Namespace) -> None:
    from varkd.report import write_report

    print(write_report(arguments.runs, arguments.out, title=arguments.title))


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
    lines = convert_file(arguments.file, arguments.out, **_options(arguments, *names))
    print("\n".join([*lines, str(arguments.out)]))


def _run_export(arguments: argparse.Namespace) -> None:
    from varkd.run.official import export

    print(f"{export(arguments.run_folder, arguments.out, arguments.official)}\n{arguments.out}")


def _run_reproduce(arguments: argparse.Namespace) -> None:
    from varkd.run.reproduce import Places, describe, reproduce

    places = Places(arguments.images, arguments.downloads, arguments.out, arguments.gpus, tuple(arguments.methods))
    if arguments.dry_run:
        print(describe(arguments.row, places))
    else:
        reproduce(arguments.row, places)


def _options(arguments: argparse.Namespace, *names: str) -> dict:
    return {name: getattr(arguments, name) for name in names}


def leave(code: int) -> None:
    """End the process. Under torchrun without the interpreter's shutdown: there, on a loaded machine, a thread that a
    library has not joined aborts a rank now and then whose work is done and on disk, and torchrun calls the run failed.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    leave(main())
