"""Planted effects are found with their sign, planted nulls are not, and nothing is decided without evidence."""

import math

import pytest
import torch

from backpass.report.claims import agreement, corrected, judge, judge_within


def _judge(ours, theirs, direction="higher"):
    return judge("id", "a claim", ours=ours, theirs=theirs, direction=direction, quantity="points")


def _normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("shift", "expected"), [(3.0, "same direction"), (-3.0, "opposite direction")])
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
    assert (claim.n, claim.verdict, claim.note) == (3, "same direction", "")


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
        ([math.nan] * 6, [1.0] * 6, "opposite direction"),
        ([1.0] * 6, [math.inf] * 6, "same direction"),
        ([math.nan] * 5, [1.0] * 5, "undecided"),  # 5 of 5 is p = 1/16
        ([math.nan, 0.5, 0.5, 0.5, 0.5, 0.5], [1.0] * 6, "undecided"),  # 5 of 6
        ([math.nan] * 6, [math.nan] * 6, "undecided"),
        ([math.nan, *[0.5] * 9], [1.0] * 10, "same direction"),  # 9 of 10
    ],
)
def test_where_a_diverged_run_is_worse_the_signs_of_the_pairs_decide(ours, theirs, expected):
    claim = judge("i", "c", ours=ours, theirs=theirs, direction="lower", quantity="loss", diverged="worse")
    assert claim.verdict == expected
    opposite = judge("i", "c", ours=theirs, theirs=ours, direction="lower", quantity="loss", diverged="worse")
    assert opposite.verdict == {"same direction": "opposite direction", "opposite direction": "same direction"}.get(
        expected, expected
    )


def test_planted_nulls_with_diverged_runs_are_decided_at_most_at_the_stated_error_rate():
    draw = torch.rand(1000, 2, 12, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    values = torch.where(draw < 0.1, math.nan, draw)
    verdicts = [
        judge("i", "c", ours=a, theirs=b, direction="lower", quantity="loss", diverged="worse").verdict
        for a, b in values.tolist()
    ]
    assert verdicts.count("same direction") + verdicts.count("opposite direction") < 50 + 4 * math.sqrt(
        1000 * 0.05 * 0.95
    )
    assert verdicts.count("same direction") > 5


def test_no_difference_at_all_is_undecided():
    assert _judge([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]).verdict == "undecided"


@pytest.mark.parametrize("shift", [-0.9, -0.4, 0.0, 0.4, 0.9])
def test_the_verdict_is_that_of_the_interval(shift):
    for row in (shift + _normal(100, 5, seed=7)).tolist():
        claim = _judge(row, [0.0] * 5)
        low, high = claim.interval
        assert claim.verdict == ("same direction" if low > 0 else "opposite direction" if high < 0 else "undecided")
        assert (claim.p <= 0.05) == (claim.verdict != "undecided")


@pytest.mark.parametrize(("direction", "expected"), [("higher", "replicated"), ("lower", "contradicted")])
def test_only_at_the_claims_own_setting_a_verdict_is_one_on_the_claim(direction, expected):
    values = {"ours": [1.0, 1.1, 1.2], "theirs": [0.0] * 3, "direction": direction, "quantity": "points"}
    assert judge("id", "a claim", **values, setting="the claim's").verdict == expected
    assert agreement(expected) is (direction == "higher")


def simulated_family(shifts, seed, claims=20, seeds=6):
    """Verdicts of one experiment after the correction, where claim i has the true difference shifts[i % len]."""
    noise = _normal(claims, seeds, seed=seed)
    made = [
        judge(str(i), "", ours=(noise[i] + shifts[i % len(shifts)]).tolist(), theirs=[0.0] * seeds, direction="higher",
              quantity="", setting="the claim's")
        for i in range(claims)
    ]  # fmt: skip
    return [claim.verdict for claim in corrected(made)]


def test_a_thousand_experiments_without_effect_replicate_something_in_at_most_five_per_cent():
    families = [simulated_family([0.0], 1000 + seed) for seed in range(1000)]
    false = sum("replicated" in family for family in families)
    assert false <= 50  # two-sided: 25 expected at most
    assert 5 <= sum(set(family) != {"undecided"} for family in families) <= 50 + 4 * math.sqrt(1000 * 0.05 * 0.95)


def test_effects_among_nulls_are_found_and_the_nulls_are_not_replicated_more_often():
    families = [simulated_family([0.0, 8.0], 5000 + seed) for seed in range(1000)]
    assert sum("replicated" in family[0::2] for family in families) <= 50
    assert sum(family[1::2].count("replicated") for family in families) > 9900


def test_a_claim_that_the_correction_undecides_says_so():
    alone = _judge([1.0, 1.2, 0.9, 1.6], [0.0, 0.9, 0.0, 0.1])
    assert (alone.verdict, alone.p_corrected) == ("same direction", None)
    nothing = [_judge([1.0, -1.0, 0.5], [0.0] * 3) for _ in range(9)]
    first, *others = corrected([alone, *nothing])
    assert first.verdict == "undecided"
    assert first.p_corrected == pytest.approx(10 * alone.p)
    assert first.note.endswith("corrected for 10 claims")
    assert {claim.note for claim in others} == {""}


def _within(values, low, high):
    return judge_within("id", "a claim", values=values, low=low, high=high, quantity="slope")


def test_a_range_holds_only_with_the_whole_interval_inside():
    values = _normal(50, seed=4).tolist()  # an interval of about -.28 to .28 around 0
    assert _within(values, -1.0, 1.0).verdict == "same direction"
    assert _within(values, 1.0, 2.0).verdict == "opposite direction"
    assert _within(values, 0.0, 2.0).verdict == "undecided"
    assert _within(values, -math.inf, 1.0).verdict == "same direction"


def test_a_planted_value_outside_of_the_range_is_found_to_hold_at_most_at_the_stated_rate():
    noise = _normal(1000, 5, seed=5)  # the mean lies exactly on the border
    verdicts = [_within((1.0 + n).tolist(), -math.inf, 1.0).verdict for n in noise]
    for wrong in ("same direction", "opposite direction"):
        assert abs(verdicts.count(wrong) / 1000 - 0.025) < 4 * math.sqrt(0.025 * 0.975 / 1000)


def test_a_range_is_not_decided_by_two_runs_or_a_diverged_one():
    assert _within([1.0, 1.0], 0.0, 2.0).verdict == "undecided"
    claim = _within([1.0, math.nan, 1.0], 0.0, 2.0)
    assert (claim.verdict, claim.note) == ("undecided", "a run diverged")
