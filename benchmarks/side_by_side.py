"""Contestants timed side by side in one process, and what a benchmark finds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

__all__ = [
    "Contestant",
    "Figure",
    "Options",
    "Row",
    "Section",
    "Times",
    "milliseconds",
    "peak_mib",
    "processor",
    "ratio",
    "side_by_side",
]

Contestant = Callable[[], object]


def processor(entry: str) -> str:
    """What Linux says of the processor, for instance of its ``model name`` or ``flags``; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(entry)), "")


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to measure.

    Attributes:
        device: ``cpu`` or ``cuda``.
        quick: small sizes and few rounds: does it run?
    """

    device: str = "cpu"
    quick: bool = False

    def rounds(self, count: int) -> int:
        """So many, or two."""
        return 2 if self.quick else count


@dataclass(frozen=True)
class Figure:
    """A number with its spread over the rounds."""

    median: float
    least: float
    most: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was found of one contestant.

    Attributes:
        name: of the contestant.
        figures: by their names, ``ratio`` among them: its time over that of the section's first contestant, or of the
            one that the name says.
        asked: the name of a figure and the most that it should be.
        note: why it is what it is, above all where it is more than asked.
    """

    name: str
    figures: Mapping[str, Figure | float]
    asked: tuple[str, float] | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A table of the page.

    Attributes:
        title: a heading.
        text: what was measured.
        rows: of the table.
    """

    title: str
    text: str
    rows: Sequence[Row] = field(default_factory=tuple)


Times = dict[str, list[float]]
"""By contestant, seconds of every round."""


def side_by_side(runs: Mapping[str, Contestant], *, device: str, rounds: int, repeats: int = 1) -> Times:
    """Each in turn, round by round, after one round that does not count.

    Seconds are CPU seconds of this process, which others do not lengthen; on CUDA those of the clock, with the device's
    queue done.

    Args:
        runs: by name.
        device: ``cpu`` or ``cuda``.
        rounds: how many.
        repeats: calls of one in a row, for what is too short for the clock.
    """
    times: Times = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            began = _clock(device)
            for _ in range(repeats):
                run()
            if number:
                times[name].append((_clock(device) - began) / repeats)
    return times


def ratio(ours: Sequence[float], theirs: Sequence[float], scale: float = 1.0) -> Figure:
    """The median over the rounds of ours / theirs, with the least and the most."""
    of = sorted(scale * a / b for a, b in zip(ours, theirs, strict=True))
    return Figure(statistics.median(of), of[0], of[-1])


def milliseconds(seconds: Sequence[float]) -> Figure:
    """The same of times."""
    return ratio(seconds, [1.0] * len(seconds), 1e3)


def peak_mib(run: Contestant, device: str) -> float:
    """The most MiB that one call holds beyond what lay there before."""
    if device != "cpu":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    held = most = 0
    for event in recorded.profiler.kineto_results.events():  # in order of time
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most / 2**20


def _clock(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()
