"""Adversarial training with momentum: the chain of heavy-ball SGD and its SDE in phase space."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import vmap

from backpass.errors import BackpassError
from backpass.numbers import is_number
from backpass.sde.derivative import value_and_along
from backpass.sde.dynamics import AdversarialSDE
from backpass.sde.ito import TorchSDE

__all__ = ["MomentumSDE"]


@dataclass(frozen=True)
class MomentumSDE:
    r"""The SDE of buf <- mu buf + g, theta <- theta - eta buf, as `torch.optim.SGD(momentum=mu)` steps.

    With tau = sqrt(eta), the velocity V = -tau buf and gamma = (1 - mu) / tau a step of the chain is
    V <- V - tau (gamma V + g), theta <- theta + tau V, and time is t = k tau after k steps. To order 2 in tau

    .. math::
        d\Theta = [V + \tfrac\tau2 F]\,dt, \qquad
        dV = [F + \tfrac\tau2 (\gamma F + (Dh) V)]\,dt + \sqrt\tau\, S^{1/2} dW, \qquad F = -(\gamma V + h).

    The state is (Theta, V), 2 P numbers; `start` makes it and `position` takes Theta out of it.

    Args:
        sde: in mode exact; h, S, eta and B are its own, its order is not used.
        momentum: mu in (0, 1).
        order: 2, or 1: without the terms of order tau.

    Raises:
        BackpassError: a setting is out of its range.

    Source: derived for this project by the method of modified equations; compare arXiv 2410.07719.
    """

    sde: AdversarialSDE
    momentum: float
    order: int = 2

    def __post_init__(self) -> None:
        if not isinstance(self.sde, AdversarialSDE) or self.sde.mode != "exact":
            raise BackpassError(f"sde must be an AdversarialSDE in mode 'exact', got {self.sde!r}.")
        if not (is_number(self.momentum) and 0 < self.momentum < 1):
            raise BackpassError(f"momentum must be in (0, 1), got {self.momentum!r}.")
        if isinstance(self.order, bool) or self.order not in (1, 2):
            raise BackpassError(f"order must be 1 or 2, got {self.order!r}.")

    @property
    def noise_dim(self) -> int:
        """Number of normal variates that the noise of a path takes: N, one per sample."""
        return self.sde.noise_dim

    @property
    def batch_size(self) -> int:
        """Samples in a batch."""
        return self.sde.batch_size

    @property
    def time_step(self) -> float:
        """SDE time of one step of the chain, tau = sqrt(eta_outer)."""
        return math.sqrt(self.sde.time_step)

    @property
    def friction(self) -> float:
        """The gamma = (1 - momentum) / sqrt(eta_outer)."""
        return (1 - self.momentum) / self.time_step

    def start(self, theta: Tensor) -> Tensor:
        """Return the state (theta, 0), (..., 2 P)."""
        return torch.cat([theta, torch.zeros_like(theta)], -1)

    def position(self, state: Tensor) -> Tensor:
        """Return Theta of a state, (..., P)."""
        return state.chunk(2, -1)[0]

    def drift(self, state: Tensor) -> Tensor:
        """The drift of (Theta, V); (..., 2 P)."""
        return self._drift(state) if state.ndim == 1 else vmap(self._drift)(state.contiguous())

    def noise(self, state: Tensor, xi: Tensor) -> Tensor:
        """The noise, which acts on the velocity alone; (..., 2 P)."""
        theta = self.position(state).contiguous()
        own = self.sde.noise(theta, xi) / self.time_step**0.5  # sqrt(tau) in the place of sqrt(eta) = tau
        return torch.cat([torch.zeros_like(own), own], -1)

    def chain_step(self, state: Tensor, *, index: Tensor) -> Tensor:
        """One step of SGD with momentum on a batch of indices (..., B); (..., 2 P)."""
        theta, velocity = (part.contiguous() for part in state.chunk(2, -1))
        step = self.sde.chain_step(theta, index=index) - theta  # -eta g = -tau^2 g
        velocity = self.momentum * velocity + step / self.time_step
        return torch.cat([theta + self.time_step * velocity, velocity], -1)

    def as_torchsde(self) -> TorchSDE:
        """Return the SDE as a module for `torchsde.sdeint` and `torchsde.sdeint_adjoint`."""
        return TorchSDE(self)

    def _drift(self, state: Tensor) -> Tensor:
        theta, velocity = state.chunk(2)
        gamma, tau = self.friction, self.time_step
        (h,), (turned,) = value_and_along(lambda p: (self.sde.mean_field(p),), (theta.clone(),), (velocity,))
        force = -(gamma * velocity + h)
        if self.order == 1:
            return torch.cat([velocity, force])
        return torch.cat([velocity + tau / 2 * force, force + tau / 2 * (gamma * force + turned)])
