"""Numbers and outside text in the form in which pages, plots and terminals show them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from backpass.lab.statistics import Interval

__all__ = ["anchor", "interval_text", "listing", "number", "setting", "visible"]

# Control characters (but for tab and line feed), line separators, bidirectional controls, surrogates, non-characters.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


def visible(text: object) -> str:
    r"""Replace characters that steer a terminal, reorder a line or cannot be encoded by Python's escapes.

    A name such as ``"a\x1b[2J"`` is shown as ``a\x1b[2J``, and a byte of a file name that is no UTF-8 as ``\udcff``.
    """
    return _INVISIBLE.sub(lambda found: repr(found[0])[1:-1], str(text))


def anchor(text: str) -> str:
    """Return an HTML id for a text: characters that an id or a link cannot hold become hyphens."""
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
    """Format an interval as ``mean [low, high]``, or the mean alone where an end is not finite."""
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


def listing(parts: Sequence[str]) -> str:
    """Join the parts as in "a, b and c"."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))
