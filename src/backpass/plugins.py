"""Rules and attacks of other packages: classes named by entry points."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from backpass.errors import BackpassError

__all__ = ["added", "added_names"]

T = TypeVar("T")


def added_names(group: str) -> list[str]:
    """The names that installed packages add to a group, ``backpass.rules`` or ``backpass.attacks``; nothing is run."""
    return sorted({point.name for point in _points(group)})


def added(group: str, name: str, base: type[T], named: Callable[[type[T]], str]) -> type[T] | None:
    """The class that an installed package adds to a group under a name; None where none does.

    Args:
        group: ``backpass.rules`` or ``backpass.attacks``.
        name: as on the command line.
        base: what the class derives from.
        named: the name that a class has in text forms, which has to be the one that it is added under.

    Raises:
        BackpassError: two packages claim the name, the class cannot be imported, or it is none of the kind.
    """
    points = {(point.value, _package(point)): point for point in _points(group) if point.name == name}
    if not points:
        return None
    if len(points) > 1:
        claims = " and ".join(sorted(f"{value} of {package}" for value, package in points))
        raise BackpassError(f"the name {name!r} is claimed by {claims}: uninstall one of them.")
    ((value, package), point) = points.popitem()
    try:
        found = point.load()
    except Exception as error:  # another package's code may raise anything when it is imported
        raise BackpassError(
            f"{name!r}, which is {value} of {package}, cannot be imported: {type(error).__name__}: {error}"
        ) from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise BackpassError(f"{name!r}, which is {value} of {package}, must be a class derived from {base.__name__}.")
    if named(found) != name:
        raise BackpassError(f"{value} of {package} is added as {name!r}, but calls itself {named(found)!r}.")
    return found


@cache
def _points(group: str) -> tuple[EntryPoint, ...]:
    """Read once in a process: it means opening a file of every installed package."""
    return tuple(entry_points(group=group))


def _package(point: EntryPoint) -> str:
    return "an unknown package" if point.dist is None else f"the package {point.dist.name}"
