"""Verbs that look at a model: sample, evaluate, analyze, report."""

from __future__ import annotations

import argparse

from varkd.cli.options import Verbs, add_verb, adm_options, chosen, place, sampler_of, sampler_options


def add(verbs: Verbs) -> None:
    _sample(add_verb(verbs, "sample", _run_sample, "draw images from a run"))
    _evaluate(add_verb(verbs, "evaluate", _run_evaluate, "measure a run: samples, agreement with the teacher, speed"))
    _analyze(
        add_verb(verbs, "analyze", _run_analyze, "diagnose a student and its teacher, position by position, as a page")
    )
    _app(add_verb(verbs, "app", _run_app, "models side by side in the browser, on this machine"))
    _report(add_verb(verbs, "report", _run_report, "one self-contained HTML page that compares runs"))
    _bench(add_verb(verbs, "bench", _run_bench, "how fast loss, rollouts and training steps are, against other code"))


def _sample(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("run_folder", type=place, metavar="RUN")
    verb.add_argument("--out", type=place, required=True, help="folder of the samples")
    verb.add_argument(
        "--num",
        "--num-images",
        type=int,
        default=100,
        help="number of images (default: %(default)s; "
        "under torchrun write --num-images: it takes --num for one of its own options)",
    )
    verb.add_argument("--labels", type=int, nargs="+", default=None, help="class labels (default: all, balanced)")
    verb.add_argument("--seed", type=int, default=None)
    verb.add_argument("--batch-size", type=int, default=250)
    verb.add_argument("--format", choices=("npz", "png"), default="npz", help="one .npz, or a folder of PNGs")
    verb.add_argument("--device", default="auto")
    sampler_options(verb)


def _run_sample(arguments: argparse.Namespace) -> None:
    from varkd.run.sampling import sample_run
    from varkd.world import World

    options, world = chosen(arguments, "seed", "labels", "batch_size", "device"), World.from_environment()
    try:
        out = sample_run(
            arguments.run_folder,
            arguments.out,
            arguments.num,
            sampler=sampler_of(arguments),
            layout=arguments.format,
            world=world,
            **options,
        )
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
    print(analyze_run(arguments.run_folder, arguments.out, **chosen(arguments, *names)))


def _report(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("runs", type=place, nargs="+", metavar="RUN")
    verb.add_argument("--out", type=place, required=True, help="folder of the report")
    verb.add_argument("--title", default="varkd report")


def _run_report(arguments: argparse.Namespace) -> None:
    from varkd.report import write_report

    print(write_report(arguments.runs, arguments.out, title=arguments.title))


def _app(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("runs", type=place, nargs="+", metavar="RUN", help="runs (or model folders) on the same codes")
    verb.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in (default: %(default)s)")
    verb.add_argument("--port", type=int, default=7860)
    verb.add_argument("--device", default="auto")


def _run_app(arguments: argparse.Namespace) -> None:
    from varkd.app.page import launch

    launch(arguments.runs, host=arguments.host, port=arguments.port, device=arguments.device)


def _bench(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("groups", nargs="*", metavar="GROUP", help="loss, rollout, step (default: all three)")
    verb.add_argument("--device", default="auto", help="auto, cpu or cuda")
    verb.add_argument(
        "--size",
        choices=("tiny", "small", "full"),
        default=None,
        help="full: the sizes of published models (default: full on CUDA, small on a CPU)",
    )
    verb.add_argument("--repeats", type=int, default=3, help="runs of each side, by turns (default: %(default)s)")
    verb.add_argument(
        "--budget",
        type=float,
        default=None,
        metavar="SECONDS",
        help="begin nothing new after that long (default: 100 on CUDA, no limit on a CPU)",
    )
    verb.add_argument("--json", type=place, default=None, metavar="FILE", help="write machine and rows there too")
    group = verb.add_argument_group(
        "official code to compare with: it is imported from the folder that you name, and run"
    )
    group.add_argument("--llamagen", type=place, default=None, metavar="PATH", help="a checkout of LlamaGen")
    group.add_argument("--llamagen-compile", action="store_true", help="compile it, as its script does with --compile")
    group.add_argument("--var", type=place, default=None, metavar="PATH", help="a checkout of VAR")


def _run_bench(arguments: argparse.Namespace) -> int:
    from varkd.run.benchmarking import GROUPS, bench

    names = ("device", "size", "repeats", "budget", "llamagen", "llamagen_compile", "var", "json")
    rows = bench(arguments.groups or GROUPS, **chosen(arguments, *names))
    return int(any(row.failed for row in rows))
