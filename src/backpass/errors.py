"""The errors that backpass raises on purpose: each says what was expected, what came and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["BackpassError", "NoSiteError", "UnknownNameError"]


class BackpassError(ValueError):
    """Any mistake in the use of backpass; the message says what was expected, what came, what to do."""


class NoSiteError(BackpassError):
    """A rule selects no operation of the model, so it would silently stay plain backpropagation."""


class UnknownNameError(BackpassError):
    """A name that is not known; the message offers the nearest known one.

    Args:
        kind: what the name should have named, for instance ``"rule"``.
        name: the name that came.
        known: the names that there are.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        self.kind, self.name, self.known = kind, name, sorted(known)
        near = get_close_matches(name, self.known, n=1, cutoff=0.4)
        guess = f" Did you mean {near[0]!r}?" if near else ""
        listing = ", ".join(self.known) or "none"
        super().__init__(f"unknown {kind} {name!r}.{guess} Known: {listing}.")

    def __reduce__(self) -> tuple[type[UnknownNameError], tuple[str, str, list[str]]]:
        return type(self), (self.kind, self.name, self.known)
