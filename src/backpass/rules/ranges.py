"""Ranges of sites: the settings ``start`` and ``stop`` that rules share."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from backpass.errors import BackpassError, UnknownNameError
from backpass.rules.attaching.redefinition import EVERYTHING
from backpass.rules.attaching.wrappers import named_modules
from backpass.rules.sites import SiteTable

__all__ = ["Place", "check_paths", "check_places", "resolve_range"]

Place = int | float | str | None
"""An index from the front (7) or the end (-2), a fraction of all sites (0.5), a module path, or None."""


def check_places(start: Place, stop: Place) -> None:
    """Refuse what names no place among the sites.

    Raises:
        BackpassError: the type is wrong, or a fraction lies outside [0, 1].
    """
    for name, place in (("start", start), ("stop", stop)):
        if isinstance(place, bool) or not isinstance(place, int | float | str | None):
            raise BackpassError(f"{name} is an int, a fraction, a module path or None, got {place!r}.")
        if isinstance(place, float) and not 0.0 <= place <= 1.0:
            raise BackpassError(f"a fraction {name} lies in [0, 1], got {place!r}; an index is an int.")


def check_paths(model: nn.Module, start: Place, stop: Place) -> None:
    """Refuse a module path that the model does not have.

    Raises:
        UnknownNameError: with the nearest path.
    """
    paths = [path for path, _ in named_modules(model)]
    for place in (start, stop):
        if isinstance(place, str) and place not in paths:
            raise UnknownNameError("module", place, [path for path in paths if path])


def resolve_range(
    start: Place, stop: Place, sites: Callable[[], SiteTable], always_look: bool = False
) -> tuple[int, int]:
    """The first index, and one past the last, that two places mean; an empty range is (0, 0).

    Args:
        start: the first site; None is the first of all.
        stop: one past the last site; None is up to the end.
        sites: the model's sites; costs a forward pass, so it is asked only where a place needs it.
        always_look: ask for the sites even where the places alone say the range.
    """
    if not always_look and all(place is None or (isinstance(place, int) and place >= 0) for place in (start, stop)):
        return start or EVERYTHING[0], EVERYTHING[1] if stop is None else stop  # type: ignore[return-value]
    table = sites()
    first, end = _index(start, table, 0), _index(stop, table, len(table))
    return (first, end) if 0 <= first < min(end, len(table)) else (0, 0)


def _index(place: Place, table: SiteTable, default: int) -> int:
    if place is None:
        return default
    if isinstance(place, str):
        return next((site.index for site in table if site.inside(place)), len(table))
    if isinstance(place, float):
        return int(place * len(table))
    return place if place >= 0 else len(table) + place
