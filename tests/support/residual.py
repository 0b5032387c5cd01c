"""The rule of Guo et al. for residual blocks, block by block from separate graphs: slow and obvious.

A network is a list of stages. For z' = after(skip(z) + f(z)) and the gradient g at the sum, n = J_f(plain)^T g and
l = J_f(linear)^T g, a block passes down J_skip^T g + decay l |n| / |l|, the norms per sample.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Block", "Stage", "guo_gradient"]

Function = Callable[[Tensor], Tensor]


def identity(z: Tensor) -> Tensor:
    return z


@dataclass(frozen=True)
class Stage:
    """A part without a residual sum; its activations are linear."""

    function: Function

    def run(self, z: Tensor) -> Tensor:
        return self.function(z)

    def backward(
        self, z: Tensor, g: Tensor, linear: Callable[[], AbstractContextManager[None]], decay: float
    ) -> Tensor:
        with linear():
            return vjp(self.function, z, g)


@dataclass(frozen=True)
class Block:
    """after(skip(z) + branch(z)); a branch without a linear activation stays as it is."""

    branch: Function
    skip: Function = identity
    after: Function = identity
    has_activation: bool = True

    def run(self, z: Tensor) -> Tensor:
        return self.after(self.skip(z) + self.branch(z))

    def backward(
        self, z: Tensor, g: Tensor, linear: Callable[[], AbstractContextManager[None]], decay: float
    ) -> Tensor:
        at_sum = vjp(self.after, self.skip(z) + self.branch(z), g)
        plain = vjp(self.branch, z, at_sum)
        beside = vjp(self.skip, z, at_sum)
        if not self.has_activation:
            return beside + plain
        with linear():
            changed = vjp(self.branch, z, at_sum)
        scale = plain.flatten(1).norm(dim=1) / changed.flatten(1).norm(dim=1)
        return beside + decay * changed * scale.view(-1, *[1] * (z.dim() - 1))


def guo_gradient(
    stages: list[Stage | Block], x: Tensor, linear: Callable[[], AbstractContextManager[None]], decay: float
) -> Tensor:
    """The gradient with respect to x of half the squared output."""
    states = [x.detach()]
    for stage in stages:
        states.append(stage.run(states[-1]).detach())
    g = states[-1]
    for stage, z in zip(stages[::-1], states[-2::-1], strict=True):
        g = stage.backward(z, g, linear, decay)
    return g


def vjp(function: Function, z: Tensor, g: Tensor) -> Tensor:
    z = z.detach().requires_grad_()
    with torch.enable_grad():
        out = function(z)
    return torch.autograd.grad(out, z, g)[0]
