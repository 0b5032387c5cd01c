"""Generator of the SDE: the derivative of expectations in time."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.func import grad, hessian, vmap

from backpass.sde.dynamics import AdversarialSDE

__all__ = ["generator"]


def generator(sde: AdversarialSDE, function: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor:
    """A f(theta) = b . grad f + (eta/2) S : Hess f, which is d/dt E f(Theta_t) where Theta_t = theta.

    Averaged over points of a law it is the slope of E f at that law. Forms matrices, so it is for few parameters.

    Args:
        sde: drift b and covariance S, in its mode and order.
        function: f, (P,) -> (), twice differentiable under `torch.func`.
        theta: (P,) or (M, P).

    Returns:
        () or (M,).
    """

    def at(p: Tensor) -> Tensor:
        slope: Tensor = grad(function)(p)
        curvature: Tensor = hessian(function)(p)
        return sde.drift(p) @ slope + sde.eta_outer / 2 * (sde.covariance(p) * curvature).sum()

    return at(theta) if theta.ndim == 1 else vmap(at)(theta)
