"""Attacks on networks whose units sleep as arms: LinBP's gradient sees what plain backpropagation's does not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from backpass.attacks import PGD
from backpass.experiments.experiment import Context, Outcome
from backpass.rules import parse_rule

__all__ = ["Asleep", "Sleeper", "attack_sleepers"]

_BOUND = 20.0  # far outside of what standard normal inputs and the radii reach


@dataclass(frozen=True, kw_only=True)
class Asleep:
    """Settings of a random network y = V relu(W x - b), and of the attacks on it.

    Attributes:
        rule: text form; its backward pass gives the attack's gradients.
        threshold: b; at a standard normal input a unit is awake with probability 1 - Phi(b).
        radii: of the l_inf ball; a step is a quarter of it.
        steps: of PGD.
        images: inputs of each network.
        widths: of x, of the hidden layer and of y.
    """

    rule: str
    threshold: float
    radii: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.5)
    steps: int = 10
    images: int = 200
    widths: tuple[int, int, int] = (100, 200, 10)


class Sleeper(nn.Module):
    """y = V relu(W x - b), W (m, d) and V (k, m) normal with variances 1/d and 1/m."""

    def __init__(self, widths: tuple[int, int, int], threshold: float, generator: torch.Generator) -> None:
        super().__init__()
        d, m, k = widths
        self.w = nn.Parameter(torch.randn(m, d, generator=generator) / d**0.5)
        self.v = nn.Parameter(torch.randn(k, m, generator=generator) / m**0.5)
        self.threshold = threshold

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, d) to (N, k)."""
        return torch.relu(x @ self.w.T - self.threshold) @ self.v.T


def attack_sleepers(settings: Asleep, seed: int, context: Context) -> Outcome:
    """Attack one network at all radii; the label of an input is the network's own answer.

    Returns:
        ``fooled``, the inputs fooled at each radius; ``awake``, the units above the threshold; ``blind``, the inputs at
        which plain backpropagation's gradient is zero; all in per cent.
    """
    generator = torch.Generator().manual_seed(seed)
    network = Sleeper(settings.widths, settings.threshold, generator).to(context.device)
    x = torch.randn(settings.images, settings.widths[0], generator=generator).to(context.device)
    seen = x.clone().requires_grad_()
    logits = network(seen)
    y = logits.argmax(1)
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(logits, y, reduction="sum"), seen)
    fooled = []
    for eps in settings.radii:
        attack = PGD(eps=eps, step=eps / 4, steps=settings.steps, restarts=1, bounds=(-_BOUND, _BOUND))
        with parse_rule(settings.rule).attach(network):
            fooled.append(_percent(attack(network, x, y).success))
    return {
        "fooled": fooled,
        "awake": _percent(x @ network.w.T > settings.threshold),
        "blind": _percent((gradient == 0).all(1)),
    }


def _percent(true: Tensor) -> float:
    return 100 * true.double().mean().item()
