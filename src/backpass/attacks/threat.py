"""Threat models: a ball around the image, cut by the pixel bounds and by a mask."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from backpass.attacks.noise import normal, signs, uniform
from backpass.errors import UnknownNameError

__all__ = ["L1", "L2", "Bounds", "Linf", "Threat", "limits", "make_threat", "per_sample"]

Limit = float | tuple[float, ...]
Bounds = tuple[Limit, Limit]

_L1_SHARE = 0.01  # of the entries, that a step of steepest ascent in l_1 is spread over


def per_sample(value: Tensor, like: Tensor) -> Tensor:
    """View a value per sample (N,) so that it broadcasts over `like` (N, ...)."""
    return value.view(-1, *(1,) * (like.dim() - 1))


def numbers(bounds: Bounds) -> Iterator[float]:
    """Yield every number of the bounds."""
    for limit in bounds:
        yield from limit if isinstance(limit, tuple) else (limit,)


def limits(bounds: Bounds, x: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """Return lo and hi as numbers, or per channel so that they broadcast over x (N, C, ...)."""
    if not isinstance(bounds[0], tuple) and not isinstance(bounds[1], tuple):
        return bounds[0], bounds[1]
    shape = (-1, *(1,) * (x.dim() - 2))
    lo, hi = (torch.tensor(limit, dtype=x.dtype, device=x.device).view(shape) for limit in bounds)
    return lo.expand_as(hi) if lo.numel() == 1 else lo, hi.expand_as(lo) if hi.numel() == 1 else hi


@dataclass(frozen=True, eq=False)
class Threat(ABC):
    """The set {z : ||z - x|| <= eps, lo <= z <= hi, z = x outside of the mask}, x: (N, ...) in [lo, hi].

    Args:
        eps: the radius, in the units of x, at least 0; one number, or (N,).
        bounds: (lo, hi), the valid pixel range; each a number, or one number per channel.
        mask: (N, ...) bool, the entries that may change; None for all.
    """

    eps: float | Tensor
    bounds: Bounds
    mask: Tensor | None = None

    def __getitem__(self, keep: Tensor) -> Threat:
        if self.mask is None and not isinstance(self.eps, Tensor):
            return self
        eps = self.eps[keep] if isinstance(self.eps, Tensor) else self.eps
        return replace(self, eps=eps, mask=None if self.mask is None else self.mask[keep])

    def radius(self, like: Tensor) -> Tensor | float:
        """Return eps so that it broadcasts over `like` (N, ...)."""
        return per_sample(self.eps.to(like.dtype), like) if isinstance(self.eps, Tensor) else self.eps

    def scaled(self, factor: float) -> Threat:
        """Return the ball with its radius multiplied by a factor."""
        return replace(self, eps=self.eps * factor)

    def project(self, x: Tensor, z: Tensor) -> Tensor:
        """Return the feasible image for z (N, ...); a feasible z is returned as it is. May write into z."""
        return self.restrict(x, self._into_ball(x, self.restrict(x, z)))

    def restrict(self, x: Tensor, z: Tensor) -> Tensor:
        """Return z inside the mask, x outside."""
        return z if self.mask is None else torch.where(self.mask, z, x)

    def clamp(self, z: Tensor) -> Tensor:
        """Clip z to the bounds in place."""
        lo, hi = limits(self.bounds, z)
        return z.clamp_(lo, hi)  # type: ignore[arg-type]

    def start(self, x: Tensor, key: Tensor) -> Tensor:
        """Return a feasible random image, uniform in the ball and then cut by the bounds; key: (N,) int64."""
        delta = self._uniform(x, key) if self.mask is None else self._uniform(x, key) * self.mask
        return self.project(x, delta.add_(x))

    def contains(self, x: Tensor, z: Tensor) -> Tensor:
        """(N,) bool: z is in the ball, the bounds and the mask, up to rounding; a NaN never is."""
        lo, hi = limits(self.bounds, x)
        inside = ((z >= lo) & (z <= hi)).flatten(1).all(1)
        if self.mask is not None:
            inside &= (self.mask | (z == x)).flatten(1).all(1)
        eps = self.eps.double() if isinstance(self.eps, Tensor) else self.eps
        return inside & (self.size(z.double() - x.double()) <= eps + self.slack(x))

    @abstractmethod
    def _into_ball(self, x: Tensor, z: Tensor) -> Tensor:
        """Project onto the ball and the bounds."""

    @abstractmethod
    def _uniform(self, x: Tensor, key: Tensor) -> Tensor:
        """Draw uniformly from the ball around 0."""

    @abstractmethod
    def direction(self, gradient: Tensor) -> Tensor:
        """Return the unit step of steepest ascent, argmax over ||d|| <= 1 of <gradient, d>."""

    @abstractmethod
    def size(self, delta: Tensor) -> Tensor:
        """||delta|| of every sample, (N,) in float64."""

    @abstractmethod
    def dual(self, gradient: Tensor) -> Tensor:
        """Return the dual norm of every sample's gradient, (N,)."""

    @abstractmethod
    def slack(self, x: Tensor) -> Tensor | float:
        """Return how far rounding alone may carry a projected image out of the ball."""

    def _rounding(self, x: Tensor, terms: float) -> Tensor | float:
        eps = 0.0 if not isinstance(self.eps, Tensor) and math.isinf(self.eps) else self.eps
        return 2.0 * torch.finfo(x.dtype).eps * (max(map(abs, numbers(self.bounds))) * terms + eps)


