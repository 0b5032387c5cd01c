"""Regression problems whose excess loss is known, for comparing learning rates; plain and adversarial."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["PROBLEMS", "Problem"]


@dataclass(frozen=True)
class Problem:
    """y = x . target + noise, x with covariance diag(k^-decay) or real; L = (x . theta - y)^2 / 2.

    The adversary takes ``attack_steps`` ascent steps of size ``eta_inner`` on x from x itself; for this loss they have
    the closed form delta = theta r (c - 1) / q, with r = x . theta - y, q = |theta|^2, c = (1 + eta_inner q)^K.

    Attributes:
        name: in the table.
        size: parameters.
        decay: of the curvatures' spectrum.
        noise: standard deviation of the targets' noise.
        batch: samples in a step.
        attack_steps: K of the adversary, 0 for none.
        eta_inner: the adversary's step.
        heavy: noise with Student's t of 3 degrees of freedom, scaled to the same variance.
        real: scikit-learn's diabetes data in the place of drawn inputs, standardised.
    """

    name: str
    size: int
    decay: float
    noise: float
    batch: int
    attack_steps: int = 0
    eta_inner: float = 0.0
    heavy: bool = False
    real: bool = False

    @cached_property
    def data(self) -> tuple[Tensor, Tensor]:
        """The real inputs and targets."""
        from sklearn.datasets import load_diabetes

        x, y = (torch.from_numpy(part).float() for part in load_diabetes(return_X_y=True))
        return (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()

    @cached_property
    def target(self) -> Tensor:
        """The true parameters, or for real data the least-squares solution."""
        if self.real:
            x, y = self.data
            solution: Tensor = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
            return solution
        generator = torch.Generator().manual_seed(sum(map(ord, self.name)))
        target = torch.randn(self.size, generator=generator)
        return target / math.sqrt(self.size)

    @cached_property
    def covariance(self) -> Tensor:
        """E x x^T."""
        if self.real:
            x, _ = self.data
            return x.mT @ x / len(x)
        return torch.diag(torch.arange(1, self.size + 1).pow(-self.decay))

    @cached_property
    def residual(self) -> float:
        """E (x . target - y)^2."""
        if self.real:
            x, y = self.data
            return float((x @ self.target - y).square().mean())
        return self.noise**2

    @property
    def largest_rate(self) -> float:
        """Half of the largest rate at which E |theta|^2 stays bounded for Gaussian inputs, without an adversary."""
        top, trace = torch.linalg.eigvalsh(self.covariance)[-1], self.covariance.trace()
        stable = top * (1 - 1 / self.batch) + (trace + top) / self.batch
        adversary = (1 + self.eta_inner * self.target.square().sum()) ** (2 * self.attack_steps)
        return float(1 / (stable * adversary))

    def batches(self, seed: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Independent batches, x (B, d) and y (B,)."""
        generator = torch.Generator().manual_seed(seed)
        scales = self.covariance.diagonal().sqrt()
        for _ in range(count):
            if self.real:
                rows = torch.randint(len(self.data[1]), (self.batch,), generator=generator)
                yield self.data[0][rows], self.data[1][rows]
                continue
            x = torch.randn(self.batch, self.size, generator=generator) * scales
            error = torch.randn(self.batch, generator=generator)
            if self.heavy:  # t_3 is a normal over the root of a mean of 3 squares; its variance is 3
                error = error / torch.randn(self.batch, 3, generator=generator).square().mean(1).sqrt() / 3**0.5
            yield x, x @ self.target + self.noise * error

    def factor(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """C and (c - 1) / q, by which the adversary multiplies residuals; (...) for theta (..., d)."""
        q = theta.square().sum(-1)
        c = (1 + self.eta_inner * q) ** self.attack_steps
        return c, torch.where(q > 0, (c - 1) / q.clamp(min=1e-30), self.attack_steps * self.eta_inner)

    def attacked(self, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """The batch as the adversary leaves it, for one theta (d,)."""
        return x + ((x @ theta - y) * self.factor(theta)[1])[:, None] * theta

    def gradients(self, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """The mean gradient at the attacked batch, (R, d) for several theta (R, d)."""
        r = theta @ x.mT - y
        c, pull = self.factor(theta)
        along = (c * pull)[:, None] * theta * r.square().mean(1, keepdim=True)
        return c[:, None] * (r @ x) / len(y) + along

    def field(self, theta: Tensor) -> Tensor:
        """h, the mean over the population; (d,)."""
        c, pull = self.factor(theta)
        return c * (self.covariance.to(theta) @ (theta - self.target)) + c * pull * self._square(theta) * theta

    @cached_property
    def minimum(self) -> tuple[Tensor, Tensor]:
        """The zero of h by Newton's method, and the symmetric part of Dh there."""
        theta = self.target.double()
        for _ in range(50):
            theta = theta - torch.linalg.solve(self._derivative(theta), self.field(theta))
        derivative = self._derivative(theta)
        return theta, (derivative + derivative.mT) / 2

    def excess(self, theta: Tensor) -> Tensor:
        """Excess of the effective loss, which h descends, over its minimum, to second order; (...) for (..., d)."""
        minimum, curvature = self.minimum
        away = theta.double() - minimum
        return ((away @ curvature) * away).sum(-1) / 2

    def attacked_loss(self, theta: Tensor) -> Tensor:
        """E L(theta, x + delta_K); (...) for (..., d)."""
        return self.factor(theta)[0].square() * self._square(theta) / 2

    def _square(self, theta: Tensor) -> Tensor:
        away = theta - self.target
        return ((away @ self.covariance.to(theta)) * away).sum(-1) + self.residual

    def _derivative(self, theta: Tensor) -> Tensor:
        derivative: Tensor = torch.func.jacrev(self.field)(theta)
        return derivative


PROBLEMS = (
    Problem("equal curvatures", 10, 0.0, 0.7, 8),
    Problem("curvatures k^-1/2", 30, 0.5, 0.4, 16),
    Problem("curvatures 1/k", 25, 1.0, 0.6, 8),
    Problem("curvatures 1/k^2", 12, 2.0, 0.4, 8),
    Problem("heavy-tailed noise", 15, 0.5, 0.6, 12, heavy=True),
    Problem("diabetes", 10, 0.0, 0.0, 8, real=True),
    Problem("adversarial, k^-1/2", 10, 0.5, 0.4, 8, attack_steps=3, eta_inner=0.1),
    Problem("adversarial, 1/k", 20, 1.0, 0.5, 16, attack_steps=3, eta_inner=0.1),
)
"""None of them was used to choose a setting of `ControlledLR`."""
