"""Places among the sites of a model: the settings ``start`` and ``stop`` that rules share."""

from __future__ import annotations

from torch import nn

from backpass.errors import BackpassError, UnknownNameError
from backpass.rules.attaching.wrappers import named_modules

__all__ = ["Place", "check_paths", "check_places", "counts_from_end"]

Place = int | float | str | None
"""An index from the front (7) or the end (-2), a fraction of all sites (0.5), a module path, or None."""


def check_places(start: Place, stop: Place) -> None:
    """Validate two places.

    Raises:
        BackpassError: a type is wrong, or a fraction is outside [0, 1].
    """
    for name, place in (("start", start), ("stop", stop)):
        if isinstance(place, bool) or not isinstance(place, int | float | str | None):
            raise BackpassError(f"{name} must be an int, a fraction, a module path or None, got {place!r}.")
        if isinstance(place, float) and not 0.0 <= place <= 1.0:
            raise BackpassError(f"a fraction {name} must be in [0, 1], got {place!r}; an index is an int.")


def check_paths(model: nn.Module, start: Place, stop: Place) -> None:
    """Refuse a module path that the model does not have.

    Raises:
        UnknownNameError: with the nearest path.
    """
    paths = [path for path, _ in named_modules(model)]
    for place in (start, stop):
        if isinstance(place, str) and place not in paths:
            raise UnknownNameError("module", place, [path for path in paths if path])


def counts_from_end(place: Place) -> bool:
    """Return whether a place is known only when the number of sites is."""
    return isinstance(place, float) or (isinstance(place, int) and place < 0)
