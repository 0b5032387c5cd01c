"""Activations as people write them: autograd functions, and modules that compose torch functions."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "WIDTH",
    "ClampedRelu",
    "ConstantBeta",
    "CubeFunction",
    "CubedRelu",
    "HandHardswish",
    "HardSigmoid",
    "HardSwish",
    "InPlaceModule",
    "InPlaceSwish",
    "LearnedSwish",
    "MaximumLeaky",
    "MemoryEfficientMish",
    "MemoryEfficientSwish",
    "NewGELU",
    "QuickGELU",
    "Rescaled",
    "ScaledReluFunction",
    "SharedModule",
    "Snake",
    "SquaredRelu",
    "WhereLeaky",
]

WIDTH = 6


# Activations written as autograd functions.


class SwishFunction(torch.autograd.Function):
    """x sigmoid(x), which saves x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate = torch.sigmoid(x)
        return grad * gate * (1 + x * (1 - gate))


class MishFunction(torch.autograd.Function):
    """x tanh(softplus(x)), with the context set up apart."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * torch.tanh(F.softplus(x))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        inner = torch.tanh(F.softplus(x))
        return grad * (inner + x * torch.sigmoid(x) * (1 - inner**2))


class CubeFunction(torch.autograd.Function):
    """relu(x)^3."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.relu(x) ** 3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * 3 * torch.relu(x) ** 2


class ScaledReluFunction(torch.autograd.Function):
    """scale relu(x) of two tensors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        return scale * torch.relu(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, scale = ctx.saved_tensors
        return grad * scale * (x > 0), (grad * torch.relu(x)).sum(0)


class MemoryEfficientSwish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return SwishFunction.apply(x)


class MemoryEfficientMish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return MishFunction.apply(x)


class CubedRelu(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return CubeFunction.apply(hidden)


# Activations composed of torch functions, in modules of their own.


class NewGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class HandHardswish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * F.relu6(x + 3.0) / 6.0


class InPlaceSwish(nn.Module):
    inplace = True

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(x.sigmoid())


class SquaredRelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.square(F.relu(x))


class Snake(nn.Module):
    """No function that looks like an activation inside."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sin(x) ** 2


class HardSigmoid(nn.Module):
    """With a module of torch inside."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU6(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + 3) / 6


class HardSwish(nn.Module):
    """With a module of its own inside, as MobileNetV3 is often written."""

    def __init__(self) -> None:
        super().__init__()
        self.sigmoid = HardSigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.sigmoid(x)


class ClampedRelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(min=0)


class WhereLeaky(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x, 0.1 * x)


class MaximumLeaky(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.maximum(x, 0.1 * x)


class InPlaceFunction(torch.autograd.Function):
    """relu that overwrites its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        x.clamp_(min=0)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return grad * (y > 0)


class InPlaceModule(nn.Module):
    inplace = True

    def forward(self, x: Tensor) -> Tensor:
        return InPlaceFunction.apply(x)


class ConstantBeta(nn.Module):
    """With a buffer, which is no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("beta", torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.beta * x)


class LinearMish(nn.Module):
    """Nothing but an affine function of each element: no activation."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - 0.5) * 2.0


class Rescaled(nn.Module):
    """Input scaling as a module without parameters stays as it is, whatever it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.first, self.last = LinearMish(), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(self.scale(x))))


class SharedModule(nn.Module):
    """One elementwise module for all calls, on tensors of several shapes, with a keyword argument."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.first, self.last = QuickGELU(), nn.Linear(WIDTH, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(x=self.first(self.act(x)))) + self.act(x).sum(-1, keepdim=True)


class LearnedSwish(nn.Module):
    """x sigmoid(beta x) with a learned beta, which keeps its own gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.beta = nn.Parameter(torch.tensor(1.3))
        self.compute = [lambda x: x * torch.sigmoid(self.beta * x)]

    def activate(self, x: Tensor) -> Tensor:
        return self.compute[0](x)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.activate(self.first(x)))
