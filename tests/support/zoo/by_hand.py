"""Activations and gates as people write them: autograd functions, compositions, gates, opaque parts.

Each network is an affine layer, the thing in question, and another affine layer. Where `Rewritten` cannot know the
activation, the network has its own reference: the same class, whose ``activate`` is straight-through.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.straight_through import straight_through
from support.zoo.architecture import Architecture

__all__ = ["BY_HAND"]

WIDTH = 6
Compute = Callable[[Tensor], Tensor]


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


def with_module(kind: type[nn.Module], calls: int = 2) -> Architecture:
    """A network that calls an elementwise module between affine layers: one site a call, named by its class."""

    def build() -> nn.Module:
        layers = [layer for _ in range(calls) for layer in (nn.Linear(WIDTH, WIDTH), kind())]
        return nn.Sequential(*layers, nn.Linear(WIDTH, 3))

    return Architecture(build=build, sites=calls, shape=(4, WIDTH), elementwise=(kind,))


# Activations composed of torch functions, in a forward that does more.


class Inline(nn.Module):
    """Two affine layers, each followed by a composition in this very forward."""

    def __init__(self, compute: Compute) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.compute = [compute]  # in a list, so that nobody takes it for a module's own function

    def activate(self, x: Tensor) -> Tensor:
        return self.compute[0](x)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.activate(self.second(self.activate(self.first(x)))))


def own_reference(model: Any, start: int, stop: int | None) -> Callable[[Tensor], Tensor]:
    """The network with a straight-through ``activate``, and with the activations that `Rewritten` knows untouched."""
    count = 0

    def activate(x: Tensor) -> Tensor:
        nonlocal count
        number, count = count, count + 1
        compute = model.compute[0]
        return straight_through(x, compute) if start <= number < (stop or float("inf")) else compute(x)

    def call(x: Tensor) -> Tensor:
        nonlocal count
        count = 0
        model.activate = activate
        try:
            return model(x)
        finally:
            del model.activate

    return call


def inline(compute: Compute) -> Architecture:
    return Architecture(build=lambda: Inline(compute), sites=2, shape=(4, WIDTH), reference=own_reference)


class SigmoidModule(nn.Module):
    """x * sigmoid(x) where the sigmoid is a module, which is no site by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.gate = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3), nn.Sigmoid()
        self.compute = [lambda x: x * self.gate(x)]

    def activate(self, x: Tensor) -> Tensor:
        return x * self.gate(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.activate(self.first(x)))


# Gates.


class SqueezeExcitation(nn.Module):
    """The gate at the end of a Sequential; its output is viewed and expanded before it multiplies."""

    def __init__(self, gate: type[nn.Module]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.fc = nn.Sequential(nn.Linear(8, 4), nn.ReLU(inplace=True), nn.Linear(4, 8), gate())
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        weight = self.fc(x.mean((2, 3))).view(x.shape[0], 8, 1, 1)
        return self.head((x * weight.expand_as(x)).mean((2, 3)))


class FunctionalSqueezeExcitation(nn.Module):
    """`scale * x` with functions; the gate is computed first and used later."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.down, self.up = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.conv(x))
        scale = F.adaptive_avg_pool2d(x, 1)
        scale = self.up(F.silu(self.down(scale)))
        scale = F.hardsigmoid(scale)
        return self.head((scale * x).mean((2, 3)))


class SpatialAttention(nn.Module):
    """CBAM's: the gate is a map of one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.attend, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(2, 1, 3, padding=1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        gate = self.attend(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)).sigmoid()
        return self.head((x * gate).mean((2, 3)))


class GatedLinearUnit(nn.Module):
    """a * sigmoid(b), from two halves of one projection."""

    def __init__(self, gate: Compute) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(WIDTH, 10), nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3)
        self.gate = [gate]

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.first(x).chunk(2, dim=-1)
        return self.last(torch.relu(self.second(self.gate[0](gate) * value)))


class Highway(nn.Module):
    """t * relu(H x) + (1 - t) * x with t = sigmoid(T x)."""

    def __init__(self) -> None:
        super().__init__()
        self.transform, self.gate, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        t = torch.sigmoid(self.gate(x))
        return self.last(t * F.relu(self.transform(x)) + (1 - t) * x)


# Parts that cannot be reached.


