"""Result of an experiment: numbers, claims, settings and environment, as data and as JSON."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from backpass.report.claims import Claim
from backpass.report.pictures import Gallery
from backpass.report.statistics import Interval, geometric_interval, mean_interval
from backpass.version import __version__

__all__ = [
    "OVER_SEEDS",
    "PAIRED_SEEDS",
    "Cell",
    "Curve",
    "Finding",
    "Result",
    "Series",
    "Table",
    "checksum",
    "environment",
    "plain",
]

OVER_SEEDS = (
    "Lines are means over the seeds, bands their 95 % intervals, geometric on a logarithmic axis. A cross at the upper "
    "edge marks where at least one run has diverged; no mean is drawn there."
)
PAIRED_SEEDS = (
    "Every pair shares its seed: initial weights and order of the batches. Each interval is Student's t over the seeds."
)

Cell = str | int | float | Interval


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Curve of a plot, measured once per seed or given as intervals.

    Attributes:
        label: label in the legend.
        x: (points,) x values.
        runs: (seeds, points) values; ``nan`` from the point where a run diverged.
        geometric: True for the geometric mean over the seeds, as for a logarithmic axis.
        given: (points,) intervals instead of runs, for instance of a proportion of images.
    """

    label: str
    x: Sequence[float]
    runs: Sequence[Sequence[float]] = ()
    geometric: bool = False
    given: Sequence[Interval] | None = None

    @property
    def intervals(self) -> list[Interval]:
        """Return the interval at every x: as given, or of the mean over the seeds; ``nan`` where a run diverged."""
        if self.given is not None:
            return list(self.given)
        interval = geometric_interval if self.geometric else mean_interval
        return [interval(values) for values in zip(*self.runs, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Series:
    """Plot: axis labels, curves, and a description as alternative text."""

    id: str
    title: str
    description: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    log_x: bool = False
    log_y: bool = False


@dataclass(frozen=True, kw_only=True)
class Table:
    """Table; every row has one cell per column."""

    id: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""


@dataclass(frozen=True)
class Finding:
    """One or two sentences on a topic, generated from the numbers."""

    topic: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Result:
    """Content of a report.

    Attributes:
        experiment: name of the experiment.
        title: heading.
        question: question and method, in a few sentences.
        scale: name of the scale, for instance ``small`` or ``paper``.
        findings: conclusions from the numbers.
        environment: versions, seeds, data, device.
        settings: settings of the experiment.
        series: plots.
        tables: tables.
        claims: claims with verdicts; without claims the page has no such section.
        galleries: images in rows.
        numbers: measurements in JSON types; only in the JSON.
        plots_note: explanation of lines and bands.
        claims_note: explanation of pairs and intervals.
        source: reproduced paper, with section, figure or table.
    """

    experiment: str
    title: str
    question: str
    scale: str
    findings: Sequence[Finding]
    environment: dict[str, Any]
    settings: dict[str, Any]
    series: Sequence[Series]
    claims: Sequence[Claim]
    tables: Sequence[Table] = field(default_factory=tuple)
    galleries: Sequence[Gallery] = ()
    numbers: dict[str, Any] = field(default_factory=dict)
    plots_note: str = OVER_SEEDS
    claims_note: str = PAIRED_SEEDS
    source: str = ""

    def as_json(self) -> str:
        """Return the result as ASCII JSON without image pixels; numbers that are not finite become ``null``."""
        content = asdict(self)
        for gallery in content["galleries"]:
            for picture in (picture for row in gallery["rows"] for picture in row):
                del picture["uri"]
        for series, ours in zip(content["series"], self.series, strict=True):
            for curve, source in zip(series["curves"], ours.curves, strict=True):
                intervals = source.intervals
                curve["mean"] = [i.mean for i in intervals]
                curve["interval"] = [(i.low, i.high) for i in intervals]
        written = plain(content)
        return json.dumps({**written, "sha256": checksum(written)}, indent=1, allow_nan=False) + "\n"


def checksum(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a result's JSON without the entry that holds it."""
    text = json.dumps(content, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def plain(value: Any) -> Any:
    """Convert a value to JSON types: sequences to lists, intervals to objects, numbers that are not finite to None."""
    if isinstance(value, Interval):
        return {name: plain(part) for name, part in value._asdict().items()}
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple | range):
        return [plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def environment(*, device: str, threads: int, data: str, seeds: Sequence[int]) -> dict[str, Any]:
    """Return the environment of a report: date, command line, versions, platform, device, data and seeds.

    Args:
        device: device of the computation.
        threads: number of CPU threads of torch.
        data: one line about the data.
        seeds: seeds of the runs.
    """
    versions = {"backpass": __version__, "python": platform.python_version()}
    for package in ("torch", "numpy", "scikit-learn", "matplotlib"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    program = Path(sys.argv[0]).name
    words = ["backpass"] if program in ("backpass", "__main__.py") else ["python", program]
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "command": shlex.join([*words, *sys.argv[1:]]),
        "versions": versions,
        "platform": f"{sys.platform} {platform.machine()}",
        "device": device,
        "threads": threads,
        "data": data,
        "seeds": list(seeds),
    }
