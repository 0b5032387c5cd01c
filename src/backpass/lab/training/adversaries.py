"""Text forms of the attacks in training: ``pgd:eps=8/255,steps=10``."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from backpass.attacks import Attack
from backpass.attacks.iterative import Iterative
from backpass.attacks.names import attack_type, make_attack
from backpass.errors import BackpassError, UnknownNameError
from backpass.numbers import read_number
from backpass.rules.text import read_settings

__all__ = ["adversary_text", "default_judge", "make_adversary"]

_NOT_IN_TEXT = {"bounds", "dtype", "logits", "seed", "targeted"}
_EXPLICIT = {"eps", "step", "restarts"}  # their defaults here are not those of the attack
_STEPS = 20  # of the attack that judges where none is named


def make_adversary(text: str, what: str) -> Attack:
    """Return the attack of a text form, for pixels in [0, 1].

    By default the step is 2.5 eps / steps, so that the iterates reach the boundary of the ball and move along it
    (Madry et al. 2018); for a single step it is 1.25 eps (Wong, Rice, Kolter 2020). `restarts` is 1.

    Args:
        text: name and settings, among them eps.
        what: name of the option, for messages.

    Raises:
        UnknownNameError: no attack, or no setting of the attack, has that name.
        BackpassError: eps is missing, or a value is out of its range.
    """
    name, given = read_settings(text)
    name = name.lower()
    kind = attack_type(name)
    defaults = {field.name: field.default for field in fields(kind) if field.name not in _NOT_IN_TEXT}
    settings: dict[str, Any] = {}
    for setting, value in given.items():
        if setting not in defaults:
            raise UnknownNameError(f"setting of {name}", setting, defaults)
        settings[setting] = _typed(value, defaults[setting], f"{setting} of {what} {text!r}")
    if "eps" not in settings:
        raise BackpassError(f"{what} {text!r} has no limit: add eps, as in {name}:eps=8/255.")
    if not settings["eps"] > 0:
        raise BackpassError(f"eps of {what} {text!r} must be above 0.")
    if "restarts" in defaults:
        settings.setdefault("restarts", 1)
    if issubclass(kind, Iterative) and "step" not in settings:
        steps = settings.get("steps", defaults["steps"])
        settings["step"] = settings["eps"] * (2.5 / steps if isinstance(steps, int) and steps > 1 else 1.25)
    return make_attack(name, **settings)


def adversary_text(attack: Attack) -> str:
    """Return the text form of an attack, the inverse of `make_adversary`."""
    values = {field.name: getattr(attack, field.name) for field in fields(attack) if field.name not in _NOT_IN_TEXT}
    changed = [
        f"{field.name}={values[field.name]!r}".replace("'", "").replace("True", "true").replace("False", "false")
        for field in fields(attack)
        if field.name in values and (field.name in _EXPLICIT or values[field.name] != field.default)
    ]
    return f"{type(attack).__name__.lower()}:{','.join(changed)}"


def default_judge(attack: Attack) -> Attack:
    """Return the default attack that measures robustness: PGD with 20 steps in the same ball."""
    return make_adversary(f"pgd:eps={attack.eps!r},norm={attack.norm},steps={_STEPS}", "--robust")


def _typed(value: Any, default: Any, what: str) -> Any:
    """Convert the value to the type of the default; fractions become numbers."""
    if isinstance(value, str) and (default is None or isinstance(default, float)):
        return read_number(value, what)
    if isinstance(value, int) and not isinstance(value, bool) and isinstance(default, float):
        return float(value)
    if default is not None and type(value) is not type(default):
        kinds = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}
        raise BackpassError(f"{what} must be {kinds[type(default)]}, got {value!r}.")
    return value
