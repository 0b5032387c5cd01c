"""What the attacker may do: a ball around the image, cut by the pixel bounds."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from backpass.attacks.noise import normal, uniform
from backpass.errors import UnknownNameError

__all__ = ["L2", "Linf", "Threat", "make_threat", "per_sample"]


def per_sample(value: Tensor, like: Tensor) -> Tensor:
    """Views a value per sample (N,) so that it broadcasts over `like` (N, ...)."""
    return value.view(-1, *(1,) * (like.dim() - 1))


@dataclass(frozen=True)
class Threat(ABC):
    """The set {z : ||z - x|| <= eps, lo <= z <= hi}, x: (N, ...) in [lo, hi].

    Args:
        eps: the radius, in the units of x, at least 0.
        bounds: (lo, hi), the valid pixel range.
    """

    eps: float
    bounds: tuple[float, float]

    @abstractmethod
    def project(self, x: Tensor, z: Tensor) -> Tensor:
        """The feasible image for z (N, ...); leaves a feasible z as it is. May write into z."""

    @abstractmethod
    def start(self, x: Tensor, key: Tensor) -> Tensor:
        """A feasible random image, uniform in the ball and then cut by the bounds; key: (N,) int64."""

    @abstractmethod
    def direction(self, gradient: Tensor) -> Tensor:
        """The unit step of steepest ascent, argmax over ||d|| <= 1 of <gradient, d>."""

    @abstractmethod
    def size(self, delta: Tensor) -> Tensor:
        """||delta|| of every sample, (N,) in float64."""

    @abstractmethod
    def slack(self, x: Tensor) -> float:
        """How far rounding alone may carry a projected image out of the ball."""

    def contains(self, x: Tensor, z: Tensor) -> Tensor:
        """(N,) bool: z is in the ball and in the bounds, up to rounding; a NaN never is."""
        flat = z.flatten(1)
        lo, hi = self.bounds
        inside = ((flat >= lo) & (flat <= hi)).all(1)
        return inside & (self.size(z.double() - x.double()) <= self.eps + self.slack(x))


@dataclass(frozen=True)
class Linf(Threat):
    """The maximum norm: every pixel moves by at most eps."""

    def project(self, x: Tensor, z: Tensor) -> Tensor:
        """clip(clip(z, x - eps, x + eps), lo, hi)."""
        torch.maximum(z, x - self.eps, out=z)
        torch.minimum(z, x + self.eps, out=z)
        return z.clamp_(*self.bounds)

    def start(self, x: Tensor, key: Tensor) -> Tensor:
        """Per pixel, x + eps * U(-1, 1)."""
        return self.project(x, uniform(key, x).mul_(2.0 * self.eps).sub_(self.eps).add_(x))

    def direction(self, gradient: Tensor) -> Tensor:
        """sign(g)."""
        return gradient.sign()

    def size(self, delta: Tensor) -> Tensor:
        """max_i |delta_i|."""
        return delta.double().flatten(1).abs().amax(1)

    def slack(self, x: Tensor) -> float:
        """One rounding of x + eps, and one of the difference."""
        return 2.0 * torch.finfo(x.dtype).eps * (max(map(abs, self.bounds)) + self.eps)


@dataclass(frozen=True)
class L2(Threat):
    """The Euclidean norm over all of a sample's entries."""

    def project(self, x: Tensor, z: Tensor) -> Tensor:
        """clip(x + d * min(1, eps / |d|_2), lo, hi), d = z - x.

        Clipping pulls every coordinate towards x, which lies in the bounds, so it cannot leave the ball.
        """
        delta = z - x
        length = torch.linalg.vector_norm(delta.flatten(1), dim=1)
        # Rounding x + d must not push the image out again, or projecting twice would move it twice.
        outside = length > self.eps + 0.5 * self.slack(x)
        scale = torch.where(outside, self.eps / length.clamp_min(torch.finfo(x.dtype).tiny), 1.0)
        scaled = delta.mul_(per_sample(scale, x)).add_(x)
        return torch.where(per_sample(outside, x), scaled, z).clamp_(*self.bounds)

    def start(self, x: Tensor, key: Tensor) -> Tensor:
        """Uniform in the ball of dimension D: x + eps * u**(1/D) * n / |n|_2."""
        direction = self.direction(normal(key, x))
        # The radius has its own stream: the bits of the direction are those of the key itself.
        radius = uniform(key.bitwise_not(), key.to(x.dtype)).pow_(1.0 / x[0].numel()).mul_(self.eps)
        return self.project(x, direction.mul_(per_sample(radius, x)).add_(x))

    def direction(self, gradient: Tensor) -> Tensor:
        """The unit vector g / |g|_2, and 0 where g is 0."""
        flat = gradient.flatten(1)
        tiny = torch.finfo(gradient.dtype).tiny
        # The squares of a confident network's gradient underflow; scaling by the largest entry first does not.
        flat = flat / flat.abs().amax(1, keepdim=True).clamp_min(tiny)
        flat = flat / torch.linalg.vector_norm(flat, dim=1, keepdim=True).clamp_min(tiny)
        return torch.empty_like(gradient).copy_(flat.view(gradient.shape))

    def size(self, delta: Tensor) -> Tensor:
        """(sum_i delta_i^2)^(1/2)."""
        size: Tensor = torch.linalg.vector_norm(delta.double().flatten(1), dim=1)
        return size

    def slack(self, x: Tensor) -> float:
        """The roundings of D entries of x + delta add up in quadrature."""
        scale = max(map(abs, self.bounds)) * math.sqrt(x[0].numel()) + self.eps
        return 2.0 * torch.finfo(x.dtype).eps * scale


_NORMS: dict[str, type[Threat]] = {"linf": Linf, "l2": L2}


def make_threat(norm: str, eps: float, bounds: tuple[float, float]) -> Threat:
    """The threat model of a norm's name.

    Raises:
        UnknownNameError: `norm` is neither ``"linf"`` nor ``"l2"``.
    """
    if norm not in _NORMS:
        raise UnknownNameError("norm", norm, _NORMS)
    return _NORMS[norm](eps, bounds)
