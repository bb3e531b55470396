"""Kill -9 and refusals of the system over every verb that writes, by hand and for long; prints a table.

python tests/chaos/table.py --kills 100 [--refusals] [--minutes N] [--seed S] [--only VERB ...]
"""

from __future__ import annotations

import argparse
import errno
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from faults import Fault, run
from verbs import commands, left_behind, quick_main, result

from tiny_runs import SETTINGS

NUMBERS = (errno.ENOSPC, errno.EROFS, errno.EIO, errno.EMFILE)


def prepare(inputs: Path, call: Callable[[Any], int]) -> None:
    """Codes, a teacher and a run, each made in a fork, so that this process stays fresh."""
    inputs.mkdir()
    cpu = ["--device", "cpu"]
    train = ["train", "digits-student", "data=codes", *SETTINGS]
    for command in (
        ["encode", "digits", "--tokenizer", "pixels", "--out", "codes", *cpu],
        [*train, "out=teacher", "seed=1"],
        [*train, "out=run", "teacher=teacher", "method=kd"],
    ):
        ended = run(call, command, inputs)
        assert ended.code == 0, ended.stderr


class Case:
    """One verb: its command, and what it writes when nothing happens."""

    def __init__(self, home: Path, command: list[str], call: Callable[[Any], int]) -> None:
        self.home, self.command, self.call, self.number = home, command, call, 0
        folder = self.fresh()
        self.straight = run(call, command, folder)
        assert self.straight.code == 0, self.straight.stderr
        self.expected = result(folder)
        assert left_behind(folder) == []
        shutil.rmtree(folder)

    def fresh(self) -> Path:
        self.number += 1
        folder = self.home / f"{self.number:06d}"
        folder.mkdir(parents=True)
        return folder

    def finish(self, folder: Path) -> str | None:
        """Run the command once more; what is wrong with its result, or None."""
        ended = run(self.call, self.command, folder)
        if ended.code:
            return f"exit {ended.code}: {ended.stderr[-300:]}"
        found, left = result(folder), left_behind(folder)
        different = sorted(
            name for name in found.keys() | self.expected.keys() if found.get(name) != self.expected.get(name)
        )
        shutil.rmtree(folder)
        return f"left behind: {left[:3]}" if left else f"differs: {different[:3]}" if different else None

    def killed(self, generator: random.Random) -> str | None:
        """One to three kills in a row, at a moment of writing or at any other, then the same command."""
        folder = self.fresh()
        for _ in range(generator.choice((1, 1, 2, 3))):
            if generator.random() < 0.6:
                run(self.call, self.command, folder, Fault(generator.randrange(self.straight.moments)))
            else:
                run(self.call, self.command, folder, after=generator.uniform(0, self.straight.seconds))
        return self.finish(folder)

    def refused(self, at: int, what: Any) -> str | None:
        """One refusal: one line and exit code 2, or nothing at all where it does not matter; then the same command."""
        folder = self.fresh()
        ended = run(self.call, self.command, folder, Fault(at, what))
        lines = ended.stderr.splitlines() or [""]  # bars and notes stand before the last one
        one_line = lines[-1].startswith("varkd: error: ") and "Traceback" not in ended.stderr
        if ended.code not in (0, 2) or (ended.code == 2 and not one_line):
            return f"exit {ended.code}: {ended.stderr[-300:]}"
        return self.finish(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="of each verb")
    parser.add_argument("--refusals", action="store_true", help="and refuse every write, each for another reason")
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[""], help="verbs that begin so")
    options = parser.parse_args()
    end, call, faults_lost = time.monotonic() + 60 * options.minutes, quick_main(), 0
    with tempfile.TemporaryDirectory() as home:
        inputs = Path(home) / "inputs"
        prepare(inputs, call)
        chosen = {name: command for name, command in commands(inputs).items() if name.startswith(tuple(options.only))}
        print("| verb | moments | kills | refusals | survived | lost |\n|---|---|---|---|---|---|", flush=True)
        for index, (name, command) in enumerate(chosen.items()):
            case, lost, counts = Case(Path(home) / f"case-{index}", command, call), [], [0, 0]
            share = time.monotonic() + max(0.0, end - time.monotonic()) / (len(chosen) - index)
            plan = [(at, what) for at in range(case.straight.moments) for what in (*NUMBERS, "cut")]
            generator = random.Random(f"{options.seed} {name}")
            generator.shuffle(plan)
            plan = plan if options.refusals else []
            while time.monotonic() < share and (counts[0] < options.kills or counts[1] < len(plan)):
                if counts[0] < options.kills and (counts[0] <= counts[1] or counts[1] == len(plan)):
                    counts[0] += 1
                    said, fault = case.killed(generator), f"kill {counts[0]}"
                else:
                    said, fault = case.refused(*plan[counts[1]]), f"{plan[counts[1]]}"
                    counts[1] += 1
                if said:
                    lost.append(f"{fault}: {said}")
            row = (name, case.straight.moments, *counts, sum(counts) - len(lost), len(lost))
            print(f"| {' | '.join(map(str, row))} |", flush=True)
            for each in lost[:6]:
                print(f"    {each}", file=sys.stderr, flush=True)
            faults_lost += len(lost)
    return int(faults_lost > 0)


if __name__ == "__main__":
    sys.exit(main())
