"""Options of `varkd evaluate` and `varkd sample` that take more than a line; imports nothing heavy."""

from __future__ import annotations

import argparse
from pathlib import Path


def adm_options(verb: argparse.ArgumentParser) -> None:
    """The options of `varkd evaluate` that concern ADM's numbers."""
    group = verb.add_argument_group("ADM's FID, sFID, IS, precision and recall (docs/evaluation.md)")
    group.add_argument("--reference", type=Path, default=None, metavar="REF",
                       help="OpenAI's .npz, a folder of real images, or what --save-reference wrote")  # fmt: skip
    group.add_argument("--inception", type=Path, default=None, metavar="FILE",
                       help="weights of the 2015 Inception network (default: downloaded once)")  # fmt: skip
    group.add_argument("--distances", choices=("adm", "float32"), default="adm",
                       help="precision and recall: rounded to float16 as published, or not")  # fmt: skip
    group.add_argument("--resamples", type=int, default=200, help="bootstrap draws behind intervals, 0 for none")
    group.add_argument("--extras", action="store_true", help="KID and FID-infinity too")
    group.add_argument("--save-reference", type=Path, default=None, metavar="DIR", help="keep the reference's features")
    group.add_argument("--compare", type=Path, default=None, metavar="JSON",
                       help="an earlier result: printed beside, refused under another protocol")  # fmt: skip
    group.add_argument("--protocol", choices=("llamagen", "var", "arpg", "randar", "rar", "own"), default=None,
                       help="draw samples as the family's official evaluation does (own: as the run)")  # fmt: skip
    group.add_argument("--tokenizer", type=Path, default=None, metavar="DIR", help="of a model folder that is no run")
    group.add_argument("--search-guidance", type=float, nargs="*", default=None, metavar="SCALE",
                       help="find the scale first, on 10,000 samples of another seed")  # fmt: skip
    group.add_argument("--search-num", type=int, default=10_000, help="samples of that search (default: %(default)s)")
    group.add_argument("--batch-size", type=int, default=250, help="images drawn at a time (default: %(default)s)")
    group.add_argument("--json", action="store_true", help="print one JSON object")
    group.add_argument("--out", type=Path, default=None, metavar="JSON", help="write the result there too")
