"""Formatting of numbers, settings and HTML ids for pages, plots and terminals."""

from __future__ import annotations

import math
import re

from backpass.report.statistics import Interval

__all__ = ["NO_IMAGE", "anchor", "interval_text", "number", "setting"]

NO_IMAGE = "no image"
"""Text of a share or a difference where no image counts."""


def anchor(text: str) -> str:
    """Return an HTML id for a text: invalid characters become hyphens."""
    return re.sub(r"[^\w.:=,+-]", "-", text)


def number(value: float, *, signed: bool = False) -> str:
    """Format a number with three significant digits; ``diverged`` for one that is not finite."""
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
    """Format an interval as ``mean [low, high]``, or as the mean if an end is not finite."""
    if interval.n == 0:
        return NO_IMAGE
    mean = number(interval.mean, signed=signed)
    if not (math.isfinite(interval.low) and math.isfinite(interval.high)):
        return mean
    return f"{mean} [{number(interval.low, signed=signed)}, {number(interval.high, signed=signed)}]"


def setting(value: object) -> str:
    """Format a setting on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {setting(part)}" for key, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(setting(part) for part in value)
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)
