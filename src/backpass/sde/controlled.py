"""Adversarial training under a learning-rate schedule: the SDE and the chain with time-dependent coefficients."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from backpass.errors import BackpassError
from backpass.sde.dynamics import AdversarialSDE
from backpass.sde.ito import TorchSDE

__all__ = ["ControlledSDE", "ScaledSDE"]


@dataclass(frozen=True)
class ControlledSDE:
    """dTheta = -[u h + u^2 eta/2 (Dh) h] dt + u sqrt(eta) S^{1/2} dW: the learning rate is u(t) eta at time t.

    u scales the outer rate, and the adversary's drift with it; eta_inner is not scaled. Step k of the chain takes
    u in the middle of its interval, u((k + 1/2) eta): then no term with the derivative of u arises at order 2.

    Args:
        sde: with u = 1.
        u: of time, at least 0, for instance ``optimal_lr(...).at``.
    """

    sde: AdversarialSDE
    u: Callable[[float], float]

    @property
    def noise_dim(self) -> int:
        """Number of normal variates that the noise of a path takes."""
        return self.sde.noise_dim

    @property
    def time_step(self) -> float:
        """SDE time of one step of the chain, eta_outer whatever u."""
        return self.sde.time_step

    @property
    def order(self) -> int:
        """Weak order of the SDE."""
        return self.sde.order

    @property
    def batch_size(self) -> int:
        """Samples in a batch."""
        return self.sde.batch_size

    def at(self, t: float) -> ScaledSDE:
        """Return the SDE with its coefficients at time t.

        Raises:
            BackpassError: u(t) is negative or not finite.
        """
        u = float(self.u(t))
        if not 0 <= u < float("inf"):
            raise BackpassError(f"the control scales the learning rate: expected a finite u >= 0, got u({t:g}) = {u}.")
        own = copy.copy(self.sde)
        object.__setattr__(own, "eta_outer", u * self.sde.eta_outer)
        return ScaledSDE(own, u)

    def as_torchsde(self) -> TorchSDE:
        """Return the SDE as a module for `torchsde.sdeint` and `torchsde.sdeint_adjoint`."""
        return TorchSDE(self)


@dataclass(frozen=True)
class ScaledSDE:
    """An SDE of learning rate u eta in the time of the learning rate eta."""

    own: AdversarialSDE
    u: float

    @property
    def noise_dim(self) -> int:
        """Number of normal variates that the noise of a path takes."""
        return self.own.noise_dim

    def drift(self, theta: Tensor) -> Tensor:
        """The drift; (..., P)."""
        return self.u * self.own.drift(theta)

    def noise(self, theta: Tensor, xi: Tensor) -> Tensor:
        """The noise; (..., P)."""
        return math.sqrt(self.u) * self.own.noise(theta, xi)

    def coefficients(self, theta: Tensor, xi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Drift, noise and leading drift at once."""
        drift, noise, leading = self.own.coefficients(theta, xi)
        return self.u * drift, math.sqrt(self.u) * noise, self.u * leading

    def leading_and_noise(self, theta: Tensor, xi: Tensor) -> tuple[Tensor, Tensor]:
        """Leading drift and noise at once."""
        leading, noise = self.own.leading_and_noise(theta, xi)
        return self.u * leading, math.sqrt(self.u) * noise

    def leading_drift(self, theta: Tensor) -> Tensor:
        """The drift without its terms of order eta; (..., P)."""
        return self.u * self.own.leading_drift(theta)

    def chain_step(self, theta: Tensor, *, index: Tensor) -> Tensor:
        """One step of the chain with the rate u eta; (..., P)."""
        return self.own.chain_step(theta, index=index)
