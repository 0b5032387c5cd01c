"""AutoAttack: the published set, each part on what the others left standing."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from backpass.attacks import APGD, FAB, AutoAttack, Square

SHARED = {"eps": 0.1, "norm": "l2", "seed": 3, "published": True}
STEPS = {**SHARED, "steps": 100}
VERSIONS = {
    "standard": [
        APGD(**STEPS),
        APGD(**STEPS, loss="dlr-targeted", targets=9),
        FAB(**STEPS, targets=9),
        Square(**SHARED, queries=5000),
    ],
    "plus": [
        APGD(**STEPS, restarts=5),
        APGD(**STEPS, loss="dlr", restarts=5),
        FAB(**STEPS, targets=None, restarts=5),
        Square(**SHARED, queries=5000),
        APGD(**STEPS, loss="dlr-targeted", targets=9),
        FAB(**STEPS, targets=9),
    ],
    "rand": [APGD(**STEPS, eot=20), APGD(**STEPS, eot=20, loss="dlr")],
}
VERSIONS["paper"] = [replace(part, published=False) for part in VERSIONS["standard"]]


@pytest.mark.parametrize("version", VERSIONS)
def test_the_parts_of_each_version(version):
    assert AutoAttack(eps=0.1, norm="l2", seed=3, version=version).parts(10) == tuple(VERSIONS[version])


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
