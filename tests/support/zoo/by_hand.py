"""Activations and gates as people write them: compositions, gates, opaque parts.

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
from support.zoo.activations_by_hand import (
    WIDTH,
    ClampedRelu,
    ConstantBeta,
    CubedRelu,
    CubeFunction,
    HandHardswish,
    HardSigmoid,
    HardSwish,
    InPlaceModule,
    InPlaceSwish,
    LearnedSwish,
    MaximumLeaky,
    MemoryEfficientMish,
    MemoryEfficientSwish,
    NewGELU,
    QuickGELU,
    Rescaled,
    ScaledReluFunction,
    SharedModule,
    Snake,
    SquaredRelu,
    WhereLeaky,
)
from support.zoo.architecture import Architecture
from support.zoo.gates_by_hand import (
    FunctionalSqueezeExcitation,
    GatedLinearUnit,
    HardGate,
    Highway,
    SpatialAttention,
    SqueezeExcitation,
)

__all__ = ["BY_HAND"]

Compute = Callable[[Tensor], Tensor]


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


class Gated(nn.Module):
    """A convolution, relu, and a gate of one number per channel, in ways that differ by ``combine(x, gate)``."""

    def __init__(self, combine: Callable[[Tensor, Tensor], Tensor], gate: Compute = torch.sigmoid) -> None:
        super().__init__()
        self.conv, self.squeeze, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(8, 3)
        self.functions = [combine, gate]

    def forward(self, x: Tensor) -> Tensor:
        combine, gate = self.functions
        x = F.relu(self.conv(x))
        return self.head(combine(x, gate(self.squeeze(F.adaptive_avg_pool2d(x, 1)))).mean((2, 3)))


def gated(combine: Callable[[Tensor, Tensor], Tensor], gate: Compute = torch.sigmoid) -> Architecture:
    return Architecture(build=lambda: Gated(combine, gate), sites=1, shape=(2, 3, 6, 6), gate_functions=GATES)


GATES = ("sigmoid", "hardsigmoid", "relu6")


class Experts(nn.Module):
    """Weighted by sigmoids of a router, one column for each expert."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 2)
        self.experts = nn.ModuleList([nn.Linear(WIDTH, 3) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).sigmoid()
        return sum(weights[:, n : n + 1] * F.silu(expert(x)) for n, expert in enumerate(self.experts))


class GatedResidual(nn.Module):
    """x + g(x) * f(x)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.branch, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x + torch.sigmoid(self.gate(x)) * F.gelu(self.branch(x)))


class WaveNet(nn.Module):
    """tanh(a) * sigmoid(b): the tanh is the activation."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.gate, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.value(x)) * torch.sigmoid(self.gate(x)))


class LongShortTerm(nn.Module):
    """An LSTM by hand, two steps of one input: the sigmoids gate, the tanhs are activations."""

    def __init__(self) -> None:
        super().__init__()
        self.input, self.state, self.last = nn.Linear(WIDTH, 16), nn.Linear(4, 16), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(len(x), 4)
        for _ in range(2):
            i, f, g, o = (self.input(x) + self.state(h)).chunk(4, dim=-1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        return self.last(h)


# Parts that cannot be reached.


@torch.library.custom_op("backpass_tests::relu", mutates_args=())
def custom_operator(x: Tensor) -> Tensor:
    return x.clamp(min=0)


custom_operator.register_autograd(
    lambda ctx, grad: grad * (ctx.saved_tensors[0] > 0),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


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


def zeros_by_a_loop(like: Tensor) -> Tensor:
    zeros = torch.zeros_like(like)
    for _ in range(60):
        zeros = 2 * (zeros + zeros)
    return zeros


BY_HAND: dict[str, Architecture] = {
    **{
        kind.__name__: with_module(kind)
        for kind in (
            *(MemoryEfficientSwish, MemoryEfficientMish, CubedRelu, NewGELU, QuickGELU, HandHardswish, InPlaceSwish),
            *(SquaredRelu, Snake, HardSigmoid, HardSwish, ClampedRelu, WhereLeaky, MaximumLeaky, InPlaceModule),
            *(ConstantBeta, nn.Softsign, nn.Tanhshrink, nn.LogSigmoid),
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
    "x/(1+exp(-x))": inline(lambda x: x / (1 + torch.exp(-x))),
    "softsign": inline(F.softsign),
    "rrelu": inline(F.rrelu),
    "logsigmoid": inline(F.logsigmoid),
    "expit": inline(torch.special.expit),
    "aten": inline(torch._C._nn.gelu),
    "learned_swish": Architecture(build=LearnedSwish, sites=1, shape=(4, WIDTH), reference=own_reference),
    "rescaled": Architecture(build=Rescaled, sites=1, shape=(4, WIDTH)),
    "shared_module": Architecture(build=SharedModule, sites=3, shape=(4, WIDTH), elementwise=(QuickGELU,)),
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
    "hard_gate_module": Architecture(
        build=HardGate, sites=2, shape=(2, 3, 6, 6), gates=("fc.3",), elementwise=(HardSwish,)
    ),
    "x*gate in place": gated(lambda x, gate: x.clone().mul_(gate)),
    "x*=gate": gated(lambda x, gate: (x.clone()).__imul__(gate)),
    "x+x*gate": gated(lambda x, gate: x + x * gate),
    "x*(1+gate)": gated(lambda x, gate: x * (1 + gate)),
    "gate expanded": gated(lambda x, gate: gate.expand_as(x) * x),
    "gate interpolated": gated(lambda x, gate: x * F.interpolate(gate, size=x.shape[-2:], mode="nearest")),
    "gate padded": gated(lambda x, gate: x * F.pad(gate, (1, 1, 1, 1))[..., 1:2, 1:2]),
    "gate after a loop": gated(lambda x, gate: zeros_by_a_loop(x) + x * gate),
    "gate by einsum": gated(lambda x, gate: torch.einsum("nchw,nc->nchw", x, gate.flatten(1))),
    "gate by relu6": gated(lambda x, gate: x * gate, lambda z: F.relu6(z + 3) / 6),
    "gate by 2*sigmoid": gated(lambda x, gate: x * (2 * gate)),
    "gate by lerp": gated(lambda x, gate: torch.lerp(x, x + 1, gate)),
    "experts": Architecture(build=Experts, sites=2, shape=(4, WIDTH), gate_functions=GATES),
    "gated_residual": Architecture(build=GatedResidual, sites=1, shape=(4, WIDTH), gate_functions=GATES),
    "wavenet": Architecture(build=WaveNet, sites=1, shape=(4, WIDTH), gate_functions=GATES),
    "lstm_by_hand": Architecture(build=LongShortTerm, sites=4, shape=(4, WIDTH), gate_functions=GATES),
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
    "custom_operator": opaque(lambda: custom_operator, ""),
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
