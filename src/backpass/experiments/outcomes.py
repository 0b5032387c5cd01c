"""Outcomes on disk: one file per arm, candidate and seed."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from backpass.experiments.experiment import Context, Design, Outcome, Work
from backpass.files import write_whole
from backpass.version import __version__

__all__ = ["CLOCK", "Store", "Task", "tasks_of"]

CLOCK = ("seconds", "wall seconds")
"""Timings of an outcome, stored in a separate file so that the other file of a repeated run is byte-identical."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One run of an arm.

    Attributes:
        label: group, arm, candidate and seed, for messages.
        work: function that runs it.
        settings: settings of the candidate.
        seed: seed of the run.
        device: device type, ``cpu`` or ``cuda``.
    """

    label: str
    work: Work
    settings: Any
    seed: int
    device: str

    @property
    def asked(self) -> dict[str, Any]:
        """Everything that the outcome depends on, in JSON types: the key of the outcome."""
        asked: dict[str, Any] = json.loads(
            json.dumps(
                {
                    "work": f"{self.work.__module__}.{self.work.__qualname__}",
                    "settings": asdict(self.settings),
                    "seed": self.seed,
                    "device": self.device,
                    "version": __version__,
                }
            )
        )
        return asked

    @property
    def name(self) -> str:
        """File name without the suffix; tasks with the same key share it."""
        digest = hashlib.sha256(json.dumps(self.asked, sort_keys=True).encode()).hexdigest()[:16]
        work = re.sub(r"[^a-z0-9]+", "-", self.work.__qualname__.lower()).strip("-")
        return f"{work}-{self.seed}-{digest}"

    def run(self, context: Context) -> Outcome:
        """Run the task and return its outcome."""
        return self.work(self.settings, self.seed, context)


def tasks_of(design: Design, device: str) -> Iterator[tuple[tuple[str, str], str, Task]]:
    """Yield every task of a scale with (group, name) of its arm and the label of its candidate."""
    for arm in design.arms:
        for label, settings in arm.candidates.items():
            for seed in design.seeds:
                words = " ".join(filter(None, (arm.group, arm.name, label)))
                task = Task(label=f"{words}, seed {seed}", work=arm.work, settings=settings, seed=seed, device=device)
                yield (arm.group, arm.name), label, task


class Store:
    """Store of outcomes in a folder, with atomic writes.

    Args:
        folder: the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, task: Task) -> Outcome | None:
        """Return the outcome of a task; None if it is missing or damaged and has to be computed."""
        found = [self._entry(self.path(task, kind), task) for kind in ("json", "clock.json")]
        if any(one is None for one in found):
            return None
        return {name: value for one in found if one is not None for name, value in one.items()}

    def write(self, task: Task, outcome: Outcome) -> None:
        """Write the outcome of a task. The file without timings is written last: its existence marks both."""
        clock = {name: value for name, value in outcome.items() if name in CLOCK}
        rest = {name: value for name, value in outcome.items() if name not in CLOCK}
        for kind, values in (("clock.json", clock), ("json", rest)):
            content = {"asked": task.asked, "values": values, "sha256": _sum(values)}
            write_whole(self.path(task, kind), json.dumps(content, sort_keys=True) + "\n")

    def path(self, task: Task, kind: str = "json") -> Path:
        """Return the path of the outcome, or with ``kind="clock.json"`` that of the timings."""
        return self.folder / f"{task.name}.{kind}"

    def hashes(self, task: Task) -> dict[str, str]:
        """Return the SHA-256 of the files of a task, by file name."""
        return {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in (self.path(task), self.path(task, "clock.json"))
        }

    @staticmethod
    def _entry(path: Path, task: Task) -> dict[str, Any] | None:
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError, RecursionError):
            return None
        whole = (
            isinstance(kept, dict)
            and kept.get("asked") == task.asked
            and kept.get("sha256") == _sum(kept.get("values"))
        )
        return kept["values"] if whole and isinstance(kept["values"], dict) else None


def _sum(values: object) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
