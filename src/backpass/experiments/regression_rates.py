"""Learning rates on one regression problem: schedules side by side on the same batches, and ControlledLR."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from backpass.experiments.experiment import Context, Outcome
from backpass.experiments.regression_problems import Problem
from backpass.training import ControlledLR

__all__ = ["RATES", "Regression", "regress"]

RATES = 10
"""The grid: the problem's largest rate, halved from one to the next."""


@dataclass(frozen=True, kw_only=True)
class Regression:
    """Settings of the comparison.

    Attributes:
        problem: what is learned.
        steps: of every run.
        every: between measurements of the second `ControlledLR`.
    """

    problem: Problem
    steps: int = 2000
    every: int = 10


def regress(settings: Regression, seed: int, context: Context) -> Outcome:
    """Learn under all schedules, on the same batches.

    Fixed rates, their Polyak averages over the second half, linear decay and cosine decay to 0 start at each rate of
    the grid; `ControlledLR` starts at the largest.

    Returns:
        By schedule, a number per rate of the grid (one for `ControlledLR`): the excess of the effective loss after the
        last step, and under the same name with `` attacked`` E L(x + delta_K).
    """
    problem, steps, every = settings.problem, settings.steps, settings.every
    grid = problem.largest_rate * 0.5 ** torch.arange(RATES)
    theta, average = torch.zeros(3 * RATES, problem.size), torch.zeros(RATES, problem.size)
    own = [_Controlled(problem, 1), _Controlled(problem, every)]
    half = steps // 2
    for k, (x, y) in enumerate(problem.batches(seed, steps)):
        part = k / steps
        rates = torch.cat([grid, grid * (1 - part), grid * (1 + math.cos(math.pi * part)) / 2])
        theta -= rates[:, None] * problem.gradients(theta, x, y)
        if k >= half:
            average += (theta[:RATES] - average) / (k - half + 1)
        for one in own:
            one.step(x, y, averaging=k >= half)
    fixed, linear, cosine = torch.split(theta, RATES)
    ends = {
        "fixed": fixed,
        "linear": linear,
        "cosine": cosine,
        "Polyak": average,
        "controlled": own[0].theta.detach()[None],
        f"controlled, every {every}": own[1].theta.detach()[None],
        "controlled, Polyak": own[0].average[None],
    }
    found = {name: problem.excess(end).tolist() for name, end in ends.items()}
    return found | {f"{name} attacked": problem.attacked_loss(end).tolist() for name, end in ends.items()}


class _Controlled:
    """One run under `ControlledLR`, and its Polyak average."""

    def __init__(self, problem: Problem, every: int) -> None:
        self.problem = problem
        self.theta = nn.Parameter(torch.zeros(problem.size))
        self.optimizer = torch.optim.SGD([self.theta], lr=problem.largest_rate)
        self.scheduler = ControlledLR(self.optimizer, every=every)
        self.average, self.count = torch.zeros(problem.size), 0

    def step(self, x: Tensor, y: Tensor, *, averaging: bool) -> None:
        """One step on one batch."""
        theta, problem = self.theta, self.problem
        attacked = problem.attacked(theta.detach(), x, y)
        if self.scheduler.due:
            parts = torch.arange(len(y)).tensor_split(2)
            self.scheduler.measure([partial(_half_square, theta, attacked[rows], y[rows]) for rows in parts])
        theta.grad = (attacked @ theta.detach() - y) @ attacked / len(y)
        self.optimizer.step()
        self.scheduler.step()
        if averaging:
            self.count += 1
            self.average += (theta.detach() - self.average) / self.count


def _half_square(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return (x @ theta - y).square().mean() / 2
