"""Steps per CPU second of an ensemble of SDE paths, beside torchsde's Euler; and what the adversarial SDE itself costs.

    OMP_NUM_THREADS=1 python benchmarks/sde.py [--quick] [--json FILE]

One process, one thread, interleaved rounds, CPU time, medians. The linear SDE is dX = -A X dt + sqrt(eta) s dW with
diagonal noise, Euler-Maruyama on both sides. torchsde is optional: pip install torchsde.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpass.sde import AdversarialSDE, ItoSDE, from_module, integrate

try:
    import torchsde
except ImportError:
    torchsde = None

ETA = 0.1


def linear(d: int) -> tuple[Tensor, Tensor]:
    """A symmetric, positive definite A and the noise's scale."""
    root = torch.randn(d, d, generator=torch.Generator().manual_seed(0)) / d**0.5
    return root @ root.T + torch.eye(d), torch.linspace(0.5, 1.5, d) * ETA**0.5


def ours(paths: int, d: int, steps: int, method: str) -> Callable[[], Tensor]:
    A, scale = linear(d)
    sde = ItoSDE(lambda x: -x @ A, lambda x, xi: scale * xi, noise_dim=d)
    start = torch.ones(paths, d)
    return lambda: integrate(sde, start, steps * 0.01, 0.01, method).theta


def theirs(paths: int, d: int, steps: int) -> Callable[[], Tensor]:
    A, scale = linear(d)

    class Linear(nn.Module):
        noise_type, sde_type = "diagonal", "ito"

        def f(self, t: Tensor, y: Tensor) -> Tensor:
            return -y @ A

        def g(self, t: Tensor, y: Tensor) -> Tensor:
            return scale.expand_as(y)

    start, times, sde = torch.ones(paths, d), torch.tensor([0.0, steps * 0.01]), Linear()

    def run() -> Tensor:
        with torch.no_grad():
            return torchsde.sdeint(sde, start, times, method="euler", dt=0.01)[-1]

    return run


def adversarial(paths: int, hidden: int) -> tuple[AdversarialSDE, Tensor]:
    """Ten classes of 64 inputs, a tanh network, K = 2."""
    generator = torch.Generator().manual_seed(0)
    data = torch.rand(64, 64, generator=generator), torch.arange(64) % 10
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, hidden), nn.Tanh(), nn.Linear(hidden, 10))
    loss, theta = from_module(model, functools.partial(F.cross_entropy, reduction="none"))
    sde = AdversarialSDE(loss, data, eta_outer=ETA, batch_size=8, steps=2, eta_inner=0.1)
    return sde, theta.expand(paths, -1)


def dense_noise(sde: AdversarialSDE, theta: Tensor, xi: Tensor) -> Tensor:
    """The same noise from the gradient of every sample."""
    at = sde.data[0] + sde.perturbation(theta)
    gradients = torch.func.jacrev(lambda p: sde.loss(p, at, sde.data[1]))(theta)
    return (xi - xi.mean()) @ gradients * (sde.eta_outer / (sde.batch_size * len(xi))) ** 0.5


def cpu_seconds(runs: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, float]:
    """Medians over interleaved rounds, after one round that does not count."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + 1):
        for name, run in runs.items():
            began = time.process_time()
            run()
            if round_:
                taken[name].append(time.process_time() - began)
    return {name: statistics.median(values) for name, values in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes and two rounds: does it run?")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rounds = 2 if arguments.quick else arguments.rounds
    paths, d, steps = (100, 10, 20) if arguments.quick else (10_000, 10, 200)

    runs = {"backpass, Euler": ours(paths, d, steps, "euler"), "backpass, Heun": ours(paths, d, steps, "heun")}
    if torchsde is None:
        print("torchsde is not installed, so it is left out: pip install torchsde\n")
    else:
        runs["torchsde, Euler"] = theirs(paths, d, steps)
    rates = {name: steps / seconds for name, seconds in cpu_seconds(runs, rounds).items()}
    print(f"torch {torch.__version__}, float32, one thread. Linear SDE, {paths} paths, d = {d}:")
    for name, rate in rates.items():
        print(f"  {name:22s}{rate:10.0f} steps per CPU second{rate / rates['backpass, Euler']:8.2f}x")

    sde, theta = adversarial(4 if arguments.quick else 16, 16 if arguments.quick else 128)
    xi = torch.randn(len(theta), sde.noise_dim)
    costs = cpu_seconds(
        {
            "a step of the chain": lambda: sde.chain_step(theta),
            "drift of order 2": lambda: sde.drift(theta),
            "noise": lambda: sde.noise(theta, xi),
            "noise, one path": lambda: sde.noise(theta[0], xi[0]),
            "same, per-sample gradients": lambda: dense_noise(sde, theta[0], xi[0]),
        },
        rounds,
    )
    difference = (sde.noise(theta[0], xi[0]) - dense_noise(sde, theta[0], xi[0])).abs().max().item()
    print(f"\nAdversarial SDE, K = 2, {theta.shape[1]} parameters, {len(theta)} paths, {sde.noise_dim} samples:")
    for name, seconds in costs.items():
        print(f"  {name:28s}{seconds * 1e3:10.2f} ms{seconds / costs['a step of the chain']:9.1f}x")
    print(f"  the two noises differ by at most {difference:.1e}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"steps per CPU second": rates, "CPU seconds": costs}, indent=1))


if __name__ == "__main__":
    main()
