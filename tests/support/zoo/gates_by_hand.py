"""Modules with gates as people write them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.zoo.activations_by_hand import WIDTH, HardSigmoid, HardSwish

__all__ = [
    "FunctionalSqueezeExcitation",
    "GatedLinearUnit",
    "HardGate",
    "Highway",
    "SpatialAttention",
    "SqueezeExcitation",
]


class SqueezeExcitation(nn.Module):
    """The gate at the end of a Sequential; its output is viewed and expanded before it multiplies."""

    def __init__(self, gate: type[nn.Module]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.fc = nn.Sequential(nn.Linear(8, 4), nn.ReLU(inplace=True), nn.Linear(4, 8), gate())
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        weight = self.fc(x.mean((2, 3))).view(x.shape[0], 8, 1, 1)
        return self.head((x * weight.expand_as(x)).mean((2, 3)))


class FunctionalSqueezeExcitation(nn.Module):
    """`scale * x` with functions; the gate is computed first and used later."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.down, self.up = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.conv(x))
        scale = F.adaptive_avg_pool2d(x, 1)
        scale = self.up(F.silu(self.down(scale)))
        scale = F.hardsigmoid(scale)
        return self.head((scale * x).mean((2, 3)))


class SpatialAttention(nn.Module):
    """CBAM's: the gate is a map of one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.attend, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(2, 1, 3, padding=1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        gate = self.attend(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)).sigmoid()
        return self.head((x * gate).mean((2, 3)))


class GatedLinearUnit(nn.Module):
    """a * sigmoid(b), from two halves of one projection."""

    def __init__(self, gate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(WIDTH, 10), nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3)
        self.gate = [gate]

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.first(x).chunk(2, dim=-1)
        return self.last(torch.relu(self.second(self.gate[0](gate) * value)))


class Highway(nn.Module):
    """t * relu(H x) + (1 - t) * x with t = sigmoid(T x)."""

    def __init__(self) -> None:
        super().__init__()
        self.transform, self.gate, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        t = torch.sigmoid(self.gate(x))
        return self.last(t * F.relu(self.transform(x)) + (1 - t) * x)


class HardGate(nn.Module):
    """Squeeze-and-excitation with a gate that is an elementwise module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.fc = nn.Sequential(nn.Linear(8, 4), nn.ReLU(inplace=True), nn.Linear(4, 8), HardSigmoid())
        self.act, self.head = HardSwish(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv(x))
        return self.head((x * self.fc(x.mean((2, 3)))[:, :, None, None]).mean((2, 3)))
