"""FAB: its projection against a slow search, and the attack against a linear model's known distance."""

import pytest
import torch
from torch import nn

from backpass.attacks import FAB
from backpass.attacks.hyperplane import towards_hyperplane

NORMS = pytest.mark.parametrize("norm", ["linf", "l2"])


def slow_projection(z, w, gap, norm):
    """Bisection on the size of the move: with t given, every coordinate goes as far as t and the box allow."""
    room = torch.where(w * gap > 0, 1 - z, z)

    def move(t):
        return torch.minimum(torch.full_like(room, t) if norm == "linf" else t * w.abs(), room) * (w * gap).sign()

    low, high = 0.0, 1e4
    for _ in range(200):
        t = 0.5 * (low + high)
        low, high = (t, high) if float((w * move(t)).sum()) * gap.sign() < gap.abs() else (low, t)
    return move(high)


@NORMS
def test_the_nearest_point_of_the_hyperplane_in_the_box(norm):
    g = torch.Generator().manual_seed(0)
    z = torch.rand(200, 12, generator=g, dtype=torch.float64)
    z[:, :2] = z[:, :2].round()  # some already on the bounds
    w = torch.randn(200, 12, generator=g, dtype=torch.float64)
    w[:50, 3] = 0
    gap = torch.randn(200, generator=g, dtype=torch.float64) * 2
    found = towards_hyperplane(z, w, gap, norm, (0.0, 1.0))
    expected = torch.stack([slow_projection(*row, norm) for row in zip(z, w, gap, strict=True)])
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)
    assert ((z + found) > -1e-12).all()
    assert ((z + found) < 1 + 1e-12).all()


@NORMS
def test_it_finds_what_is_just_inside_the_distance_of_a_linear_boundary(norm):
    torch.manual_seed(0)
    model = nn.Linear(20, 2).double()
    x = 0.3 + 0.4 * torch.rand(40, 20, dtype=torch.float64)
    y = model(x).argmax(1)
    w = model.weight[0] - model.weight[1]
    gap = (model(x)[:, 0] - model(x)[:, 1]).abs()
    distance = (gap / (w.abs().sum() if norm == "linf" else w.norm())).median().item()
    result = FAB(norm=norm, eps=distance * 1.001, steps=30, targets=1)(model, x, y)
    near = gap / (w.abs().sum() if norm == "linf" else w.norm()) <= distance
    assert torch.equal(result.success, near)


@NORMS
def test_the_answer_is_that_of_any_batch_size(cnn, held_out, norm):
    cnn, x, y = cnn.double(), held_out.x[:16].double(), held_out.y[:16]
    attack = FAB(eps=0.1 if norm == "linf" else 0.5, norm=norm, steps=6, targets=2, restarts=2)
    whole, part = attack(cnn, x, y), attack(cnn, x, y, batch_size=7)
    torch.testing.assert_close(part.x_adv, whole.x_adv, atol=1e-9, rtol=0)
    assert torch.equal(part.success, whole.success)
