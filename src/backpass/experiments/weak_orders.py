"""Weak errors of an SDE against adversarial training as arms, by an oracle without Monte Carlo."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from backpass.errors import BackpassError
from backpass.experiments.experiment import Context, Outcome
from backpass.experiments.small_regression import choose, squared_loss
from backpass.lab.threads import one_thread
from backpass.sde import AdversarialSDE
from backpass.sde import weak_error as errors_of

__all__ = ["FUNCTIONS", "Orders", "weak_errors"]

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sin 2 theta_1": lambda p: (2 * p[..., 0]).sin(),
    "|theta|^2": lambda p: p.square().sum(-1),
    "exp(-|theta|^2)": lambda p: (-p.square().sum(-1)).exp(),
}
"""Several, because one error can change its sign with eta and then fakes a slope."""


@dataclass(frozen=True, kw_only=True)
class Orders:
    """An SDE, and the regressions and adversaries on which its weak order is measured.

    Attributes:
        variant: name of the SDE, one of `backpass.sde.VARIANTS`.
        dimensions: parameters of the regressions, 1 or 2.
        steps: numbers of steps K of the adversary.
        rhos: eta_inner / eta_outer, each used where there is an adversary.
        batch_size: B.
        t: the horizon.
        largest: the largest learning rate.
        halvings: how often it is halved.
    """

    variant: str = "C"
    dimensions: tuple[int, ...] = (1,)
    steps: tuple[int, ...] = (0, 2, 3)
    rhos: tuple[float, ...] = (1.0, 3.0)
    batch_size: int = 1
    t: float = 2.0
    largest: float = 0.005
    halvings: int = 2

    def __post_init__(self) -> None:
        if not (math.isfinite(self.largest) and self.largest > 0) or self.halvings < 1:
            raise BackpassError(f"eta must be > 0 and halved at least once; got {self.largest} and {self.halvings}.")

    @property
    def etas(self) -> tuple[float, ...]:
        """The learning rates."""
        return tuple(self.largest / 2**k for k in range(self.halvings + 1))

    @property
    def problems(self) -> Iterator[tuple[int, int, float]]:
        """Every regression with every adversary: dimension, steps and rho."""
        for dimension in self.dimensions:
            for steps in self.steps:
                for rho in self.rhos if steps else self.rhos[:1]:
                    yield dimension, steps, rho


@one_thread()
def weak_errors(settings: Orders, seed: int, context: Context) -> Outcome:
    """Measure an SDE against the chain at every learning rate; nothing is random.

    Returns:
        For each problem and test function the ``slope`` of log error against log eta and the ``resolution``, the
        oracle's own part of an error; for each function, ``error of F``, by problem one error per learning rate.

    Raises:
        BackpassError: a setting is out of its range, or the adversary drives the chain out of the oracle's box.
    """
    slopes: list[float] = []
    resolution: list[float] = []
    errors: dict[str, list[list[float]]] = {f"error of {function}": [] for function in FUNCTIONS}
    for dimension, steps, rho in settings.problems:
        problem = choose(dimension)
        sde = AdversarialSDE(
            squared_loss, problem.data, eta_outer=1.0, eta_inner=rho, steps=steps, batch_size=settings.batch_size
        )
        found = errors_of(
            sde,
            bounds=problem.bounds,
            theta0=torch.tensor(problem.start, dtype=torch.float64),
            functions=FUNCTIONS,
            t=settings.t,
            etas=settings.etas,
            variants=(settings.variant,),
            nodes=problem.nodes,
        )
        slopes += found.slopes[settings.variant].values()
        resolution += found.resolution[settings.variant].values()
        for function, row in found.errors[settings.variant].items():
            errors[f"error of {function}"].append(list(row))
    return {"slope": slopes, "resolution": resolution, **errors}