class Inside(nn.Module):
    """An opaque part between affine layers, and an ordinary activation after it."""

    def __init__(self, part: Callable[[Tensor], Any], compute: Compute = torch.tanh) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.part, self.compute = part, [compute]

    def activate(self, x: Tensor) -> Tensor:
        return self.compute[0](x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.part(self.first(x))
        x = x[0] if isinstance(x, tuple) else x
        return self.last(self.activate(self.second(x)))


class ScaledRelu(nn.Module):
    """An autograd function of two tensors in a module that has a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return ScaledReluFunction.apply(x, self.scale)


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)


def block() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())


def scripted() -> nn.Module:
    return torch.jit.script(block())


def traced() -> nn.Module:
    return torch.jit.trace(block(), torch.randn(4, WIDTH))


def exported() -> nn.Module:
    module = torch.export.export(block(), (torch.randn(4, WIDTH),)).module()
    module.train = lambda mode=True: module  # it has no modes, and refuses to be asked for one
    return module


@torch.jit.script
def scripted_function(x):  # type: ignore[no-untyped-def]
    return torch.relu(x) * 2.0


def opaque(part: Callable[[], Callable[[Tensor], Any]], path: str = "part") -> Architecture:
    return Architecture(
        build=lambda: Inside(part()),
        sites=1,
        shape=(4, WIDTH),
        unreachable=frozenset((path,)),
        reference=own_reference,
    )


# The rest of torch.


def encoder(activation: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 10, activation=activation, batch_first=True)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    return build


class Autoencoder(nn.Module):
    """The sigmoid of the output is an activation: it multiplies nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(WIDTH, 3), nn.Linear(3, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x).tanh()).sigmoid()


BY_HAND: dict[str, Architecture] = {
    **{
        kind.__name__: with_module(kind)
        for kind in (
            *(MemoryEfficientSwish, MemoryEfficientMish, CubedRelu, NewGELU, QuickGELU, HandHardswish, InPlaceSwish),
            *(SquaredRelu, Snake),
        )
    },
    "prelu": with_module(nn.PReLU),
    "x*sigmoid(x)": inline(lambda x: x * torch.sigmoid(x)),
    "sigmoid(x)*x": inline(lambda x: torch.sigmoid(x) * x),
    "x.mul(x.sigmoid())": inline(lambda x: x.mul(x.sigmoid())),
    "x.mul_(sigmoid(x))": inline(lambda x: x.clone().mul_(torch.sigmoid(x))),
    "mul(sigmoid,x)": inline(lambda x: torch.mul(F.sigmoid(x), x)),
    "quick_gelu": inline(lambda x: x * torch.sigmoid(1.702 * x)),
    "gelu_new": inline(lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
    "gelu_erf": inline(lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))),
    "x*hardsigmoid(x)": inline(lambda x: x * F.hardsigmoid(x)),
    "x*relu6(x+3)/6": inline(lambda x: x * F.relu6(x + 3) / 6),
    "x*tanh(softplus(x))": inline(lambda x: x * torch.tanh(F.softplus(x))),
    "x*sigmoid_module(x)": Architecture(build=SigmoidModule, sites=1, shape=(4, WIDTH), reference=own_reference),
    "squeeze_excitation": Architecture(
        build=lambda: SqueezeExcitation(nn.Sigmoid), sites=1, shape=(2, 3, 6, 6), gates=("fc.3",)
    ),
    "squeeze_excitation_hard": Architecture(
        build=lambda: SqueezeExcitation(nn.Hardsigmoid), sites=1, shape=(2, 3, 6, 6), gates=("fc.3",)
    ),
    "squeeze_excitation_functional": Architecture(
        build=FunctionalSqueezeExcitation, sites=2, shape=(2, 3, 6, 6), gate_functions=("hardsigmoid",)
    ),
    "spatial_attention": Architecture(build=SpatialAttention, sites=1, shape=(2, 3, 6, 6), gate_functions=("sigmoid",)),
    "glu": Architecture(
        build=lambda: GatedLinearUnit(torch.sigmoid), sites=1, shape=(4, WIDTH), gate_functions=("sigmoid",)
    ),
    # In SwiGLU and GEGLU the activation is one.
    "swiglu": Architecture(build=lambda: GatedLinearUnit(lambda x: F.silu(x)), sites=2, shape=(4, WIDTH)),
    "geglu": Architecture(build=lambda: GatedLinearUnit(lambda x: F.gelu(x)), sites=2, shape=(4, WIDTH)),
    "highway": Architecture(build=Highway, sites=1, shape=(4, WIDTH), gate_functions=("sigmoid",)),
    "autoencoder": Architecture(build=Autoencoder, sites=2, shape=(4, WIDTH)),
    "transformer_encoder": Architecture(build=encoder("gelu"), sites=2, shape=(2, 3, WIDTH), fused=True),
    "transformer_encoder_module": Architecture(build=encoder(nn.ReLU()), sites=2, shape=(2, 3, WIDTH), fused=True),
    "autograd_function": opaque(lambda: CubeFunction.apply, ""),
    "scripted_function": opaque(lambda: scripted_function, ""),
    "autograd_function_of_two": opaque(ScaledRelu),
    "scripted": opaque(scripted),
    "traced": opaque(traced),
    "exported": opaque(exported),
    "lstm": opaque(lambda: nn.LSTM(WIDTH, WIDTH, batch_first=True)),
    "gru": opaque(lambda: nn.GRU(WIDTH, WIDTH, batch_first=True)),
    "rnn": opaque(lambda: nn.RNN(WIDTH, WIDTH, nonlinearity="relu", batch_first=True)),
    "gru_cell": opaque(Cell, "part.cell"),
}
