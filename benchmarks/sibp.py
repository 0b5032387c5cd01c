"""What a training step with SIBP costs: its CPU time over that of a plain SGD step.

Interleaved in one process on one thread; minima of many short rounds. Run: python benchmarks/sibp.py [--rounds 40]
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpass import SIBP, ProxProp
from backpass.rules import Rule

RULES: dict[str, Rule | None] = {
    "plain": None,
    "SIBP": SIBP(),
    "two Newton steps": SIBP(newton_steps=2),
    "ProxProp": ProxProp(),
}


def step(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    """A training step too short to change anything."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-9)

    def run() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return run


def interleaved(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Least CPU seconds of each, the rounds taken in turn."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            begin = time.process_time()
            run()
            run()
            best[name] = min(best[name], (time.process_time() - begin) / 2)
    return best


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 500), nn.ReLU(), nn.Linear(500, 10))


def cnn(norm: Callable[[int], nn.Module] = nn.Identity) -> nn.Module:
    def block(i: int, o: int) -> list[nn.Module]:
        return [nn.Conv2d(i, o, 3, padding=1), norm(o), nn.ReLU(), nn.MaxPool2d(2)]

    return nn.Sequential(*block(3, 16), *block(16, 32), nn.Flatten(), nn.Linear(32 * 64, 10))


def plain_cnn() -> nn.Module:
    return nn.Sequential(*[m for m in cnn() if not isinstance(m, nn.Identity)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    torch.set_num_threads(1)
    cases = {f"784-500-10, batch {n}": (mlp(), torch.randn(n, 784), rounds) for n in (25, 50, 100, 200, 500, 1000)}
    images = torch.randn(32, 3, 32, 32)
    cases["2 x (conv, BN, ReLU, pool), batch 32"] = (cnn(nn.BatchNorm2d), images, rounds // 4)
    cases["2 x (conv, ReLU, pool), batch 32"] = (plain_cnn(), images, rounds // 4)
    print(f"{'network':<40}{'plain ms':>10}" + "".join(f"{name:>18}" for name in list(RULES)[1:]))
    for name, (model, x, repeats) in cases.items():
        y, copies = torch.randint(10, (len(x),)), {}
        for rule_name, rule in RULES.items():
            copies[rule_name] = copy.deepcopy(model)
            if rule:
                rule.attach(copies[rule_name])
        best = interleaved({key: step(one, x, y) for key, one in copies.items()}, max(repeats, 2))
        ratios = "".join(f"{best[key] / best['plain']:>18.2f}" for key in list(RULES)[1:])
        print(f"{name:<40}{best['plain'] * 1e3:>10.2f}{ratios}", flush=True)


if __name__ == "__main__":
    main()
