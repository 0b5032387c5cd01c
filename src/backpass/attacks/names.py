"""Attacks by name, for command lines and configurations."""

from __future__ import annotations

from typing import Any

from backpass.attacks.apgd import APGD
from backpass.attacks.attack import Attack
from backpass.attacks.autoattack import AutoAttack
from backpass.attacks.fab import FAB
from backpass.attacks.fgsm import FGSM, IFGSM
from backpass.attacks.minimum import FMN
from backpass.attacks.momentum import MIFGSM
from backpass.attacks.pgd import PGD
from backpass.attacks.square import Square
from backpass.errors import BackpassError, UnknownNameError
from backpass.plugins import added, added_names

__all__ = ["ATTACKS", "attack_type", "make_attack"]


def _name(kind: type[Attack]) -> str:
    return kind.__name__.lower()


ATTACKS: dict[str, type[Attack]] = {
    _name(attack): attack for attack in (FGSM, IFGSM, MIFGSM, PGD, APGD, FAB, FMN, Square, AutoAttack)
}
"""backpass' own attacks by name."""

_GROUP = "backpass.attacks"


def attack_type(name: str) -> type[Attack]:
    """Return the class of an attack, by its name in any case: one of `ATTACKS`, or one that an installed package adds.

    Raises:
        UnknownNameError: there is no attack of this name.
        BackpassError: a package's attack cannot be imported, or is none.
    """
    found = ATTACKS.get(name.lower()) or added(_GROUP, name.lower(), Attack, _name)  # type: ignore[type-abstract]
    if found is None:
        raise UnknownNameError("attack", name, [*ATTACKS, *added_names(_GROUP)])
    return found


def make_attack(name: str, **settings: Any) -> Attack:
    """Return the attack of this name, in any case, with these settings, as in ``make_attack("pgd", eps=0.03)``.

    Raises:
        UnknownNameError: no attack has this name, or the attack no such setting.
        BackpassError: a setting is out of range, or an added attack cannot be imported.
    """
    attack = attack_type(name)
    known = attack.__dataclass_fields__
    for setting in settings:
        if setting not in known:
            raise UnknownNameError(f"setting of {attack.__name__}", setting, known)
    try:
        return attack(**settings)
    except TypeError as error:
        raise BackpassError(f"a setting of {attack.__name__} has the wrong type: {error}. Got {settings}.") from error
