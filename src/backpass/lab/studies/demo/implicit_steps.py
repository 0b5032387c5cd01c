"""Implicit steps: AdamW with plain gradients and with ProxProp's, training loss against time."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from backpass.data import Split
from backpass.lab.studies.demo.part import Part, Report, compare, make
from backpass.report.claims import judge
from backpass.report.result import Curve, Finding, Series
from backpass.report.statistics import geometric_interval
from backpass.rules import ProxProp, Rule
from backpass.training import Trainer

__all__ = ["ImplicitSteps"]

_RULES: dict[str, tuple[Rule, ...]] = {"AdamW": (), "ProxProp + AdamW": (ProxProp(),)}


@dataclass(frozen=True, kw_only=True)
class ImplicitSteps:
    """Settings; each method uses the rate of ``rates`` with the lowest final training loss."""

    seeds: int = 5
    model: str = "mlp:widths=512-512-512"
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    epochs: int = 4
    batch_size: int = 128

    def run(self, split: Split, report: Report) -> Part:
        """Return the losses of both methods after every epoch, and the cost of a step."""
        runs: dict[tuple[str, float], list[list[float]]] = {(name, r): [] for name in _RULES for r in self.rates}
        durations: dict[str, list[float]] = {name: [] for name in _RULES}
        for seed in range(self.seeds):
            for name, rate in runs:  # interleaved, so that other load of the machine affects both methods
                losses, seconds = self._train(split, name, rate, seed)
                runs[name, rate].append(losses)
                durations[name] += seconds
            report(f"implicit steps, seed {seed + 1} of {self.seeds}")
        plain, implicit = _RULES
        cost = statistics.median(durations[implicit]) / statistics.median(durations[plain])
        until = {plain: float(self.epochs), implicit: self.epochs / max(cost, 1.0)}
        ends = {(name, r): [_at(row, until[name]) for row in rows] for (name, r), rows in runs.items()}
        rates = {name: min(self.rates, key=lambda r: geometric_interval(ends[name, r]).mean) for name in _RULES}
        claim = judge(
            "implicit-steps",
            f"in the time of {self.epochs} plain epochs, implicit steps reach a lower training loss",
            ours=ends[implicit, rates[implicit]],
            theirs=ends[plain, rates[plain]],
            direction="lower",
            quantity="training loss, nats",
            reference="Frerix et al., ICLR 2018, Section 4",
        )
        return Part(
            finding=Finding(
                "Implicit steps",
                f"A step of AdamW with ProxProp costs {cost:.1f} plain ones. In the time of {self.epochs} plain epochs "
                f"the training loss with ProxProp is {compare(claim, 'higher', 'lower', ' nats')}.",
            ),
            series=Series(
                id="implicit-steps",
                title="Implicit steps",
                description=f"Training loss of {self.model} against time, each method at its best of "
                f"{len(self.rates)} rates; geometric means.",
                x_label="time (epochs of AdamW)",
                y_label="training loss, nats",
                curves=[
                    Curve(
                        label=name,
                        x=[round(epoch * scale, 2) for epoch in range(self.epochs + 1)],
                        runs=runs[name, rates[name]],
                        geometric=True,
                    )
                    for name, scale in ((plain, 1.0), (implicit, cost))
                ],
                log_y=True,
            ),
            claims=[claim],
            settings={
                "network": self.model,
                "rates": f"{rates}, of {self.rates}, on the same seeds",
                "epochs and batch size": (self.epochs, self.batch_size),
                "milliseconds per step, median": {
                    n: round(1e3 * statistics.median(d), 2) for n, d in durations.items()
                },
            },
        )

    def _train(self, split: Split, name: str, rate: float, seed: int) -> tuple[list[float], list[float]]:
        data = split.train.x, split.train.y
        ticks: list[float] = []
        model = make(self.model, split, seed)
        result = Trainer(
            model,
            torch.optim.AdamW(model.parameters(), rate),
            data,
            epochs=self.epochs,
            batch_size=self.batch_size,
            seed=seed,
            rules=_RULES[name],
            evaluation=data,
            evaluate_at=(0,),
            diverged_above=None,
            on_step=lambda step: ticks.append(time.perf_counter()),
        ).fit()
        losses = [record["evaluation"]["loss"] for record in (*result.evaluations, *result.history)]
        return losses, [after - before for before, after in pairwise(ticks)]


def _at(losses: Sequence[float], epoch: float) -> float:
    """Return the loss between two epochs by log-linear interpolation."""
    before = min(int(epoch), len(losses) - 2)
    share = epoch - before
    return math.exp((1 - share) * math.log(losses[before]) + share * math.log(losses[before + 1]))
