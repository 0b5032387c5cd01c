"""Planted effects are found with their sign, planted nulls are not, and nothing is decided without evidence."""

import math

import pytest
import torch

from backpass.report.claims import judge, judge_within, verdict
from backpass.report.statistics import Interval


def _judge(ours, theirs, direction="higher"):
    return judge("id", "a claim", ours=ours, theirs=theirs, direction=direction, quantity="points")


def _normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("shift", "expected"), [(3.0, "holds"), (-3.0, "does not hold")])
def test_planted_effects_are_found_with_their_sign(shift, expected):
    base, noise = _normal(200, 5, seed=0), _normal(200, 5, seed=1)
    verdicts = [_judge((b + shift + n).tolist(), b.tolist()).verdict for b, n in zip(base, noise, strict=True)]
    assert verdicts.count(expected) >= 190  # the test's power is 99.8 % for three standard deviations and 5 pairs
    opposite = [_judge((b + shift + n).tolist(), b.tolist(), "lower").verdict for b, n in zip(base, noise, strict=True)]
    assert opposite.count(expected) == 0


def test_planted_nulls_are_decided_at_the_stated_error_rate():
    base, noise = _normal(1000, 5, seed=2), _normal(1000, 5, seed=3)
    verdicts = [_judge((b + n).tolist(), b.tolist()).verdict for b, n in zip(base, noise, strict=True)]
    decided = 1 - verdicts.count("undecided") / len(verdicts)
    assert abs(decided - 0.05) < 4 * math.sqrt(0.05 * 0.95 / len(verdicts))


def test_the_claim_carries_its_paired_difference():
    claim = _judge([1.0, 2.5, 3.0], [0.0, 1.0, 2.0])
    assert claim.estimate == pytest.approx(7 / 6)
    assert claim.interval[0] < claim.estimate < claim.interval[1]
    assert (claim.n, claim.verdict, claim.note) == (3, "holds", "")


def test_two_pairs_give_no_verdict_however_clear():
    claim = _judge([10.0, 10.001], [0.0, 0.0])
    assert claim.interval[0] > 0
    assert claim.verdict == "undecided"
    assert "fewer than 3 pairs" in claim.note


def test_a_diverged_run_leaves_the_claim_undecided_and_is_named():
    claim = judge(
        "id",
        "a claim",
        ours=[1.0, math.nan, 1.0, 1.0],
        theirs=[0.0] * 4,
        direction="higher",
        quantity="points",
        seeds=[10, 11, 12, 13],
    )
    assert claim.verdict == "undecided"
    assert math.isnan(claim.estimate)
    assert claim.note == "a run diverged in 1 of 4 pairs, seed 11"


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ([math.nan] * 6, [1.0] * 6, "does not hold"),
        ([1.0] * 6, [math.inf] * 6, "holds"),
        ([math.nan] * 5, [1.0] * 5, "undecided"),  # 5 of 5 is p = 1/16
        ([math.nan, 0.5, 0.5, 0.5, 0.5, 0.5], [1.0] * 6, "undecided"),  # 5 of 6
        ([math.nan] * 6, [math.nan] * 6, "undecided"),
        ([math.nan, *[0.5] * 9], [1.0] * 10, "holds"),  # 9 of 10
    ],
)
def test_where_a_diverged_run_is_worse_the_signs_of_the_pairs_decide(ours, theirs, expected):
    claim = judge("i", "c", ours=ours, theirs=theirs, direction="lower", quantity="loss", diverged="worse")
    assert claim.verdict == expected
    opposite = judge("i", "c", ours=theirs, theirs=ours, direction="lower", quantity="loss", diverged="worse")
    assert opposite.verdict == {"holds": "does not hold", "does not hold": "holds"}.get(expected, expected)


def test_planted_nulls_with_diverged_runs_are_decided_at_most_at_the_stated_error_rate():
    draw = torch.rand(1000, 2, 12, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    values = torch.where(draw < 0.1, math.nan, draw)
    verdicts = [
        judge("i", "c", ours=a, theirs=b, direction="lower", quantity="loss", diverged="worse").verdict
        for a, b in values.tolist()
    ]
    assert verdicts.count("holds") + verdicts.count("does not hold") < 50 + 4 * math.sqrt(1000 * 0.05 * 0.95)
    assert verdicts.count("holds") > 5


def test_no_difference_at_all_is_undecided():
    assert _judge([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]).verdict == "undecided"


@pytest.mark.parametrize(
    ("low", "high", "higher", "lower"),
    [
        (0.1, 0.2, "holds", "does not hold"),
        (-0.2, -0.1, "does not hold", "holds"),
        (-0.1, 0.2, "undecided", "undecided"),
        (0.0, 0.2, "undecided", "undecided"),
    ],
)
def test_the_verdict_follows_from_where_the_interval_lies(low, high, higher, lower):
    interval = Interval((low + high) / 2, low, high, 5)
    assert verdict(interval, "higher") == higher
    assert verdict(interval, "lower") == lower


def _within(values, low, high):
    return judge_within("id", "a claim", values=values, low=low, high=high, quantity="slope")


def test_a_range_holds_only_with_the_whole_interval_inside():
    values = _normal(50, seed=4).tolist()  # an interval of about -.28 to .28 around 0
    assert _within(values, -1.0, 1.0).verdict == "holds"
    assert _within(values, 1.0, 2.0).verdict == "does not hold"
    assert _within(values, 0.0, 2.0).verdict == "undecided"
    assert _within(values, -math.inf, 1.0).verdict == "holds"


def test_a_planted_value_outside_of_the_range_is_found_to_hold_at_most_at_the_stated_rate():
    noise = _normal(1000, 5, seed=5)  # the mean lies exactly on the border
    verdicts = [_within((1.0 + n).tolist(), -math.inf, 1.0).verdict for n in noise]
    for wrong in ("holds", "does not hold"):
        assert abs(verdicts.count(wrong) / 1000 - 0.025) < 4 * math.sqrt(0.025 * 0.975 / 1000)


def test_a_range_is_not_decided_by_two_runs_or_a_diverged_one():
    assert _within([1.0, 1.0], 0.0, 2.0).verdict == "undecided"
    claim = _within([1.0, math.nan, 1.0], 0.0, 2.0)
    assert (claim.verdict, claim.note) == ("undecided", "a run diverged")
