"""Experiments of the papers: arms, seeds, measurements and comparisons with published values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from backpass.errors import UnknownNameError
from backpass.experiments.experiment import Experiment
from backpass.lab.bench import experiment as bench
from backpass.lab.experiments import catalogue
from backpass.papers import (
    adversarial_sde,
    learning_rates,
    linbp_adversarial,
    linbp_simulations,
    linbp_training,
    proxprop,
    sibp,
)

__all__ = ["EXPERIMENTS", "choose", "every_experiment", "experiment_names"]

EXPERIMENTS: tuple[Experiment, ...] = (
    *linbp_simulations.EXPERIMENTS,
    *linbp_training.EXPERIMENTS,
    *linbp_adversarial.EXPERIMENTS,
    *proxprop.EXPERIMENTS,
    *sibp.EXPERIMENTS,
    *adversarial_sde.EXPERIMENTS,
    *learning_rates.EXPERIMENTS,
)
"""Experiments in the declarative form of `backpass.experiments`."""

_ORDER = ("linbp", "proxprop", "sibp", "sde")


def every_experiment() -> list[Experiment | bench.Experiment[Any]]:
    """Return every experiment, ordered by paper."""
    every: list[Experiment | bench.Experiment[Any]] = [*EXPERIMENTS, *catalogue.EXPERIMENTS]
    places = {name: place for place, name in enumerate(_ORDER)}
    return sorted(every, key=lambda one: places.get(one.name.partition("-")[0], len(places)))


def experiment_names() -> list[str]:
    """Return the names of all experiments, in order."""
    return [experiment.name for experiment in every_experiment()]


def choose(names: Sequence[str]) -> list[Experiment | bench.Experiment[Any]]:
    """Return the experiments of these names without duplicates, in order; ``all`` selects every experiment.

    Raises:
        UnknownNameError: a name is unknown.
    """
    known = experiment_names()
    for name in names:
        if name != "all" and name not in known:
            raise UnknownNameError("experiment", name, [*known, "all"])
    return [experiment for experiment in every_experiment() if "all" in names or experiment.name in names]
