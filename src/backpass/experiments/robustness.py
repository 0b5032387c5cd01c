"""Paths of SGD and of adversarial training of a small network as arms, and their SDEs as others."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from backpass.errors import BackpassError
from backpass.experiments.experiment import Context, Outcome
from backpass.experiments.tanh_network import make_problem
from backpass.lab.threads import one_thread
from backpass.numbers import is_number
from backpass.sde import AdversarialSDE, integrate, run_chain
from backpass.sde.generator import generator

__all__ = ["QUANTITIES", "Paired", "compare_slopes", "predict_paths", "run_paths"]

_MOST_STEPS = 10**6

QUANTITIES = ("gradient_penalty", "expected_loss", "adversarial_loss")
"""The methods of `AdversarialSDE` that are recorded, all with the adversary of adversarial training."""


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Settings of an arm; arms of one seed share data and start, and their chains the batches.

    Attributes:
        adversarial: adversarial training, and not SGD.
        mode: of the SDE that predicts it, ``exact`` or ``expanded``.
        paths: of the chain, and of its SDE.
        t: the horizon; t / eta steps of the chain.
        records: at time 0 and at this many equal intervals.
        eta: the learning rate.
        eta_inner: the adversary's step size.
        steps: K of the adversary, >= 1.
        batch_size: B.
        samples: N.
        points: where slopes are compared, at most; half of them from each chain.
    """

    adversarial: bool = True
    mode: str = "exact"
    paths: int = 100
    t: float = 20.0
    records: int = 10
    eta: float = 0.1
    eta_inner: float = 0.1
    steps: int = 3
    batch_size: int = 4
    samples: int = 32
    points: int = 400

    def __post_init__(self) -> None:
        if self.steps < 1 or self.paths < 2:
            raise BackpassError(
                f"compare needs an adversary, steps >= 1, and paths >= 2; got {self.steps} and {self.paths}."
            )
        if not all(is_number(one) and one > 0 for one in (self.t, self.eta)) or self.t / self.eta > _MOST_STEPS:
            raise BackpassError(
                f"t and eta are finite numbers above 0, and t / eta at most {_MOST_STEPS:,} steps; got "
                f"t={self.t:g} and eta={self.eta:g}."
            )
        chain = round(self.t / self.eta)
        if abs(chain * self.eta - self.t) > 1e-9 * self.t or chain % self.records:
            fitting = max(1, round(chain / self.records)) * self.records * self.eta
            raise BackpassError(
                f"t / eta is the number of steps, a whole one that the number of records divides; got t={self.t:g}, "
                f"eta={self.eta:g} and {self.records} records. Try t={fitting:g}."
            )

    @property
    def times(self) -> list[float]:
        """Times at which the paths are recorded."""
        return [self.t * k / self.records for k in range(self.records + 1)]


def _problem(settings: Paired, seed: int) -> tuple[AdversarialSDE, AdversarialSDE, Tensor]:
    """The process with the adversary by which all is judged, the process of the arm, and the start."""
    judge, start = make_problem(
        seed=seed,
        samples=settings.samples,
        eta=settings.eta,
        eta_inner=settings.eta_inner,
        steps=settings.steps,
        batch_size=settings.batch_size,
    )
    return judge, judge if settings.adversarial else replace(judge, steps=0), start


def _chain(settings: Paired, seed: int) -> Tensor:
    """The records of the chain, (R, paths, P)."""
    _, sde, start = _problem(settings, seed)
    draws, steps = torch.Generator().manual_seed(seed + 1), round(settings.t / settings.eta)
    return run_chain(sde, start, steps, paths=settings.paths, generator=draws, record=settings.records).values


def _judged(judge: AdversarialSDE, records: Tensor) -> dict[str, Tensor]:
    """The quantities by record and path, (R, paths)."""
    return {quantity: torch.stack([getattr(judge, quantity)(theta) for theta in records]) for quantity in QUANTITIES}


def _by_path(values: dict[str, Tensor]) -> dict[str, list[list[float]]]:
    return {quantity: one.T.tolist() for quantity, one in values.items()}


@one_thread()
def run_paths(settings: Paired, seed: int, context: Context) -> Outcome:
    """Train along many paths; each of `QUANTITIES` has for every path a list along the records."""
    judge, *_ = _problem(settings, seed)
    return _by_path(_judged(judge, _chain(settings, seed)))


@one_thread()
def predict_paths(settings: Paired, seed: int, context: Context) -> Outcome:
    """Integrate the SDE of `run_paths`.

    Returns:
        The entries of `run_paths`, and for each record but the first: ``gap Q``, how far the mean of Q is from that of
        the chain, and ``excess Q``, the gap less three standard errors and 5 % of the prediction.
    """
    judge, process, start = _problem(settings, seed)
    draws = torch.Generator().manual_seed(seed + 2)
    sde = process if settings.mode == "exact" else replace(process, mode="expanded")
    found = integrate(sde, start, settings.t, paths=settings.paths, generator=draws, record=settings.records)
    ours, chain = _judged(judge, found.values), _judged(judge, _chain(settings, seed))
    outcome: dict[str, list[list[float]] | list[float]] = {**_by_path(ours)}
    for quantity, values in ours.items():
        gap = (chain[quantity].mean(1) - values.mean(1)).abs()
        error = ((chain[quantity].var(1) + values.var(1)) / settings.paths).sqrt()
        outcome[f"gap {quantity}"] = gap[1:].tolist()
        outcome[f"excess {quantity}"] = (gap - 3 * error - 0.05 * values.mean(1).abs())[1:].tolist()
    return outcome


@one_thread()
def compare_slopes(settings: Paired, seed: int, context: Context) -> Outcome:
    """Compare slopes at points that both chains visit.

    Returns:
        ``slope``, by point d/dt E V under adversarial training less that under SGD, V = |L_x|^2 / 2.
    """
    judge, *_ = _problem(settings, seed)
    plain, draws, chosen = replace(judge, steps=0), torch.Generator().manual_seed(seed + 3), []
    for adversarial in (False, True):
        visited = _chain(replace(settings, adversarial=adversarial), seed)[1:].flatten(0, 1)
        chosen.append(visited[torch.randperm(len(visited), generator=draws)[: settings.points // 2]])

    def v(theta: Tensor) -> Tensor:
        return judge.gradient_penalty(theta) / 2

    points = torch.split(torch.cat(chosen), 50)
    return {"slope": torch.cat([generator(judge, v, some) - generator(plain, v, some) for some in points]).tolist()}
