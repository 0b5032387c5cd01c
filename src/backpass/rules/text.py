"""Text form of settings in the command line and in reports: ``linbp:start=-2,slope=0.5``."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

from backpass.errors import BackpassError

__all__ = ["format_settings", "read_settings"]

_CONSTANTS = {"none": None, "true": True, "false": False}
_BARE = re.compile(r"[A-Za-z_][\w.\-/]*")
_SETTING = re.compile(r"\s*(\w+)\s*=\s*('(?:[^'\\]|\\.)*'|[^,']*)\s*(?:,|$)")


def read_settings(text: str) -> tuple[str, dict[str, Any]]:
    """Parse ``name`` or ``name:setting=value,...`` into name and settings; the inverse of `format_settings`.

    A value is an int, a float, ``none``, ``true``, ``false``, or a word; a word with other characters is written
    in single quotes (``start='0.1'``).

    Raises:
        BackpassError: the text has another form.
    """
    name, _, rest = text.strip().partition(":")
    settings: dict[str, Any] = {}
    position = 0
    while position < len(rest):
        match = _SETTING.match(rest, position)
        if match is None:
            raise BackpassError(
                f"cannot read {rest[position:]!r} in {text!r}: expected setting=value, several with commas between."
            )
        setting, value = match.groups()
        if setting in settings:
            raise BackpassError(f"setting {setting!r} stands twice in {text!r}.")
        settings[setting] = _read(value.strip())
        position = match.end()
    return name, settings


def format_settings(name: str, settings: Any) -> str:
    """Format the name and the fields of the dataclass ``settings`` that differ from their defaults."""
    changed = [
        f"{field.name}={_write(value)}"
        for field in fields(settings)
        if (value := getattr(settings, field.name)) != field.default
    ]
    return f"{name}:{','.join(changed)}" if changed else name


def _read(value: str) -> Any:
    if value.startswith("'"):
        return re.sub(r"\\(.)", r"\1", value[1:-1])
    if value.lower() in _CONSTANTS:
        return _CONSTANTS[value.lower()]
    for number in (int, float):
        try:
            return number(value)
        except ValueError:
            continue
    return value


def _write(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        bare = _BARE.fullmatch(value) and _read(value) == value
        return value if bare else "'" + re.sub(r"(['\\])", r"\\\1", value) + "'"
    return f"<{getattr(value, '__name__', type(value).__name__)}>" if callable(value) else repr(value)
