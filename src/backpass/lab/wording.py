"""Numbers as people read them; the page and the terminal use the same."""

from __future__ import annotations

import math
from collections.abc import Sequence

from backpass.lab.statistics import Interval

__all__ = ["interval_text", "listing", "number", "setting"]


def number(value: float, *, signed: bool = False) -> str:
    """Three significant digits, a true minus sign, and a word for what is not finite."""
    if not math.isfinite(value):
        return "diverged"
    magnitude = abs(value)
    if magnitude == 0:
        text = "0"
    elif 1e-4 <= magnitude < 1e5:
        decimals = max(0, 2 - math.floor(math.log10(magnitude)))
        text = f"{magnitude:,.{decimals}f}"
    else:
        text = f"{magnitude:.2e}"
    sign = "\N{MINUS SIGN}" if value < 0 else "+" if signed and value > 0 else ""
    return sign + text


def interval_text(interval: Interval, *, signed: bool = False) -> str:
    """``mean [low, high]``; the mean alone where there is no interval."""
    mean = number(interval.mean, signed=signed)
    if not (math.isfinite(interval.low) and math.isfinite(interval.high)):
        return mean
    return f"{mean} [{number(interval.low, signed=signed)}, {number(interval.high, signed=signed)}]"


def setting(value: object) -> str:
    """A setting on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {setting(part)}" for key, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(setting(part) for part in value)
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def listing(parts: Sequence[str]) -> str:
    """The parts as in "a, b and c"; nothing for no part."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))
