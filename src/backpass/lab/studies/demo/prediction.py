"""SDE prediction of adversarial training: input gradient and adversarial loss against time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpass.data import Split
from backpass.lab.studies.demo.part import Part, Report
from backpass.report.claims import judge_within
from backpass.report.result import Curve, Finding, Series
from backpass.report.statistics import Interval
from backpass.report.wording import interval_text
from backpass.sde import AdversarialSDE, from_module, integrate, run_chain

__all__ = ["Prediction"]

_TOLERANCE = 10
_LOSS = functools.partial(F.binary_cross_entropy_with_logits, reduction="none")


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Settings: a tanh network classifies 3 against 8 in 4x4 images; ``paths`` runs from one start per seed."""

    seeds: int = 5
    paths: int = 100
    samples: int = 64
    hidden: int = 4
    eta: float = 0.2
    batch_size: int = 8
    steps: int = 80
    records: int = 8
    attack_steps: int = 3
    eta_inner: float = 0.1

    def run(self, split: Split, report: Report) -> Part:
        """Return the input gradient under training, adversarial training and its SDE."""
        sde, starts = self._problem(split)
        time = self.steps * self.eta
        draws = torch.Generator().manual_seed(0)
        ends: dict[str, Tensor] = {}
        for name, process in (("plain training", replace(sde, steps=0)), ("adversarial training", sde)):
            ends[name] = run_chain(process, starts, self.steps, generator=draws, record=self.records).values
            report(f"prediction, {name}")
        ends["its SDE"] = integrate(
            sde, starts, time, dt=self.eta, method="derivative_free", generator=draws, record=self.records
        ).values
        report("prediction, its SDE")
        gradients, losses = (
            {name: self._means(measure, values) for name, values in ends.items()}
            for measure in (sde.gradient_penalty, sde.adversarial_loss)
        )
        claims = [
            judge_within(
                f"prediction-{key}",
                f"the SDE predicts the {words} of adversarial training within {_TOLERANCE} %",
                values=[
                    100 * (predicted[-1] / actual[-1] - 1)
                    for predicted, actual in zip(found["its SDE"], found["adversarial training"], strict=True)
                ],
                low=-_TOLERANCE,
                high=_TOLERANCE,
                quantity=f"difference at time {time:g}, %",
                reference="setting of Gu and Guo, arXiv 2105.08037v1",
            )
            for key, words, found in (("gradient", "input gradient", gradients), ("loss", "loss under attack", losses))
        ]
        errors = [interval_text(Interval(c.estimate, *c.interval, c.n), signed=True) for c in claims]
        trained, plain = (
            sum(row[-1] for row in gradients[name]) for name in ("adversarial training", "plain training")
        )
        return Part(
            finding=Finding(
                "The SDE of adversarial training",
                f"Adversarial training ends with {trained / plain:.2f} times the squared input gradient of "
                f"plain training. Its SDE differs from it by {errors[0]} % there, and by {errors[1]} % in the loss "
                "under attack.",
            ),
            series=Series(
                id="prediction",
                title="The SDE of adversarial training",
                description=f"Mean squared input gradient of a tanh network of {starts.shape[1]} parameters against "
                "time, the number of steps times the learning rate.",
                x_label="time",
                y_label="squared input gradient",
                curves=[
                    Curve(label=name, x=[round(i * time / self.records, 6) for i in range(self.records + 1)], runs=rows)
                    for name, rows in gradients.items()
                ],
            ),
            claims=claims,
            settings={
                "network": f"16-{self.hidden}-1, tanh; digits 3 and 8, mean pixels of 2x2, {self.samples} images",
                "training": f"eta {self.eta:g}, batch size {self.batch_size}, {self.steps} steps, {self.paths} paths "
                "from each start",
                "attack": f"{self.attack_steps} gradient steps of {self.eta_inner:g}",
            },
        )

    def _problem(self, split: Split) -> tuple[AdversarialSDE, Tensor]:
        x, y = split.train.x, split.train.y
        rows = ((y == 3) | (y == 8)).nonzero().squeeze(1)[: self.samples]
        pixels = F.avg_pool2d(x[rows], 2).flatten(1).double()
        data = (pixels - pixels.mean(0)) / pixels.std(), (y[rows] == 8).double()
        starts = []
        with torch.random.fork_rng(devices=[]):
            for seed in range(self.seeds):
                torch.manual_seed(seed)
                layers = nn.Linear(16, self.hidden), nn.Tanh(), nn.Linear(self.hidden, 1), nn.Flatten(0)
                loss, theta = from_module(nn.Sequential(*layers).double(), _LOSS)
                starts.append(theta.expand(self.paths, -1))
        sde = AdversarialSDE(
            loss,
            data,
            eta_outer=self.eta,
            batch_size=self.batch_size,
            steps=self.attack_steps,
            eta_inner=self.eta_inner,
        )
        return sde, torch.cat(starts)

    def _means(self, measure: Callable[[Tensor], Tensor], values: Tensor) -> list[list[float]]:
        """Return the mean over the paths by seed and record."""
        found = torch.stack([measure(theta) for theta in values])  # (records + 1, seeds * paths)
        means: list[list[float]] = found.view(len(found), self.seeds, self.paths).mean(2).T.tolist()
        return means
