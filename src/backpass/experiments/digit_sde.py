"""Adversarial training of a small network on two digits, and its SDE: input gradient and adversarial loss."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpass.data import load_digits
from backpass.errors import BackpassError
from backpass.experiments.experiment import Context, Measurement, Outcome, Runs
from backpass.sde import AdversarialSDE, from_module, integrate, run_chain

__all__ = ["DigitSDE", "relative_difference", "run_digits"]

_LOSS = functools.partial(F.binary_cross_entropy_with_logits, reduction="none")


@dataclass(frozen=True, kw_only=True)
class DigitSDE:
    """Settings: a tanh network classifies 3 against 8 in images of 4x4 pixels.

    Attributes:
        process: ``plain``, ``adversarial`` or ``sde``.
        paths: runs from the initial weights of one seed.
        samples: number of images.
        hidden: hidden units.
        eta: learning rate.
        batch_size: images per step.
        steps: steps of training.
        records: number of evaluations after the start.
        attack_steps: gradient steps of the attack.
        eta_inner: length of a step of the attack.
    """

    process: str
    paths: int = 100
    samples: int = 64
    hidden: int = 4
    eta: float = 0.2
    batch_size: int = 8
    steps: int = 80
    records: int = 8
    attack_steps: int = 3
    eta_inner: float = 0.1


def run_digits(settings: DigitSDE, seed: int, context: Context) -> Outcome:
    """Return time, mean squared input gradient and adversarial loss over the paths, at every record."""
    train = load_digits().train
    rows = ((train.y == 3) | (train.y == 8)).nonzero().squeeze(1)[: settings.samples]
    pixels = F.avg_pool2d(train.x[rows], 2).flatten(1).double()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = nn.Linear(16, settings.hidden), nn.Tanh(), nn.Linear(settings.hidden, 1), nn.Flatten(0)
        loss, theta = from_module(nn.Sequential(*layers).double(), _LOSS)
    data = (pixels - pixels.mean(0)) / pixels.std(), (train.y[rows] == 8).double()

    def process(steps: int) -> AdversarialSDE:
        return AdversarialSDE(loss, data, eta_outer=settings.eta, batch_size=settings.batch_size, steps=steps,
                              eta_inner=settings.eta_inner)  # fmt: skip

    sde, time = process(settings.attack_steps), settings.steps * settings.eta
    start, draws = theta.expand(settings.paths, -1), torch.Generator().manual_seed(seed)
    if settings.process == "sde":
        values = integrate(sde, start, time, dt=settings.eta, method="derivative_free", generator=draws,
                           record=settings.records).values  # fmt: skip
    elif settings.process in ("plain", "adversarial"):
        chain = sde if settings.process == "adversarial" else process(0)
        values = run_chain(chain, start, settings.steps, generator=draws, record=settings.records).values
    else:
        raise BackpassError(f"process must be plain, adversarial or sde, got {settings.process!r}.")
    return {
        "time": [round(record * time / settings.records, 6) for record in range(settings.records + 1)],
        "gradient": _means(sde.gradient_penalty(theta) for theta in values),
        "loss": _means(sde.adversarial_loss(theta) for theta in values),
    }


def _means(records: Iterable[Tensor]) -> list[float]:
    return [one.mean().item() for one in records]


def relative_difference(key: str, label: str) -> Measurement:
    """Return the paired measurement of the last record in per cent of that of the second arm."""

    def pair(ours: Runs, theirs: Runs) -> tuple[list[float], list[float]]:
        ends = [(a[key][-1], b[key][-1]) for a, b in zip(ours.runs, theirs.runs, strict=True)]
        return [100 * a / b for a, b in ends], [100.0 for _ in ends]

    return Measurement(label=f"{label} at the end, relative to adversarial training", unit="%", pair=pair)
