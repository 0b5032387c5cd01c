"""Quadratic losses with known matrices, for what measures gradients and curvatures."""

import torch
from torch import nn

F64 = torch.float64


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def quadratic(matrix, gradients):
    """Two losses theta A_i theta / 2 + c_i . theta, i = 1, 2."""
    theta = nn.Parameter(normal(len(matrix[0]), seed=9))
    return theta, [lambda A=A, c=c: theta @ A @ theta / 2 + c @ theta for A, c in zip(matrix, gradients, strict=True)]


def symmetric(n, seed):
    m = normal(n, n, seed=seed)
    return m @ m.mT / n
