"""Local measurements of a training process: drift, noise, curvature, and the tails of its gradient noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from backpass.sde.derivative import along
from backpass.sde.dynamics import AdversarialSDE

__all__ = ["Local", "excess_kurtosis", "largest_curvature", "local_numbers", "projected_noise", "tail_exponent"]


@dataclass(frozen=True, kw_only=True)
class Local:
    """Numbers of a process at one theta.

    Attributes:
        drift: |h|^2.
        noise: tr S, the variance of a batch's gradient.
        curvature: h . (Dh) h / |h|^2, through the attack.
        noise_curvature: tr(Dh S), by Hutchinson's estimator.
        largest: the largest |eigenvalue| of Dh, by power iteration.
        kurtosis: excess kurtosis of single samples' gradient noise along random directions, with its standard error.
        tail: Hill's estimate of 1 / alpha for the tails of that noise, with its standard error.
    """

    drift: float
    noise: float
    curvature: float
    noise_curvature: float
    largest: float
    kurtosis: tuple[float, float]
    tail: tuple[float, float]

    @property
    def noise_to_drift(self) -> float:
        """Tr S / |h|^2, variance over squared mean of an update."""
        return self.noise / self.drift if self.drift > 0 else float("inf")


def local_numbers(
    sde: AdversarialSDE,
    theta: Tensor,
    *,
    draws: int = 16,
    iterations: int = 20,
    generator: torch.Generator | None = None,
) -> Local:
    """Measure drift, noise and curvature of a process at one theta without forming matrices.

    Args:
        sde: the process; expectations are over all of its data.
        theta: (P,).
        draws: random directions for the traces and for the kurtosis.
        iterations: of the power iteration.
        generator: of the directions.
    """
    h = sde.mean_field(theta)
    square = float(h @ h)

    def curve(v: Tensor) -> Tensor:
        return along(sde.mean_field, theta, v)

    xi = torch.randn(draws, sde.noise_dim, generator=generator, dtype=theta.dtype, device=theta.device)
    noises = torch.stack([sde.noise(theta, one) for one in xi]) / sde.eta_outer**0.5
    curved = torch.stack([curve(one) for one in noises])
    projections = projected_noise(sde, theta, draws=draws, generator=generator)
    return Local(
        drift=square,
        noise=float(noises.square().sum(-1).mean()),
        curvature=float(h @ curve(h)) / square if square > 0 else 0.0,
        noise_curvature=float((noises * curved).sum(-1).mean()),
        largest=largest_curvature(curve, noises.sum(0) if square == 0 else h, iterations),
        kurtosis=excess_kurtosis(projections),
        tail=tail_exponent(projections, len(theta)),
    )


def largest_curvature(product: Callable[[Tensor], Tensor], start: Tensor, iterations: int) -> float:
    """Return the largest |eigenvalue| of a linear map by power iteration; not finite if a product is not."""
    vector = start / start.abs().max().clamp(min=torch.finfo(start.dtype).tiny)
    value = float(vector.norm())
    for _ in range(iterations):
        if value == 0 or not math.isfinite(value):
            return value
        vector = product(vector / value)
        value = float(vector.norm())
    return value


def projected_noise(
    sde: AdversarialSDE, theta: Tensor, *, draws: int = 16, generator: torch.Generator | None = None
) -> Tensor:
    """Return the samples' gradient noise along random directions, (draws, N).

    The projections of all samples' gradients on a direction are one forward-mode derivative of the losses.
    """
    directions = torch.randn(draws, len(theta), generator=generator, dtype=theta.dtype, device=theta.device)
    x, y = sde.data
    at = x + sde.perturbation(theta)
    found = torch.stack([along(lambda p: sde.loss(p, at, y), theta, v) for v in directions])
    return found - found.mean(1, keepdim=True)


def excess_kurtosis(noise: Tensor) -> tuple[float, float]:
    """Return the mean excess kurtosis over the directions of noise (draws, N), and its standard error."""
    squares = noise.square()
    ratios = squares.square().mean(1) / squares.mean(1).square().clamp(min=torch.finfo(noise.dtype).tiny) - 3
    return float(ratios.mean()), float(ratios.std()) / math.sqrt(len(noise))


def tail_exponent(noise: Tensor, independent: int) -> tuple[float, float]:
    """Return Hill's estimate of 1 / alpha for tails |noise|^-alpha, from the top 2 %, and its standard error.

    Args:
        noise: (draws, N).
        independent: number of directions that count as independent, at most the number of parameters.
    """
    ordered = noise.abs().sort(1, descending=True).values
    top = min(max(10, noise.shape[1] // 50), noise.shape[1] - 1)
    tiny = torch.finfo(noise.dtype).tiny
    value = float((ordered[:, :top].clamp(min=tiny) / ordered[:, top : top + 1].clamp(min=tiny)).log().mean())
    return value, value / math.sqrt(top * min(independent, len(noise)))
