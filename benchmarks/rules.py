"""What an attached rule costs."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from backpass import PNA, SGM, LinBP
from backpass.models import build
from implicit_networks import ViT
from side_by_side import Contestant, Figure, Options, Row, Section, milliseconds, ratio, side_by_side

EACH = "us per activation, of least times"


def input_gradient(model: nn.Module, x: Tensor) -> Contestant:
    return lambda: torch.autograd.grad(model(x).sum(), x)


def mlp(depth: int, width: int) -> nn.Module:
    return nn.Sequential(*[m for _ in range(depth) for m in (nn.Linear(width, width), nn.ReLU())])


def cnn() -> nn.Module:
    def block(i: int, o: int) -> list[nn.Module]:
        return [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU()]

    body = [*block(3, 32), *block(32, 32), nn.MaxPool2d(2), *block(32, 64), *block(64, 64), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(64, 10)).eval()


class Passing(torch.autograd.Function):
    """ReLU with a backward pass that does nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """The value."""
        return torch.ops.aten.relu(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """The gradient as it comes."""
        return grad


class Replacing(TorchFunctionMode):
    """Every function that is seen becomes `Passing`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return Passing.apply(args[0])


def bare(model: nn.Module, x: Tensor) -> Contestant:
    """What any rule needs of torch and nothing more: two hooks a module, a mode, an autograd.Function a call."""
    for module in model:
        module.register_forward_pre_hook(lambda module, args: None)
        module.register_forward_hook(lambda module, args, output: None, always_call=True)

    def run() -> object:
        with Replacing():
            y = model(x)
        return torch.autograd.grad(y.sum(), x)

    return run


def transfer_rules(options: Options) -> Section:
    """Input gradients with and without the rules of transfer attacks."""
    vit, resnet = ViT(width=192, depth=12).eval(), build("resnet18").eval()
    x = torch.rand(8, 3, 32, 32, device=options.device, requires_grad=True)
    rows = []
    for name, rule, model in (
        ("SGM, ViT-tiny", SGM(), vit),
        ("PNA, ViT-tiny", PNA(), vit),
        ("SGM, ResNet-18", SGM(), resnet),
    ):
        plain, ruled = model.to(options.device), copy.deepcopy(model).to(options.device)
        with rule.attach(ruled):
            runs = {"plain": input_gradient(plain, x), "rule": input_gradient(ruled, x)}
            times = side_by_side(runs, device=options.device, rounds=options.rounds(30))
        figures: dict[str, Figure | float] = {
            "ratio": ratio(times["rule"], times["plain"]),
            "plain, ms": milliseconds(times["plain"]),
        }
        rows.append(Row(name=name, figures=figures, asked=("ratio", 1.1)))
    return Section(
        title="Rules of transfer attacks",
        text=f"An input gradient of {len(x)} images of 3x32x32 with a rule attached over the plain one. ViT-tiny has "
        "width 192, 12 blocks and 4x4 patches.",
        rows=rows,
    )


def sections(options: Options) -> Iterator[Section]:
    """Input gradients with and without rules."""
    chain = nn.Sequential(*[nn.ReLU() for _ in range(100)])
    cases = {
        "100 ReLU modules and nothing else": (chain, torch.randn(8, 8), 100, 5),
        "20 x (Linear 32, ReLU), batch 8": (mlp(20, 32), torch.randn(8, 32), 20, 10),
        "20 x (Linear 512, ReLU), batch 128": (mlp(20, 512), torch.randn(128, 512), 20, 1),
        "4 x (conv, BatchNorm, ReLU), batch 32": (cnn(), torch.randn(32, 3, 32, 32), 4, 1),
    }
    rows = []
    for name, (model, x, activations, repeats) in cases.items():
        plain, linear = model.to(options.device), copy.deepcopy(model).to(options.device)
        x = x.to(options.device).requires_grad_()
        with LinBP().attach(linear):
            runs = {"plain": input_gradient(plain, x), "linear": input_gradient(linear, x)}
            if model is chain:
                runs["bare"] = bare(copy.deepcopy(model), x)
            times = side_by_side(runs, device=options.device, rounds=options.rounds(30), repeats=repeats)
        figures: dict[str, Figure | float] = {
            "ratio": ratio(times["linear"], times["plain"]),
            "plain, ms": milliseconds(times["plain"]),
        }
        note = ""
        if model is chain:  # nothing else to scatter
            linear_us, bare_us = (
                1e6 * (min(times[key]) - min(times["plain"])) / activations for key in ("linear", "bare")
            )
            figures[EACH] = linear_us
            note = f"of these, hooks, mode and autograd.Function that do nothing: {bare_us:.1f}"
        rows.append(Row(name=name, figures=figures, asked=(EACH, 15.0) if note else None, note=note))
    yield Section(
        title="Rules",
        text="An input gradient with `LinBP()` attached over the plain one. The cost is Python's, per operation; it is "
        "seen where the operations are small.",
        rows=rows,
    )
    yield transfer_rules(options)
