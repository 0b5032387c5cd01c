"""A tanh network of 37 parameters that learns the sign of a quadratic, with adversary: small enough for its SDE."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from backpass.sde import AdversarialSDE

__all__ = ["make_problem"]

_INPUTS, _HIDDEN, _PARAMETERS = 4, 6, 37


def make_problem(
    *, seed: int, samples: int, eta: float, eta_inner: float, steps: int, batch_size: int
) -> tuple[AdversarialSDE, Tensor]:
    """The SDE of its training and a start.

    The inputs are normal, the label is the sign of x1 x2 + x3 - x4/2, the loss is logistic.

    Args:
        seed: of the data and of the start.
        samples: N.
        eta: the learning rate.
        eta_inner: the adversary's step size.
        steps: K.
        batch_size: B.

    Returns:
        The SDE and theta_0 (37,), float64.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, _INPUTS, generator=generator, dtype=torch.float64)
    y = (x[:, 0] * x[:, 1] + x[:, 2] - x[:, 3] / 2).sign()
    start = torch.randn(_PARAMETERS, generator=generator, dtype=torch.float64) / 2
    sde = AdversarialSDE(_logistic_loss, (x, y), eta_outer=eta, batch_size=batch_size, steps=steps, eta_inner=eta_inner)
    return sde, start


def _logistic_loss(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    weight, bias, last, shift = torch.split(theta, [_INPUTS * _HIDDEN, _HIDDEN, _HIDDEN, 1])
    output = torch.tanh(x @ weight.view(_HIDDEN, _INPUTS).T + bias) @ last + shift
    return F.softplus(-y * output)
