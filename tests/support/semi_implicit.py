"""Semi-implicit back propagation by dense least squares, one unit after the other: slow and obvious."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Function = Callable[[Tensor], Tensor]


@dataclass
class Layer:
    """A linear or convolutional module, the activation after it, and how its output becomes the next input."""

    module: nn.Module
    s: Function | None
    after: Function = lambda y: y


def rows(module: nn.Module, x: Tensor, ratio: float) -> Tensor:
    """What each output position sees, (n, columns), the bias as a last column sqrt(lam / lam_bias)."""
    if isinstance(module, nn.Conv2d):
        unfolded = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
        x = unfolded.transpose(1, 2).flatten(0, 1)
    if module.bias is None:
        return x
    return torch.cat([x, torch.full_like(x[:, :1], ratio**0.5)], 1)


def by_unit(module: nn.Module, outputs: Tensor) -> Tensor:
    """(n, units), in the order of `rows`."""
    return outputs.movedim(1, -1).flatten(0, -2)


def derivative(s: Function | None, z: Tensor) -> Tensor:
    return torch.ones_like(z) if s is None else torch.func.vmap(torch.func.grad(s))(z.flatten()).view_as(z)


def least_squares(A: Tensor, D: Tensor, target: Tensor, lam: float, center: Tensor) -> Tensor:
    """argmin_d |D A d - target|^2 + lam |center + d|^2."""
    eye = torch.eye(A.shape[1], dtype=A.dtype) * lam**0.5
    left, right = torch.cat([D[:, None] * A, eye]), torch.cat([target, -eye @ center])
    return torch.linalg.lstsq(left, right[:, None]).solution[:, 0]


def step_of_layer(
    A: Tensor,
    z: Tensor,
    g: Tensor,
    s: Function | None,
    eta: float,
    lam: float,
    newton_steps: int = 1,
    descents: int = 0,
) -> Tensor:
    """The increment of all units, (units, columns); g is the gradient at s(z).

    With ``descents`` the Newton steps are dropped if the objective rises by them, and so many steps along its gradient
    follow, each as long as the quadratic model around the point says, and dropped if the objective would rise.
    """
    each, value = [], s or (lambda v: v)
    for j in range(z.shape[1]):
        d = torch.zeros(A.shape[1], dtype=A.dtype)
        target = value(z[:, j]) - eta * g[:, j]
        for _ in range(newton_steps if s else 1):
            moved = z[:, j] + A @ d
            d = d + least_squares(A, derivative(s, moved), target - value(moved), lam, d)

        def objective(d: Tensor, j: int = j, target: Tensor = target) -> Tensor:
            return (value(z[:, j] + A @ d) - target).square().sum() + lam * d @ d

        if descents and objective(d) > objective(torch.zeros_like(d)):
            d = torch.zeros_like(d)
        for _ in range(descents):
            moved = z[:, j] + A @ d
            DA = derivative(value, moved)[:, None] * A
            down = DA.T @ (target - value(moved)) - lam * d
            further = d + down * (down @ down) / ((DA @ down).square().sum() + lam * down @ down)
            d = further if objective(further) <= objective(d) else d
        each.append(d)
    return torch.stack(each)


def transcription(
    layers: list[Layer],
    x: Tensor,
    gradient: Function,
    eta: float,
    lam: float = 1.0,
    lam_bias: float | None = None,
    newton_steps: int = 1,
    updated_weights: bool = True,
    descents: int = 0,
) -> list[tuple[Tensor, Tensor | None]]:
    """(dW, db) of each layer, from the last layer to the first; ``gradient`` is that of the summed loss."""
    ratio = 1.0 if lam_bias is None else lam / lam_bias
    inputs, zs = [], []
    for layer in layers:
        inputs.append(x)
        zs.append(layer.module(x).detach())
        x = layer.after((layer.s or (lambda v: v))(zs[-1])).detach()
    g, steps = gradient(x), []
    for layer, a, z in reversed(list(zip(layers, inputs, zs, strict=True))):
        module = layer.module
        y = (layer.s or (lambda v: v))(z).requires_grad_()
        (g,) = torch.autograd.grad(layer.after(y), y, g)
        of_units = (by_unit(module, z), by_unit(module, g))
        d = step_of_layer(rows(module, a, ratio), *of_units, layer.s, eta, lam, newton_steps, descents)
        bias = None if module.bias is None else d[:, -1] * ratio**0.5
        weight = (d if bias is None else d[:, :-1]).reshape(module.weight.shape)
        steps.insert(0, (weight, bias))
        through = module.weight.detach() + (weight if updated_weights else 0)
        a = a.clone().requires_grad_()
        conv = isinstance(module, nn.Conv2d)
        again = module._conv_forward(a, through, None) if conv else F.linear(a, through)
        (g,) = torch.autograd.grad(again, a, derivative(layer.s, z) * g)
    return steps


def steps_of_rule(model: nn.Module, modules: list[nn.Module]) -> list[tuple[Tensor, Tensor | None]]:
    """(dW, db) as they lie in ``.grad`` after a backward pass."""
    return [(-m.weight.grad, None if m.bias is None else -m.bias.grad) for m in modules]


def error(found: list[tuple[Tensor, Tensor | None]], expected: list[tuple[Tensor, Tensor | None]]) -> float:
    """The largest difference, relative to the largest entry of its layer."""
    worst = 0.0
    for one, other in zip(found, expected, strict=True):
        for a, b in zip(one, other, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                worst = max(worst, float((a - b).abs().max().detach() / b.abs().max().detach()))
    return worst
