"""Backpropagation as sequential gradient steps on a quadratic penalty, and ProxProp as the same with one prox.

Frerix et al., Section 2 and 3. With z_l = phi(theta_l, a_{l-1}) linear and a_l = s_l(z_l),
E = L(phi(theta_L, a_{L-1})) + sum_l 1/(2 tau) |s_l(z_l) - a_l|^2 + 1/(2 tau) |phi(theta_l, a_{l-1}) - z_l|^2.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpass.rules import ProxProp

TAU = 0.3


def network() -> tuple[nn.Sequential, list]:
    """Layers with two different activations and pooling between them."""
    torch.manual_seed(0)
    first, second, last = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 4, 3), nn.Linear(16, 5)
    between = [nn.Sequential(nn.Tanh(), nn.MaxPool2d(2)), nn.Sequential(nn.Softplus(), nn.Flatten())]
    model = nn.Sequential(first, between[0], second, between[1], last).double()
    return model, [(first, between[0]), (second, between[1]), (last, None)]


def gradient(energy, *variables: Tensor) -> tuple[Tensor, ...]:
    leaves = [v.detach().requires_grad_() for v in variables]
    return torch.autograd.grad(energy(*leaves), leaves)


def apply(layer: nn.Module, weight: Tensor, bias: Tensor, a: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return F.linear(a, weight, bias)
    return F.conv2d(a, weight, bias, layer.stride, layer.padding)


def prox(layer: nn.Module, a: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """argmin over theta of 1/2 |phi(theta, a) - z|^2 + 1/(2 tau) |theta - theta_old|^2, solved densely."""
    old = torch.cat([layer.weight.flatten(), layer.bias]).detach()

    def phi(theta: Tensor) -> Tensor:
        weight, bias = theta[: layer.weight.numel()].view_as(layer.weight), theta[layer.weight.numel() :]
        return apply(layer, weight, bias, a).flatten()

    design = torch.autograd.functional.jacobian(phi, old)
    system = torch.cat([design, torch.eye(len(old), dtype=old.dtype) / TAU**0.5])
    new = torch.linalg.lstsq(system, torch.cat([z.flatten(), old / TAU**0.5]).unsqueeze(1)).solution.squeeze(1)
    return new[: layer.weight.numel()].view_as(layer.weight), new[layer.weight.numel() :]


def penalty_step(stages: list, x: Tensor, y: Tensor, implicit: bool) -> list[tuple[Tensor, Tensor]]:
    """One round of steps of length tau on E from the forward point, in the paper's order; the new weights."""
    a, z = [x], []
    with torch.no_grad():
        for layer, activation in stages:
            z.append(layer(a[-1]))
            a.append(activation(z[-1]) if activation else z[-1])
    last, _ = stages[-1]
    by_weight, by_bias, by_a = gradient(
        lambda w, b, h: F.cross_entropy(apply(last, w, b, h), y), last.weight, last.bias, a[-2]
    )
    weights = [(last.weight - TAU * by_weight, last.bias - TAU * by_bias)]
    a_new = a[-2] - TAU * by_a
    for (layer, activation), z_old, below in reversed(list(zip(stages[:-1], z[:-1], a[:-2], strict=True))):
        (by_z,) = gradient(lambda v, s=activation, t=a_new: (s(v) - t).square().sum() / 2, z_old)
        z_new = z_old - by_z
        by_weight, by_bias, by_a = gradient(
            lambda w, b, h, f=layer, t=z_new: (apply(f, w, b, h) - t).square().sum() / 2,
            *(layer.weight, layer.bias, below),
        )
        explicit = (layer.weight - by_weight, layer.bias - by_bias)
        weights.insert(0, prox(layer, below, z_new) if implicit else explicit)
        a_new = below - by_a
    return weights


@pytest.mark.parametrize("implicit", [False, True], ids=["backpropagation", "ProxProp"])
def test_one_round_on_the_penalty_is_one_optimizer_step(implicit):
    model, stages = network()
    x, y = torch.randn(3, 2, 8, 8, dtype=torch.float64), torch.tensor([0, 3, 4])
    expected = penalty_step(stages, x, y, implicit)
    if implicit:
        # g of the penalty is tau dL/dz: the steps in z and a are of length tau.
        with ProxProp(tau=TAU, stop=-1).attach(model):
            (TAU * F.cross_entropy(model(x), y)).backward()
        rate = 1.0
    else:
        F.cross_entropy(model(x), y).backward()
        rate = TAU
    for (layer, _), (weight, bias) in zip(stages, expected, strict=True):
        torch.testing.assert_close(layer.weight - rate * layer.weight.grad, weight, rtol=0, atol=1e-12)
        torch.testing.assert_close(layer.bias - rate * layer.bias.grad, bias, rtol=0, atol=1e-12)
