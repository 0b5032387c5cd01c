"""The text form of a rule, as the command line and the reports write it: ``linbp:start=-2,slope=0.5``."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

from backpass.errors import BackpassError, UnknownNameError
from backpass.rules.linbp import LinBP
from backpass.rules.rule import BP, Rule

__all__ = ["RULES", "format_rule", "parse_rule"]

RULES: dict[str, type[Rule]] = {rule.name: rule for rule in (BP, LinBP)}
"""The rules by name."""

_CONSTANTS = {"none": None, "true": True, "false": False}
_BARE = re.compile(r"[A-Za-z_][\w.\-/]*")
_SETTING = re.compile(r"\s*(\w+)\s*=\s*('(?:[^'\\]|\\.)*'|[^,']*)\s*(?:,|$)")


def parse_rule(text: str) -> Rule:
    """The rule that a text form names; the inverse of `format_rule`.

    Args:
        text: ``name`` or ``name:setting=value,...``; a value is an int, a float, ``none``, ``true``, ``false``, or a
            word; a word with other characters stands in single quotes (``start='0.1'``).

    Raises:
        UnknownNameError: no rule, or no setting of the rule, has that name.
        BackpassError: the text has another form, or a value is out of its range.
    """
    name, _, rest = text.strip().partition(":")
    if name not in RULES:
        raise UnknownNameError("rule", name, RULES)
    rule = RULES[name]
    known = [field.name for field in fields(rule)]
    settings: dict[str, Any] = {}
    position = 0
    while position < len(rest):
        match = _SETTING.match(rest, position)
        if match is None:
            raise BackpassError(
                f"cannot read {rest[position:]!r} in rule {text!r}: expected setting=value, several with commas between."
            )
        setting, value = match.groups()
        if setting not in known:
            raise UnknownNameError(f"setting of rule {name!r}", setting, known)
        if setting in settings:
            raise BackpassError(f"setting {setting!r} stands twice in rule {text!r}.")
        settings[setting] = _read(value.strip())
        position = match.end()
    return rule(**settings)


def format_rule(rule: Rule) -> str:
    """The text form of a rule: its name and the settings that differ from their defaults."""
    settings = [
        f"{field.name}={_write(value)}"
        for field in fields(rule)
        if (value := getattr(rule, field.name)) != field.default
    ]
    return f"{rule.name}:{','.join(settings)}" if settings else rule.name


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
