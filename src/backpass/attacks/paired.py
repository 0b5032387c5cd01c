"""Paired comparison of two yes-or-no outcomes of the same samples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from backpass.errors import BackpassError

__all__ = ["Paired", "binomial_interval", "binomial_test", "paired"]

_LEVEL = 0.95


@dataclass(frozen=True)
class Paired:
    """Difference of two proportions over the same samples, by McNemar's exact test.

    The interval is Clopper and Pearson's for the share of `only_first` among the samples that differ, scaled to a
    difference of proportions with one more differing sample, so that it never shrinks to a point. It leaves out 0
    exactly where p < .05.

    Attributes:
        samples: N.
        only_first: number of samples with the first outcome alone.
        only_second: number of samples with the second alone.
    """

    samples: int
    only_first: int
    only_second: int

    @property
    def difference(self) -> float:
        """First proportion minus the second."""
        return (self.only_first - self.only_second) / self.samples if self.samples else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the difference."""
        return self.interval_at(_LEVEL)

    def interval_at(self, level: float) -> tuple[float, float]:
        """Return the interval of the difference at a confidence level; it leaves out 0 where p < 1 - level."""
        differing = self.only_first + self.only_second
        low, high = binomial_interval(self.only_first, differing, level)
        scale = min((differing + 1) / self.samples, 1.0) if self.samples else math.nan
        return scale * (2 * low - 1), scale * (2 * high - 1)

    @property
    def p_value(self) -> float:
        """Two-sided p of no difference."""
        return binomial_test(self.only_first, self.only_first + self.only_second)

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers in JSON's types."""
        return {
            "samples": self.samples,
            "only_first": self.only_first,
            "only_second": self.only_second,
            "difference": self.difference if self.samples else None,
            "interval": list(self.interval) if self.samples else None,
            "p_value": self.p_value,
        }


def paired(first: Tensor, second: Tensor) -> Paired:
    """Compare two outcomes (N,) bool of the same samples.

    Raises:
        BackpassError: they are of different lengths.
    """
    if first.shape != second.shape:
        raise BackpassError(f"paired outcomes must be of the same samples; got {len(first)} and {len(second)} samples.")
    return Paired(len(first), int((first & ~second).sum()), int((second & ~first).sum()))


def binomial_test(hits: int, trials: int) -> float:
    """Return the two-sided p of a share of 1/2: twice the smaller tail, at most 1."""
    return min(1.0, 2.0 * min(_tail(hits, trials, 0.5), _tail(trials - hits, trials, 0.5)))


def binomial_interval(hits: int, trials: int, level: float = _LEVEL) -> tuple[float, float]:
    """Return Clopper and Pearson's interval of a share: those that no one-sided test at (1 - level) / 2 rejects."""
    if trials == 0:
        return 0.0, 1.0
    return _solve(hits, trials, level), 1.0 - _solve(trials - hits, trials, level)


def _tail(hits: int, trials: int, share: float) -> float:
    """P(X >= hits), X binomial."""
    if hits == 0:
        return 1.0
    k = torch.arange(hits, trials + 1, dtype=torch.float64)
    n = torch.tensor(float(trials), dtype=torch.float64)
    choose = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    logs = choose + torch.xlogy(k, torch.tensor(share, dtype=torch.float64)) + (n - k) * math.log1p(-share)
    return min(1.0, float(logs.exp().sum()))


def _solve(hits: int, trials: int, level: float) -> float:
    """Return the largest share at which P(X >= hits) is still at most (1 - level) / 2; 0 without hits."""
    low, high = 0.0, 1.0
    if hits == 0:
        return low
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _tail(hits, trials, middle) <= (1 - level) / 2 else (low, middle)
    return low
