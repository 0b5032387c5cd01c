"""What SIBP is for: a deep network from weights so small that plain SGD hardly starts, on real digits."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from backpass import SIBP

pytestmark = pytest.mark.slow


def train(digits, rule: SIBP | None, rate: float) -> float:
    """Held-out accuracy after 20 epochs of six hidden layers of 100 from N(0, .05)."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs in (64, *[100] * 5):
        layers += [nn.Linear(inputs, 100), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(100, 10))
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0, 0.05) if parameter.dim() > 1 else nn.init.zeros_(parameter)
    optimizer = torch.optim.SGD(model.parameters(), rate)
    attached = rule.attach(model) if rule else None
    for _ in range(20):
        for rows in torch.randperm(1200).split(50):
            optimizer.zero_grad()
            F.cross_entropy(model(digits.x[rows]), digits.y[rows]).backward()
            optimizer.step()
    if attached:
        attached.remove()
    with torch.no_grad():
        return float((model(digits.x[1200:]).argmax(1) == digits.y[1200:]).float().mean())


def test_sibp_starts_where_sgd_hardly_does(digits) -> None:
    assert max(train(digits, None, rate) for rate in (0.1, 0.5, 2.0)) < 0.7
    assert train(digits, SIBP(eta=0.25), 1.0) > 0.95
