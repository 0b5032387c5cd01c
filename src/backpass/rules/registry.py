"""Registry of the rules by name."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields

from backpass.errors import BackpassError, UnknownNameError
from backpass.plugins import added, added_names
from backpass.rules.bpa import BPA
from backpass.rules.guided import Deconvnet, GuidedBackprop
from backpass.rules.linbp import LinBP
from backpass.rules.pna import PNA
from backpass.rules.proxprop import ProxProp
from backpass.rules.rule import BP, Rule
from backpass.rules.sgm import SGM
from backpass.rules.sibp import SIBP
from backpass.rules.text import read_settings
from backpass.rules.tgr import TGR

__all__ = ["PLACEHOLDERS", "RULES", "parse_rule", "rule_type"]

RULES: dict[str, type[Rule]] = {
    rule.name: rule for rule in (BP, LinBP, ProxProp, SIBP, SGM, BPA, PNA, TGR, GuidedBackprop, Deconvnet)
}
"""Rules of backpass by name."""

_GROUP = "backpass.rules"
PLACEHOLDERS = ("paper", "auto")
"""Values of ``start`` that depend on the network and are resolved by `backpass.lab`."""


def rule_type(name: str) -> type[Rule]:
    """Return the class of a rule: one of `RULES`, or of an installed package by an entry point of backpass.rules.

    Raises:
        UnknownNameError: the name is unknown.
        BackpassError: the entry point cannot be imported, or is no `Rule`.
    """
    found = RULES.get(name) or added(_GROUP, name, Rule, lambda kind: kind.name)
    if found is None:
        raise UnknownNameError("rule", name, [*RULES, *added_names(_GROUP)])
    return found


def parse_rule(text: str, *, placeholders: Collection[str] = ()) -> Rule:
    """Return the rule that a text form names, for instance ``"linbp:start=-2"``; ``str`` of the rule gives it back.

    Args:
        text: the text form.
        placeholders: accepted placeholders of ``start``, out of ``"paper"`` and ``"auto"``, which the caller replaces
            by a position in its network. Others are an error.

    Raises:
        UnknownNameError: no rule, or no setting of the rule, has that name.
        BackpassError: the text has another form, a value is out of its range, or an added rule cannot be imported.
    """
    if not isinstance(text, str):
        raise BackpassError(f"a rule's text form is a string such as 'linbp:start=-2', got {text!r}.")
    name, settings = read_settings(text)
    kind = rule_type(name)
    known = [field.name for field in fields(kind)]
    for setting in settings:
        if setting not in known:
            raise UnknownNameError(f"setting of rule {name!r}", setting, known)
    start = settings.get("start")
    if start in PLACEHOLDERS and start not in placeholders:
        raise BackpassError(
            f"{text!r} depends on the network, which a text form does not know: `backpass sites NETWORK --rule {text}` "
            "shows the place to give, as in linbp:start=-2 or linbp:start=layer4."
        )
    return kind(**settings)
