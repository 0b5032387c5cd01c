"""Functions of one or two variables by their values on Chebyshev nodes: interpolation and differentiation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from backpass.errors import BackpassError

__all__ = ["MOST_NODES", "ChebyshevGrid"]

MOST_NODES = 20
"""Per dimension. Above, interpolation outside of the box grows so fast that powers of an operator blow up."""


class ChebyshevGrid:
    """A box with n nodes of cos(pi j / (n - 1)) in each of its one or two dimensions.

    Attributes:
        points: the nodes, (Q, d) float64 with Q = n^d.
        derivatives: d matrices (Q, Q), from a function's values at the nodes to those of its partial derivative.

    Args:
        bounds: lower and upper end of every dimension.
        nodes: n, in [4, 20].

    Raises:
        BackpassError: another number of dimensions or nodes, or an empty box.
    """

    def __init__(self, bounds: Sequence[tuple[float, float]], nodes: int) -> None:
        if len(bounds) not in (1, 2):
            raise BackpassError(f"bounds are pairs (low, high) for one or two dimensions; got {len(bounds)}.")
        if not all(math.isfinite(low) and math.isfinite(high) and low < high for low, high in bounds):
            raise BackpassError(f"every pair of bounds is finite with low < high; got {list(bounds)}.")
        if not 4 <= nodes <= MOST_NODES:
            raise BackpassError(
                f"nodes per dimension are from 4 to {MOST_NODES}: with more, powers blow up; got {nodes}."
            )
        unit = torch.cos(math.pi * torch.arange(nodes, dtype=torch.float64) / (nodes - 1))
        self._weights = (-1.0) ** torch.arange(nodes, dtype=torch.float64)
        self._weights[[0, -1]] /= 2
        self._axes = [(low + high) / 2 + (high - low) / 2 * unit for low, high in bounds]
        self.points = torch.cartesian_prod(*self._axes).view(-1, len(bounds))
        eye = torch.eye(nodes, dtype=torch.float64)
        slopes = [self._differentiation(axis) for axis in self._axes]
        if len(bounds) == 1:
            self.derivatives = slopes
        else:
            self.derivatives = [torch.kron(slopes[0], eye), torch.kron(eye, slopes[1])]

    def interpolation(self, theta: Tensor) -> Tensor:
        """The matrix from values at the nodes to values at theta, (..., d) -> (..., Q)."""
        matrix = self._interpolation(self._axes[0], theta[..., 0])
        for axis, coordinate in zip(self._axes[1:], theta.unbind(-1)[1:], strict=True):
            matrix = (matrix[..., :, None] * self._interpolation(axis, coordinate)[..., None, :]).flatten(-2)
        return matrix

    def _interpolation(self, axis: Tensor, at: Tensor) -> Tensor:
        """The second barycentric formula."""
        distance = at[..., None] - axis
        hit = distance == 0
        terms = self._weights / distance.masked_fill(hit, 1.0)
        matrix = terms / terms.sum(-1, keepdim=True)
        return torch.where(hit.any(-1, keepdim=True), hit.to(matrix), matrix)

    def _differentiation(self, axis: Tensor) -> Tensor:
        """Rows sum to zero, so that the derivative of a constant vanishes to the last bit."""
        distance = (axis[:, None] - axis).fill_diagonal_(1.0)
        matrix = (self._weights / self._weights[:, None] / distance).fill_diagonal_(0.0)
        return matrix - matrix.sum(1).diag()
