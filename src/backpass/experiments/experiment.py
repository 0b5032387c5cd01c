"""Experiments as tables: arms, seeds, measurements, comparisons and plots."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from backpass.errors import BackpassError, UnknownNameError
from backpass.report.claims import Direction, Diverged, Setting
from backpass.report.result import OVER_SEEDS, PAIRED_SEEDS, Finding

__all__ = ["Arm", "Comparison", "Experiment", "Measurement", "Outcome", "Place", "Plot", "Runs", "Scale", "Work"]

Outcome = Mapping[str, Any]
"""Named numbers, lists of numbers or texts, of JSON's types; ``nan`` from where a run diverged. The entry ``seconds``
is stored apart, as it differs from run to run."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where an arm is run.

    Attributes:
        device: of the computation.
        folder: for files that arms share, such as trained weights; None to keep nothing.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    folder: Path | None = None


Work = Callable[[Any, int, Place], Outcome]
"""A module's function of (settings, seed, place), which depends on nothing but settings, seed and device."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One method that is run with every seed.

    Attributes:
        name: unique in its group, for reports.
        work: function that runs it.
        candidates: the settings, a frozen dataclass each, by label. Of several, for instance one per learning rate, one
            is chosen by `Scale.choice`.
        group: the arms of a group share a table and plots: a network, a problem.
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
    """The outcomes of an arm.

    Attributes:
        arm: the arm.
        by_candidate: the outcomes by label of the candidate, one per seed.
        chosen: label of the candidate that is compared.
    """

    arm: Arm
    by_candidate: Mapping[str, Sequence[Outcome]]
    chosen: str

    @property
    def runs(self) -> Sequence[Outcome]:
        """The outcomes of the chosen candidate, by seed."""
        return self.by_candidate[self.chosen]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A number read from outcomes, one per seed or per draw.

    Attributes:
        label: in tables, as in "training loss".
        unit: as in "nats"; may be empty.
        key: entry of the outcome.
        at: place in the entry's list; None where the entry is the number itself, or with `draws` the list of numbers.
        draws: whether the entry has one number, or one list, for each draw of a run.
        reduce: what is made of an entry that is a list, for instance ``min``.
        derive: instead of an entry, the numbers of an arm's runs.
        pair: instead of an entry, the numbers of two arms' runs, where one side depends on the other.
    """

    label: str
    unit: str = ""
    key: str = ""
    at: int | None = None
    draws: bool = False
    reduce: Callable[[Sequence[float]], float] | None = None
    derive: Callable[[Runs], Sequence[float]] | None = None
    pair: Callable[[Runs, Runs], tuple[Sequence[float], Sequence[float]]] | None = None

    @property
    def quantity(self) -> str:
        """Label and unit."""
        return ", ".join(filter(None, (self.label, self.unit)))

    def of(self, outcomes: Sequence[Outcome]) -> list[float]:
        """Read the entry of each outcome."""
        rows = [row for one in outcomes for row in (one[self.key] if self.draws else [one[self.key]])]
        if self.reduce is not None:
            return [float(self.reduce(row)) for row in rows]
        return [float(row if self.at is None else row[self.at]) for row in rows]

    def values(self, runs: Runs) -> list[float]:
        """Return the numbers of an arm."""
        return list(self.derive(runs)) if self.derive is not None else self.of(runs.runs)

    def both(self, ours: Runs, theirs: Runs) -> tuple[list[float], list[float]]:
        """Return the numbers of two arms, pair by pair."""
        if self.pair is not None:
            first, second = self.pair(ours, theirs)
            return list(first), list(second)
        return self.values(ours), self.values(theirs)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A claim: one arm compared with another, or one arm's numbers, or their differences from another's, with a range.

    Attributes:
        id: unique in the experiment.
        statement: the claim in words, as if it were true.
        measurement: what is compared.
        ours: name of the arm that the claim is about.
        theirs: name of the other arm; empty for a range of ours.
        group: of both arms.
        groups: instead, several groups; each gives one pair, the means over its seeds.
        direction: which side the claim says is ``higher`` or ``lower``: ours.
        low: the least value of a claimed range, with `theirs` of the difference ours - theirs.
        high: the greatest.
        reference: the place in the paper; empty where the question is asked here.
        published: the paper's value, or its words.
        setting: whether the scale is ``the claim's`` setting or ``elsewhere``.
        diverged: whether a diverged run leaves the claim ``undecided`` or is ``worse`` than any other.
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
        title: after the group's name.
        y_label: with the unit.
        x_label: with the unit.
        key: entry of the outcomes, a list along x; with `draws` one list per draw.
        x: the places, or the entry of the outcomes that has them, whose mean over the seeds is taken.
        lines: instead of an entry, by label of a line the arms whose `measurement` it joins, along x.
        measurement: of the lines.
        arms: the arms shown; all of the group where empty.
        groups: the groups shown; all where empty.
        draws: whether the entry has one list per draw.
        log_x: logarithmic axis.
        log_y: logarithmic axis with geometric means.
    """

    title: str
    y_label: str
    x_label: str
    key: str = ""
    x: Sequence[float] | str = ()
    lines: Mapping[str, Sequence[str]] = field(default_factory=dict)
    measurement: Measurement | None = None
    arms: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    draws: bool = False
    log_x: bool = False
    log_y: bool = False


@dataclass(frozen=True, kw_only=True)
class Scale:
    """An experiment at one size.

    Attributes:
        arms: what is run.
        seeds: of every arm.
        measurements: columns of the tables.
        comparisons: the claims.
        plots: of every group.
        choice: measurement by whose mean over the seeds a candidate is chosen, of those with the fewest diverged runs,
            the highest; on data of its own.
        cost: a measurement whose ratio is reported beside every pair of arms, such as seconds.
        data: one line about the data, computed where it is needed.
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
        """Every group with its arms, in order."""
        for group in dict.fromkeys(arm.group for arm in self.arms):
            yield group, [arm for arm in self.arms if arm.group == group]


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One figure, table or sentence of a paper, put to the test.

    Attributes:
        name: on the command line.
        title: a heading.
        question: what is asked and how, in a few sentences.
        source: the paper and the place in it.
        scales: by name; ``small`` takes minutes on two cores, ``paper`` has the paper's sizes.
        data: the data sets that it needs.
        remarks: what a reader must know beside the numbers.
        plots_note: what lines and bands are.
        claims_note: what pairs and intervals are.
    """

    name: str
    title: str
    question: str
    source: str
    scales: Mapping[str, Scale]
    data: tuple[str, ...] = ()
    remarks: tuple[Finding, ...] = ()
    plots_note: str = OVER_SEEDS
    claims_note: str = PAIRED_SEEDS

    def settings(self, scale: str) -> Scale:
        """Return the table of a scale.

        Raises:
            UnknownNameError: there is no such scale.
        """
        if scale not in self.scales:
            raise UnknownNameError(f"scale of {self.name}", scale, self.scales)
        return self.scales[scale]
