"""Where LinBP is placed when it is chosen: the start whose attack fools most, found among all."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from backpass import BackpassError, LinBP
from backpass.attacks import PGD
from backpass.lab.placement_search import choose_start
from backpass.models import build

ATTACK = PGD(eps=0.3, step=0.05, steps=10, restarts=1, random_start=False)


class Planted(nn.Module):
    """The first unit is far too deep asleep and misleads; the second has to be woken. Best is start=-1."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 1))

    def forward(self, x):
        z = F.linear(x.flatten(1)[:, :1], self.weight)
        misled = torch.relu(F.linear(z, -20 * self.weight) - 180)
        other = 10 * torch.relu(z - 0.6 + misled) - 0.1
        return torch.cat([torch.zeros_like(other), other], 1)


def images(count):
    return torch.full((count, 1, 2, 2), 0.5), torch.zeros(count, dtype=torch.long)


def test_the_best_start_of_a_planted_network_is_found():
    choice = choose_start(LinBP(), Planted(), *images(6), ATTACK)
    assert choice.rule == LinBP(start=-1)
    assert {start: rate.value for start, rate in choice.rates.items()} == {-1: 1.0, -2: 0.0}
    assert choice.plain.value == 0.0


def test_the_rates_are_those_of_the_attack_itself():
    torch.manual_seed(0)
    model = build("mlp:widths=20-20-20").eval()
    x = torch.rand(30, 1, 8, 8)
    y = model(x).argmax(1)
    attack = replace(ATTACK, eps=0.05, step=0.02, steps=3)
    choice = choose_start(LinBP(slope=0.5), model, x, y, attack)
    for start, rate in choice.rates.items():
        with LinBP(start=start, slope=0.5).attach(model):
            assert rate.hits == int(attack(model, x, y).success.sum())
    assert choice.plain.hits == int(attack(model, x, y).success.sum())
    assert choice.rates[choice.rule.start].hits == max(rate.hits for rate in choice.rates.values())
    assert choice.rule.slope == 0.5


def test_of_many_sites_a_few_are_tried_from_the_last_to_the_first():
    model = build("mlp:widths=8-8-8-8-8-8-8-8-8").eval()
    starts = list(choose_start(LinBP(), model, torch.rand(2, 1, 8, 8), torch.tensor([0, 1]), ATTACK, most=4).rates)
    assert (starts[0], starts[-1], len(starts)) == (-1, -9, 4)
    assert list(choose_start(LinBP(), model, torch.rand(2, 1, 8, 8), torch.tensor([0, 1]), ATTACK, most=1).rates) == [
        -1
    ]


@pytest.mark.parametrize(("count", "most"), [(0, 3), (2, 0)])
def test_a_search_without_images_or_starts_is_refused(count, most):
    with pytest.raises(BackpassError, match="needs an image and a start"):
        choose_start(LinBP(), Planted(), *images(count), ATTACK, most=most)
