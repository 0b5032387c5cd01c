"""The rules by name."""

from __future__ import annotations

from dataclasses import fields

from backpass.errors import BackpassError, UnknownNameError
from backpass.rules.linbp import LinBP
from backpass.rules.proxprop import ProxProp
from backpass.rules.rule import BP, Rule
from backpass.rules.sibp import SIBP
from backpass.rules.text import read_settings

__all__ = ["RULES", "parse_rule"]

RULES: dict[str, type[Rule]] = {rule.name: rule for rule in (BP, LinBP, ProxProp, SIBP)}
"""The rules by name."""


def parse_rule(text: str) -> Rule:
    """The rule that a text form names, for instance ``"linbp:start=-2"``; ``str`` of the rule gives it back.

    Raises:
        UnknownNameError: no rule, or no setting of the rule, has that name.
        BackpassError: the text has another form, or a value is out of its range.
    """
    if not isinstance(text, str):
        raise BackpassError(f"a rule's text form is a string such as 'linbp:start=-2', got {text!r}.")
    name, settings = read_settings(text)
    if name not in RULES:
        raise UnknownNameError("rule", name, RULES)
    known = [field.name for field in fields(RULES[name])]
    for setting in settings:
        if setting not in known:
            raise UnknownNameError(f"setting of rule {name!r}", setting, known)
    return RULES[name](**settings)
