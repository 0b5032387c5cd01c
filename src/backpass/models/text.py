"""Text form of a network on the command line and in recipes: ``mlp:widths=400-200-100,activation=tanh``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_type_hints

from torch import nn

from backpass.errors import BackpassError, UnknownNameError
from backpass.numbers import is_whole_text

__all__ = ["options_of", "read_model"]

_WORDS = {"true": True, "false": False}


def read_model(text: str, known: Mapping[str, Callable[..., nn.Module]]) -> tuple[str, dict[str, Any]]:
    """Read the name and options of ``name`` or ``name:option=value,...``.

    A value is a whole number, whole numbers joined by hyphens (``400-200-100``), ``true``, ``false`` or a word, by the
    option's type.

    Raises:
        UnknownNameError: the network or the option is unknown.
        BackpassError: the text has another form, or a value is not of the option's type.
    """
    name, _, rest = text.strip().partition(":")
    if name not in known:
        raise UnknownNameError("model", name, known)
    kinds = options_of(known[name])
    options: dict[str, Any] = {}
    for part in filter(None, map(str.strip, rest.split(","))):
        option, equals, value = map(str.strip, part.partition("="))
        if not equals:
            raise BackpassError(
                f"cannot read {part!r} in {text!r}: expected option=value, several with commas between."
            )
        if option not in kinds:
            raise UnknownNameError(f"option of model {name!r}", option, kinds)
        if option in options:
            raise BackpassError(f"option {option!r} stands twice in {text!r}.")
        options[option] = _value(value, kinds[option], f"{option} of {text!r}")
    return name, options


def options_of(make: Callable[..., nn.Module]) -> dict[str, Any]:
    """Return the options of a network and their types: the keyword-only parameters of the function that builds it."""
    hints = get_type_hints(make)
    parameters = inspect.signature(make).parameters.values()
    return {p.name: hints[p.name] for p in parameters if p.kind is p.KEYWORD_ONLY}


def _value(text: str, kind: Any, what: str) -> Any:
    if kind is str:
        return text
    if kind is bool:
        if text.lower() not in _WORDS:
            raise BackpassError(f"{what} must be true or false, got {text!r}.")
        return _WORDS[text.lower()]
    parts = text.split("-") if kind == Sequence[int] else [text]
    if not all(map(is_whole_text, parts)):
        expected = "whole numbers as in 400-200-100" if kind == Sequence[int] else "a whole number"
        raise BackpassError(f"{what} must be {expected}, got {text!r}.")
    return tuple(map(int, parts)) if kind == Sequence[int] else int(text)
