"""Ito SDEs: their protocol, an SDE from two functions, and the form that torchsde integrates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.func import vmap

__all__ = ["SDE", "ItoSDE", "TimeDependentSDE", "TorchSDE", "at_time"]


class SDE(Protocol):
    """dTheta = drift(Theta) dt + noise(Theta, dW), in Ito's sense."""

    @property
    def noise_dim(self) -> int:
        """The dimension of W."""

    def drift(self, theta: Tensor) -> Tensor:
        """(..., P) -> (..., P)."""

    def noise(self, theta: Tensor, xi: Tensor) -> Tensor:
        """Linear in xi: (..., P), (..., noise_dim) -> (..., P)."""


class TimeDependentSDE(Protocol):
    """An SDE whose coefficients depend on time, for instance on a learning-rate schedule."""

    @property
    def noise_dim(self) -> int:
        """The dimension of W."""

    def at(self, t: float) -> SDE:
        """Return the SDE with its coefficients at time t."""


def at_time(sde: SDE | TimeDependentSDE, t: float) -> SDE:
    """Return the SDE with its coefficients at time t; an SDE without time dependence is returned unchanged."""
    return cast("TimeDependentSDE", sde).at(t) if hasattr(sde, "at") else sde


class TorchSDE(nn.Module):
    """Module with the methods that ``torchsde.sdeint`` calls, for states y (M, P).

    ``torchsde.sdeint(module, y0, ts, method="euler")`` uses the product `g_prod` alone; `g` forms the matrix. With
    ``sdeint_adjoint`` pass the tensors that gradients are wanted for as ``adjoint_params``, for instance
    ``(sde.eta_outer, sde.data[0])``.

    Attributes:
        noise_type: ``"general"``.
        sde_type: ``"ito"``.
    """

    noise_type = "general"
    sde_type = "ito"

    def __init__(self, sde: SDE | TimeDependentSDE) -> None:
        super().__init__()
        self.sde = sde

    def f(self, t: float | Tensor, y: Tensor) -> Tensor:
        """Drift, (M, P)."""
        return at_time(self.sde, float(t)).drift(y)

    def g(self, t: float | Tensor, y: Tensor) -> Tensor:
        """Diffusion matrices, (M, P, noise_dim)."""
        sde = at_time(self.sde, float(t))
        units = torch.eye(sde.noise_dim, dtype=y.dtype, device=y.device)
        columns: Tensor = vmap(lambda xi: sde.noise(y, xi.expand(len(y), -1)), out_dims=-1)(units)
        return columns

    def g_prod(self, t: float | Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Diffusion times v (M, noise_dim), (M, P)."""
        return at_time(self.sde, float(t)).noise(y, v)

    def f_and_g_prod(self, t: float | Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Drift and diffusion product."""
        return self.f(t, y), self.g_prod(t, y, v)


@dataclass(frozen=True)
class ItoSDE:
    """An SDE from its two functions, in Ito's sense.

    Args:
        drift: (..., P) -> (..., P).
        noise: (theta, xi) -> (..., P), linear in xi, (..., noise_dim).
        noise_dim: the dimension of xi.
    """

    drift: Callable[[Tensor], Tensor]
    noise: Callable[[Tensor, Tensor], Tensor]
    _: KW_ONLY
    noise_dim: int

    def as_torchsde(self) -> TorchSDE:
        """Return the SDE as a module for `torchsde.sdeint` and `torchsde.sdeint_adjoint`."""
        return TorchSDE(self)
