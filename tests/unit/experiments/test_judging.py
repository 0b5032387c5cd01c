"""Tables are checked, candidates are chosen as promised, and planted effects and nulls get their verdicts."""

import math

import pytest
import torch

from backpass.errors import BackpassError
from backpass.experiments.experiment import Comparison, Measurement, Runs
from backpass.experiments.judging import collect, judge_all, pairs_of
from backpass.experiments.outcomes import Store, tasks_of
from support.experiments import VALUE, arm, claim, constant, experiment, table


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: arm("empty"), "at least one candidate"),
        (lambda: table(arm("a", 0.0), arm("a", 1.0)), "two arms have one name"),
        (lambda: table(arm("a", 0.0), arm("b", 1.0), claims=[claim("a", "b")] * 2), "two claims have one name"),
        (lambda: table(arm("a", 0.0), claims=[claim("a", "b")]), "compares 'b' of '': no such arm"),
        (lambda: table(arm("a", 0.0, group="g"), claims=[claim("a", "")]), "compares 'a' of '': no such arm"),
    ],
)
def test_an_impossible_table_is_refused(make, message):
    with pytest.raises(BackpassError, match=message):
        make()


def test_the_candidate_with_fewest_diverged_runs_and_then_the_highest_mean_is_chosen(tmp_path):
    scale, store = table(arm("a", 1.0, 2.0, 3.0), seeds=2), Store(tmp_path)
    values = {1.0: [5.0, 5.0], 2.0: [6.0, 6.0], 3.0: [99.0, math.nan]}
    for _, _, task in tasks_of(scale, "cpu"):
        store.write(task, {"curve": [0.0, values[task.settings.shift][task.seed]], "seconds": 1.0})
    found, read = collect(scale, store, "cpu")
    assert found["", "a"].chosen == "2"
    assert len(read) == 6
    with pytest.raises(BackpassError, match=r"outcome of a 1, seed 0 is not in"):
        collect(scale, Store(tmp_path / "empty"), "cpu")


def test_a_run_that_arms_share_is_read_once(tmp_path):
    design, store = table(arm("a", 1.0), arm("b", 1.0), arm("c", 2.0)), Store(tmp_path)
    for number, (_, _, task) in enumerate(tasks_of(design, "cpu")):
        store.write(task, {"curve": [0.0], "wall seconds": float(number)})
    found, read = collect(design, store, "cpu")
    assert len(read) == 2 * len(design.seeds)
    assert all(x is y for x, y in zip(*(found["", name].by_candidate["1"] for name in "ab"), strict=True))


def test_measurements_read_numbers_curves_draws_and_pairs():
    one, two = arm("a", 0.0), arm("b", 0.0)
    runs = Runs(arm=one, by_candidate={"": [{"x": 2.0, "c": [1.0, 4.0], "d": [[1.0, 2.0], [3.0, 4.0]]}] * 2}, chosen="")
    other = Runs(arm=two, by_candidate={"": [{"x": 1.0}] * 2}, chosen="")
    assert Measurement(label="", key="x").values(runs) == [2.0, 2.0]
    assert Measurement(label="", key="c", at=0).values(runs) == [1.0, 1.0]
    assert Measurement(label="", key="c", reduce=max).values(runs) == [4.0, 4.0]
    assert Measurement(label="", key="d", at=1, draws=True).values(runs) == [2.0, 4.0, 2.0, 4.0]
    assert Measurement(label="", key="x").both(runs, other) == ([2.0, 2.0], [1.0, 1.0])
    assert Measurement(label="", pair=lambda a, b: ((1,), (2,))).both(runs, other) == ([1], [2])


def test_a_claim_over_groups_has_one_pair_for_each():
    arms = [arm(name, 0.0, group=group) for group in "pqr" for name in "ab"]
    scale = table(*arms, claims=[claim("a", "b", groups=("p", "q", "r"))], seeds=2)
    found = {
        (one.group, one.name): Runs(
            arm=one,
            chosen="",
            by_candidate={"": [{"curve": [0, ord(one.group) + s + (one.name == "a")]} for s in (0, 2)]},
        )
        for one in arms
    }
    pairs = pairs_of(scale.comparisons[0], found)
    assert pairs == {"ours": [ord(g) + 2.0 for g in "pqr"], "theirs": [ord(g) + 1.0 for g in "pqr"]}


def test_a_range_may_be_claimed_of_differences():
    close, far = (claim("a", "b", low=-1.0, high=high) for high in (0.5, 1.5))
    values = {"a": [5.0, 7.0, 9.0, 11.0], "b": [4.0, 6.0, 7.9, 9.9]}
    for one, verdict in ((close, "opposite direction"), (far, "same direction")):
        scale = table(arm("a", 0.0), arm("b", 0.0), claims=[one])
        (judged,) = judge_all(experiment(scale=scale), "small", constant(scale, values))
        assert (judged.verdict, judged.estimate) == (verdict, pytest.approx(1.05))
        assert judged.quantity.startswith("difference in value, points; claimed: -1 to")


def simulated(shifts, generator, seeds=6):
    """Verdicts of one experiment whose i-th claim has the true difference ``shifts[i]``."""
    names = [f"a{i}" for i in range(len(shifts))]
    claims = [claim(name, "zero", setting="the claim's") for name in names]
    scale = table(arm("zero", 0.0), *(arm(name, 0.0) for name in names), claims=claims, seeds=seeds)
    noise = torch.randn(len(shifts), seeds, generator=generator, dtype=torch.float64)
    values = {name: (row + shift).tolist() for name, row, shift in zip(names, noise, shifts, strict=True)}
    found = constant(scale, {**values, "zero": [0.0] * seeds})
    return [one.verdict for one in judge_all(experiment(scale=scale), "small", found)]


def test_of_a_thousand_experiments_without_effect_at_most_five_per_cent_replicate_a_claim():
    generator = torch.Generator().manual_seed(11)
    families = [simulated([0.0] * 8, generator) for _ in range(1000)]
    assert sum("replicated" in family for family in families) <= 50
    assert sum("contradicted" in family for family in families) <= 50


def test_planted_effects_are_replicated_or_contradicted_and_the_nulls_beside_them_are_not():
    generator = torch.Generator().manual_seed(12)
    families = [simulated([9.0, 0.0, -9.0, 0.0], generator) for _ in range(1000)]
    assert sum(family[0] == "replicated" for family in families) > 990
    assert sum(family[2] == "contradicted" for family in families) > 990
    assert sum("replicated" in family[1::2] for family in families) <= 50


def test_ranges_and_diverged_runs_are_judged_as_their_rows_say():
    claims = [
        Comparison(id="in", statement="", measurement=VALUE, ours="a", low=0.0, high=2.0),
        Comparison(id="out", statement="", measurement=VALUE, ours="a", low=5.0),
        claim("lost", "a", direction="higher", diverged="worse"),
        claim("a", "lost"),
    ]
    scale = table(arm("a", 0.0), arm("lost", 0.0), claims=claims, seeds=9)
    found = constant(scale, {"a": [1.0 + 0.01 * s for s in range(9)], "lost": [math.nan] * 9})
    verdicts = [one.verdict for one in judge_all(experiment(scale=scale), "small", found)]
    assert verdicts == ["same direction", "opposite direction", "opposite direction", "undecided"]
