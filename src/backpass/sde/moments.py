"""Gaussian linear regression with the adversary on the target: the moments of the chain and of its SDEs, exactly."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from backpass.errors import BackpassError, UnknownNameError
from backpass.numbers import is_number, is_whole

__all__ = ["GaussianRegression", "Moments"]


class Moments(NamedTuple):
    """Moments of the error v = theta - theta*: E v, (d,), and E v v^T, (d, d)."""

    mean: Tensor
    second: Tensor

    @classmethod
    def at(cls, error: Tensor) -> Moments:
        """Those of a fixed v, (d,)."""
        return cls(error, error.outer(error))


@dataclass(frozen=True, kw_only=True, eq=False)
class GaussianRegression:
    """L = (theta . z - y)^2 / 2 with z ~ N(0, S), y = theta* . z + s N(0, 1), and K steps of ascent on y.

    The adversary stretches the residual r to c r, c = (1 + eta_I)^K, so g = c r z and the moments of
    v = theta - theta* close. With e = c eta and M = E v v^T the chain has

        M' = M - e (S M + M S) + e^2 [S M S + (S M S + tr(S M) S + s^2 S) / B]

    and an SDE with drift -H v and noise q^2 eta Cov(r z) / B has

        dM/dt = -(H M + M H) + (q^2 eta / B) [S M S + tr(S M) S + s^2 S]:

    H = c S + eta c^2 S^2 / 2 and q = c where exact, H = S + eta S^2 / 2 + K eta_I S and q = 1 where expanded; order
    1 keeps the first term of H. In the eigenbasis of S every off-diagonal entry of M is on its own.

    Args:
        covariance: S, (d, d), symmetric and positive definite.
        noise: s >= 0.
        eta_outer: the learning rate, > 0.
        batch_size: B >= 1 fresh samples a step.
        steps: K >= 0 of the adversary.
        eta_inner: its step size, >= 0.

    Raises:
        BackpassError: a setting is out of its range.

    Source: derived for this project.
    """

    covariance: Tensor
    noise: float
    eta_outer: float
    batch_size: int = 1
    steps: int = 0
    eta_inner: float = 0.0

    def __post_init__(self) -> None:
        s = self.covariance
        if not isinstance(s, Tensor) or not s.is_floating_point():
            raise BackpassError(f"covariance is a floating-point matrix (d, d); got {s!r}.")
        if (
            s.ndim != 2
            or not s.numel()
            or s.shape[0] != s.shape[1]
            or not torch.allclose(s, s.mT)
            or not (self._basis[0] > 0).all()
        ):
            raise BackpassError(
                f"covariance is a symmetric, positive definite matrix (d, d); got shape {tuple(s.shape)}."
            )
        if not (is_number(self.eta_outer) and self.eta_outer > 0):
            raise BackpassError(f"eta_outer is the learning rate, > 0; got {self.eta_outer!r}.")
        real = all(is_number(value) and value >= 0 for value in (self.noise, self.eta_inner))
        if not (real and is_whole(self.steps, 0) and is_whole(self.batch_size, 1)):
            raise BackpassError(
                "noise, steps and eta_inner are >= 0 and batch_size >= 1; got "
                f"{self.noise!r}, {self.steps!r}, {self.eta_inner!r} and {self.batch_size!r}."
            )

    @cached_property
    def _basis(self) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(self.covariance)
        return values, vectors

    @property
    def stretch(self) -> float:
        """The c = (1 + eta_I)^K of the residual."""
        return float((1 + self.eta_inner) ** self.steps)

    def risk(self, moments: Moments) -> Tensor:
        """E L(theta) without adversary, (tr(S M) + s^2) / 2."""
        return ((self.covariance * moments.second).sum() + self.noise**2) / 2

    def chain(self, start: Moments, steps: int) -> Moments:
        """After that many steps of the chain.

        Args:
            start: at step 0.
            steps: of the outer loop, >= 0.
        """
        if not is_whole(steps, 0):
            raise BackpassError(f"steps is a whole number of at least 0; got {steps!r}.")
        values, _ = self._basis
        e = self.stretch * self.eta_outer
        noise = e**2 / self.batch_size
        pairs = 1 - e * (values[:, None] + values) + (e**2 + noise) * values.outer(values)
        diagonal = torch.linalg.matrix_power(self._coupled(pairs.diagonal(), noise, identity=1.0), steps)
        return self._apply(start, (1 - e * values) ** steps, pairs**steps, diagonal)

    def sde(
        self,
        start: Moments,
        t: float,
        *,
        mode: Literal["exact", "expanded"] = "exact",
        order: Literal[1, 2] = 2,
        noise: bool = True,
    ) -> Moments:
        """At time t of the SDE; mode, order and noise as in `Variant`.

        Args:
            start: at time 0.
            t: the time, k eta_outer after k steps.
            mode: ``"exact"`` or ``"expanded"``.
            order: 2, or 1.
            noise: include the noise.
        """
        if mode not in ("exact", "expanded"):
            raise UnknownNameError("mode", str(mode), ("exact", "expanded"))
        if isinstance(order, bool) or order not in (1, 2):
            raise BackpassError(f"order is 1 or 2; got {order!r}.")
        if not (is_number(t) and t >= 0):
            raise BackpassError(f"t is a finite time of at least 0; got {t!r}.")
        values, _ = self._basis
        q = self.stretch if mode == "exact" else 1.0
        rates = q * values
        if order == 2:
            rates = rates + self.eta_outer / 2 * rates**2
            if mode == "expanded":
                rates = rates + self.steps * self.eta_inner * values
        strength = q**2 * self.eta_outer / self.batch_size if noise else 0.0
        pairs = -(rates[:, None] + rates) + strength * values.outer(values)
        diagonal = torch.linalg.matrix_exp(t * self._coupled(pairs.diagonal(), strength, identity=0.0))
        return self._apply(start, (-rates * t).exp(), (pairs * t).exp(), diagonal)

    def _coupled(self, own: Tensor, strength: float, *, identity: float) -> Tensor:
        """The linear map of (diagonal of M, 1): each entry on its own, and tr(S M) S + s^2 S from the noise."""
        values, _ = self._basis
        top = torch.cat([own.diag() + strength * values.outer(values), strength * self.noise**2 * values[:, None]], 1)
        last = torch.zeros_like(top[:1])
        last[0, -1] = identity
        return torch.cat([top, last])

    def _apply(self, start: Moments, mean: Tensor, pairs: Tensor, diagonal: Tensor) -> Moments:
        """Multiply in the eigenbasis: the mean, the entries off the diagonal, and (diagonal, 1)."""
        _, vectors = self._basis
        if not isinstance(start, Moments) or start.second.shape != self.covariance.shape:
            got = tuple(start.second.shape) if isinstance(start, Moments) else type(start).__name__
            raise BackpassError(f"start is of type Moments, of {len(vectors)} parameters; got {got}.")
        second = vectors.mT @ start.second @ vectors
        one = torch.ones_like(second[0, :1])
        own = (diagonal @ torch.cat([second.diagonal(), one]))[:-1]
        second = (pairs * second).diagonal_scatter(own)
        return Moments(vectors @ (mean * (vectors.mT @ start.mean)), vectors @ second @ vectors.mT)
