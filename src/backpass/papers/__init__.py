"""Experiments of the papers: arms, seeds, measurements and comparisons with published values."""

from __future__ import annotations

from collections.abc import Sequence

from backpass.errors import UnknownNameError
from backpass.experiments.experiment import Experiment
from backpass.papers import (
    adversarial_sde,
    learning_rates,
    linbp_adversarial,
    linbp_simulations,
    linbp_tables,
    linbp_training,
    linbp_transfer,
    linbp_white_box,
    proxprop,
    sibp,
)

__all__ = ["EXPERIMENTS", "choose", "experiment_names"]

EXPERIMENTS: tuple[Experiment, ...] = (
    *linbp_simulations.EXPERIMENTS,
    *linbp_training.EXPERIMENTS,
    *linbp_adversarial.EXPERIMENTS,
    *linbp_tables.EXPERIMENTS,
    *linbp_white_box.EXPERIMENTS,
    *linbp_transfer.EXPERIMENTS,
    *proxprop.EXPERIMENTS,
    *sibp.EXPERIMENTS,
    *adversarial_sde.EXPERIMENTS,
    *learning_rates.EXPERIMENTS,
)
"""Every experiment, ordered by paper."""


def experiment_names() -> list[str]:
    """Return the names of all experiments, in order."""
    return [experiment.name for experiment in EXPERIMENTS]


def choose(names: Sequence[str]) -> list[Experiment]:
    """Return the experiments of these names without duplicates, in order; ``all`` selects every experiment.

    Raises:
        UnknownNameError: a name is unknown.
    """
    known = experiment_names()
    for name in names:
        if name != "all" and name not in known:
            raise UnknownNameError("experiment", name, [*known, "all"])
    return [experiment for experiment in EXPERIMENTS if "all" in names or experiment.name in names]
