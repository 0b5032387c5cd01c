"""Construction of attacks from text forms and command-line options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, fields, replace
from typing import Any

import torch

from backpass.attacks import MIFGSM, Attack, Iterative, Pool, make_attack
from backpass.attacks.names import attack_type
from backpass.data import Labelled
from backpass.errors import BackpassError, UnknownNameError
from backpass.lab.protocols import Protocol
from backpass.numbers import fraction_text, read_number
from backpass.rules.text import read_settings

__all__ = ["Plan", "make_plans", "mixing_pool"]

_ELSEWHERE = {"eps": "--eps", "seed": "--seed", "dtype": "--dtype"}  # settings that have their own option
_NOT_IN_TEXT = {"bounds", "logits", "targeted", "pool"}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One attack at one radius.

    Attributes:
        text: text form as given, for instance ``apgd:steps=20``.
        eps: radius as given, before the protocol converts it.
        attack: attack with all settings.
    """

    text: str
    eps: float
    attack: Attack

    @property
    def name(self) -> str:
        """Unique name of the plan."""
        return f"{self.text} at eps {fraction_text(self.eps)}"

    @property
    def uses_gradients(self) -> bool:
        """True if the attack uses gradients, so that a rule affects it."""
        return self.attack.uses_gradients


def make_plans(
    texts: Sequence[str],
    radii: Sequence[float],
    options: Mapping[str, Any],
    protocol: Protocol,
    gradients: int | None = None,
) -> list[Plan]:
    """Return all attacks at all radii, ordered by attack.

    Args:
        texts: names with settings of their own, as in ``apgd:steps=20,loss=dlr``.
        radii: radii as given by the user.
        options: settings for every attack that has them; ``None`` means not given.
        protocol: protocol, which adds settings and defaults.
        gradients: budget in gradients per image, converted to steps; None for the attacks' own number of steps.

    Raises:
        UnknownNameError: no attack, or no setting, has that name.
        BackpassError: an option fits none of the attacks, a radius is out of range or stands twice, a setting is
            invalid, or an attack has no steps to make of a budget.
    """
    for given, what in ((texts, "--attack"), ([fraction_text(eps) for eps in radii], "--eps")):
        twice = [one for index, one in enumerate(given) if one in given[:index]]
        if twice or not given:
            raise BackpassError(f"{what} {twice[0]} stands twice." if twice else f"there is no {what}.")
    parsed = [(text, *_parse(text)) for text in texts]
    given_options = {name: value for name, value in options.items() if value is not None}
    for option in given_options:
        if option != "pool" and not any(option in attack_type(name).__dataclass_fields__ for _, name, _ in parsed):
            raise BackpassError(f"--{option} has no meaning for {', '.join(texts)}.")
    made = [
        Plan(text=text, eps=eps, attack=_make(name, own, eps, given_options, protocol))
        for text, name, own in parsed
        for eps in radii
    ]
    if gradients is None:
        return made
    for text, _, own in parsed:
        twice = [setting for setting in ("steps", "restarts") if setting in own or setting in given_options]
        if twice:
            raise BackpassError(f"--gradients decides how many steps {text} has: leave out {' and '.join(twice)}.")
    return [replace(plan, attack=_within(plan, gradients)) for plan in made]


def _within(plan: Plan, gradients: int) -> Iterative:
    if not isinstance(plan.attack, Iterative):
        raise BackpassError(
            f"--gradients makes steps of a budget, which {plan.text} does not take: give ifgsm, mifgsm or pgd."
        )
    return plan.attack.within(gradients)


def mixing_pool(plans: Sequence[Plan], data: Labelled, protocol: Protocol) -> dict[str, Pool]:
    """Return the setting ``pool`` for attacks that mix images, at most 64 of the data at equal distances."""
    if not any(isinstance(plan.attack, MIFGSM) and plan.attack.mix for plan in plans):
        return {}
    images = data.images
    chosen = torch.linspace(0, len(images) - 1, min(64, len(images))).round().long()
    pixels = torch.stack([protocol.images(images.pixels[i].float() / images.white) for i in chosen.tolist()])
    return {"pool": Pool(pixels, images.labels[chosen].long())}


def _parse(text: str) -> tuple[str, dict[str, Any]]:
    name, own = read_settings(text)
    name = name.lower()
    known = {field.name: field for field in fields(attack_type(name))}
    for setting, value in own.items():
        if setting in _ELSEWHERE:
            raise BackpassError(f"{setting} of {text!r} is given by {_ELSEWHERE[setting]}.")
        if setting not in known or setting in _NOT_IN_TEXT:
            raise UnknownNameError(f"setting of {name}", setting, set(known) - _NOT_IN_TEXT - set(_ELSEWHERE))
        own[setting] = _typed(known[setting], value, text)
    return name, own


def _typed(field: Field[Any], value: Any, text: str) -> Any:
    """Convert the value of a setting to the type of its default; fractions become floats."""
    default = field.default
    if (isinstance(default, float) or default is None) and isinstance(value, str):
        return read_number(value, f"{field.name} of {text!r}")
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if default is not None and type(value) is not type(default):
        kind = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a word"}
        raise BackpassError(f"{field.name} of {text!r} must be {kind[type(default).__name__]}, got {value!r}.")
    return value


def _make(name: str, own: dict[str, Any], eps: float, options: Mapping[str, Any], protocol: Protocol) -> Attack:
    known = attack_type(name).__dataclass_fields__
    norm = own.get("norm", options.get("norm", "linf"))
    if not (eps > 0):
        raise BackpassError(f"eps must be above 0, got {eps:g}.")
    if norm == "linf" and eps > 1:
        raise BackpassError(f"eps={eps:g} exceeds the pixel range 0 to 1. Did you mean {eps:g}/255?")
    if norm != "linf" and protocol.name == "paper":
        raise BackpassError(f"the protocol 'paper' is defined for the norm linf only, got {norm!r}.")
    defaults = {"restarts": protocol.restarts, "step": protocol.step}
    settings = {
        **{setting: value for setting, value in defaults.items() if setting in known},
        **{setting: value for setting, value in options.items() if setting in known},
        **protocol.settings(eps, known),
        **own,
    }
    return make_attack(name, **settings)
