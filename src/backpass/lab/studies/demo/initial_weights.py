"""Small initial weights: training with SIBP and with SGD."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from backpass.data import Split
from backpass.lab.studies.demo.part import Part, Report, compare, make
from backpass.report.claims import judge
from backpass.report.result import Curve, Finding, Series
from backpass.report.statistics import Interval, mean_interval
from backpass.report.wording import interval_text
from backpass.rules import SIBP
from backpass.training import Trainer

__all__ = ["InitialWeights"]


@dataclass(frozen=True, kw_only=True)
class InitialWeights:
    """Settings: weights from N(0, ``std``^2), zero biases; of all SGD ``rates`` the best one is shown."""

    seeds: int = 5
    model: str = "mlp:widths=100-100-100-100"
    std: float = 0.05
    rates: tuple[float, ...] = (0.01, 0.1, 1.0)
    epochs: int = 6
    batch_size: int = 100

    def run(self, split: Split, report: Report) -> Part:
        """Return the test accuracy of SIBP and of SGD after every epoch."""
        runs: dict[float | None, list[list[float]]] = {rate: [] for rate in (None, *self.rates)}
        for seed in range(self.seeds):
            for rate, rows in runs.items():
                rows.append(self._train(split, rate, seed))
            report(f"initial weights, seed {seed + 1} of {self.seeds}")
        best = max(self.rates, key=lambda rate: mean_interval([row[-1] for row in runs[rate]]).mean)
        ours, theirs = runs[None], runs[best]
        claim = judge(
            "initial-weights",
            f"from weights of N(0, {self.std:g}^2), SIBP has the higher test accuracy after {self.epochs} epochs",
            ours=[row[-1] for row in ours],
            theirs=[row[-1] for row in theirs],
            direction="higher",
            quantity="test accuracy, percentage points",
            reference="Liu and Zhang, arXiv 2002.03516, abstract",
        )

        def end(rows: list[list[float]]) -> Interval:
            return mean_interval([row[-1] for row in rows])

        return Part(
            finding=Finding(
                "Bad initial weights",
                f"Weights from N(0, {self.std:g}^2) are too small: after {self.epochs} epochs SIBP has "
                f"{interval_text(end(ours))} % of the held-out digits right, and SGD at the best of {len(self.rates)} "
                f"rates {interval_text(end(theirs))} %: SIBP's accuracy is "
                f"{compare(claim, 'higher', 'lower', ' points')}.",
            ),
            series=Series(
                id="initial-weights",
                title="Bad initial weights",
                description=f"Test accuracy of {self.model} against epochs; SGD at its best rate, {best:g}.",
                x_label="epoch",
                y_label="test accuracy, %",
                curves=[
                    Curve(label=label, x=range(self.epochs + 1), runs=rows)
                    for label, rows in (("SGD", theirs), ("SIBP", ours))
                ],
            ),
            claims=[claim],
            settings={
                "network": f"{self.model}, weights from N(0, {self.std:g}^2), biases 0",
                "SIBP": f"{SIBP()!r}, SGD at rate 1",
                "rates of SGD": self.rates,
                "epochs and batch size": (self.epochs, self.batch_size),
            },
        )

    def _train(self, split: Split, rate: float | None, seed: int) -> list[float]:
        model = make(self.model, split, seed)
        draws = torch.Generator().manual_seed(seed)
        for weight in model.parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=self.std, generator=draws)
            else:
                nn.init.zeros_(weight)
        result = Trainer(
            model,
            torch.optim.SGD(model.parameters(), 1.0 if rate is None else rate),
            (split.train.x, split.train.y),
            epochs=self.epochs,
            batch_size=self.batch_size,
            seed=seed,
            rules=(SIBP(),) if rate is None else (),
            evaluation=(split.test.x, split.test.y),
            evaluate_at=(0,),
            diverged_above=None,
        ).fit()
        return [100 * record["evaluation"]["accuracy"] for record in (*result.evaluations, *result.history)]
