"""Networks whose units sleep: where LinBP's gradient sees what plain backpropagation's does not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn

from backpass.attacks import PGD
from backpass.lab.bench.experiment import Bench, Experiment, Outcome
from backpass.report.claims import Claim, agreement, judge
from backpass.report.result import Cell, Curve, Finding, Series, Table
from backpass.report.statistics import mean_interval, paired_interval
from backpass.report.wording import interval_text
from backpass.rules import parse_rule

__all__ = ["EXPERIMENTS", "Sleep", "Sleeper", "simulate"]

_RULES = ("bp", "linbp")
_BOUND = 20.0  # far outside of what standard normal inputs and the radii reach


@dataclass(frozen=True, kw_only=True)
class Sleep:
    """Random networks y = V relu(W x - b), and attacks on them.

    Attributes:
        thresholds: b; at a standard normal input a unit is awake with probability 1 - Phi(b).
        radii: of the l_inf ball; a step is a quarter of it.
        steps: of PGD.
        networks: how many are drawn for every threshold.
        images: inputs of each.
        widths: of x, of the hidden layer and of y.
    """

    thresholds: tuple[float, ...] = (0.0, 1.0, 2.0, 2.5, 3.0)
    radii: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.5)
    steps: int = 10
    networks: int = 8
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
        """(N, d) to (N, k)."""
        return torch.relu(x @ self.w.T - self.threshold) @ self.v.T

    @torch.no_grad()
    def awake(self, x: Tensor) -> float:
        """The share of units above the threshold, in per cent."""
        return 100 * (x @ self.w.T > self.threshold).double().mean().item()


def simulate(settings: Sleep, threshold: float, seed: int, device: torch.device) -> dict[str, list[float]]:
    """One network, attacked with both gradients at all radii; the label of an input is the network's own answer.

    Returns:
        By rule the inputs fooled in per cent, by radius; ``awake`` and ``blind``, one number each: units awake at the
        inputs, and inputs at which plain backpropagation's gradient is zero, in per cent.
    """
    generator = torch.Generator().manual_seed(seed)
    network = Sleeper(settings.widths, threshold, generator).to(device)
    x = torch.randn(settings.images, settings.widths[0], generator=generator).to(device)
    seen = x.clone().requires_grad_()
    logits = network(seen)
    y = logits.argmax(1)
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(logits, y, reduction="sum"), seen)
    found: dict[str, list[float]] = {
        "awake": [network.awake(x)],
        "blind": [100 * (gradient == 0).all(1).double().mean().item()],
    }
    for rule in _RULES:
        found[rule] = []
        for eps in settings.radii:
            attack = PGD(eps=eps, step=eps / 4, steps=settings.steps, restarts=1, bounds=(-_BOUND, _BOUND))
            with parse_rule(rule).attach(network):
                found[rule].append(100 * attack(network, x, y).success.double().mean().item())
    return found


Found = Mapping[float, list[dict[str, list[float]]]]
"""By threshold, what `simulate` gave for every seed."""


def _measure(settings: Sleep, bench: Bench) -> Outcome:
    seeds = range(settings.networks)
    found: Found = {
        b: [
            bench.pieces.value(
                f"threshold {b:g}, network {seed}",
                partial(simulate, settings, b, seed, bench.device),
                threshold=b,
                seed=seed,
                radii=settings.radii,
                steps=settings.steps,
                images=settings.images,
                widths=settings.widths,
                device=bench.device.type,
            )
            for seed in seeds
        ]
        for b in settings.thresholds
    }
    claims = [
        _claim(found, b, place, eps) for b, (place, eps) in product(settings.thresholds, enumerate(settings.radii))
    ]
    return Outcome(
        findings=[_finding(settings, found, claims)],
        series=[_curves(settings, found, b) for b in (settings.thresholds[0], settings.thresholds[-1])],
        claims=claims,
        tables=[_table(settings, found)],
        data=f"made: {settings.images} standard normal inputs for each of {settings.networks} networks a threshold",
        seeds=list(seeds),
        plots_note="Lines are means over the networks, bands their 95 % intervals.",
        claims_note="A pair is one network, attacked with both gradients from the same starts; n counts the networks.",
    )


def _rates(found: Found, b: float, rule: str, place: int) -> list[float]:
    return [one[rule][place] for one in found[b]]


def _claim(found: Found, b: float, place: int, eps: float) -> Claim:
    return judge(
        f"b{b:g}-eps{eps:g}",
        f"LinBP fools more inputs than BP where the threshold is {b:g} and the radius {eps:g}",
        ours=_rates(found, b, "linbp", place),
        theirs=_rates(found, b, "bp", place),
        direction="higher",
        quantity="inputs fooled, percentage points",
    )


def _finding(settings: Sleep, found: Found, claims: list[Claim]) -> Finding:
    first, last, far = settings.thresholds[0], settings.thresholds[-1], len(settings.radii) - 1

    def told(b: float, what: str) -> str:
        return f"{mean_interval([one[what][0] for one in found[b]]).mean:.2g}"

    def gained(b: float, place: int) -> str:
        return interval_text(
            paired_interval(_rates(found, b, "linbp", place), _rates(found, b, "bp", place)), signed=True
        )

    ahead = [claim.id for claim in claims if agreement(claim.verdict) is True]
    behind = sum(agreement(claim.verdict) is False for claim in claims)
    return Finding(
        "Sleeping units and a wide ball",
        f"With threshold {last:g} only {told(last, 'awake')} % of the units are awake at an input, and at "
        f"{told(last, 'blind')} % of the inputs BP's gradient is zero: it sees nothing of the units that sleep. LinBP "
        f"sees them all. In the widest ball, {settings.radii[far]:g}, they can be woken, and LinBP fools "
        f"{gained(last, far)} percentage points more; in the narrowest, {settings.radii[0]:g}, they cannot, and the "
        f"difference is {gained(last, 0)}. With threshold {first:g}, {told(first, 'awake')} % are awake, and the "
        f"differences are {gained(first, far)} and {gained(first, 0)}. LinBP is ahead in {len(ahead)} of {len(claims)} "
        f"comparisons ({', '.join(ahead) or 'none'}), behind in {behind}.",
    )


def _curves(settings: Sleep, found: Found, b: float) -> Series:
    return Series(
        id=f"threshold-{b:g}",
        title=f"Threshold {b:g}",
        description=f"Inputs fooled against the radius; PGD with {settings.steps} steps of a quarter of the radius.",
        x_label="radius",
        y_label="inputs fooled, %",
        curves=[
            Curve(label=label, x=settings.radii, runs=[one[rule] for one in found[b]])
            for rule, label in (("bp", "BP"), ("linbp", "LinBP"))
        ],
        log_x=True,
    )


def _table(settings: Sleep, found: Found) -> Table:
    rows: list[list[Cell]] = []
    for b in settings.thresholds:
        about = [mean_interval([one[what][0] for one in found[b]]) for what in ("awake", "blind")]
        differences = [
            paired_interval(_rates(found, b, "linbp", place), _rates(found, b, "bp", place))
            for place in range(len(settings.radii))
        ]
        rows.append([b, *about, *differences])
    return Table(
        id="difference",
        title="LinBP less BP, percentage points",
        columns=["threshold", "units awake, %", "BP blind, %", *(f"radius {eps:g}" for eps in settings.radii)],
        rows=rows,
        note=f"Means over {settings.networks} networks, with 95 % intervals.",
    )


EXPERIMENTS = (
    Experiment(
        name="linbp-sleeping-units",
        title="Can LinBP make the stronger attack at all?",
        question=(
            "Random networks y = V relu(W x - b) are attacked with both gradients. The threshold b says how many units "
            "sleep, and the radius of the ball whether an attack can wake them. The paper says that LinBP makes "
            "stronger white-box attacks; these networks show when that can be."
        ),
        source="an open question of Li et al., arXiv 2112.11018, Section 4.2.1",
        scales={"small": Sleep(), "paper": Sleep(networks=32, images=1000)},
        measure=_measure,
    ),
)
