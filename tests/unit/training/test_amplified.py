"""SVAG through the trainer, for any network: against a loop written by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from backpass import BackpassError
from backpass.attacks import PGD
from backpass.training import AdversarialTraining, Amplified, CrossEntropy, Trainer


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(9, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))


DATA = torch.rand(16, 1, 3, 3, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 3


def fit(model, objective, size=8, **settings):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Trainer(model, optimizer, DATA, epochs=1, batch_size=size, objective=objective, **settings).fit()


def test_a_step_is_that_of_two_weighted_batches():
    model = network()
    by_hand = copy.deepcopy(model)
    seen = []

    class Watched(CrossEntropy):
        def __call__(self, model, batch, plain):
            seen.append(batch)
            return super().__call__(model, batch, plain)

    fit(model, Amplified(Watched(), 4))
    assert [len(batch) for batch in seen] == [4, 4, 4, 4]
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    plus, minus = (7**0.5 + 1) / 2, (7**0.5 - 1) / 2
    for first, second in (seen[:2], seen[2:]):
        optimizer.zero_grad()
        loss = plus * F.cross_entropy(by_hand(first.x), first.y) - minus * F.cross_entropy(by_hand(second.x), second.y)
        loss.backward()
        optimizer.step()
    for ours, theirs in zip(model.state_dict().values(), by_hand.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_one_is_the_objective_itself_and_adversaries_are_searched_on_both_halves():
    plain, amplified = network(), network()
    fit(plain, CrossEntropy())
    fit(amplified, Amplified(CrossEntropy(), 1))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), amplified.parameters(), strict=True))
    found = fit(network(), Amplified(AdversarialTraining(PGD(eps=0.1, steps=2)), 2))
    assert 0 <= found.history[-1]["adversarial_accuracy"] <= 1


def test_mistakes_are_named():
    with pytest.raises(BackpassError, match="amplification"):
        Amplified(CrossEntropy(), 0)
    with pytest.raises(BackpassError, match="even batch_size"):
        fit(network(), Amplified(CrossEntropy(), 2), size=5)
