"""Attacks by name, as the command line asks for them."""

import pytest

from backpass.attacks import APGD, PGD, make_attack
from backpass.errors import UnknownNameError


def test_a_name_and_settings_make_an_attack():
    assert make_attack("pgd", eps=0.1) == PGD(eps=0.1)
    assert make_attack("APGD", loss="dlr") == APGD(loss="dlr")


def test_unknown_names_are_answered_with_the_nearest_known():
    with pytest.raises(UnknownNameError, match="unknown attack 'apdg'. Did you mean 'apgd'?"):
        make_attack("apdg")
    with pytest.raises(UnknownNameError, match="unknown setting of PGD 'restart'. Did you mean 'restarts'?"):
        make_attack("pgd", restart=3)
