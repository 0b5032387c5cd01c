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
    """One line of a plot, measured once per seed, or given as intervals.

    Attributes:
        label: its name in the legend.
        x: the places, (points,).
        runs: the values, (seeds, points); ``nan`` from where a run diverged.
        geometric: whether the mean over the seeds is the geometric one, as suits a logarithmic axis.
        given: instead of runs, an interval per place, for instance of a proportion of images.
    """

    label: str
    x: Sequence[float]
    runs: Sequence[Sequence[float]] = ()
    geometric: bool = False
    given: Sequence[Interval] | None = None

    @property
    def intervals(self) -> list[Interval]:
        """At every place, what is given, or mean and interval over the seeds; ``nan`` where a run has diverged."""
        if self.given is not None:
            return list(self.given)
        interval = geometric_interval if self.geometric else mean_interval
        return [interval(values) for values in zip(*self.runs, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Series:
    """One plot: what is measured against what, and a sentence for those who cannot see it."""

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
    """Numbers in rows; every row has one cell per column."""

    id: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""


@dataclass(frozen=True)
class Finding:
    """A sentence or two on one topic, made from the numbers."""

    topic: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Result:
    """Everything that a report shows.

    Attributes:
        experiment: its name.
        title: a heading.
        question: what was asked and how, in a few sentences.
        scale: the size of the run, for instance ``quick`` or ``standard``.
        findings: what the numbers support and what they do not.
        environment: versions, seeds, data, device.
        settings: everything that was chosen.
        series: the plots.
        tables: numbers that are not plotted.
        claims: the claims with their verdicts; a page without claims leaves their section out.
        galleries: images in rows.
        numbers: the measurements in a form for programs, JSON's types; only in the JSON.
        plots_note: what lines and bands are.
        claims_note: what pairs and intervals are.
        source: the paper and the place in it, where the experiment reproduces one.
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
        """Return the result as ASCII JSON without the pixels of its images; a number that is not finite is ``null``."""
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
    """``value`` with sequences as lists, intervals as objects and every number JSON can carry."""
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
    """Return what every report names: date, command line, versions, platform, device, data and seeds.

    Args:
        device: where it ran.
        threads: of torch's CPU operations.
        data: one line about the data.
        seeds: of the runs.
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
