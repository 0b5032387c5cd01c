"""AutoAttack: the published set, each part on what the others left standing."""

import pytest
import torch
from torch import nn

from backpass.attacks import APGD, FAB, AutoAttack, Square
from backpass.errors import BackpassError


def test_the_parts_are_the_published_ones():
    ce, dlr, fab, square = AutoAttack(eps=0.1, norm="l2", seed=3).parts(classes=10)
    shared = {"eps": 0.1, "norm": "l2", "seed": 3}
    assert ce == APGD(**shared, steps=100)
    assert dlr == APGD(**shared, steps=100, loss="dlr-targeted", targets=9)
    assert fab == FAB(**shared, steps=100, targets=9)
    assert square == Square(**shared, queries=5000)


def test_it_fools_at_least_what_each_part_fools_first(cnn, held_out):
    x, y = held_out.x[:48], held_out.y[:48]
    whole = AutoAttack(eps=0.07, steps=10, queries=20, targets=3)
    result = whole(cnn, x, y)
    first = whole.parts(10)[0](cnn, x, y)
    assert bool((result.success | ~first.success).all())
    assert torch.equal(cnn(result.x_adv).argmax(1) != y, result.success)
    assert torch.equal(result.x_adv[first.success], first.x_adv[first.success])


def test_the_answer_is_that_of_any_batch_size(cnn, held_out):
    cnn, x, y = cnn.double(), held_out.x[:16].double(), held_out.y[:16]
    attack = AutoAttack(eps=0.1, steps=5, queries=10, targets=2)
    assert torch.equal(attack(cnn, x, y, batch_size=7).x_adv, attack(cnn, x, y).x_adv)


def test_two_classes_are_enough():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    x = torch.rand(8, 1, 8, 8)
    y = model(x).argmax(1)
    assert AutoAttack(eps=0.5, steps=5, queries=5)(model, x, y).success.all()


@pytest.mark.parametrize(("settings", "message"), [({"targeted": True}, "away from y"), ({"loss": "dlr"}, "itself")])
def test_what_it_does_not_do_is_refused(settings, message):
    with pytest.raises(BackpassError, match=message):
        AutoAttack(**settings)
