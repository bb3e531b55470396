"""The `varkd` command: parse, import what the verb needs, call it; nothing else.

Exit codes: 0 done; 2 something that the user can put right (one line on stderr); 128 + signal when stopped by one
(after saving; the same command resumes). `--help` imports neither torch nor numpy.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

from varkd.cli import data, judging, models, training
from varkd.errors import VarkdError, check_seed, missing_extra
from varkd.files import refusal
from varkd.version import VERSION


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
    for group in (data, training, judging, models):
        group.add(verbs)
    return top


def leave(code: int) -> None:
    """End the process. Under torchrun without the interpreter's shutdown: there, on a loaded machine, a thread that a
    library has not joined aborts a rank now and then whose work is done and on disk, and torchrun calls the run failed.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
