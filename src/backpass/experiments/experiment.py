"""Declarative experiments: arms, seeds, measurements, comparisons and plots."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from backpass.errors import BackpassError, UnknownNameError
from backpass.report.claims import Direction, Diverged, Setting
from backpass.report.proportions import percent, rate_of
from backpass.report.result import OVER_SEEDS, PAIRED_SEEDS, Finding
from backpass.report.statistics import Interval, mean_interval

__all__ = [
    "Arm",
    "Comparison",
    "Context",
    "Design",
    "Experiment",
    "Measurement",
    "Outcome",
    "Plot",
    "Runs",
    "Values",
    "Work",
]

Outcome = Mapping[str, Any]
"""Result of one run: numbers, lists of numbers or strings by name, in JSON types. Values are ``nan`` from the point
where the run diverged. The entry ``seconds`` is stored in a separate file, because it differs from run to run."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """Device and shared folder of a run.

    Attributes:
        device: device to compute on.
        folder: folder for files that arms share, such as trained weights; None keeps no files.
        loaded: objects of the caller that the works of `run_here` use, for instance a network. The settings of an arm
            name them by their hashes.
        progress: called by a work of `run_here` with the finished share of the run.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    folder: Path | None = None
    loaded: Any = None
    progress: Callable[[float], None] = lambda share: None


Values = list[float] | str
"""Numbers of an arm, or the marks of its images."""

