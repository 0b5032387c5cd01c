"""Intervals of proportions: against published values, other implementations and simulation."""

import math

import pytest
import torch
from scipy.stats import binomtest

from backpass.attacks import Rate
from backpass.errors import BackpassError
from backpass.report.proportions import judge_images, marks, paired_difference, percent, percent_text, rate_of


def outcomes(both, only_ours, only_theirs, neither):
    ours = [True] * (both + only_ours) + [False] * (only_theirs + neither)
    theirs = [True] * both + [False] * only_ours + [True] * only_theirs + [False] * neither
    return torch.tensor(ours), torch.tensor(theirs)


def test_a_rate_in_per_cent_has_wilsons_ends_in_per_cent():
    rate = Rate(81, 263)  # Newcombe (1998), table I, method 3: .2553 to .3662
    assert percent(rate) == pytest.approx((100 * 81 / 263, 25.53, 36.62, 263), abs=0.005)
    assert percent_text(rate) == "30.8 [25.5, 36.6]\N{NO-BREAK SPACE}%"
    assert math.isnan(percent(Rate(0, 0)).mean)


def text(*cells):
    return [marks(outcome) for outcome in outcomes(*cells)]


def judged(ours, theirs, direction="higher"):
    return judge_images("a", "s", ours=ours, theirs=theirs, quantity="images fooled", direction=direction)


@pytest.mark.parametrize(
    ("cells", "direction", "verdict"),
    [
        ((50, 30, 5, 15), "higher", "same direction"),
        ((50, 5, 30, 15), "higher", "opposite direction"),
        ((50, 5, 30, 15), "lower", "same direction"),
        ((50, 5, 5, 40), "higher", "undecided"),
        ((0, 2, 0, 0), "higher", "undecided"),
    ],
)
def test_a_claim_counts_the_images_with_one_outcome_alone(cells, direction, verdict):
    claim = judged(*text(*cells), direction)
    _, ours, theirs, _ = cells
    assert (claim.verdict, claim.n) == (verdict, sum(cells))
    assert claim.estimate == pytest.approx(100 * (ours - theirs) / sum(cells))
    assert claim.note.startswith(f"{ours} images only with ours, {theirs} only with theirs")


def test_images_that_a_side_does_not_count_are_left_out():
    ours, theirs = (one + "-1-" for one in text(50, 30, 5, 15))
    theirs = theirs[:-3] + "11-"
    assert judged(ours, theirs).n == 101
    assert rate_of(ours) == Rate(81, 101)
    assert marks(torch.tensor([True, False, True]), torch.tensor([True, True, False])) == "10-"
    nothing = judged("--1", "11-")
    assert (nothing.verdict, nothing.n) == ("undecided", 0)


@pytest.mark.parametrize("cells", [(5, 3, 1, 10), (0, 0, 0, 4), (50, 12, 12, 3), (0, 9, 0, 1), (800, 60, 41, 300)])
def test_mcnemars_p_is_the_binomial_tests(cells):
    found = paired_difference(*outcomes(*cells))
    _, b, c, _ = cells
    assert (found.only_ours, found.only_theirs) == (b, c)
    assert found.p == pytest.approx(binomtest(b, b + c).pvalue if b + c else 1.0)
    assert found.interval.mean == pytest.approx(100 * (b - c) / sum(cells))
    assert found.interval.low <= found.interval.mean <= found.interval.high


def test_full_agreement_leaves_an_interval():
    interval = paired_difference(*outcomes(10, 0, 0, 10)).interval
    assert interval.low < 0 < interval.high
    assert interval.mean == 0


def test_the_paired_interval_covers_the_truth_about_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    n, p_ours, p_theirs = 60, 0.10, 0.04  # chances of each kind of disagreement
    covered = 0
    for _ in range(2000):
        u = torch.rand(n, generator=generator)
        ours, theirs = u < p_ours, (u >= p_ours) & (u < p_ours + p_theirs)
        interval = paired_difference(ours, theirs).interval
        covered += interval.low <= 100 * (p_ours - p_theirs) <= interval.high
    assert 0.94 < covered / 2000 < 0.99


def test_outcomes_that_are_no_pairs_are_refused():
    with pytest.raises(BackpassError, match="as many"):
        paired_difference(torch.ones(3).bool(), torch.ones(2).bool())
    with pytest.raises(BackpassError, match="at least one"):
        paired_difference(torch.ones(0).bool(), torch.ones(0).bool())


@pytest.mark.parametrize("level", [0.9, 0.95, 0.99, 0.999])
def test_the_interval_at_a_level_leaves_out_zero_exactly_where_the_test_is_significant(level):
    for ours in range(12):
        for theirs in range(12):
            found = paired_difference(*outcomes(3, ours, theirs, 4), level)
            assert (found.interval.low > 0 or found.interval.high < 0) == (found.p < 1 - level)
