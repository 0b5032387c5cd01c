"""Part of the demo, its network, and the text of a difference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from backpass.data import Split
from backpass.models import build
from backpass.report.claims import Claim
from backpass.report.result import Finding, Series
from backpass.report.statistics import Interval
from backpass.report.wording import interval_text

__all__ = ["Part", "Report", "compare", "make"]

Report = Callable[[str], None]
"""Called with a description of each finished run."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Part of the demo: a question with plot, claims and a one-sentence summary."""

    finding: Finding
    series: Series
    claims: Sequence[Claim]
    settings: dict[str, Any]


def make(name: str, split: Split, seed: int) -> nn.Module:
    """Return a network for the digits."""
    return build(name, shape=tuple(split.train.pixels.shape[1:]), classes=split.classes, seed=seed)


def compare(claim: Claim, more: str, less: str, unit: str = "") -> str:
    """Return the measured difference in words: ``more``, ``less``, or not significantly different."""
    low, high = claim.interval
    text = interval_text(Interval(claim.estimate, low, high, claim.n), signed=True) + unit
    if not (low > 0 or high < 0):  # also where a run diverged
        return f"not significantly different ({text})"
    return f"{more if low > 0 else less} ({text})"
