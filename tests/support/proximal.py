"""The proximal step by its definition: slow and obvious, to hold `ProxProp` against."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from backpass.rules import ProxProp, Rule


def jacobian(model: nn.Module, x: Tensor, names: Iterable[str]) -> Tensor:
    """dz/dtheta of ``z = model(x)``, (entries of z, entries of the named parameters): the whole layer's A."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    chosen = {name: parameters[name] for name in names}

    def z(*theta: Tensor) -> Tensor:
        # Statistics that a normalization keeps are no function of theta.
        buffers = {name: b.clone() for name, b in model.named_buffers()}
        return functional_call(model, parameters | buffers | dict(zip(chosen, theta, strict=True)), (x,)).flatten()

    parts = dict(zip(chosen, torch.autograd.functional.jacobian(z, tuple(chosen.values())), strict=True))
    return torch.cat([parts[name].flatten(1) for name in chosen], 1)


def proximal_direction(j: Tensor, g: Tensor, tau: float, rows: int = 1) -> Tensor:
    """argmin_D |J D - g|^2 / rows + |D|^2 / tau, times what makes it (J^T J / rows + I / tau)^{-1} J^T g."""
    # The normal equations of the stacked system are the proximal ones, at the square root of their condition.
    damping = torch.eye(j.shape[1], dtype=j.dtype) * (rows / tau) ** 0.5
    stacked = torch.cat([j, damping])
    target = torch.cat([g.flatten(), g.new_zeros(j.shape[1])]).unsqueeze(1)
    return rows * torch.linalg.lstsq(stacked, target, driver="gelsd").solution.squeeze(1)


def directions(model: nn.Module, x: Tensor, g: Tensor, rule: Rule) -> dict[str, Tensor]:
    """What the rule leaves in ``.grad`` for the loss <g, model(x)>."""
    model.zero_grad()
    with rule.attach(model):
        (model(x) * g).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def flat(tensors: dict[str, Tensor], names: Iterable[str]) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in names])


def relative(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|, and 0 where both are 0."""
    return float((found - expected).norm() / expected.norm()) if found.any() or expected.any() else 0.0


EXACT = ProxProp(tau=0.5, norms=True)
