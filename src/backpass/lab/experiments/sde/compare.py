"""Adversarial training and SGD of a small network beside what their SDEs predict."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from backpass.errors import BackpassError
from backpass.lab.experiments.sde.tanh_network import make_problem
from backpass.lab.threads import one_thread
from backpass.numbers import is_number
from backpass.sde import AdversarialSDE, integrate, run_chain
from backpass.sde.generator import generator

__all__ = ["QUANTITIES", "Measured", "Study", "measure"]

_MOST_STEPS = 10**6

Progress = Callable[[str, float], None]
"""Called with what is going on and with the part that is done, in [0, 1]."""

QUANTITIES = ("gradient_penalty", "expected_loss", "adversarial_loss")
"""The methods of `AdversarialSDE` that are recorded, all with the adversary of adversarial training."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """Settings of the comparison.

    Attributes:
        paths: of each chain and each SDE.
        t: the horizon; t / eta steps of the chain.
        records: at time 0 and at this many equal intervals.
        eta: the learning rate.
        eta_inner: the adversary's step size.
        steps: K of the adversary, >= 1.
        batch_size: B.
        samples: N.
        points: where the slopes are compared, at most; half of them from each chain.
        seed: of data, start and draws.
    """

    paths: int = 100
    t: float = 20.0
    records: int = 10
    eta: float = 0.1
    eta_inner: float = 0.1
    steps: int = 3
    batch_size: int = 4
    samples: int = 32
    points: int = 400
    seed: int = 0

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


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Measured numbers; tensors are float64.

    Attributes:
        study: the settings.
        times: of the records, (R,).
        values: by quantity and by who, (R, paths); who is ``SGD`` or ``AT``, as a chain, or predicted by C or by B:
            ``"SGD"``, ``"SGD, C"``, ``"AT"``, ``"AT, C"``, ``"AT, B"``.
        slopes: d/dt E V under adversarial training less that under SGD, V = |L_x|^2 / 2, at points of both chains.
        seconds: how long it took.
    """

    study: Study
    times: Tensor
    values: Mapping[str, Mapping[str, Tensor]]
    slopes: Tensor
    seconds: float


@one_thread()
def measure(study: Study, progress: Progress = lambda what, part: None) -> Measured:
    """Run both chains and their SDEs from one start; the chains' paths see the same batches in pairs.

    Raises:
        BackpassError: a setting is out of its range.
    """
    began = time.perf_counter()
    trained, start = make_problem(
        seed=study.seed,
        samples=study.samples,
        eta=study.eta,
        eta_inner=study.eta_inner,
        steps=study.steps,
        batch_size=study.batch_size,
    )
    plain = replace(trained, steps=0)
    values: dict[str, dict[str, Tensor]] = {quantity: {} for quantity in QUANTITIES}
    visited: dict[str, Tensor] = {}
    work: list[tuple[str, AdversarialSDE, bool]] = [
        ("SGD", plain, True),
        ("AT", trained, True),
        ("SGD, C", plain, False),
        ("AT, C", trained, False),
        ("AT, B", replace(trained, mode="expanded"), False),
    ]
    times = torch.empty(0)
    for number, (who, sde, chain) in enumerate(work):
        progress(f"{who}: {'chain' if chain else 'SDE'}", number / (len(work) + 1))
        draws = torch.Generator().manual_seed(study.seed + (1 if chain else 2))
        if chain:
            steps = round(study.t / study.eta)
            found = run_chain(sde, start, steps, paths=study.paths, generator=draws, record=study.records)
            visited[who] = found.values[1:].flatten(0, 1)
        else:
            found = integrate(sde, start, study.t, paths=study.paths, generator=draws, record=study.records)
        times = found.times
        for quantity in QUANTITIES:
            values[quantity][who] = torch.stack([getattr(trained, quantity)(theta) for theta in found.values])
    progress("slopes of E V", len(work) / (len(work) + 1))
    return Measured(
        study=study,
        times=times,
        values=values,
        slopes=_slopes(trained, plain, visited, study),
        seconds=time.perf_counter() - began,
    )


def _slopes(trained: AdversarialSDE, plain: AdversarialSDE, visited: Mapping[str, Tensor], study: Study) -> Tensor:
    draws = torch.Generator().manual_seed(study.seed + 3)
    chosen = [theta[torch.randperm(len(theta), generator=draws)[: study.points // 2]] for theta in visited.values()]

    def v(theta: Tensor) -> Tensor:
        return trained.gradient_penalty(theta) / 2

    found = [
        generator(trained, v, points) - generator(plain, v, points) for points in torch.split(torch.cat(chosen), 50)
    ]
    return torch.cat(found)
