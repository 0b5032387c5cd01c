"""AutoAttack beside the authors' code, on an adversarially trained network."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from backpass.attacks import PGD, AutoAttack

pyautoattack = pytest.importorskip("pyautoattack", reason="needs the package pyautoattack, the authors' code")

EPS, STEPS, QUERIES = {"linf": 0.2, "l2": 0.8}, 50, 500


class Counted(nn.Module):
    """A network that counts the samples whose gradient is taken."""

    def __init__(self, network):
        super().__init__()
        self.network, self.gradients = network, 0

    def forward(self, x):
        self.gradients += len(x) * (torch.is_grad_enabled() and x.requires_grad)
        return self.network(x)


@pytest.fixture(scope="module")
def robust(_trained_cnn, digits):
    """The convolutional network, trained for four more epochs on PGD images."""
    model = copy.deepcopy(_trained_cnn).train()
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    attack = PGD(eps=0.2, step=0.07, steps=5, restarts=1, early_stop=False)
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(4):
            for rows in torch.randperm(1200, generator=generator).split(64):
                x_adv = attack(model, digits.x[rows], digits.y[rows]).x_adv
                optimizer.zero_grad()
                F.cross_entropy(model(x_adv), digits.y[rows]).backward()
                optimizer.step()
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("norm", EPS)
def test_the_robust_set_is_that_of_the_authors_code_with_fewer_gradients(norm, robust, held_out):
    x, y, eps = held_out.x[:500], held_out.y[:500], EPS[norm]
    right = robust(x).argmax(1) == y
    ours = AutoAttack(eps=eps, norm=norm, steps=STEPS, queries=QUERIES)(robust, x, y)
    counted = Counted(robust)
    theirs = pyautoattack.AutoAttack(counted, norm=norm.capitalize(), eps=eps, seed=0)
    theirs.square.n_queries = QUERIES
    for part in (theirs.apgd, theirs.apgd_targeted, theirs.fab):
        part.n_iter = STEPS
    with torch.random.fork_rng():
        x_adv, _ = theirs.run_standard_evaluation(x, y, batch_size=500)
    standing = robust(x_adv).argmax(1) == y
    assert 0.3 < standing.float().mean() < 0.7
    assert int(((right & ~ours.success) != standing).sum()) <= 1
    assert ours.gradients <= counted.gradients
