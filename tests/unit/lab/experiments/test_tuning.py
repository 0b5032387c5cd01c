"""Rates are chosen on held-out images alone, and losses are compared after the same seconds."""

import math

import pytest

from backpass.errors import BackpassError
from backpass.lab.bench.experiment import Bench
from backpass.lab.bench.images import Source
from backpass.lab.bench.tuning import Method, Protocol, Tuned, loss_after, table_of, tune

PROTOCOL = Protocol(model="mlp:widths=32", source=Source(data="digits", held_out=200), batch=64, marks=(0, 20), seeds=2)


def curve(losses, seconds, held_out=(10.0, 50.0)):
    return {"train loss": losses, "seconds": seconds, "held-out accuracy": held_out, "test accuracy": held_out}


def test_the_rate_that_learns_is_chosen_and_a_diverging_one_is_not():
    tuned = tune(Bench(), PROTOCOL, {"SGD": Method(optimizer="sgd", rates=(1e-6, 0.3, 1e9))})["SGD"]
    assert tuned.rate == 0.3
    assert all(math.isnan(run["train loss"][-1]) for run in tuned.by_rate[1e9])
    held_out = {rate: sum(run["held-out accuracy"][-1] for run in runs) for rate, runs in tuned.by_rate.items()}
    assert held_out[0.3] > held_out[1e-6]
    assert tuned.at("test accuracy", -1) == [run["test accuracy"][-1] for run in tuned.by_rate[0.3]]
    chosen = {row[1]: row[2] for row in table_of("MLP", {"SGD": tuned}).rows}
    assert chosen == {1e-6: "", 0.3: "chosen", 1e9: ""}
    edge = Tuned(rate=0.3, by_rate={0.1: tuned.runs, 0.3: tuned.runs})
    assert [row[2] for row in table_of("MLP", {"SGD": edge}).rows] == ["", "chosen, at the edge"]


def test_a_rate_in_the_rule_leaves_the_optimizers_at_one():
    by_rule = tune(Bench(), PROTOCOL, {"SIBP": Method(rule="sibp:eta={rate}", optimizer="sgd", rates=(0.2,))})["SIBP"]
    by_hand = tune(Bench(), PROTOCOL, {"SIBP": Method(rule="sibp:eta=0.2", optimizer="sgd", rates=(1.0,))})["SIBP"]
    assert by_rule.at("train loss", -1) == by_hand.at("train loss", -1)
    assert (by_rule.rate, by_hand.rate) == (0.2, 1.0)


def test_without_held_out_images_no_rate_is_chosen():
    with pytest.raises(BackpassError, match="held_out"):
        tune(Bench(), Protocol(**{**vars(PROTOCOL), "source": Source(data="digits")}), {})


def test_losses_are_read_after_the_seconds_of_the_quicker_of_each_pair():
    quick = Tuned(rate=1.0, by_rate={1.0: [curve([4.0, 1.0], [0.0, 2.0]), curve([4.0, 1.0], [0.0, 8.0])]})
    slow = Tuned(rate=1.0, by_rate={1.0: [curve([4.0, 1.0], [0.0, 4.0]), curve([4.0, 1.0], [0.0, 4.0])]})
    ours, theirs = loss_after(quick, slow)
    assert ours == pytest.approx([1.0, 2.0])  # halfway in time is halfway in the logarithm
    assert theirs == pytest.approx([2.0, 1.0])


def test_after_a_divergence_there_is_no_loss():
    lost = Tuned(rate=1.0, by_rate={1.0: [curve([4.0, math.nan], [0.0, math.nan])]})
    fine = Tuned(rate=1.0, by_rate={1.0: [curve([4.0, 1.0], [0.0, 4.0])]})
    ours, _ = loss_after(lost, fine)
    assert math.isnan(ours[0])
