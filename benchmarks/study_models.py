"""Codes, teacher and starts of a study on one device, each start in a process of its own; `varkd study` goes on."""

from __future__ import annotations

import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

from varkd.config import load_value
from varkd.study import work
from varkd.study.spec import Study


def main() -> None:
    study = load_value(Study, sys.argv[1], sys.argv[2:])
    Path(study.out).mkdir(parents=True, exist_ok=True)
    for pair in study.pairs:
        work.prepare(study, pair)
        work.model(study, pair, "teacher", study.seeds[0])
        with ProcessPoolExecutor(len(study.start_seeds)) as pool:
            jobs = [pool.submit(work.model, replace(study), pair, study.start_of(seed), seed)
                    for seed in study.start_seeds]  # fmt: skip
            for job in jobs:
                job.result()


if __name__ == "__main__":
    main()
