"""Started by torchrun: ADM's numbers of the files named in the job, written by every rank."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from varkd import metrics
from varkd.world import World


def main(job: Path) -> None:
    torch.set_num_threads(1)
    paths = json.loads(job.read_text())
    world = World.from_environment()
    found = metrics.adm(paths["samples"], paths["reference"], paths["inception"], resamples=5, world=world)
    (job.parent / f"rank-{world.rank}.json").write_text(json.dumps(found.to_json()))
    world.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
