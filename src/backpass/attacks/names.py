"""Attacks by the names that a command line or a configuration gives them."""

from __future__ import annotations

from typing import Any

from backpass.attacks.apgd import APGD
from backpass.attacks.attack import Attack
from backpass.attacks.autoattack import AutoAttack
from backpass.attacks.fab import FAB
from backpass.attacks.fgsm import FGSM, IFGSM, MIFGSM
from backpass.attacks.pgd import PGD
from backpass.attacks.square import Square
from backpass.errors import BackpassError, UnknownNameError

__all__ = ["ATTACKS", "make_attack"]

ATTACKS: dict[str, type[Attack]] = {
    attack.__name__.lower(): attack for attack in (FGSM, IFGSM, MIFGSM, PGD, APGD, FAB, Square, AutoAttack)
}


def make_attack(name: str, **settings: Any) -> Attack:
    """The attack of this name, in any case, with these settings, for instance ``make_attack("pgd", eps=8 / 255)``.

    Raises:
        UnknownNameError: no attack has this name, or the attack no such setting.
        BackpassError: a setting is out of range.
    """
    if name.lower() not in ATTACKS:
        raise UnknownNameError("attack", name, ATTACKS)
    attack = ATTACKS[name.lower()]
    known = attack.__dataclass_fields__
    for setting in settings:
        if setting not in known:
            raise UnknownNameError(f"setting of {attack.__name__}", setting, known)
    try:
        return attack(**settings)
    except TypeError as error:
        raise BackpassError(f"a setting of {attack.__name__} has the wrong type: {error}. Got {settings}.") from error
