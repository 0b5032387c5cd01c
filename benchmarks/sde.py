"""An ensemble of SDE paths beside torchsde's Euler; and what the adversarial SDE itself costs."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpass.sde import AdversarialSDE, ItoSDE, from_module, integrate
from side_by_side import Contestant, Options, Row, Section, milliseconds, ratio, side_by_side

try:
    import torchsde
except ImportError:
    torchsde = None

ETA = 0.1


def linear(d: int) -> tuple[Tensor, Tensor]:
    """A symmetric, positive definite A and the noise's scale."""
    root = torch.randn(d, d, generator=torch.Generator().manual_seed(0)) / d**0.5
    return root @ root.T + torch.eye(d), torch.linspace(0.5, 1.5, d) * ETA**0.5


def ours(paths: int, d: int, steps: int, method: str) -> Contestant:
    A, scale = linear(d)
    sde = ItoSDE(lambda x: -x @ A, lambda x, xi: scale * xi, noise_dim=d)
    start = torch.ones(paths, d)
    return lambda: integrate(sde, start, steps * 0.01, 0.01, method).theta


def theirs(paths: int, d: int, steps: int) -> Contestant:
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


def against_torchsde(sde: AdversarialSDE, theta: Tensor) -> dict[str, Contestant]:
    """Sixteen steps to time 4 eta, by both packages."""
    times, dt = torch.tensor([0.0, 4 * ETA]), ETA / 4
    runs: dict[str, Contestant] = {
        "16 steps, Euler": lambda: integrate(sde, theta, 4 * ETA, dt, "euler_maruyama", coarse=True),
        "16 steps, predictor-corrector": lambda: integrate(sde, theta, 4 * ETA, dt, "predictor_corrector"),
        "16 steps, the default": lambda: integrate(sde, theta, 4 * ETA, dt),
    }
    if torchsde is not None:
        module = sde.as_torchsde()
        runs["16 steps, torchsde's Euler"] = lambda: torchsde.sdeint(module, theta, times, method="euler", dt=dt)
    return runs


def dense_noise(sde: AdversarialSDE, theta: Tensor, xi: Tensor) -> Tensor:
    """The same noise from the gradient of every sample."""
    at = sde.data[0] + sde.perturbation(theta)
    gradients = torch.func.jacrev(lambda p: sde.loss(p, at, sde.data[1]))(theta)
    return (xi - xi.mean()) @ gradients * (sde.eta_outer / (sde.batch_size * len(xi))) ** 0.5


def sections(options: Options) -> Iterator[Section]:
    """A linear SDE, and the drift and noise of an adversarial one."""
    rounds = options.rounds(7)
    paths, d, steps = (100, 10, 20) if options.quick else (10_000, 10, 200)
    euler = "backpass, Euler"
    runs = {
        euler: ours(paths, d, steps, "euler_maruyama"),
        "backpass, PC": ours(paths, d, steps, "predictor_corrector"),
    }
    if torchsde is not None:
        runs["torchsde, Euler"] = theirs(paths, d, steps)
    times = side_by_side(runs, device="cpu", rounds=rounds)
    yield Section(
        title="SDE: integration",
        text=f"dX = -A X dt + s dW with diagonal noise, {paths:,} paths of dimension {d}, {steps} steps, float32. The "
        "predictor-corrector method takes the drift twice in a step."
        + ("" if torchsde else " torchsde was not installed."),
        rows=[
            Row(
                name=name,
                figures={"ratio": ratio(of, times[euler]), "steps per second": steps / sorted(of)[len(of) // 2]},
            )
            for name, of in times.items()
        ],
    )

    sde, theta = adversarial(4 if options.quick else 16, 16 if options.quick else 128)
    xi = torch.randn(len(theta), sde.noise_dim)
    chain, ours_noise, dense = "a step of the chain", "noise of one path", "the same by per-sample gradients"
    costs = side_by_side(
        {
            chain: lambda: sde.chain_step(theta),
            "drift of order 2": lambda: sde.drift(theta),
            "noise": lambda: sde.noise(theta, xi),
            "drift and noise at once": lambda: sde.coefficients(theta, xi),
            **against_torchsde(sde, theta),
            ours_noise: lambda: sde.noise(theta[0], xi[0]),
            dense: lambda: dense_noise(sde, theta[0], xi[0]),
        },
        device="cpu",
        rounds=rounds,
    )
    difference = (sde.noise(theta[0], xi[0]) - dense_noise(sde, theta[0], xi[0])).abs().max().item()
    yield Section(
        title="SDE: adversarial training",
        text=f"A tanh network of {theta.shape[1]:,} parameters, K = 2, {sde.noise_dim} samples, {len(theta)} paths. "
        f"The two noises differ by at most {difference:.1e}. A path costs more than the chain that it models: it is "
        "for analysis.",
        rows=[
            Row(name=name, figures={"ratio": ratio(of, costs[chain]), "ms": milliseconds(of)})
            for name, of in costs.items()
        ],
    )
