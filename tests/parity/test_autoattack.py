"""AutoAttack beside the authors' code, on an adversarially trained network."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from backpass.attacks import PGD, AutoAttack

pyautoattack = pytest.importorskip("pyautoattack", reason="needs the package pyautoattack, the authors' code")

STEPS, QUERIES = 50, 500


class Counted(nn.Module):
    """A network that counts the samples whose gradient is taken."""

    def __init__(self, network):
        super().__init__()
        self.network, self.gradients = network, 0

    def forward(self, x):
        self.gradients += len(x) * (torch.is_grad_enabled() and x.requires_grad)
        return self.network(x)


@pytest.fixture
def robust(digits):
    """A convolutional network, trained for two epochs on images and for six on PGD images."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2, padding=1), nn.ReLU()]
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 10))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    attack = PGD(eps=0.2, step=0.07, steps=5, restarts=1, early_stop=False)
    for epoch in range(8):
        for rows in torch.randperm(1200, generator=generator).split(64):
            x, y = digits.x[rows], digits.y[rows]
            x = attack.search(model, x, y, indices=rows) if epoch > 1 else x
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.15), ("l2", 0.8)])
def test_the_robust_set_is_that_of_the_authors_code_with_fewer_gradients(robust, held_out, norm, eps):
    x, y = held_out.x[:500], held_out.y[:500]
    right = robust(x).argmax(1) == y
    ours = AutoAttack(eps=eps, norm=norm, steps=STEPS, queries=QUERIES)(robust, x, y)
    counted = Counted(robust)
    theirs = pyautoattack.AutoAttack(counted, norm=norm.capitalize(), eps=eps, seed=0)
    theirs.square.n_queries = QUERIES
    for part in (theirs.apgd, theirs.apgd_targeted, theirs.fab):
        part.n_iter = STEPS
    for part in (theirs.apgd, theirs.apgd_targeted):  # which place their checkpoints when they are made
        part.n_iter_2, part.n_iter_min, part.size_decr = (max(int(share * STEPS), 1) for share in (0.22, 0.06, 0.03))
    with torch.random.fork_rng():
        x_adv, _ = theirs.run_standard_evaluation(x, y, batch_size=500)
    standing = robust(x_adv).argmax(1) == y
    assert 0.2 < standing.float().mean() < 0.7
    assert int(((right & ~ours.success) != standing).sum()) <= 1
    assert ours.gradients <= counted.gradients
