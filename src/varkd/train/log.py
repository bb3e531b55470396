"""What a run says about itself while it runs: JSON lines always, trackers beside them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from varkd.files import write_errors, write_text
from varkd.train.trackers import Told, TrackerName, Trackers, run_record
from varkd.world import World


class Log:
    """`log.jsonl` of a run folder, and the trackers of the run; silent on all ranks but the first.

    On resume, lines later than the checkpoint (all of them where there is none, `resume_step=None`) are cut, so a
    resumed log reads like one that was never interrupted. `settings` is what trackers are told of the run.
    """

    def __init__(
        self,
        folder: Path,
        world: World,
        resume_step: int | None,
        trackers: tuple[TrackerName, ...] = (),
        *,
        name: str = "",
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = folder / "log.jsonl"
        self.enabled = world.is_main
        self.warned: set[str] = set()
        self.trackers: Trackers | None = None
        if self.enabled:
            lines = self._read()
            logged = {str(entry.get("split")): entry["step"] for _, entry in lines}
            run_id, told = run_record(folder, trackers, logged)
            self._keep([pair for pair in lines if resume_step is not None and pair[1]["step"] <= resume_step])
            self.trackers = Trackers(
                trackers, Told(run_id, name or folder.name, folder, settings or {}, resume_step), told
            )

    def write(self, split: str, step: int, values: Mapping[str, float]) -> None:
        """Append one line; numbers that are not finite are written as null."""
        if self.trackers is None:
            return
        clean = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._append({"split": split, "step": step, **clean})
        self.trackers.write(split, step, values)

    def image(self, name: str, step: int, path: Path) -> None:
        """Show a picture that has been drawn, where a tracker can."""
        if self.trackers is not None:
            self.trackers.image(name, step, path)

    def warn(self, step: int, rule: str, text: str) -> bool:
        """Append a warning, unless its rule has spoken before in this run, also before a resume; whether it is new."""
        if not self.enabled or rule in self.warned:
            return False
        self.warned.add(rule)
        self._append({"split": "warning", "step": step, "rule": rule, "text": text})
        return True

    def close(self, failed: bool = False) -> None:
        if self.trackers is not None:
            self.trackers.close(failed)

    def _append(self, entry: Mapping[str, Any]) -> None:
        with write_errors(self.path), self.path.open("a") as file:
            file.write(json.dumps(entry, allow_nan=False) + "\n")

    def _read(self) -> list[tuple[str, dict[str, Any]]]:
        """The lines that are records, as text and as values; the last one of a killed run may be cut short."""
        found = []
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            try:
                entry = json.loads(line)
                if isinstance(entry["step"], int):
                    found.append((line, entry))
            except (json.JSONDecodeError, KeyError, TypeError):
                continue
        return found

    def _keep(self, lines: list[tuple[str, dict[str, Any]]]) -> None:
        self.warned.update(entry["rule"] for _, entry in lines if entry.get("split") == "warning" and "rule" in entry)
        if self.path.exists():
            write_text(self.path, "".join(f"{line}\n" for line, _ in lines))
