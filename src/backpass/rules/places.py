"""Positions among the sites of a model: the settings ``start`` and ``stop`` of rules."""

from __future__ import annotations

from torch import nn

from backpass.errors import BackpassError, UnknownNameError
from backpass.rules.attaching.wrappers import named_modules

__all__ = ["Place", "check_paths", "check_places", "counts_from_end"]

Place = int | float | str | None
"""An index from the front (7) or the end (-2), a fraction of all sites (0.5), a module path, or None."""


def check_places(start: Place, stop: Place) -> None:
    """Validate ``start`` and ``stop``.

    Raises:
        BackpassError: a type is wrong, or a fraction is outside [0, 1].
    """
    for name, place in (("start", start), ("stop", stop)):
        if isinstance(place, bool) or not isinstance(place, int | float | str | None):
            raise BackpassError(f"{name} must be an int, a fraction, a module path or None, got {place!r}.")
        if isinstance(place, float) and not 0.0 <= place <= 1.0:
            raise BackpassError(f"a fraction {name} must be in [0, 1], got {place!r}; an index is an int.")


def check_paths(model: nn.Module, start: Place, stop: Place) -> None:
    """Validate module paths against the model.

    Raises:
        UnknownNameError: the model has no such module; the message suggests the nearest path.
    """
    paths = [path for path, _ in named_modules(model)]
    for place in (start, stop):
        if isinstance(place, str) and place not in paths:
            raise UnknownNameError("module", place, [path for path in paths if path])


def counts_from_end(place: Place) -> bool:
    """Return True if a position depends on the total number of sites."""
    return isinstance(place, float) or (isinstance(place, int) and place < 0)
