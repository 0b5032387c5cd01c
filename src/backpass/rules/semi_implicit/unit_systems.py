# ruff: noqa: D102  the methods' docstrings are at ByRows
"""Linear systems of a layer's sub-problems, in row or column coordinates.

Each output unit j has a least-squares problem in its weights w_j with the common matrix A. A bias is a constant column
sqrt(c) of A, with c = lam / lam_bias, and b = sqrt(c) times the weight of that column.

By rows, w_j = A^T u_j with the unknown u_j: only K = A A^T is needed, and A^T v is represented by v. By columns, w_j
is the unknown and A is applied as an operator, without materialising the patches of a convolution. Tensors of unknowns
and outputs hold all units.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from backpass.rules.implicit.layers import Gradients, Linear, LinearLayer
from backpass.rules.implicit.systems import row_gram, solve

__all__ = ["ByColumns", "ByRows", "UnitSystem", "unit_system"]

# If the squared pivots of a float32 Cholesky factor spread further, it is recomputed in float64.
_ROWS_FLOOR = 1e-7
_COLUMNS_FLOOR = 1e-6

Wants = tuple[bool, bool]


class ByRows:
    """Row coordinates: unknowns u with w = A^T u, (blocks, n, units) like the outputs.

    Args:
        layer: the layer.
        x: input of the layer, in the precision of the solve.
        wants: flags for weight and bias; the other one is held fixed.
        ratio: c = lam / lam_bias.
    """

    def __init__(self, layer: LinearLayer, x: Tensor, wants: Wants, ratio: float) -> None:
        self.layer, self.wants, self.ratio = layer, wants, ratio if wants[1] else 0.0
        self.rows = layer.rows(x)
        self.gram = self._gram(x.dtype)
        self._products: Tensor | None = None

    def _gram(self, dtype: torch.dtype) -> Tensor:
        blocks, n = self.rows.shape[:2]
        gram = row_gram(self.rows.to(dtype)) if self.wants[0] else self.rows.new_zeros(blocks, n, n, dtype=dtype)
        return gram.add_(self.ratio) if self.ratio else gram

    def arrange(self, outputs: Tensor) -> Tensor:
        """Arrange a tensor of the shape of the layer's output for the other methods."""
        return self.layer.output_rows(outputs)

    def apply(self, unknown: Tensor, out: Tensor | None = None) -> Tensor:
        """Return A w, in the memory of ``out`` if possible."""
        return self.gram @ unknown if out is None else torch.bmm(self.gram, unknown, out=out)

    def adjoint(self, outputs: Tensor) -> Tensor:
        """Return the unknown that represents A^T v."""
        return outputs

    def damped(self, weighting: Tensor, applied: Tensor, unknown: Tensor, out: Tensor) -> Tensor:
        """Return A^T diag(weighting) A w + w, given ``applied`` = A w; overwrites ``out``."""
        return torch.addcmul(unknown, weighting, applied, out=out)

    def inner(self, first: Tensor, second: Tensor, applied: Tensor) -> Tensor:
        """Return <w, w'> per unit, given ``applied`` = A w'; the result broadcasts over unknowns."""
        # Reuse one buffer in all calls: allocating fresh pages costs more than the products.
        if self._products is None:
            self._products = torch.empty_like(first)
        return torch.mul(first, applied, out=self._products).sum(-2, keepdim=True)

    def over_outputs(self, per_unit: Tensor) -> Tensor:
        """Reshape a result of `inner` so that it broadcasts over outputs."""
        return per_unit

    def square(self, outputs: Tensor) -> Tensor:
        """Return |v|^2 per unit; the result broadcasts over unknowns."""
        return self.inner(outputs, outputs, outputs)

    def solve(self, outputs: Tensor, lam: float) -> Tensor:
        """Return the unknown that represents (A^T A + lam I)^{-1} A^T v for all units. Must be the last call.

        Raises:
            NotFiniteError: A is not finite.
        """

        def system(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
            return self.gram if dtype == self.gram.dtype else self._gram(dtype), outputs.to(dtype)

        return solve(system, lambda gram: lam, outputs.dtype, _ROWS_FLOOR)[0].to(outputs.dtype)

    def weights(self, unknown: Tensor) -> Gradients:
        """Convert the unknown to tensors of the shapes of weight and bias; None for a fixed one."""
        weight = self.layer.weight(unknown.mT @ self.rows) if self.wants[0] else None
        return weight, self.ratio * unknown.sum(-2).flatten() if self.wants[1] else None


class ByColumns:
    """Column coordinates: unknowns w, (blocks, units, columns), with the column of the bias last."""

    def __init__(self, layer: LinearLayer, x: Tensor, wants: Wants, ratio: float) -> None:
        self.layer, self.x, self.wants, self.ratio = layer, x, wants, ratio if wants[1] else 0.0
        self._root = math.sqrt(self.ratio)
        self._by_rows = layer.is_product
        self._rows = layer.rows(x) if self._by_rows else x

    def arrange(self, outputs: Tensor) -> Tensor:
        return self.layer.output_rows(outputs) if self._by_rows else outputs

    def apply(self, unknown: Tensor, out: Tensor | None = None) -> Tensor:
        if self._by_rows:
            columns = unknown.shape[-1] - self.wants[1]
            if not self.wants[0]:
                return unknown.mT.expand(-1, self._rows.shape[1], -1) * self._root
            z = self._rows @ unknown[..., :columns].mT
            return z.add_(unknown[..., columns:].mT, alpha=self._root) if self.wants[1] else z
        weight, bias = self.weights(unknown)
        weight = self.x.new_zeros(self.layer.shape) if weight is None else weight
        return self.layer.outputs(self.x, weight, bias)

    def adjoint(self, outputs: Tensor) -> Tensor:
        if self._by_rows:
            parts = [outputs.mT @ self._rows] if self.wants[0] else []
            parts += [outputs.sum(-2).unsqueeze(-1) * self._root] if self.wants[1] else []
        else:
            weight, bias = self.layer.gradients(self.x, outputs, *self.wants)
            parts = [] if weight is None else [self.layer.matrix(weight)]
            parts += [] if bias is None else [self.layer.bias_matrix(bias) * self._root]
        return torch.cat(parts, -1) if len(parts) > 1 else parts[0]

    def damped(self, weighting: Tensor, applied: Tensor, unknown: Tensor, out: Tensor) -> Tensor:
        return self.adjoint(torch.mul(weighting, applied, out=out)).add_(unknown)

    def inner(self, first: Tensor, second: Tensor, applied: Tensor) -> Tensor:
        return (first * second).sum(-1, keepdim=True)

    def over_outputs(self, per_unit: Tensor) -> Tensor:
        return per_unit.mT if self._by_rows else per_unit.reshape(-1, *[1] * (len(self.layer.shape) - 2))

    def square(self, outputs: Tensor) -> Tensor:
        if self._by_rows:
            return outputs.square().sum(-2).unsqueeze(-1)
        return outputs.movedim(1, -1).square().flatten(0, -2).sum(0).reshape(self.layer.blocks, -1, 1)

    def solve(self, outputs: Tensor, lam: float) -> Tensor:
        def system(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
            same = self if dtype == self.x.dtype else ByColumns(self.layer, self.x.to(dtype), self.wants, self.ratio)
            return same._gram(), same.adjoint(outputs.to(dtype)).mT

        return solve(system, lambda gram: lam, outputs.dtype, _COLUMNS_FLOOR)[0].mT.to(outputs.dtype)

    def _gram(self) -> Tensor:
        x, count = self.x, self.layer.count(self.x)
        if not self.wants[0]:
            return torch.full((self.layer.blocks, 1, 1), count * self.ratio, dtype=x.dtype, device=x.device)
        gram = self.layer.gram(x, self.wants[1])
        if self.wants[1]:
            gram[:, -1] *= self._root
            gram[:, :, -1] *= self._root
        return gram

    def weights(self, unknown: Tensor) -> Gradients:
        weight, bias = self.wants
        of_weight = self.layer.weight(unknown[..., :-1] if bias else unknown) if weight else None
        return of_weight, unknown[..., -1].flatten() * self._root if bias else None


UnitSystem = ByRows | ByColumns


def unit_system(layer: LinearLayer, x: Tensor, wants: Wants, ratio: float, direct: bool) -> UnitSystem:
    """Return the cheaper system, for a direct solve or for conjugate gradients."""
    if isinstance(layer, Linear):
        # An iteration costs one product with K, or one with A and one with A^T.
        few_rows = layer.count(x) <= layer.columns(False) * (1 if direct else 2)
    else:
        few_rows = layer.has_rows and layer.count(x) <= layer.columns(wants[1])
    return (ByRows if few_rows else ByColumns)(layer, x, wants, ratio)
