"""The experiments that are not tables in `backpass.papers` yet, by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from backpass.errors import UnknownNameError
from backpass.lab.bench.experiment import Experiment
from backpass.lab.experiments.linbp import (
    halving,
    success_tables,
    transfer,
    white_box_conditions,
)

__all__ = ["EXPERIMENTS", "choose", "experiment_names"]

EXPERIMENTS: tuple[Experiment[Any], ...] = (
    *success_tables.EXPERIMENTS,
    *halving.EXPERIMENTS,
    *transfer.EXPERIMENTS,
    *white_box_conditions.EXPERIMENTS,
)


def experiment_names() -> list[str]:
    """The names, in order."""
    return [experiment.name for experiment in EXPERIMENTS]


def choose(names: Sequence[str]) -> list[Experiment[Any]]:
    """The experiments of these names, each once, in the catalogue's order; ``all`` stands for all.

    Raises:
        UnknownNameError: there is no experiment of a name.
    """
    known = experiment_names()
    for name in names:
        if name != "all" and name not in known:
            raise UnknownNameError("experiment", name, [*known, "all"])
    return [experiment for experiment in EXPERIMENTS if "all" in names or experiment.name in names]
