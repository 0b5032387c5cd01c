"""Overhead of LinBP per activation, in one process with another checkout of backpass.

    python benchmarks/rule_overhead.py ../other/src

prints CPU microseconds per activation beyond the plain model: 100 ReLUs and nothing else, forward and backward.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import statistics
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from side_by_side import Contestant, side_by_side

ACTIVATIONS = 100
STARTS = (0, 0.5, -1)


class Functions(nn.Module):
    """A chain of calls of `F.relu`."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the end of the chain."""
        for _ in range(ACTIVATIONS):
            x = F.relu(x)
        return x


CHAINS = {"functions": Functions(), "modules": nn.Sequential(*(nn.ReLU() for _ in range(ACTIVATIONS)))}


def load(source: str | None) -> Any:
    """Import LinBP of a checkout of backpass, beside those of others; None: of this one."""
    if source is not None:
        sys.path.insert(0, source)
    try:
        return importlib.import_module("backpass").LinBP
    finally:
        if source is not None:
            sys.path.remove(source)
        for name in [name for name in sys.modules if name.partition(".")[0] == "backpass"]:
            del sys.modules[name]


def input_gradient(model: nn.Module, x: Tensor) -> Contestant:
    """Return a contestant that differentiates the model."""
    return lambda: torch.autograd.grad(model(x).sum(), x)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sources", nargs="*", help="src folders of other checkouts")
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    versions = {source or "this": load(source) for source in (None, *options.sources)}
    x = torch.randn(8, 8).requires_grad_()
    print(f"{'':24}" + "".join(f"{name[-24:]:>26}" for name in versions))
    for chain, model in CHAINS.items():
        runs = {("plain", None): input_gradient(model, x)}
        for name, version in versions.items():
            for start in STARTS:
                attached = copy.deepcopy(model)
                version(start=start).attach(attached)
                runs[name, start] = input_gradient(attached, x)
        times = side_by_side(runs, device="cpu", rounds=options.rounds, repeats=5)
        for start in STARTS:
            beyond = {
                name: statistics.median(
                    1e6 * (a - b) / ACTIVATIONS for a, b in zip(times[name, start], times["plain", None], strict=True)
                )
                for name in versions
            }
            print(f"{f'{chain}, start={start}':24}" + "".join(f"{us:>26.1f}" for us in beyond.values()))


if __name__ == "__main__":
    main()
