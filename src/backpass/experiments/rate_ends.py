"""Last values of runs under a schedule: outcomes have a number per rate of a grid for every schedule, arms name one."""

from __future__ import annotations

import math

from backpass.experiments.experiment import Measurement, Runs

__all__ = ["SCHEDULES", "end"]

_START, _TUNED = "the largest rate", "best of 10 rates"

SCHEDULES: dict[str, tuple[str, int | None]] = {
    f"fixed, {_TUNED}": ("fixed", None),
    f"linear decay from {_START}": ("linear", 0),
    f"linear decay, {_TUNED}": ("linear", None),
    f"cosine from {_START}": ("cosine", 0),
    f"cosine, {_TUNED}": ("cosine", None),
    f"Polyak average at {_START}": ("Polyak", 0),
    f"Polyak average, {_TUNED}": ("Polyak", None),
    "controlled, Polyak average": ("controlled, Polyak", 0),
}
"""By name of an arm the entry of its outcomes and the place in the grid, None for the best of all; another arm is the
first of the entry of its name."""


def end(
    label: str, *, unit: str = "", metric: str = "", chosen_by: str = "", log: bool = False, over: str = ""
) -> Measurement:
    """Return the measurement of where an arm's schedule ends.

    Args:
        label: of the measurement.
        unit: of it.
        metric: what the entries' names end in.
        chosen_by: the same for the numbers by whose mean over these seeds the best rate is chosen, the lowest.
        log: take logarithms.
        over: name of an arm whose numbers are divided by.
    """

    def read(runs: Runs, name: str) -> list[float]:
        entry, place = SCHEDULES.get(name, (name, 0))
        if place is None:
            means = [math.fsum(column) for column in zip(*(one[entry + chosen_by] for one in runs.runs), strict=True)]
            place = min(range(len(means)), key=lambda k: means[k] if math.isfinite(means[k]) else math.inf)
        return [one[entry + metric][place] for one in runs.runs]

    def derive(runs: Runs) -> list[float]:
        values = read(runs, runs.arm.name)
        if over:
            values = [ours / base for ours, base in zip(values, read(runs, over), strict=True)]
        return list(map(math.log, values)) if log else values

    return Measurement(label=label, unit=unit, derive=derive)
