"""What a run says about itself while it runs: JSON lines always, TensorBoard beside them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from varkd.files import write_errors, write_text
from varkd.progress import console
from varkd.world import World


def _tensorboard(folder: Path, resume_step: int) -> Any:
    """A writer, or None (and a word about it) where TensorBoard is not installed: log.jsonl holds the same numbers."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError:
        console.print("TensorBoard is not installed (pip install 'varkd[tensorboard]'): log.jsonl has the same numbers")
        return None
    return SummaryWriter(str(folder), purge_step=resume_step)


class Log:
    """`log.jsonl` and `tensorboard/` of a run folder; silent on all ranks but the first.

    On resume, lines later than the checkpoint are cut, so a resumed log reads like one that was never interrupted.
    """

    def __init__(self, folder: Path, world: World, resume_step: int, tensorboard: bool = True) -> None:
        self.path = folder / "log.jsonl"
        self.writer: Any = None
        self.enabled = world.is_main
        self.warned: set[str] = set()
        if self.enabled:
            self._cut(resume_step)
            if tensorboard:
                self.writer = _tensorboard(folder / "tensorboard", resume_step)

    def write(self, split: str, step: int, values: Mapping[str, float]) -> None:
        """Append one line; numbers that are not finite are written as null."""
        if not self.enabled:
            return
        clean = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._append({"split": split, "step": step, **clean})
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(f"{split}/{name}", value, step)

    def warn(self, step: int, rule: str, text: str) -> bool:
        """Append a warning, unless its rule has spoken before in this run, also before a resume; whether it is new."""
        if not self.enabled or rule in self.warned:
            return False
        self.warned.add(rule)
        self._append({"split": "warning", "step": step, "rule": rule, "text": text})
        return True

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()

    def _append(self, entry: Mapping[str, Any]) -> None:
        with write_errors(self.path), self.path.open("a") as file:
            file.write(json.dumps(entry, allow_nan=False) + "\n")

    def _cut(self, resume_step: int) -> None:
        if not self.path.exists():
            return
        kept: list[str] = []
        for line in self.path.read_text().splitlines():
            try:
                entry = json.loads(line)
                if 0 < resume_step >= entry["step"]:  # what begins anew looks at its start again
                    kept.append(line)
                    if entry.get("split") == "warning":
                        self.warned.add(entry["rule"])
            except (json.JSONDecodeError, KeyError, TypeError):
                continue  # the last line of a killed run may be cut short
        write_text(self.path, "".join(f"{line}\n" for line in kept))
