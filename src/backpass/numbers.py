"""Checks of numbers, and numbers as users write them: 8/255, 0.03, 1e-2."""

from __future__ import annotations

import math
from typing import TypeGuard

from backpass.errors import BackpassError

__all__ = ["fraction_text", "is_number", "is_whole", "is_whole_text", "read_number", "read_numbers"]

_MOST_DIGITS = 18  # no count or size here is longer, and Python reads no number of thousands of digits


def is_number(value: object) -> TypeGuard[float]:
    """Return whether this is a finite int or float, no bool, within the range of floats."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def is_whole(value: object, least: int) -> TypeGuard[int]:
    """Return whether this is an int from ``least`` to 2**63 - 1, no bool."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**63


def read_number(text: str, name: str = "a number") -> float:
    """Read a finite number or a fraction such as ``8/255``.

    Raises:
        BackpassError: the text has another form.
    """
    top, slash, bottom = text.partition("/")
    try:
        value = float(top) / float(bottom) if slash else float(top)
    except (ValueError, ZeroDivisionError):
        value = math.nan
    if not math.isfinite(value):
        raise BackpassError(f"{name} must be a number such as 8/255 or 0.03, got {text!r}.")
    return value


def read_numbers(text: str, name: str) -> tuple[float, ...]:
    """Read numbers separated by commas.

    Raises:
        BackpassError: the text has another form.
    """
    return tuple(read_number(part.strip(), name) for part in text.split(","))


def is_whole_text(text: str) -> bool:
    """Return whether a text is a whole number of 1 to 18 ASCII digits."""
    return text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS


def fraction_text(value: float) -> str:
    """Format a radius or step size in pixels: as a short decimal, or else in 255ths."""
    short = f"{value:.3g}"
    if float(short) == value:
        return short
    in_255ths = f"{255 * value:.4g}"
    return f"{in_255ths}/255" if math.isclose(float(in_255ths) / 255, value, rel_tol=1e-9) else f"{value:.4g}"
