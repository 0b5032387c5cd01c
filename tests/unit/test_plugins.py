"""Rules and attacks of other packages are found by name, and whatever is wrong with one is told."""

import pytest

from backpass import BackpassError, LinBP, UnknownNameError, parse_rule
from backpass.attacks import PGD, make_attack
from backpass.plugins import _points, added_names
from support.packages import install

RULES, ATTACKS = "backpass.rules", "backpass.attacks"
MODULE = """
from dataclasses import dataclass
from backpass.attacks import Attack
from backpass.rules import ActivationRule

@dataclass(frozen=True, kw_only=True)
class Half(ActivationRule):
    name = "half"
    factor: float = 0.5

    def backward(self, grad, x):
        return self.factor * grad

@dataclass(frozen=True, kw_only=True)
class Still(Attack):
    def _attack(self, oracle, x, y, index, capacity):
        raise NotImplementedError

def half():
    return Half()
"""


@pytest.fixture(autouse=True)
def _forget():
    yield
    _points.cache_clear()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A function that installs packages whose entry points lead into one module."""
    (tmp_path / "additions.py").write_text(MODULE)
    (tmp_path / "broken_additions.py").write_text("import no_such_thing")

    def make(name="more", **points):
        install(tmp_path, monkeypatch, name, points)

    return make


def test_a_rule_of_another_package_has_a_text_form(package):
    package(**{RULES: {"half": "additions:Half"}})
    rule = parse_rule("half:factor=0.25,start=-1")
    assert (type(rule).__name__, rule.factor, rule.start) == ("Half", 0.25, -1)
    assert parse_rule(str(rule)) == rule
    with pytest.raises(UnknownNameError, match="Did you mean 'factor'"):
        parse_rule("half:facter=0.25")


def test_an_attack_of_another_package_is_made_by_name_in_any_case(package):
    package(**{ATTACKS: {"still": "additions:Still"}})
    assert make_attack("Still", eps=0.25).eps == 0.25


def test_an_unknown_name_is_answered_with_those_of_packages_too_and_imports_nothing(package):
    package(**{RULES: {"half": "broken_additions:Half"}, ATTACKS: {"still": "broken_additions:Still"}})
    assert added_names(RULES) == ["half"]
    with pytest.raises(UnknownNameError, match="Did you mean 'half'"):
        parse_rule("haf")
    with pytest.raises(UnknownNameError, match="Did you mean 'still'"):
        make_attack("stil")


def test_the_names_of_backpass_cannot_be_taken(package):
    package(**{RULES: {"linbp": "additions:Half"}, ATTACKS: {"pgd": "additions:Still"}})
    assert parse_rule("linbp") == LinBP()
    assert isinstance(make_attack("pgd"), PGD)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("broken_additions:Half", "cannot be imported: ModuleNotFoundError: No module named 'no_such_thing'"),
        ("additions:Absent", "cannot be imported: AttributeError"),
        ("additions:half", "must be a class derived from Rule"),
        ("additions:Still", "must be a class derived from Rule"),
    ],
)
def test_what_is_no_rule_is_told_with_its_package(package, value, message):
    package(**{RULES: {"half": value}})
    with pytest.raises(BackpassError, match=f"'half', which is {value} of the package more, {message}"):
        parse_rule("half")


def test_a_rule_under_another_name_than_its_own_is_refused(package):
    package(**{RULES: {"quarter": "additions:Half"}})
    with pytest.raises(BackpassError, match="is added as 'quarter', but calls itself 'half'"):
        parse_rule("quarter")


def test_a_name_that_two_packages_claim_is_refused(package):
    package("one", **{RULES: {"half": "additions:Half"}})
    package("two", **{RULES: {"half": "broken_additions:Half"}})
    with pytest.raises(BackpassError, match="is claimed by additions:Half of the package one and broken_additions"):
        parse_rule("half")
