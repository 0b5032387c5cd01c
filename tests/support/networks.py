"""Small networks that call their activations in every way PyTorch knows, with their dense stages."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.dense import Parameters, Stage

WIDTH = 5


def linears(n: int) -> nn.ModuleList:
    return nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(n)])


class Modules(nn.Module):
    def __init__(self, activation: Callable[[], nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.layers = linears(4)
        self.acts = nn.ModuleList([activation() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer, act in zip(self.layers[:3], self.acts, strict=True):
            x = act(layer(x))
        return self.layers[3](x)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = linears(4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.layers[0](x))
        x = torch.relu(self.layers[1](x))
        return self.layers[3](F.relu(self.layers[2](x), inplace=True))


class Method(Functional):
    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x).relu()
        return self.layers[3](self.layers[2](self.layers[1](x).relu()).relu())


class Statement(Functional):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:3]:
            h = layer(x)
            h.relu_()
            x = h
        return self.layers[3](x)


class TorchInPlace(Functional):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:3]:
            x = torch.relu_(layer(x))
        return self.layers[3](x)


class Loop(Functional):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:3]:
            x = F.relu(input=layer(x))
        return self.layers[3](x)


class Reused(nn.Module):
    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.layers = linears(4)
        self.relu = nn.ReLU(inplace=inplace)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:3]:
            x = self.relu(layer(x))
        return self.layers[3](x)


class Nested(nn.Module):
    """A Sequential of Sequentials."""

    def __init__(self) -> None:
        super().__init__()
        layers = linears(4)
        self.body = nn.Sequential(
            nn.Sequential(layers[0], nn.ReLU(), nn.Sequential(layers[1], nn.ReLU())),
            nn.Sequential(layers[2], nn.ReLU()),
            layers[3],
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Residual(nn.Module):
    """Two blocks relu(x + W relu(V x)) with one activation module for both calls, as torchvision does."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.V, self.W, self.relu = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.W(self.relu(self.V(x))) + x)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(self.Block(), self.Block())
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x))