@dataclass(frozen=True, eq=False)
class Linf(Threat):
    """The maximum norm: every pixel moves by at most eps."""

    def _into_ball(self, x: Tensor, z: Tensor) -> Tensor:
        """clip(clip(z, x - eps, x + eps), lo, hi)."""
        eps = self.radius(x)
        torch.maximum(z, x - eps, out=z)
        torch.minimum(z, x + eps, out=z)
        return self.clamp(z)

    def _uniform(self, x: Tensor, key: Tensor) -> Tensor:
        eps = self.radius(x)
        return uniform(key, x).mul_(2.0 * eps).sub_(eps)

    def direction(self, gradient: Tensor) -> Tensor:
        """sign(g)."""
        return gradient.sign()

    def size(self, delta: Tensor) -> Tensor:
        """max_i |delta_i|."""
        return delta.double().flatten(1).abs().amax(1)

    def dual(self, gradient: Tensor) -> Tensor:
        """sum_i |g_i|."""
        return gradient.flatten(1).abs().sum(1)

    def slack(self, x: Tensor) -> Tensor | float:
        """One rounding of x + eps, and one of the difference."""
        return self._rounding(x, 1.0)


@dataclass(frozen=True, eq=False)
class L2(Threat):
    """The Euclidean norm over all of a sample's entries."""

    def _into_ball(self, x: Tensor, z: Tensor) -> Tensor:
        """clip(x + d * min(1, eps / |d|_2), lo, hi), d = z - x.

        Clipping pulls every coordinate towards x, which lies in the bounds, so it cannot leave the ball.
        """
        delta = z - x
        length = torch.linalg.vector_norm(delta.flatten(1), dim=1)
        eps = self.eps.to(x.dtype) if isinstance(self.eps, Tensor) else self.eps
        # Rounding x + d must not push the image out again, or projecting twice would move it twice.
        outside = length > eps + 0.5 * self.slack(x)
        scale = torch.where(outside, eps / length.clamp_min(torch.finfo(x.dtype).tiny), 1.0)
        scaled = delta.mul_(per_sample(scale, x)).add_(x)
        return self.clamp(torch.where(per_sample(outside, x), scaled, z))

    def _uniform(self, x: Tensor, key: Tensor) -> Tensor:
        """Eps * u**(1/D) * n / |n|_2, D the number of entries that may change."""
        drawn = normal(key, x)
        size = x[0].numel() if self.mask is None else self.mask.flatten(1).sum(1).clamp_min(1)
        direction = self.direction(drawn if self.mask is None else drawn * self.mask)
        # The radius has its own stream: the bits of the direction are those of the key itself.
        radius = uniform(key.bitwise_not(), key.to(x.dtype)).pow_(1.0 / size)
        return direction.mul_(per_sample(radius, x)).mul_(self.radius(x))

    def direction(self, gradient: Tensor) -> Tensor:
        """Return the unit vector g / |g|_2, and 0 where g is 0."""
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

    def dual(self, gradient: Tensor) -> Tensor:
        """|g|_2."""
        size: Tensor = torch.linalg.vector_norm(gradient.flatten(1), dim=1)
        return size

    def slack(self, x: Tensor) -> Tensor | float:
        """The roundings of D entries of x + delta add up in quadrature."""
        return self._rounding(x, math.sqrt(x[0].numel()))


