"""A rule's text form: read, printed back, and refused with the nearest known name."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backpass import BackpassError, LinBP, UnknownNameError, parse_rule
from backpass.rules import BP


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("bp", BP()),
        ("linbp", LinBP()),
        ("linbp:start=-2", LinBP(start=-2)),
        ("linbp:start=0.5", LinBP(start=0.5)),
        ("linbp:start=layer4", LinBP(start="layer4")),
        ("linbp:start=layer3.1,stop=fc", LinBP(start="layer3.1", stop="fc")),
        ("linbp:start='0.1'", LinBP(start="0.1")),
        ("linbp:start='7'", LinBP(start="7")),
        ("linbp:start='none'", LinBP(start="none")),
        ("linbp:slope=0.25,residual=renormalized", LinBP(slope=0.25, residual="renormalized")),
    ],
)
def test_text_and_rule_correspond(text, rule):
    assert parse_rule(text) == rule
    assert str(rule) == text


places = st.none() | st.integers(-1000, 1000) | st.floats(0, 1) | st.text(max_size=20)


@given(start=places, stop=places, slope=st.floats(allow_nan=False, allow_infinity=False))
def test_every_rule_survives_its_text_form(start, stop, slope):
    rule = LinBP(start=start, stop=stop, slope=slope)
    again = parse_rule(str(rule))
    assert again == rule
    assert str(again) == str(rule)


@given(st.text(max_size=40) | st.from_regex(r"linbp:[a-z=,'0-9.\-]{0,20}", fullmatch=True))
def test_any_text_is_a_rule_or_a_clear_error(text):
    try:
        rule = parse_rule(text)
    except BackpassError:
        return
    assert parse_rule(str(rule)) == rule


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("linbq", "Did you mean 'linbp'"),
        ("linbp:strat=1", "Did you mean 'start'"),
        ("linbp:residual=renormalised", "Did you mean 'renormalized'"),
        ("bp:start=1", "unknown setting of rule 'bp'"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(text, message):
    with pytest.raises(UnknownNameError, match=message):
        parse_rule(text)


@pytest.mark.parametrize(
    "text", ["linbp:start", "linbp:start=1,,stop=2", "linbp:start=1,start=2", "linbp:start='", "linbp:=1", 3]
)
def test_another_form_is_refused(text):
    with pytest.raises(BackpassError):
        parse_rule(text)


def test_a_function_prints_as_its_name_and_cannot_be_read_back():
    text = str(LinBP(where=callable))
    assert text == "linbp:where=<callable>"
    with pytest.raises(BackpassError, match="where must be a function"):
        parse_rule(text)