class ConvBNReLU(nn.Module):
    """conv-BN-ReLU twice, in eval mode, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()),
            *(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.ReLU()),
        )
        self.head = nn.Linear(8, 3)
        for norm in (self.body[1], self.body[4]):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2.0)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).flatten(1))


def affine(name: str) -> Callable[[Parameters, Tensor], Tensor]:
    return lambda p, state: p[f"{name}.weight"] @ state + p[f"{name}.bias"]


def chain(activation: Callable[[Tensor], Tensor], names: list[str] | None = None) -> Callable[[nn.Module], list[Stage]]:
    names = names or [f"layers.{k}" for k in range(4)]
    return lambda model: [Stage(affine(name), activation) for name in names[:-1]] + [Stage(affine(names[-1]))]


def residual_stages(model: nn.Module) -> list[Stage]:
    stages = []
    for block in ("blocks.0", "blocks.1"):
        V, W = affine(f"{block}.V"), affine(f"{block}.W")
        stages.append(Stage(lambda p, s, V=V: torch.cat([V(p, s), s]), torch.relu, active=WIDTH))
        stages.append(Stage(lambda p, s, W=W: W(p, s[:WIDTH]) + s[WIDTH:], torch.relu))
    return [*stages, Stage(affine("head"))]


def conv_stages(model: nn.Module) -> list[Stage]:
    def conv_bn(conv: str, bn: str, shape: tuple[int, ...], padding: int) -> Callable[[Parameters, Tensor], Tensor]:
        norm = model.get_submodule(bn)

        def run(p: Parameters, state: Tensor) -> Tensor:
            z = F.conv2d(state.reshape(1, *shape), p[f"{conv}.weight"], p[f"{conv}.bias"], padding=padding)
            scale = p[f"{bn}.weight"] / (norm.running_var + norm.eps).sqrt()
            shift = p[f"{bn}.bias"] - norm.running_mean * scale
            return (z * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)).reshape(-1)

        return run

    return [
        Stage(conv_bn("body.0", "body.1", (2, 4, 4), 1), torch.relu),
        Stage(conv_bn("body.3", "body.4", (3, 4, 4), 0), torch.relu),
        Stage(affine("head")),
    ]


@dataclass
class Case:
    """A network, its dense stages, and what goes in."""

    build: Callable[[], nn.Module]
    stages: Callable[[nn.Module], list[Stage]]
    shape: tuple[int, ...] = field(default=(WIDTH,))

    def make(self, seed: int = 0) -> tuple[nn.Module, Tensor]:
        torch.manual_seed(seed)
        return self.build().double(), torch.randn(3, *self.shape, dtype=torch.float64) * 2


def _leaky(z: Tensor) -> Tensor:
    return F.leaky_relu(z, 0.2)


NESTED = ["body.0.0", "body.0.2.0", "body.1.0", "body.2"]

CASES: dict[str, Case] = {
    "modules": Case(Modules, chain(torch.relu)),
    "functional": Case(Functional, chain(torch.relu)),
    "method": Case(Method, chain(torch.relu)),
    "statement-in-place": Case(Statement, chain(torch.relu)),
    "torch-in-place": Case(TorchInPlace, chain(torch.relu)),
    "loop": Case(Loop, chain(torch.relu)),
    "reused": Case(Reused, chain(torch.relu)),
    "reused-in-place": Case(lambda: Reused(inplace=True), chain(torch.relu)),
    "relu6": Case(lambda: Modules(nn.ReLU6), chain(F.relu6)),
    "relu6-in-place": Case(lambda: Modules(lambda: nn.ReLU6(inplace=True)), chain(F.relu6)),
    "silu": Case(lambda: Modules(nn.SiLU), chain(F.silu)),
    "gelu": Case(lambda: Modules(nn.GELU), chain(F.gelu)),
    "gelu-tanh": Case(lambda: Modules(lambda: nn.GELU("tanh")), chain(lambda z: F.gelu(z, approximate="tanh"))),
    "tanh": Case(lambda: Modules(nn.Tanh), chain(torch.tanh)),
    "sigmoid": Case(lambda: Modules(nn.Sigmoid), chain(torch.sigmoid)),
    "leaky": Case(lambda: Modules(lambda: nn.LeakyReLU(0.2, inplace=True)), chain(_leaky)),
    "elu": Case(lambda: Modules(lambda: nn.ELU(0.5)), chain(lambda z: F.elu(z, 0.5))),
    "celu": Case(lambda: Modules(lambda: nn.CELU(0.5)), chain(lambda z: F.celu(z, 0.5))),
    "selu": Case(lambda: Modules(nn.SELU), chain(F.selu)),
    "mish": Case(lambda: Modules(nn.Mish), chain(F.mish)),
    "softplus": Case(lambda: Modules(lambda: nn.Softplus(2.0)), chain(lambda z: F.softplus(z, 2.0))),
    "hardswish": Case(lambda: Modules(nn.Hardswish), chain(F.hardswish)),
    "hardsigmoid": Case(lambda: Modules(nn.Hardsigmoid), chain(F.hardsigmoid)),
    "hardtanh": Case(lambda: Modules(lambda: nn.Hardtanh(-0.5, 0.7)), chain(lambda z: F.hardtanh(z, -0.5, 0.7))),
    "threshold": Case(lambda: Modules(lambda: nn.Threshold(0.1, 0.1)), chain(lambda z: F.threshold(z, 0.1, 0.1))),
    "residual": Case(Residual, residual_stages),
    "nested-sequential": Case(Nested, chain(torch.relu, NESTED)),
    "conv-bn-relu": Case(ConvBNReLU, conv_stages, (2, 4, 4)),
}


def gradients(model: Callable[[Tensor], Tensor], parameters: nn.Module, x: Tensor) -> tuple[Tensor, Parameters, Tensor]:
    """Input gradient, weight gradients and output for the loss 1/2 |f(x)|^2."""
    x = x.clone().requires_grad_()
    parameters.zero_grad()
    out = model(x)
    (0.5 * out.square().sum()).backward()
    return x.grad, {name: p.grad.clone() for name, p in parameters.named_parameters()}, out.detach()
