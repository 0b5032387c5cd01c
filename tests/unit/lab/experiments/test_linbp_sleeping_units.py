"""Networks whose units sleep: how many do is known, and where the two gradients cross is found."""

import math
from dataclasses import replace

import pytest
import torch

from backpass.attacks import PGD
from backpass.lab.bench.experiment import Bench
from backpass.lab.experiments.linbp.sleeping_units import EXPERIMENTS, Sleep, Sleeper, simulate

CPU = torch.device("cpu")


@pytest.mark.parametrize("threshold", [0.0, 1.0, 2.0])
def test_units_are_awake_as_often_as_a_normal_number_exceeds_the_threshold(threshold):
    found = simulate(Sleep(radii=(), images=2000), threshold, 0, CPU)
    expected = 50 * math.erfc(threshold / math.sqrt(2))
    assert found["awake"][0] == pytest.approx(expected, abs=2)


def test_plain_gradients_are_blind_exactly_where_no_unit_is_awake():
    settings, threshold = Sleep(radii=(), images=300), 3.0
    generator = torch.Generator().manual_seed(4)
    network = Sleeper(settings.widths, threshold, generator)
    x = torch.randn(settings.images, settings.widths[0], generator=generator)
    asleep = (x @ network.w.T <= threshold).all(1)
    found = simulate(settings, threshold, 4, CPU)
    assert 0 < asleep.double().mean() < 1
    assert found["blind"][0] == pytest.approx(100 * asleep.double().mean().item())


def test_without_sleeping_units_both_gradients_are_one():
    found = simulate(Sleep(radii=(0.1,), images=50), -100.0, 0, CPU)
    assert found["awake"] == [100.0]
    assert found["bp"] == found["linbp"]


def test_a_rate_is_that_of_pgd():
    settings = Sleep(radii=(0.2,), images=40)
    generator = torch.Generator().manual_seed(0)
    network = Sleeper(settings.widths, 1.0, generator)
    x = torch.randn(40, settings.widths[0], generator=generator)
    attack = PGD(eps=0.2, step=0.05, steps=10, restarts=1, bounds=(-20, 20))
    expected = attack(network, x, network(x).argmax(1)).success.double().mean().item()
    assert simulate(settings, 1.0, 0, CPU)["bp"] == [pytest.approx(100 * expected)]


def test_linbp_is_ahead_where_units_sleep_and_the_ball_is_wide_and_behind_where_neither():
    settings = Sleep(thresholds=(0.0, 3.0), radii=(0.05, 0.5), networks=4, images=80)
    found = replace(EXPERIMENTS[0], scales={"small": settings}).run("small", Bench())
    verdicts = {claim.id.partition(".")[2]: claim.verdict for claim in found.claims}
    assert verdicts["b3-eps0.5"] == "same direction"
    assert verdicts["b0-eps0.05"] == "opposite direction"
    assert "b3-eps0.5" in found.findings[0].text


def test_no_scale_rests_on_fewer_than_three_networks():
    assert all(scale.networks >= 3 for one in EXPERIMENTS for scale in one.scales.values())
