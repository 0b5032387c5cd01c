"""Errors of backpass: each message says what was expected, what was received and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["BackpassError", "NoSiteError", "UnknownNameError"]


class BackpassError(ValueError):
    """Invalid use of backpass; the message says what was expected, what was received and what to do."""


class NoSiteError(BackpassError):
    """A rule selects no operation of the model, so the backward pass would stay plain."""


class UnknownNameError(BackpassError):
    """An unknown name; the message offers the nearest known one.

    Args:
        kind: kind of thing named, for instance ``"rule"``.
        name: the unknown name.
        known: all known names.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        self.kind, self.name, self.known = kind, name, sorted(known)
        near = get_close_matches(name, self.known, n=1, cutoff=0.4)
        guess = f" Did you mean {near[0]!r}?" if near else ""
        listing = ", ".join(self.known) or "none"
        super().__init__(f"unknown {kind} {name!r}.{guess} Known: {listing}.")

    def __reduce__(self) -> tuple[type[UnknownNameError], tuple[str, str, list[str]]]:
        return type(self), (self.kind, self.name, self.known)
