"""Results of an evaluation: accuracies with intervals, per attack and in the worst case."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from backpass.attacks.paired import Paired, paired
from backpass.errors import BackpassError

__all__ = ["AttackRecord", "ClassRates", "Rate", "Report", "wilson"]


def wilson(hits: int, trials: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Return the Wilson score interval of a proportion, 95 % by default; (0, 1) without trials.

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
        attacked: (N,) bool: classified correctly at first, and with another class to lead to.
        success: (N,) bool, False also where the sample was not attacked.
        loss: (N,) float64, NaN where the sample was not attacked.
        prediction: (N,) int64 under attack; the clean one where the sample was not attacked.
        distance: (N,) float64, of the image found where it is misclassified, beyond eps too; inf elsewhere.
        gradients: sample gradients computed; of several radii together, at the first.
        minimum_norm: whether the attack looked for the smallest distance.
    """

    settings: dict[str, Any]
    attacked: Tensor
    success: Tensor
    loss: Tensor
    prediction: Tensor
    distance: Tensor
    gradients: int
    minimum_norm: bool = False

    def __repr__(self) -> str:
        return f"AttackRecord({self.settings}, fooled {int(self.success.sum()):,} of {len(self.success):,} samples)"


@dataclass(frozen=True)
class ClassRates:
    """Accuracies of one class.

    Attributes:
        label: its number.
        name: its name, or the number.
        clean: classified correctly.
        robust: classified correctly under attack.
    """

    label: int
    name: str
    clean: Rate
    robust: Rate

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers in JSON's types."""
        return {"label": self.label, "name": self.name, "clean": self.clean.to_dict(), "robust": self.robust.to_dict()}


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
        radii: for each attack that was run at several radii, the names in `attacks` by radius.
        class_names: names of the classes.
    """

    y: Tensor
    prediction: Tensor
    classes: int
    attacks: dict[str, AttackRecord]
    shards_computed: int
    shards_reused: int
    versions: dict[str, str]
    radii: dict[str, dict[float, str]] = field(default_factory=dict)
    class_names: tuple[str, ...] | None = None

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
        """Misclassified under the attack `name`, by default under any, of those that were attacked."""
        records = list(self.attacks.values()) if name is None else [self.attacks[name]]
        success = torch.stack([record.success for record in records]).any(0)
        return Rate(int(success.sum()), int(torch.stack([record.attacked for record in records]).any(0).sum()))

    def curve(self, name: str | None = None, radii: Sequence[float] | None = None) -> dict[float, Rate]:
        """Return robust accuracy by radius.

        Args:
            name: of the attack as it was given to `evaluate`; the only one by default.
            radii: for a minimum-norm attack, any radii, by the distances that it found; else those of `evaluate`.

        Raises:
            BackpassError: the attack was not run at these radii.
        """
        if name is None:
            if len(names := set(self.radii) or set(self.attacks)) > 1:
                raise BackpassError(f"curve needs the name of an attack: {', '.join(sorted(names))}.")
            (name,) = names
        if radii is None:
            if name not in self.radii:
                raise BackpassError(f"{name!r} was run at one radius: give radii= to evaluate.")
            return {radius: self.robust(own) for radius, own in self.radii[name].items()}
        record = self.attacks[next(iter(self.radii[name].values())) if name in self.radii else name]
        if not record.minimum_norm:
            raise BackpassError(f"{name!r} finds no smallest distances: give radii= to evaluate, or use FMN or FAB.")
        return {r: Rate(int((self.correct & ~(record.distance <= r)).sum()), len(self.y)) for r in radii}

    def per_class(self, name: str | None = None) -> list[ClassRates]:
        """Return clean and robust accuracy of every class, under the attack `name`, by default under every attack."""
        success = self.success if name is None else self.attacks[name].success
        standing = self.correct & ~success
        rows = []
        for label in range(self.classes):
            own = self.y == label
            total = int(own.sum())
            known = str(label) if self.class_names is None else self.class_names[label]
            clean, robust = (Rate(int((own & some).sum()), total) for some in (self.correct, standing))
            rows.append(ClassRates(label, known, clean, robust))
        return rows

    def compare(self, other: Report, name: str | None = None, other_name: str | None = None) -> Paired:
        """Compare robustness with another report on the same data, sample by sample.

        Args:
            other: report on the same samples.
            name: attack of this report, by default all.
            other_name: attack of the other report, by default `name`.

        Returns:
            The difference of robust accuracies, this one's minus the other's, with McNemar's exact test.

        Raises:
            BackpassError: the reports are of different samples.
        """
        if len(self.y) != len(other.y) or not torch.equal(self.y, other.y):
            raise BackpassError("reports can be compared on the same samples only: their labels differ.")
        other_name = name if other_name is None else other_name
        mine, theirs = (
            report.correct & ~(report.success if one is None else report.attacks[one].success)
            for report, one in ((self, name), (other, other_name))
        )
        return paired(mine, theirs)

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
            "per_class": [row.to_dict() for row in self.per_class()],
            "curves": {
                name: [{"eps": radius, "robust_accuracy": rate.to_dict()} for radius, rate in self.curve(name).items()]
                for name in self.radii
            },
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
