"""Outside text, and lists of words, as messages and pages show them."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["listing", "reason", "visible"]

# Control characters (but for tab and line feed), line separators, bidirectional controls, surrogates, non-characters.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


def visible(text: object) -> str:
    r"""Replace characters that steer a terminal, reorder a line or cannot be encoded by Python's escapes.

    A name such as ``"a\x1b[2J"`` is shown as ``a\x1b[2J``, and a byte of a file name that is no UTF-8 as ``\udcff``.
    """
    return _INVISIBLE.sub(lambda found: repr(found[0])[1:-1], str(text))


def listing(parts: Sequence[str]) -> str:
    """Join the parts as in "a, b and c"."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))


def reason(error: BaseException) -> str:
    """Return the first line of an error's message without its full stop, or the name of its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
