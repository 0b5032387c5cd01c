"""Settings of attacks: their ranges, declared beside their defaults, and the checks of them."""

from __future__ import annotations

import math
from dataclasses import Field, field, fields
from typing import Any, TypeVar

from backpass.attacks.threat import Bounds
from backpass.errors import BackpassError
from backpass.numbers import is_number, is_whole

__all__ = [
    "check_count",
    "check_length",
    "check_settings",
    "count",
    "normalised_bounds",
    "normalised_eps",
    "per_channel",
    "plain",
    "setting",
]

T = TypeVar("T")


def setting(default: T, interval: str) -> T:
    """Declare a number of a dataclass with the interval that it has to lie in, such as ``"[0, 1)"``."""
    return field(default=default, metadata={"interval": interval})


def count(default: T, least: int = 1) -> T:
    """Declare a whole number of a dataclass that is at least `least`."""
    return setting(default, f"[{least}, inf)")


def check_settings(one: Any) -> None:
    """Check the numbers and flags of a dataclass by their annotated types and declared intervals.

    Numbers of NumPy and of tensors become Python's.

    Raises:
        BackpassError: a value is of another type, or outside of its interval.
    """
    for part in fields(one):
        text = str(getattr(part.type, "__name__", part.type))
        kind, value = text.removesuffix(" | None"), plain(getattr(one, part.name))
        if kind in ("bool", "int", "float") and not (value is None and kind != text):
            object.__setattr__(one, part.name, value)
            _check(part, kind, value)


def _check(part: Field[Any], kind: str, value: Any) -> None:
    if kind == "bool":
        if not isinstance(value, bool):
            raise BackpassError(f"{part.name} must be True or False; got {value!r}.")
        return
    interval = part.metadata.get("interval", "[-inf, inf]")
    low, high = (float(end) for end in interval[1:-1].split(","))
    open_ends = [end for end, bracket in ((low, interval[0] == "("), (high, interval[-1] == ")")) if bracket]
    fits = type(value) is int if kind == "int" else is_number(value) or value in (math.inf, -math.inf)
    if fits and low <= value <= high and value not in open_ends:
        return
    noun = "a whole number" if kind == "int" else "a finite number"
    bounded = "" if math.isinf(low) else f" of at least {low:g}" if math.isinf(high) else f" in {interval}"
    raise BackpassError(f"{part.name} must be {noun}{bounded}; got {value!r}.")


def check_count(name: str, value: object) -> None:
    """Check that an argument is a whole number of at least 1."""
    if not is_whole(value, 1):
        raise BackpassError(f"{name} must be a whole number of at least 1; got {value!r}.")


def plain(value: Any) -> Any:
    """Return tensors, arrays and sequences as tuples, those of no dimension as numbers."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return tuple(value) if isinstance(value, list | tuple) else value


def normalised_bounds(bounds: Any) -> Bounds:
    """Return the bounds as numbers, or tuples of numbers per channel.

    Raises:
        BackpassError: they are no pair (lo, hi) with lo < hi.
    """
    try:
        lo, hi = (plain(limit) for limit in bounds)
        pairs = per_channel((lo, hi))
        valid = bool(pairs) and all(is_number(a) and is_number(b) and a < b for a, b in pairs)
    except (TypeError, ValueError):
        valid = False
    if not valid:
        raise BackpassError(
            "bounds must be two finite numbers (lo, hi) with lo < hi, or two sequences of them, one number per "
            f"channel; got {bounds!r}."
        )
    return lo, hi


def per_channel(bounds: Bounds) -> list[tuple[float, float]]:
    """Return (lo, hi) of each channel; one pair where both are numbers."""
    channels = max((len(limit) for limit in bounds if isinstance(limit, tuple)), default=1)
    lo, hi = (limit if isinstance(limit, tuple) else (limit,) * channels for limit in bounds)
    return list(zip(lo, hi, strict=True))


def normalised_eps(eps: Any, norm: str, bounds: Bounds, *, infinite: bool) -> float | tuple[float, ...]:
    """Return the radius, or a tuple of one radius per sample.

    Raises:
        BackpassError: a radius is invalid.
    """
    found: float | tuple[float, ...] = plain(eps)
    for radius in found if isinstance(found, tuple) else (found,):
        if not (infinite and radius == math.inf):
            check_length("eps", radius, norm, bounds)
    return found


def check_length(name: str, value: Any, norm: str, bounds: Bounds) -> None:
    """Check that a radius or a step is a non-negative number that fits the pixel range.

    Raises:
        BackpassError: it is not, for instance because it counts in 255ths.
    """
    if not (is_number(value) and value >= 0):
        raise BackpassError(f"{name} must be a finite number of at least 0; got {value!r}.")
    if norm == "linf" and value > max(hi - lo for lo, hi in per_channel(bounds)):
        raise BackpassError(
            f"{name}={value:g} exceeds the pixel range {bounds}, so every image would be allowed. "
            f"Did you mean {value:g}/255? Images in [0, 255] need bounds=(0, 255)."
        )
