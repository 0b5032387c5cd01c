"""ControlledLR beside fixed rates in adversarial training of convex losses, with the curvature through the attack."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import jacfwd

from backpass.experiments.experiment import Context, Outcome
from backpass.sde import AdversarialSDE, InnerLoop
from backpass.sde.long_run import find_zero
from backpass.sde.sampling import draw_batches
from backpass.training import ControlledLR, half_losses

__all__ = ["PROBLEMS", "Attacked", "AttackedProblem", "compare_rates"]

RATES = 10
"""The grid: the problem's largest rate, halved from one to the next."""

_CONTROLLED = ("controlled", "controlled, frozen")

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class AttackedProblem:
    """Adversarial training of a convex loss on fixed data.

    Attributes:
        name: in the table.
        loss: loss(theta, x, y) -> (N,).
        make: data from a generator, x (N, d) and y (N,).
        size: parameters.
        batch: samples in a step, drawn with replacement.
        adversary: the inner loop, of gradient steps.
    """

    name: str
    loss: Loss
    make: Callable[[torch.Generator], tuple[Tensor, Tensor]]
    size: int
    batch: int
    adversary: InnerLoop

    @cached_property
    def sde(self) -> AdversarialSDE:
        """The process at learning rate 1."""
        data = self.make(torch.Generator().manual_seed(0))
        adversary = self.adversary
        return AdversarialSDE(
            self.loss,
            data,
            eta_outer=1.0,
            batch_size=self.batch,
            steps=adversary.steps,
            eta_inner=adversary.eta,
            eps=adversary.eps,
            order=1,
        )

    @cached_property
    def minimum(self) -> tuple[Tensor, Tensor]:
        """The zero of h, and Dh there."""
        theta = find_zero(self.sde, torch.zeros(self.size, dtype=torch.float64))
        derivative: Tensor = jacfwd(self.sde.mean_field)(theta)
        return theta, derivative

    @property
    def largest_rate(self) -> float:
        """1 over the largest curvature and the noise's: near half of the largest stable rate."""
        derivative = self.minimum[1]
        top = torch.linalg.eigvals(derivative).real.max()
        return float(1 / (top + derivative.trace() / self.batch))

    def excess(self, theta: Tensor) -> Tensor:
        """Half of the squared distance from the minimum in the symmetric part of Dh; (...) for (..., d)."""
        minimum, derivative = self.minimum
        away = theta - minimum
        return ((away @ (derivative + derivative.mT)) * away).sum(-1) / 4

    def frozen_share(self) -> float:
        """The trace of the curvature at frozen perturbations over that through the attack, at the minimum."""
        theta, derivative = self.minimum
        x, y = self.sde.data
        at = x + self.sde.perturbation(theta)
        frozen: Tensor = torch.func.hessian(lambda p: self.loss(p, at, y).mean())(theta)
        return float(frozen.trace() / derivative.trace())


