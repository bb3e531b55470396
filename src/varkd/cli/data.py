"""Verbs that make data: demo, tokenizer, encode, teach."""

from __future__ import annotations

import argparse
from pathlib import Path

from varkd.cli.options import Verbs, add_verb, chosen, place
from varkd.errors import VarkdError
from varkd.folders import expand

_DATA = (
    "digits, an image folder, .parquet or .tar files (one, train,validation, a folder or '*.tar' of them), a "
    "Hugging Face id, or the URL of one of these (s3://, gs://, hf://)"
)


def add(verbs: Verbs) -> None:
    _demo(
        add_verb(verbs, "demo", _run_demo, "teacher, student and five methods on embedded real images, with a report")
    )
    _tokenizer(verbs)
    _encode(add_verb(verbs, "encode", _run_encode, "images -> code shards, with a reconstruction check"))
    _teach(add_verb(verbs, "teach", _run_teach, "a teacher's word on all codes, so that students train without it"))


def _run_demo(arguments: argparse.Namespace) -> None:
    from varkd.demo import demo

    demo(arguments.out, seed=arguments.seed, overwrite=arguments.overwrite)


def _demo(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--out", type=place, default=Path("runs/demo"), help="folder of the demo (default: %(default)s)")
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--overwrite", action="store_true", help="start anew instead of resuming or reusing")


def _tokenizer(verbs: Verbs) -> None:
    text = "train a tokenizer on images, or import an official one"
    group = verbs.add_parser("tokenizer", help=text, description=text[0].upper() + text[1:] + ".")
    inner = group.add_subparsers(title="verbs", metavar="VERB", required=True)
    fit = add_verb(inner, "fit", _run_tokenizer_fit, "train a tokenizer by reconstruction")
    fit.add_argument("data", help=_DATA)
    fit.add_argument("--out", type=place, required=True, help="folder of the tokenizer")
    fit.add_argument("--kind", choices=("vq", "multiscale"), default="vq", help="one grid of codes, or VAR's maps")
    fit.add_argument(
        "--scales",
        type=int,
        nargs="+",
        default=None,
        metavar="SIDE",
        help="multiscale: sides of the maps (default: 1 2 4 ... to the last)",
    )
    fit.add_argument("--codes", type=int, default=512, dest="vocab_size", help="codebook size (default: %(default)s)")
    fit.add_argument("--downsampling", type=int, default=4, help="pixels per code side (default: %(default)s)")
    fit.add_argument("--steps", type=int, default=None, help="training steps")
    fit.add_argument("--no-flip", action="store_false", dest="flip", help="do not mirror training images")
    fit.add_argument("--overwrite", action="store_true")
    _image_options(fit)
    _tokenizer_import(add_verb(inner, "import", _run_tokenizer_import, "an official tokenizer -> a tokenizer folder"))


def _tokenizer_import(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("file", type=place, help="vq_ds16_c2i.pt, vae_ch160v4096z32.pth, maskgit-vqgan-*.bin or the like")
    verb.add_argument("--out", type=place, required=True, help="folder of the tokenizer")
    verb.add_argument("--image-size", type=int, default=256, help="side of the images (default: %(default)s)")
    verb.add_argument(
        "--kind",
        choices=("vq", "multiscale", "maskgit"),
        default=None,
        help="LlamaGen's, VAR's or MaskGIT's (default: recognized by the tensors)",
    )
    verb.add_argument(
        "--scales",
        type=int,
        nargs="+",
        default=None,
        metavar="SIDE",
        help="multiscale: sides of the maps (default: the published ones for 256 or 512)",
    )
    verb.add_argument("--overwrite", action="store_true")


def _run_tokenizer_fit(arguments: argparse.Namespace) -> None:
    from varkd.run.data import fit

    names = (
        "kind",
        "scales",
        "vocab_size",
        "downsampling",
        "steps",
        "flip",
        "overwrite",
        "label",
        "skip_corrupt",
        "image_size",
        "validation",
        "seed",
        "device",
    )
    record = fit(arguments.data, arguments.out, **chosen(arguments, *names))
    print(f"PSNR {record['psnr']:.2f} dB on {record['num']} held-out images, {record['seconds']:.0f} s")
    print(f"{record['codes_used']:.0%} of the codes used\n{arguments.out}")


def _run_tokenizer_import(arguments: argparse.Namespace) -> None:
    from varkd.run.data import import_official

    options = chosen(arguments, "image_size", "kind", "scales", "overwrite")
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
    verb.add_argument(
        "--ten-crop",
        type=float,
        default=None,
        metavar="RATIO",
        help="LlamaGen's ten crops, of images this much larger (1.1)",
    )
    verb.add_argument("--batch-size", type=int, default=256)
    verb.add_argument("--shard-size", type=int, default=4096, help="images per shard (default: %(default)s)")
    verb.add_argument(
        "--workers",
        type=int,
        default=0,
        help="processes that decode images ahead of the tokenizer, for each GPU (default: none)",
    )
    verb.add_argument(
        "--class-map",
        type=place,
        default=None,
        metavar="FILE",
        help="each class's number in a teacher of more classes: JSON or text (docs/data.md)",
    )
    _image_options(verb)


def _run_encode(arguments: argparse.Namespace) -> None:
    from varkd.run.data import describe_codes, encode
    from varkd.world import World

    names = (
        "flip",
        "shifts",
        "ten_crop",
        "batch_size",
        "shard_size",
        "workers",
        "class_map",
        "label",
        "skip_corrupt",
        "image_size",
        "validation",
        "seed",
        "device",
    )
    world = World.from_environment()
    try:
        encode(arguments.data, arguments.tokenizer, arguments.out, **chosen(arguments, *names))
    finally:
        world.close()
    if world.is_main:
        print("\n".join([*describe_codes(arguments.out), str(arguments.out)]))


def _teach(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("teacher", type=place, help="a run or model folder")
    verb.add_argument("--data", type=expand, required=True, help="codes folder, or the URL of one")
    verb.add_argument(
        "--out", type=place, required=True, help="folder of the cache (a teacher= of `varkd train`) or samples (data=)"
    )
    verb.add_argument(
        "--top-k", type=int, default=None, help="likeliest codes kept at a position (default: 64, or all)"
    )
    verb.add_argument("--dtype", choices=("float16", "float32"), default="float16", help="of the log-probabilities")
    verb.add_argument(
        "--no-null",
        action="store_false",
        dest="null",
        help="leave out the null branch: half the size, for train.label_drop=0",
    )
    verb.add_argument(
        "--guidance",
        type=float,
        default=None,
        metavar="SCALE",
        help="ask the guided teacher, for a method.target of this scale",
    )
    verb.add_argument("--batch-size", type=int, default=64, help="images read at a time (default: %(default)s)")
    verb.add_argument("--shard-size", type=int, default=1024, help="images per shard (default: %(default)s)")
    verb.add_argument("--device", default="auto", help="auto, cpu or cuda")
    group = verb.add_argument_group("sequences that the teacher samples, in place of its word on the data")
    group.add_argument("--samples", type=int, default=None, metavar="N", help="write N of them as a codes folder")
    group.add_argument(
        "--sampler", nargs="+", default=None, metavar="key=value", help="temperature=, top_k=, top_p=, guidance=, ..."
    )
    group.add_argument(
        "--labels", choices=("data", "balanced"), default=None, help="as often as the training images have them (data)"
    )
    group.add_argument("--seed", type=int, default=None, help="of the samples (default: 0)")


_OF_SAMPLES = ("sampler", "labels", "seed")
_OF_CACHES = {"top_k": None, "dtype": "float16", "null": True, "guidance": None}


def _run_teach(arguments: argparse.Namespace) -> None:
    given = vars(arguments)
    if arguments.samples is not None:
        if [name for name, default in _OF_CACHES.items() if given[name] != default]:
            raise VarkdError(
                "--samples writes codes, not a cache: leave --top-k, --dtype, --no-null and --guidance out, and say "
                "how the teacher samples by --sampler top_k=... guidance=..."
            )
        _run_teach_samples(arguments)
        return
    if useless := [f"--{name}" for name in _OF_SAMPLES if given[name] is not None]:
        raise VarkdError(f"{', '.join(useless)}: only with --samples N")
    _run_teach_cache(arguments)


def _run_teach_samples(arguments: argparse.Namespace) -> None:
    from varkd.config import sampler_from
    from varkd.run.teacher_samples import describe_samples, teach_samples
    from varkd.world import World

    world, names = World.from_environment(), ("batch_size", "shard_size", "device")
    options = {name: value for name, value in chosen(arguments, "labels", "seed").items() if value is not None}
    try:
        sampler = sampler_from(arguments.sampler or ())
        teach_samples(
            arguments.teacher,
            arguments.data,
            arguments.out,
            arguments.samples,
            sampler=sampler,
            **options,
            **chosen(arguments, *names),
        )
    finally:
        world.close()
    if world.is_main:
        print("\n".join([*describe_samples(arguments.out), str(arguments.out)]))


def _run_teach_cache(arguments: argparse.Namespace) -> None:
    from varkd.run.teaching import describe_cache, teach
    from varkd.world import World

    names = ("top_k", "dtype", "null", "guidance", "batch_size", "shard_size", "device")
    world = World.from_environment()
    try:
        teach(arguments.teacher, arguments.data, arguments.out, **chosen(arguments, *names))
    finally:
        world.close()
    if world.is_main:
        print("\n".join([*describe_cache(arguments.out), str(arguments.out)]))


def _image_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--image-size", type=int, default=None, help="resize and center-crop to this side")
    verb.add_argument("--label", default=None, metavar="NAME", help="label column of a table (none: one class)")
    verb.add_argument("--skip-corrupt", action="store_true", help="leave out images that cannot be decoded")
    verb.add_argument("--validation", type=float, default=0.1, help="share held out where the data has no such split")
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--device", default="auto", help="auto, cpu or cuda")