@dataclass(frozen=True, eq=False)
class L1(Threat):
    """The sum of absolute values over all of a sample's entries."""

    def _into_ball(self, x: Tensor, z: Tensor) -> Tensor:
        """Argmin |d - (z - x)|_2 over |d|_1 <= eps, lo <= x + d <= hi, exactly, by one sort.

        d_i = sign(u_i) min(max(|u_i| - t, 0), room_i), u = z - x, where room_i is the distance to the bound and t the
        number at which |d|_1 = eps. sum_i |d_i| is piecewise linear in t, with kinks at |u_i| and |u_i| - room_i.
        Source: Croce and Hein, Mind the box (2021), section 2.2.
        """
        flat, u = x.flatten(1), (z - x).flatten(1)
        lo, hi = (torch.as_tensor(one, dtype=x.dtype, device=x.device).expand(x.shape[1:]).reshape(1, -1)
                  for one in limits(self.bounds, x))  # fmt: skip
        room = torch.where(u > 0, hi - flat, flat - lo).clamp_min(0.0)
        size = u.abs()
        eps = torch.as_tensor(self.eps, dtype=x.dtype, device=x.device).reshape(-1, 1)
        cut = torch.minimum(size, room)
        outside = cut.sum(1, keepdim=True) > eps + 0.5 * torch.as_tensor(self.slack(x), device=x.device).reshape(-1, 1)
        if not bool(outside.any()):
            return self.clamp(z)
        kinks, order = torch.cat([size, size - room], 1).double().sort(1, descending=True)
        weight = torch.cat([torch.ones_like(size), -torch.ones_like(size)], 1).double().gather(1, order)
        count, total = weight.cumsum(1), (weight * kinks).cumsum(1)
        reached = total - count * kinks  # sum_i |d_i| at t = kinks, which grows along the row
        k = torch.searchsorted(reached, eps.double().expand(len(x), 1).contiguous()).clamp(1, kinks.shape[1] - 1) - 1
        t = ((total.gather(1, k) - eps) / count.gather(1, k).clamp_min(1.0)).clamp_min(0.0).to(x.dtype)
        shrunk = u.sign() * torch.minimum((size - t).clamp_min(0.0), room)
        return self.clamp(torch.where(per_sample(outside[:, 0], x), x + shrunk.view(x.shape), z))

    def _uniform(self, x: Tensor, key: Tensor) -> Tensor:
        """Eps * s_i e_i / (e_0 + ... + e_D), s_i = -1 or 1, e_i exponential."""
        drawn = -torch.log1p(-uniform(key, x))
        drawn = drawn if self.mask is None else drawn * self.mask
        spare = -torch.log1p(-uniform(key.bitwise_not(), key.to(x.dtype)))
        total = drawn.flatten(1).sum(1) + spare
        sign = signs(key.bitwise_not() ^ 1, x)
        return (drawn / per_sample(total.clamp_min(torch.finfo(x.dtype).tiny), x)).mul_(sign).mul_(self.radius(x))

    def direction(self, gradient: Tensor) -> Tensor:
        """sign(g) / k on the k largest entries, k a hundredth of them: one entry alone soon meets its bound."""
        flat = gradient.flatten(1)
        count = max(1, round(_L1_SHARE * flat.shape[1]))
        top = flat.abs().topk(count, dim=1).indices
        return torch.zeros_like(flat).scatter(1, top, flat.gather(1, top).sign() / count).view(gradient.shape)

    def size(self, delta: Tensor) -> Tensor:
        """sum_i |delta_i|."""
        return delta.double().flatten(1).abs().sum(1)

    def dual(self, gradient: Tensor) -> Tensor:
        """max_i |g_i|."""
        return gradient.flatten(1).abs().amax(1)

    def slack(self, x: Tensor) -> Tensor | float:
        """The roundings of D entries add up."""
        return self._rounding(x, x[0].numel())


_NORMS: dict[str, type[Threat]] = {"linf": Linf, "l2": L2, "l1": L1}


def make_threat(norm: str, eps: float | Tensor, bounds: Bounds, mask: Tensor | None = None) -> Threat:
    """Return the threat model of a norm's name.

    Raises:
        UnknownNameError: `norm` is none of ``"linf"``, ``"l2"`` and ``"l1"``.
    """
    if not isinstance(norm, str) or norm not in _NORMS:
        raise UnknownNameError("norm", str(norm), _NORMS)
    return _NORMS[norm](eps, bounds, mask)
