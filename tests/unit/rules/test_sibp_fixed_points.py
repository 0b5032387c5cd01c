"""Where SIBP stands still the loss is stationary, and the other way round."""

import pytest
import torch
from torch import Tensor, nn

from backpass import SIBP


@pytest.fixture
def problem() -> tuple[nn.Module, Tensor, Tensor]:
    """Targets that the network cannot reach: the gradient vanishes where the errors do not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    return model, torch.randn(30, 2).double(), torch.randn(30, 1).double()


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (model(x) - y).square().sum() / len(x)


def length(model: nn.Module, x: Tensor, y: Tensor, rule: SIBP | None) -> float:
    """Of the gradient, or of the rule's step, for the full batch."""
    model.zero_grad()
    attached = rule.attach(model) if rule else None
    loss(model, x, y).backward()
    if attached:
        attached.remove()
    return float(torch.stack([p.grad.norm() for p in model.parameters()]).norm())


def test_steps_and_gradient_vanish_together(problem: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = problem
    settings = {"tolerance_grad": 0, "tolerance_change": 0, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=10, **settings)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(model, x, y)
        value.backward()
        return value

    path = []
    for _ in range(25):
        path.append((length(model, x, y, None), length(model, x, y, SIBP(eta=0.5, lam=0.3, cg_steps=20))))
        optimizer.step(closure)
    gradients, steps = torch.tensor(path).T
    assert gradients.min() < 1e-4 * gradients.max()
    assert loss(model, x, y) > 0.1  # not because the errors vanish
    # Through unchanged weights |step| lies between n eta / (lam + |A|^2) and n eta / lam times |gradient|.
    assert (steps / gradients).max() <= 30 * 0.5 / 0.3
    assert (steps / gradients).min() >= 0.1


def test_iterated_steps_approach_a_stationary_point(problem: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = problem
    before = length(model, x, y, None)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    with SIBP(eta=0.1, lam=10.0).attach(model):
        for _ in range(600):
            optimizer.zero_grad()
            loss(model, x, y).backward()
            optimizer.step()
    assert length(model, x, y, None) < 0.1 * before
    assert loss(model, x, y) > 0.1