Work = Callable[[Any, int, Context], Outcome]
"""A module-level function of (settings, seed, context). Its result depends on settings, seed and device only."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One method, run once per seed.

    Attributes:
        name: name in reports, unique in its group.
        work: function that runs one seed.
        candidates: settings by label, each a frozen dataclass. Of several candidates, for instance one per learning
            rate, `Design.choice` selects one.
        group: name of the group, for instance a network. Arms of a group share a table and plots.
    """

    name: str
    work: Work
    candidates: Mapping[str, Any]
    group: str = ""

    def __post_init__(self) -> None:
        if not self.candidates:
            raise BackpassError(f"the arm {self.name!r} needs at least one candidate's settings, got none.")


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Outcomes of an arm.

    Attributes:
        arm: the arm.
        by_candidate: outcomes by label of the candidate, one per seed.
        chosen: label of the selected candidate.
    """

    arm: Arm
    by_candidate: Mapping[str, Sequence[Outcome]]
    chosen: str

    @property
    def runs(self) -> Sequence[Outcome]:
        """Outcomes of the selected candidate, in the order of the seeds."""
        return self.by_candidate[self.chosen]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A number read from outcomes, one per seed or per draw.

    Attributes:
        label: name in tables, for instance "training loss".
        unit: unit, for instance "nats"; may be empty.
        key: entry of the outcome.
        at: index into the entry's list; None if the entry is the number itself, or with `draws` the list of numbers.
        draws: True if the entry has one number, or one list, per draw of a run.
        reduce: function that reduces a list to a number, for instance ``min``.
        derive: function that computes the numbers from the runs of an arm, instead of reading an entry.
        pair: function that computes the numbers of two arms together, for measurements that depend on both.
        images: True if the entry is a text of `report.proportions.marks`, one per image. The value is the percentage of
            images with Wilson's interval; two arms are compared image by image with McNemar's exact test.
    """

    label: str
    unit: str = ""
    key: str = ""
    at: int | None = None
    draws: bool = False
    reduce: Callable[[Sequence[float]], float] | None = None
    derive: Callable[[Runs], Sequence[float]] | None = None
    pair: Callable[[Runs, Runs], tuple[Sequence[float], Sequence[float]]] | None = None
    images: bool = False

    @property
    def quantity(self) -> str:
        """Label with the unit."""
        return ", ".join(filter(None, (self.label, self.unit)))

    def of(self, outcomes: Sequence[Outcome]) -> list[float]:
        """Read the entry of each outcome."""
        if self.images:
            return [100 * rate_of(self._marks(one)).value for one in outcomes]
        rows = [row for one in outcomes for row in (one[self.key] if self.draws else [one[self.key]])]
        if self.reduce is not None:
            return [float(self.reduce(row)) for row in rows]
        return [float(row if self.at is None else row[self.at]) for row in rows]

    def _marks(self, outcome: Outcome) -> str:
        return str(outcome[self.key] if self.at is None else outcome[self.key][self.at])

    def interval(self, runs: Runs) -> Interval:
        """Return the mean of an arm with its interval."""
        if self.images:
            return percent(rate_of("".join(map(self._marks, runs.runs))))
        return mean_interval(self.values(runs))

    def values(self, runs: Runs) -> list[float]:
        """Return the values of an arm."""
        return list(self.derive(runs)) if self.derive is not None else self.of(runs.runs)

    def both(self, ours: Runs, theirs: Runs) -> tuple[Values, Values]:
        """Return the paired values of two arms; marks for a measurement of images."""
        if self.images:
            first, second = ("".join(map(self._marks, one.runs)) for one in (ours, theirs))
            return first, second
        if self.pair is not None:
            a, b = self.pair(ours, theirs)
            return list(a), list(b)
        return self.values(ours), self.values(theirs)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A claim: compares one arm with another, or its values or their difference from another arm's with a range.

    Attributes:
        id: identifier, unique in the experiment.
        statement: the claim, as an affirmative sentence.
        measurement: compared measurement.
        ours: name of the arm that the claim is about.
        theirs: name of the baseline arm; empty for a range of the values of ours.
        group: group of both arms.
        groups: several groups instead of one; each gives one pair, the means over its seeds.
        direction: ``higher`` or ``lower``: the claimed direction of ours relative to theirs.
        low: lower end of the claimed range, with `theirs` of the difference ours - theirs.
        high: upper end of the claimed range.
        reference: source of the claim; empty for a claim of this project.
        published: published value, or a quotation.
        setting: ``the claim's`` if the scale is the setting that the claim is about, else ``elsewhere``.
        diverged: ``undecided`` if a diverged run leaves the claim undecided; ``worse`` if it ranks below all others.
    """

    id: str
    statement: str
    measurement: Measurement
    ours: str
    theirs: str = ""
    group: str = ""
    groups: tuple[str, ...] = ()
    direction: Direction = "higher"
    low: float = -math.inf
    high: float = math.inf
    reference: str = ""
    published: str = ""
    setting: Setting = "elsewhere"
    diverged: Diverged = "undecided"


@dataclass(frozen=True, kw_only=True)
class Plot:
    """One plot for each group: a measurement against steps, seconds or settings.

    Attributes:
        title: title, printed after the name of the group.
        y_label: label with the unit.
        x_label: label with the unit.
        key: entry of the outcomes, a list of values along x; with `draws` one list per draw.
        x: x values, or the entry of the outcomes that has them; the mean over the seeds is plotted.
        lines: instead of an entry, arms by label of a line; the line joins their `measurement` along x.
        measurement: measurement that the lines show.
        less: arms whose measurement is subtracted along x, for lines of paired differences; with `key` one arm.
        images: True if the entry is a list of marks along x, as of `Measurement.images`.
        arms: arms to show; empty for all arms of the group.
        groups: groups to show; empty for all.
        draws: True if the entry has one list per draw.
        log_x: True for a logarithmic x axis.
        log_y: True for a logarithmic y axis with geometric means.
    """

    title: str
    y_label: str
    x_label: str
    key: str = ""
    x: Sequence[float] | str = ()
    lines: Mapping[str, Sequence[str]] = field(default_factory=dict)
    measurement: Measurement | None = None
    less: Sequence[str] = ()
    images: bool = False
    arms: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    draws: bool = False
    log_x: bool = False
    log_y: bool = False


@dataclass(frozen=True, kw_only=True)
class Design:
    """An experiment at one size.

    Attributes:
        arms: arms to run.
        seeds: seeds of every arm.
        measurements: columns of the tables.
        comparisons: claims to test.
        plots: plots of every group.
        choice: measurement that selects a candidate: the highest mean over the seeds among those with the fewest
            diverged runs. It must be measured on held-out data.
        cost: measurement whose ratio is reported for every pair of arms, such as seconds.
        data: function that returns one line about the data.
    """

    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    measurements: tuple[Measurement, ...]
    comparisons: tuple[Comparison, ...]
    plots: tuple[Plot, ...] = ()
    choice: Measurement | None = None
    cost: Measurement | None = None
    data: Callable[[], str] = lambda: "made"

    def __post_init__(self) -> None:
        keys = [(arm.group, arm.name) for arm in self.arms]
        ids = [one.id for one in self.comparisons]
        for what, names in (("arms", keys), ("claims", ids)):
            if len(set(names)) < len(names):
                raise BackpassError(f"two {what} have one name: {sorted(map(str, names))}.")
        for one in self.comparisons:
            for group in one.groups or (one.group,):
                missing = [name for name in (one.ours, one.theirs) if name and (group, name) not in keys]
                if missing:
                    raise BackpassError(f"the claim {one.id!r} compares {missing[0]!r} of {group!r}: no such arm.")
        several = [arm.name for arm in self.arms if len(arm.candidates) > 1]
        if several and self.choice is None:
            raise BackpassError(f"{several[0]!r} has several candidates: say by which measurement one is chosen.")

    def groups(self) -> Iterator[tuple[str, list[Arm]]]:
        """Yield every group with its arms, in order."""
        for group in dict.fromkeys(arm.group for arm in self.arms):
            yield group, [arm for arm in self.arms if arm.group == group]


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Reproduction of one figure, table or statement of a paper.

    Attributes:
        name: name on the command line.
        title: heading of the report.
        question: question and method, in a few sentences.
        source: paper, with section, figure or table.
        scales: scales by name; ``small`` takes minutes on two cores, ``paper`` has the sizes of the paper.
        data: names of the required data sets.
        remarks: further notes for the reader.
        plots_note: explanation of lines and bands.
        claims_note: explanation of pairs and intervals.
    """

    name: str
    title: str
    question: str
    source: str
    scales: Mapping[str, Design]
    data: tuple[str, ...] = ()
    remarks: tuple[Finding, ...] = ()
    plots_note: str = OVER_SEEDS
    claims_note: str = PAIRED_SEEDS

    def design(self, scale: str) -> Design:
        """Return the design of a scale.

        Raises:
            UnknownNameError: the scale is unknown.
        """
        if scale not in self.scales:
            raise UnknownNameError(f"scale of {self.name}", scale, self.scales)
        return self.scales[scale]
