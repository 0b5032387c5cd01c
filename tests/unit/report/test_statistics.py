"""Intervals agree with closed forms and printed tables, and cover what they promise to cover."""

import math

import pytest
import torch

from backpass.errors import BackpassError
from backpass.report.statistics import (
    geometric_interval,
    holm,
    mean_interval,
    mean_test,
    paired_interval,
    sign_test,
    student_p,
    student_quantile,
)


@pytest.mark.parametrize(
    ("freedom", "quantile"),  # the usual printed table, two-sided 95 %
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (9, 2.26216), (30, 2.04227), (1000, 1.96234)],
)
def test_quantiles_are_those_of_the_printed_table(freedom, quantile):
    assert student_quantile(0.975, freedom) == pytest.approx(quantile, rel=2e-6)
    assert student_quantile(0.025, freedom) == pytest.approx(-quantile, rel=2e-6)


@pytest.mark.parametrize("t", [-3.0, -0.4, 0.0, 1.3, 7.0])
def test_one_and_two_degrees_of_freedom_have_their_closed_forms(t):
    assert student_p(t, 1) == pytest.approx(1 - 2 * math.atan(abs(t)) / math.pi, abs=1e-12)
    assert student_p(t, 2) == pytest.approx(1 - abs(t) / math.sqrt(2 + t * t), abs=1e-12)


@pytest.mark.parametrize("freedom", [1, 2, 3, 8, 25])
def test_quantile_inverts_the_distribution_function(freedom):
    for level in (0.02, 0.4, 0.9, 0.99):
        assert student_p(student_quantile(0.5 + level / 2, freedom), freedom) == pytest.approx(1 - level, abs=1e-9)


def test_a_test_and_its_interval_agree_at_every_level():
    for values in torch.randn(200, 4, generator=torch.Generator().manual_seed(3)).tolist():
        p = mean_test(values, 0.3)
        for level in (1 - p - 1e-6, 1 - p + 1e-6):
            _, low, high, _ = mean_interval(values, level)
            assert (low <= 0.3 <= high) == (level > 1 - p)


def test_a_mean_that_is_known_exactly_differs_or_does_not():
    assert (mean_test([2.0] * 3), mean_test([0.0] * 3), mean_test([math.nan, 1.0]), mean_test([5.0])) == (0, 1, 1, 1)


@pytest.mark.parametrize(("ours", "theirs", "p"), [(0, 0, 1.0), (5, 0, 1 / 16), (1, 9, 22 / 1024), (4, 4, 1.0)])
def test_the_sign_test_counts_the_throws_of_a_coin(ours, theirs, p):
    assert sign_test(ours, theirs) == pytest.approx(p)
    assert sign_test(theirs, ours) == pytest.approx(p)


def test_mean_interval_of_a_known_sample():
    # mean 3, standard deviation sqrt(2.5), standard error sqrt(0.5), t(4) = 2.776445
    mean, low, high, n = mean_interval([1, 2, 3, 4, 5])
    assert (mean, n) == (3, 5)
    assert [mean - low, high - mean] == pytest.approx([2.776445 * math.sqrt(0.5)] * 2, rel=1e-6)


def test_pairing_takes_out_what_the_pairs_share():
    shared = [10.0, -7.0, 55.0, 3.0]
    difference = paired_interval([s + d for s, d in zip(shared, [1, 2, 1, 2], strict=True)], shared)
    assert difference.mean == pytest.approx(1.5)
    assert difference.high - difference.low < 2  # unpaired it would be wider than 80


def test_the_interval_covers_the_truth_at_its_level():
    draws = torch.randn(2000, 5, generator=torch.Generator().manual_seed(1)).tolist()
    covered = sum(low <= 0 <= high for _, low, high, _ in map(mean_interval, draws)) / len(draws)
    assert abs(covered - 0.95) < 4 * math.sqrt(0.95 * 0.05 / len(draws))


def test_a_geometric_interval_is_the_interval_of_the_logarithms():
    mean, low, high, _ = geometric_interval([0.1, 1.0, 10.0])
    assert mean == pytest.approx(1.0)
    assert low * high == pytest.approx(1.0)
    with pytest.raises(BackpassError, match="positive values, got 0"):
        geometric_interval([1.0, 0.0])


def test_a_diverged_value_leaves_no_finite_interval():
    assert all(map(math.isnan, mean_interval([1.0, math.nan, 2.0])[:3]))
    assert all(map(math.isnan, mean_interval([1.0, math.inf])[:3]))


def test_one_value_has_a_mean_but_no_ends():
    mean, low, high, n = mean_interval([4.0])
    assert (mean, n) == (4.0, 1)
    assert math.isnan(low)
    assert math.isnan(high)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_interval([]), "at least one value"),
        (lambda: mean_interval([1, 2], level=95), "inside"),
        (lambda: paired_interval([1, 2], [1]), "2 and 1"),
        (lambda: student_quantile(0.9, 0), "at least 1 degree"),
        (lambda: student_quantile(1.0, 3), "inside"),
    ],
)
def test_impossible_requests_are_refused_with_words(call, message):
    with pytest.raises(BackpassError, match=message):
        call()


def test_holms_correction_is_the_one_written_out():
    assert [one.p for one in holm([0.01, 0.04, 0.03, 0.005])] == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert [one.level for one in holm([0.9, 0.01])] == pytest.approx([0.95, 0.975])
    assert [one.p for one in holm([0.9, 0.8])] == [1.0, 1.0]
    assert holm([0.3]) == [(0.3, 0.95)]
    assert holm([]) == []


def test_holms_levels_and_p_values_decide_as_his_procedure():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        values = (torch.rand(6, generator=generator) ** 4).tolist()
        significant, rest = set(), sorted(values)
        while rest and rest[0] < 0.05 / len(rest):  # reject the least p as long as it is below its share
            significant.add(rest.pop(0))
        found = list(zip(values, holm(values), strict=True))
        assert {p for p, one in found if p < 1 - one.level} == significant
        assert {p for p, one in found if one.p < 0.05} == significant
