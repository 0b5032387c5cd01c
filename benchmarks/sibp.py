"""What a training step with SIBP costs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpass import SIBP, ProxProp
from backpass.rules import Rule
from side_by_side import Contestant, Options, Row, Section, milliseconds, ratio, side_by_side

RULES: dict[str, Rule | None] = {
    "plain": None,
    "SIBP": SIBP(),
    "two Newton steps": SIBP(newton_steps=2),
    "ProxProp": ProxProp(tau=1.0),
}
BAR = "784-500-10, batch 100"


def step(model: nn.Module, x: Tensor, y: Tensor) -> Contestant:
    """A training step too short to change anything."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-9)

    def run() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return run


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 500), nn.ReLU(), nn.Linear(500, 10))


def cnn(norm: Callable[[int], nn.Module] = nn.Identity) -> nn.Module:
    def block(i: int, o: int) -> list[nn.Module]:
        return [nn.Conv2d(i, o, 3, padding=1), norm(o), nn.ReLU(), nn.MaxPool2d(2)]

    return nn.Sequential(*block(3, 16), *block(16, 32), nn.Flatten(), nn.Linear(32 * 64, 10))


def plain_cnn() -> nn.Module:
    return nn.Sequential(*[m for m in cnn() if not isinstance(m, nn.Identity)])


def sections(options: Options) -> Iterator[Section]:
    """The paper's MLP at several batch sizes, and two convolutional networks."""
    torch.manual_seed(0)
    rounds = options.rounds(40)
    sizes = (25, 100) if options.quick else (25, 50, 100, 200, 500, 1000)
    cases = {f"784-500-10, batch {n}": (mlp(), torch.randn(n, 784), rounds) for n in sizes}
    images = torch.randn(32, 3, 32, 32)
    cases["2 x (conv, BatchNorm, ReLU, pool), batch 32"] = (cnn(nn.BatchNorm2d), images, max(2, rounds // 4))
    cases["2 x (conv, ReLU, pool), batch 32"] = (plain_cnn(), images, max(2, rounds // 4))
    rows = []
    for name, (model, x, repeats) in cases.items():
        x = x.to(options.device)
        y, copies = torch.randint(10, (len(x),), device=options.device), {}
        for rule_name, rule in RULES.items():
            copies[rule_name] = copy.deepcopy(model).to(options.device)
            if rule:
                rule.attach(copies[rule_name])
        runs = {key: step(one, x, y) for key, one in copies.items()}
        times = side_by_side(runs, device=options.device, rounds=repeats, repeats=2)
        least = {key: min(seconds) for key, seconds in times.items()}
        rows.append(
            Row(
                name=name,
                figures={
                    "ratio": ratio(times["SIBP"], times["plain"]),
                    "ratio of least times": least["SIBP"] / least["plain"],
                    "two Newton steps": ratio(times["two Newton steps"], times["plain"]),
                    "ProxProp": ratio(times["ProxProp"], times["plain"]),
                    "plain, ms": milliseconds(times["plain"]),
                },
                asked=("ratio of least times", 2.5) if name == BAR else None,
            )
        )
    yield Section(
        title="SIBP",
        text="A training step with `SIBP()` over the plain step of SGD; beside it two Newton steps, and ProxProp. The "
        "sub-problem grows with the square of the batch, or with every output pixel.",
        rows=rows,
    )
