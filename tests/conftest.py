"""Fixtures that several families of tests share: real images, and small networks trained on them."""

from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpass.allocator import keep_freed_memory

keep_freed_memory()


class Images(NamedTuple):
    x: Tensor  # (N, 1, 8, 8) float32 in [0, 1]
    y: Tensor  # (N,) int64


@pytest.fixture(scope="session")
def digits() -> Images:
    """All 1,797 digits of scikit-learn, shuffled once; the networks below are trained on the first 1,200."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    return Images(images[order], torch.tensor(y)[order])


@pytest.fixture(scope="session")
def held_out(digits: Images) -> Images:
    return Images(digits.x[1200:], digits.y[1200:])


def _train(model: nn.Module, images: Images, epochs: int) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for rows in torch.randperm(1200, generator=generator).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images.x[rows]), images.y[rows]).backward()
            optimizer.step()
    optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="session")
def _trained_cnn(digits: Images) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, stride=2, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.1),
            nn.Linear(256, 10),
        )
        return _train(model, digits, epochs=12)


@pytest.fixture(scope="session")
def _trained_mlp(digits: Images) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)
        )
        return _train(model, digits, epochs=12)


@pytest.fixture
def cnn(_trained_cnn: nn.Module) -> nn.Module:
    """Convolution, BatchNorm, dropout: accuracy on the held-out digits above 95 %, in eval mode."""
    return copy.deepcopy(_trained_cnn)


@pytest.fixture
def mlp(_trained_mlp: nn.Module) -> nn.Module:
    """Three linear layers, accuracy on the held-out digits above 90 %, in eval mode."""
    return copy.deepcopy(_trained_mlp)


def pytest_collection_modifyitems(items):
    """Tests in parallel need names that are the same in every process."""
    odd = [item.nodeid for item in items if " at 0x" in item.nodeid]
    if odd:
        raise pytest.UsageError(f"a test's name holds an address; use ids=name_of of tests/support/names.py: {odd[0]}")