class _Parameters(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(size, dtype=torch.float64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.theta, x


@dataclass(frozen=True, kw_only=True)
class Attacked:
    """Settings of the comparison.

    Attributes:
        problem: name of one of `PROBLEMS`.
        steps: of every run.
        every: between measurements of `ControlledLR`.
    """

    problem: str
    steps: int = 1500
    every: int = 10


def compare_rates(settings: Attacked, seed: int, context: Context) -> Outcome:
    """Learn under all schedules, on the same batches.

    Returns:
        The excess after the last step: ``fixed``, one number per rate of the grid, ``controlled`` and ``controlled,
        frozen``, one.
    """
    (problem,) = (one for one in PROBLEMS if one.name == settings.problem)
    sde, adversary = problem.sde, problem.adversary
    rates = problem.largest_rate * 0.5 ** torch.arange(RATES, dtype=torch.float64)
    theta = torch.zeros(RATES + len(_CONTROLLED), problem.size, dtype=torch.float64)
    models = [_Parameters(problem.size) for _ in _CONTROLLED]
    schedulers = [
        ControlledLR(torch.optim.SGD(model.parameters(), lr=float(rates[0])), every=settings.every) for model in models
    ]

    def mean(output: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
        return problem.loss(*output, y).mean()

    batches: Iterator[Tensor] = draw_batches(
        "iid", sde.noise_dim, sde.batch_size, (), torch.Generator().manual_seed(seed), torch.device("cpu")
    )
    for _ in range(settings.steps):
        index = next(batches)
        gradients = theta - sde.chain_step(theta, index=index.expand(len(theta), -1))
        x, y = (part[index] for part in sde.data)
        theta[:RATES] -= rates[:, None] * gradients[:RATES]
        for row, (name, model, scheduler) in enumerate(zip(_CONTROLLED, models, schedulers, strict=True), RATES):
            if scheduler.due:
                if name == "controlled":
                    scheduler.measure(half_losses(model, mean, x, y, adversary=adversary))  # type: ignore[arg-type]
                else:
                    at = x + _perturbation(adversary, problem.loss, model.theta.detach(), x, y)
                    scheduler.measure(half_losses(model, mean, at, y))  # type: ignore[arg-type]
            model.theta.grad = gradients[row]
            scheduler.optimizer.step()
            scheduler.step()
            theta[row] = model.theta.detach()
    ends = problem.excess(theta).tolist()
    return {"fixed": ends[:RATES], **{name: [end] for name, end in zip(_CONTROLLED, ends[RATES:], strict=True)}}


def _perturbation(adversary: InnerLoop, loss: Loss, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return adversary.run(torch.func.grad(lambda delta: loss(theta, x + delta, y).sum()), x)


def _logistic(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return F.softplus(-y * (x @ theta))


def _softmax(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    logits = x @ theta.view(-1, 3)
    return logits.logsumexp(1) - logits.gather(1, y.long()[:, None])[:, 0] + 0.025 * theta.square().sum()


def _log_cosh(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    residual = x @ theta - y
    return F.softplus(2 * residual) - residual


def _huber(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    size = (x @ theta - y).abs()
    return torch.where(size < 1, size.square() / 2, size - 0.5)


def _squared_hinge(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return F.relu(1 - y * (x @ theta)).square() / 2


def _quantile(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Quantile loss for 0.8, smoothed over a quarter: 0.8 r + softplus(-4 r) / 4 with r = y - <x, theta>."""
    residual = y - x @ theta
    return 0.8 * residual + F.softplus(-4 * residual) / 4


def _signs(samples: int, size: int, decay: float) -> Callable[[torch.Generator], tuple[Tensor, Tensor]]:
    """Normal inputs with variances k^-decay, and labels -1, 1 drawn from a logistic model."""

    def make(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        scales = torch.arange(1, size + 1, dtype=torch.float64).pow(-decay / 2)
        x = torch.randn(samples, size, generator=generator, dtype=torch.float64) * scales
        target = torch.randn(size, generator=generator, dtype=torch.float64)
        draws = torch.rand(samples, generator=generator, dtype=torch.float64)
        return x, (draws < torch.sigmoid(x @ target)).double() * 2 - 1

    return make


def _classes(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    centres = torch.randn(3, 8, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (900,), generator=generator)
    return centres[y] + torch.randn(900, 8, generator=generator, dtype=torch.float64), y.double()


def _heavy(samples: int, size: int, decay: float) -> Callable[[torch.Generator], tuple[Tensor, Tensor]]:
    """Normal inputs with variances k^-decay, and targets with noise of Student's t with 3 degrees of freedom."""

    def make(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        scales = torch.arange(1, size + 1, dtype=torch.float64).pow(-decay / 2)
        x = torch.randn(samples, size, generator=generator, dtype=torch.float64) * scales
        target = torch.randn(size, generator=generator, dtype=torch.float64) / size**0.5
        squares = torch.randn(samples, 3, generator=generator, dtype=torch.float64).square().mean(1)
        return x, x @ target + torch.randn(samples, generator=generator, dtype=torch.float64) / squares.sqrt()

    return make


PROBLEMS = (
    AttackedProblem("logistic", _logistic, _signs(1500, 20, 0.0), 20, 20, InnerLoop(steps=3, eta=0.3)),
    AttackedProblem("softmax", _softmax, _classes, 24, 16, InnerLoop(steps=5, eta=0.2)),
    AttackedProblem("log cosh, heavy tails", _log_cosh, _heavy(1000, 15, 0.0), 15, 10, InnerLoop(steps=4, eta=0.25)),
    AttackedProblem("logistic, l2 ball", _logistic, _signs(800, 12, 1.0), 12, 10, InnerLoop(steps=5, eta=1.0, eps=0.5)),
    AttackedProblem("Huber, heavy tails", _huber, _heavy(1000, 12, 0.5), 12, 10, InnerLoop(steps=3, eta=0.25)),
    AttackedProblem("squared hinge", _squared_hinge, _signs(1200, 15, 0.5), 15, 12, InnerLoop(steps=4, eta=0.1)),
    AttackedProblem("quantile, heavy tails", _quantile, _heavy(1200, 10, 0.8), 10, 8, InnerLoop(steps=3, eta=0.3)),
)
"""The first four were known when the rule took its present form; the last three served to choose nothing."""
