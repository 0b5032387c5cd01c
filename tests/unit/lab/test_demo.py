"""The demo end to end in small, and its words on planted differences."""

import json
import math

import pytest
import torch

from backpass.lab.studies.demo.demo import SCALES, run
from backpass.lab.studies.demo.implicit_steps import _at
from backpass.lab.studies.demo.part import compare
from backpass.report.claims import judge

TIMED = "implicit"


@pytest.fixture(scope="module")
def result():
    return run(SCALES["quick"])


def test_every_part_has_a_plot_a_sentence_and_claims_with_intervals(result):
    assert [series.id for series in result.series] == ["transfer", "implicit-steps", "initial-weights", "prediction"]
    assert [finding.topic for finding in result.findings] == [*(series.title for series in result.series), "Limits"]
    for series in result.series:
        assert any(claim.id.startswith(series.id) for claim in result.claims)
    assert all(claim.n == 3 and claim.interval[0] <= claim.estimate <= claim.interval[1] for claim in result.claims)
    assert "1,797 real images" in result.environment["data"]


def test_all_numbers_without_seconds_are_the_same_again_and_nothing_global_changes(result):
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        again = run(SCALES["quick"])
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(state, torch.get_rng_state())
    for part in ("series", "claims", "findings"):
        ours, theirs = (
            [one for one in json.loads(r.as_json())[part] if TIMED not in str(one).lower()] for r in (again, result)
        )
        assert ours == theirs


@pytest.mark.parametrize(
    ("ours", "words"),
    [
        ([1.0, 1.1, 1.2], "higher (+1.10 [+0.852, +1.35] points)"),
        ([-1.0, -1.1, -1.2], "lower (-1.10 [-1.35, -0.852] points)"),
        ([-1.0, 0.0, 1.0], "not significantly different (0 [-2.48, +2.48] points)"),
        ([1.0, 1.1, math.nan], "not significantly different (diverged points)"),
    ],
)
def test_a_difference_is_named_where_its_interval_excludes_zero(ours, words):
    claim = judge("id", "statement", ours=ours, theirs=[0.0] * 3, direction="higher", quantity="points")
    assert compare(claim, "higher", "lower", " points").replace("\N{MINUS SIGN}", "-") == words


@pytest.mark.parametrize(("epoch", "loss"), [(0, 4.0), (0.5, 2.0), (1, 1.0), (1.5, 0.5), (2, 0.25)])
def test_losses_between_epochs_are_interpolated_on_the_logarithmic_axis(epoch, loss):
    assert _at([4.0, 1.0, 0.25], epoch) == pytest.approx(loss)
