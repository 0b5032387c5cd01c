"""What an attached rule costs: microseconds per activation, and the ratio for whole networks.

Interleaved in one process; minima of many short rounds. Run: python benchmarks/rules.py [--rounds 30]
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from backpass import LinBP


def step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    def run() -> None:
        torch.autograd.grad(model(x).sum(), x)

    return run


def interleaved(runs: dict[str, Callable[[], None]], rounds: int, repeats: int) -> dict[str, float]:
    """Least seconds per call of each, the rounds taken in turn."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            begin = time.perf_counter()
            for _ in range(repeats):
                run()
            best[name] = min(best[name], (time.perf_counter() - begin) / repeats)
    return best


def chain(depth: int) -> nn.Module:
    return nn.Sequential(*[nn.ReLU() for _ in range(depth)])


def mlp(depth: int, width: int) -> nn.Module:
    return nn.Sequential(*[m for _ in range(depth) for m in (nn.Linear(width, width), nn.ReLU())])


def cnn() -> nn.Module:
    def block(i: int, o: int) -> list[nn.Module]:
        return [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU()]

    body = [*block(3, 32), *block(32, 32), nn.MaxPool2d(2), *block(32, 64), *block(64, 64), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(64, 10)).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    cases = {
        "100 ReLU modules": (chain(100), torch.randn(8, 8), 100, 5),
        "20 x (Linear 32, ReLU)": (mlp(20, 32), torch.randn(8, 32), 20, 10),
        "20 x (Linear 512, ReLU), batch 128": (mlp(20, 512), torch.randn(128, 512), 20, 1),
        "4 x (conv, BN, ReLU), batch 32": (cnn(), torch.randn(32, 3, 32, 32), 4, 1),
    }
    print("Input gradient, one thread, CPU; minimum over interleaved rounds.\n")
    print(f"{'network':<38}{'plain us':>10}{'LinBP us':>10}{'ratio':>8}{'us per activation':>20}")
    for name, (model, x, activations, repeats) in cases.items():
        plain, linear = model, copy.deepcopy(model)
        x.requires_grad_()
        with LinBP().attach(linear):
            linear(x)
            best = interleaved({"plain": step(plain, x), "linear": step(linear, x)}, rounds, repeats)
        before, after = best["plain"] * 1e6, best["linear"] * 1e6
        print(f"{name:<38}{before:>10.0f}{after:>10.0f}{after / before:>8.2f}{(after - before) / activations:>20.1f}")


if __name__ == "__main__":
    main()
