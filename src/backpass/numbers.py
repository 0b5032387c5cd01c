"""What counts as a number among settings."""

from __future__ import annotations

import math
from typing import TypeGuard

__all__ = ["is_number", "is_whole"]


def is_number(value: object) -> TypeGuard[float]:
    """Whether this is a finite int or float; a bool is none, nor is an int that no float can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def is_whole(value: object, least: int) -> TypeGuard[int]:
    """Whether this is an int of at least ``least`` that 64 bits hold; a bool is none."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**63
