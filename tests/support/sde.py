"""Small problems for the SDE tests, and adversarial training written out slowly: one sample at a time, by autograd."""

import torch
from torch import Tensor

D = torch.float64


def smooth_loss(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Nothing in it is linear, so that every term of an expansion counts; theta (3,), x (N, 3)."""
    return torch.log1p(((x @ theta).tanh() + 0.3 * (x**2 @ theta.sin()) - y).square())


def squared_loss(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Linear regression, the adversary on the inputs; theta (P,), x (N, P)."""
    return (x @ theta - y).square() / 2


def smooth_data(samples: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return (
        torch.randn(samples, 3, generator=generator, dtype=D),
        torch.randn(samples, generator=generator, dtype=D),
    )


def smooth_theta(paths: int = 4) -> Tensor:
    return torch.randn(paths, 3, generator=torch.Generator().manual_seed(4), dtype=D)


def slow_gradients(
    loss, theta, x, y, *, steps, eta, lam=0.0, direction=lambda g: g, project=lambda d: d, unrolled=False
):
    """g(theta, x_i) for every sample, (N, P), each by itself; the penalty is |delta|^2 / 2."""
    found = []
    for i in range(len(x)):
        p = theta.clone().requires_grad_()
        xi, yi = x[i : i + 1], y[i : i + 1]
        delta = torch.zeros_like(xi)
        for _ in range(steps):
            at = delta if unrolled else delta.detach()
            at = at if at.requires_grad else at.clone().requires_grad_()
            value = loss(p, xi + at, yi).sum() - lam * at.square().sum() / 2
            (ascent,) = torch.autograd.grad(value, at, create_graph=unrolled)
            delta = project(at + eta * direction(ascent))
        delta = delta if unrolled else delta.detach()
        found.append(torch.autograd.grad(loss(p, xi + delta, yi).sum(), p)[0])
    return torch.stack(found)


def slow_jacobian(field, theta, step=1e-5):
    """Central differences, column by column."""
    columns = []
    for unit in torch.eye(len(theta), dtype=theta.dtype):
        columns.append((field(theta + step * unit) - field(theta - step * unit)) / (2 * step))
    return torch.stack(columns, 1)
