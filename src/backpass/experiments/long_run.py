"""Adversarial training run into its stationary law as an arm, and the law predicted without running it as another."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from backpass.errors import BackpassError
from backpass.experiments.experiment import Context, Outcome
from backpass.experiments.small_regression import choose, squared_loss
from backpass.lab.threads import one_thread
from backpass.sde import AdversarialSDE, Stationary, fluctuation_dissipation, run_chain, stationarity_test, stationary

__all__ = ["LongRun", "find_minimum", "predict_law", "run_long"]

_LONGEST = 10_000


@dataclass(frozen=True, kw_only=True)
class LongRun:
    """Settings of the run.

    Attributes:
        dimension: parameters of the regression on four points, 1 or 2.
        steps: K of the adversary.
        eta: the learning rate.
        eta_inner: the adversary's step.
        batch_size: B.
        paths: independent runs, >= 8.
        relaxations: the length of a run, in relaxation times 1 / rate.
        records: at equal intervals; the second half is taken as stationary.
    """

    dimension: int = 2
    steps: int = 2
    eta: float = 0.02
    eta_inner: float = 0.1
    batch_size: int = 1
    paths: int = 400
    relaxations: float = 16.0
    records: int = 80

    def __post_init__(self) -> None:
        if self.paths < 8 or self.records < 8 or not 2 <= self.relaxations <= _LONGEST:
            raise BackpassError(
                f"a long run takes at least 8 paths, 8 records and 2 relaxation times, at most {_LONGEST:,}; got "
                f"{self.paths}, {self.records} and {self.relaxations:g}."
            )


def _law(settings: LongRun) -> tuple[AdversarialSDE, Tensor, Stationary]:
    """The SDE, the start and the predicted law."""
    problem = choose(settings.dimension)
    sde = AdversarialSDE(
        squared_loss,
        problem.data,
        eta_outer=settings.eta,
        eta_inner=settings.eta_inner,
        steps=settings.steps,
        batch_size=settings.batch_size,
    )
    start = torch.tensor(problem.start, dtype=torch.float64)
    return sde, start, stationary(sde, start)


def _steps(settings: LongRun, law: Stationary) -> int:
    return max(1, math.ceil(settings.relaxations / law.rate / settings.eta / settings.records)) * settings.records


def _by_parameter(what: str, values: Tensor) -> dict[str, list[float]]:
    """Name an entry for each parameter; values (..., P)."""
    return {what.format(place + 1): values[..., place].tolist() for place in range(values.shape[-1])}


@one_thread()
def run_long(settings: LongRun, seed: int, context: Context) -> Outcome:
    """Run the chain into its stationary law.

    Returns:
        ``t``, the times of the records; by path the records ``theta_1``, ..., the ``mean of theta_1`` and the
        ``variance of theta_1``, ..., over the second half, and ``spread``, E|theta - mean|^2 over the predicted trace;
        ``gap``, by how many per cent dissipation is off fluctuation; ``z``, by how many standard errors the halves of
        the second half differ.

    Raises:
        BackpassError: a setting is out of its range, or there is no stationary law.
    """
    sde, start, law = _law(settings)
    draws = torch.Generator().manual_seed(seed)
    found = run_chain(sde, start, _steps(settings, law), paths=settings.paths, generator=draws, record=settings.records)
    settled = found.values[settings.records // 2 + 1 :]
    squares = (settled - law.mean).square()
    return {
        "t": found.times.tolist(),
        **_by_parameter("theta_{}", found.values.transpose(0, 1)),
        **_by_parameter("mean of theta_{}", settled.mean(0)),
        **_by_parameter("variance of theta_{}", squares.mean(0)),
        "spread": (squares.sum(-1).mean(0) / law.chain_covariance.trace()).tolist(),
        "gap": 100 * float(fluctuation_dissipation(sde, settled).gap),
        "z": float(stationarity_test(squares.sum(-1)).z),
    }


@one_thread()
def predict_law(settings: LongRun, seed: int, context: Context) -> Outcome:
    """Predict every entry of `run_long` without running it; E theta by its linear equation.

    Raises:
        BackpassError: a setting is out of its range, or there is no stationary law.
    """
    _, start, law = _law(settings)
    every = _steps(settings, law) // settings.records
    times = [k * every * settings.eta for k in range(settings.records + 1)]
    away = start - law.mean
    path = torch.stack([law.mean + torch.linalg.matrix_exp(-law.jacobian * t) @ away for t in times])
    return {
        "t": times,
        **_by_parameter("theta_{}", path[None]),
        **_by_parameter("mean of theta_{}", law.mean[None]),
        **_by_parameter("variance of theta_{}", law.chain_covariance.diagonal()[None]),
        "spread": [1.0],
        "gap": 0.0,
        "z": 0.0,
    }


@one_thread()
def find_minimum(settings: LongRun, seed: int, context: Context) -> Outcome:
    """Find where the mean field vanishes.

    Returns:
        The ``minimum theta_1``, ...; ``penalty``, E|grad_x L|^2 there; ``rate``, at which the slowest direction
        forgets its start, per unit of time.
    """
    sde, _, law = _law(settings)
    return {
        **_by_parameter("minimum theta_{}", law.theta),
        "penalty": float(sde.gradient_penalty(law.theta)),
        "rate": float(law.rate),
    }
