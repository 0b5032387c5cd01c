"""What an attached rule costs."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from backpass import LinBP
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


def sections(options: Options) -> Iterator[Section]:
    """Input gradients with and without LinBP."""
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
            times = side_by_side(runs, device=options.device, rounds=options.rounds(30), repeats=repeats)
        figures: dict[str, Figure | float] = {
            "ratio": ratio(times["linear"], times["plain"]),
            "plain, ms": milliseconds(times["plain"]),
        }
        if activations == len(model):  # nothing else to scatter
            least = {key: min(seconds) for key, seconds in times.items()}
            figures[EACH] = 1e6 * (least["linear"] - least["plain"]) / activations
        rows.append(Row(name=name, figures=figures, asked=(EACH, 15.0) if EACH in figures else None))
    yield Section(
        title="Rules",
        text="An input gradient with `LinBP()` attached over the plain one. The cost is Python's, per operation; it is "
        "seen where the operations are small.",
        rows=rows,
    )
