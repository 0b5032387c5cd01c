"""What the simulations share: the paper, the two backward passes, and one number of each draw."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["LABELS", "PAPER", "column"]

PAPER = "Li et al., arXiv 2112.11018"

LABELS = {"bp": "BP", "linbp": "LinBP"}
"""The rules that are compared, in their text forms, and their names in legends."""


def column(values: Sequence[Sequence[float]], place: int) -> list[float]:
    """The number at one place, of every draw."""
    return [row[place] for row in values]
