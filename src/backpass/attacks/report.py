"""What an evaluation found: accuracies with intervals, per attack and in the worst case."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["AttackRecord", "Rate", "Report", "wilson"]


def wilson(hits: int, trials: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """The Wilson score interval of a proportion, 95 % by default; (0, 1) without trials.

    (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n), p = hits / trials. Source: Wilson (1927).
    """
    if trials == 0:
        return 0.0, 1.0
    p, w = hits / trials, z * z / trials
    centre, half = p + w / 2, z * math.sqrt(p * (1 - p) / trials + w / (4 * trials))
    # At p = 0 and p = 1 one end is exact, which rounding would miss.
    low = 0.0 if hits == 0 else (centre - half) / (1 + w)
    high = 1.0 if hits == trials else (centre + half) / (1 + w)
    return low, high


@dataclass(frozen=True)
class Rate:
    """hits of trials; `value` is their ratio, NaN without trials, and `interval` Wilson's at 95 %."""

    hits: int
    trials: int

    @property
    def value(self) -> float:
        """The proportion."""
        return self.hits / self.trials if self.trials else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, Wilson."""
        return wilson(self.hits, self.trials)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.1%} [{low:.1%}, {high:.1%}]" if self.trials else "of no sample"

    def to_dict(self) -> dict[str, Any]:
        """For JSON; null for NaN."""
        value = self.value if self.trials else None
        return {"value": value, "interval": list(self.interval), "hits": self.hits, "trials": self.trials}


@dataclass(frozen=True, eq=False)
class AttackRecord:
    """One attack on every sample that the model had right.

    Attributes:
        settings: the attack's name and settings.
        success: (N,) bool, False also where the sample was wrong already.
        loss: (N,) float64, NaN where the sample was not attacked.
        prediction: (N,) int64 under attack; the clean one where the sample was not attacked.
        gradients: sample gradients computed.
    """

    settings: dict[str, Any]
    success: Tensor
    loss: Tensor
    prediction: Tensor
    gradients: int

    def __repr__(self) -> str:
        return f"AttackRecord({self.settings}, fooled {int(self.success.sum()):,} of {len(self.success):,} samples)"


@dataclass(frozen=True, eq=False)
class Report:
    """The outcome of `evaluate`, per sample and in numbers.

    Attributes:
        y: (N,) labels.
        prediction: (N,) of the model on clean images.
        classes: number of classes, C.
        attacks: by name, in the order given.
        shards_computed: parts computed in this run, by all processes.
        shards_reused: parts found finished.
        versions: of torch and backpass.
    """

    y: Tensor
    prediction: Tensor
    classes: int
    attacks: dict[str, AttackRecord]
    shards_computed: int
    shards_reused: int
    versions: dict[str, str]

    def __repr__(self) -> str:
        lines = [
            f"Report of {len(self.y):,} samples, {self.classes:,} classes; 95 % intervals",
            f"  clean accuracy {self.clean}",
            f"  robust accuracy {self.robust()}",
        ]
        lines += [f"  {name}: accuracy {self.robust(name)}, success {self.fooled(name)}" for name in self.attacks]
        return "\n".join(lines)

    @property
    def correct(self) -> Tensor:
        """(N,) bool: clean and right."""
        return self.prediction == self.y

    @property
    def success(self) -> Tensor:
        """(N,) bool: right at first, and mistaken under at least one attack."""
        return torch.stack([record.success for record in self.attacks.values()]).any(0)

    @property
    def clean(self) -> Rate:
        """Right on clean images, of all."""
        return Rate(int(self.correct.sum()), len(self.y))

    def robust(self, name: str | None = None) -> Rate:
        """Right under the attack `name`, by default under every attack, of all samples."""
        success = self.success if name is None else self.attacks[name].success
        return Rate(int((self.correct & ~success).sum()), len(self.y))

    def fooled(self, name: str | None = None) -> Rate:
        """Mistaken under the attack `name`, by default under any, of those that were right."""
        success = self.success if name is None else self.attacks[name].success
        return Rate(int(success.sum()), int(self.correct.sum()))

    @property
    def clean_accuracy(self) -> float:
        """The share of all samples that the model has right."""
        return self.clean.value

    @property
    def robust_accuracy(self) -> float:
        """The share of all samples that it has right under every attack."""
        return self.robust().value

    @property
    def success_rate(self) -> float:
        """The share of the correctly classified samples that some attack turned."""
        return self.fooled().value

    def confusion(self, name: str | None = None) -> Tensor:
        """(C, C) int64: how many samples of class i became class j, by default under the first attack to turn them."""
        records = self.attacks.values() if name is None else [self.attacks[name]]
        became = torch.full_like(self.y, -1)
        for record in records:
            became = torch.where((became < 0) & record.success, record.prediction, became)
        turned = became >= 0
        cells = self.y[turned] * self.classes + became[turned]
        return torch.bincount(cells, minlength=self.classes**2).view(self.classes, self.classes)

    def to_dict(self) -> dict[str, Any]:
        """Every number with its settings, in JSON's types."""
        return {
            "samples": len(self.y),
            "clean_accuracy": self.clean.to_dict(),
            "robust_accuracy": self.robust().to_dict(),
            "success_rate": self.fooled().to_dict(),
            "confusion": self.confusion().tolist(),
            "attacks": {
                name: {
                    "settings": record.settings,
                    "robust_accuracy": self.robust(name).to_dict(),
                    "success_rate": self.fooled(name).to_dict(),
                    "confusion": self.confusion(name).tolist(),
                    "gradients": record.gradients,
                }
                for name, record in self.attacks.items()
            },
            "versions": self.versions,
        }
