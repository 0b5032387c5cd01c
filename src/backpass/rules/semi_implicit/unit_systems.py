"""The unknowns of a layer's sub-problem, in the rows of its input or in its columns.

Every output unit j has a problem of its own in its weights w_j, with the same rows A. A bias with another penalty than
the weights is a column of the constant sqrt(c) in A, c = lam / lam_bias: b = sqrt(c) times that column's weight.

By rows, w_j = A^T u_j and u_j is the unknown: only K = A A^T is needed, and A^T in front of a vector is left out.
By columns, w_j itself is the unknown and A is applied as an operator, which for a convolution writes out no patches.
Tensors of unknowns and of outputs have all units side by side.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from backpass.rules.damped import solve
from backpass.rules.gram import row_gram
from backpass.rules.layers.convolution import Convolution
from backpass.rules.layers.linear_layer import Gradients, LinearLayer
from backpass.rules.layers.linear_layers import Linear

__all__ = ["ByColumns", "ByRows", "UnitSystem", "unit_system"]

# Squared pivots of a float32 Cholesky factor that spread further are computed anew in float64.
_ROWS_FLOOR = 1e-7
_COLUMNS_FLOOR = 1e-6

Wants = tuple[bool, bool]


class UnitSystem(ABC):
    """A with the unknowns' coordinates.

    Args:
        layer: the layer.
        x: its input, in the precision to solve in.
        wants: whether weight and bias learn; what does not is held fixed.
        ratio: c, the penalty on weights over the penalty on biases.
    """

    def __init__(self, layer: LinearLayer, x: Tensor, wants: Wants, ratio: float) -> None:
        self.layer = layer
        self.x = x
        self.wants = wants
        self.ratio = ratio if wants[1] else 0.0

    @abstractmethod
    def arrange(self, outputs: Tensor) -> Tensor:
        """A tensor like the layer's output in the arrangement that the other methods take."""

    @abstractmethod
    def apply(self, unknown: Tensor, out: Tensor | None = None) -> Tensor:
        """A w, in the memory of ``out`` where that serves."""

    @abstractmethod
    def adjoint(self, outputs: Tensor) -> Tensor:
        """The unknown that stands for A^T v."""

    def damped(self, weighting: Tensor, applied: Tensor, unknown: Tensor, out: Tensor) -> Tensor:
        """A^T diag(weighting) A w + w, with ``applied`` = A w; overwrites ``out``, which is like that."""
        return self.adjoint(torch.mul(weighting, applied, out=out)).add_(unknown)

    @abstractmethod
    def inner(self, first: Tensor, second: Tensor, applied: Tensor) -> Tensor:
        """<w, w'> per unit, where ``applied`` is A w'; broadcasts over unknowns."""

    def over_outputs(self, per_unit: Tensor) -> Tensor:
        """What `inner` gives, to broadcast over outputs instead."""
        return per_unit

    @abstractmethod
    def square(self, outputs: Tensor) -> Tensor:
        """|v|^2 of each unit's outputs; broadcasts over unknowns."""

    @abstractmethod
    def solve(self, outputs: Tensor, lam: float) -> Tensor:
        """The unknown that stands for (A^T A + lam I)^{-1} A^T v, the same system for all units; the last call.

        Raises:
            NotFiniteError: A is not finite.
        """

    @abstractmethod
    def weights(self, unknown: Tensor) -> Gradients:
        """The unknown as tensors like weight and bias, None for what is held fixed."""


class ByRows(UnitSystem):
    """Unknowns u with w = A^T u: (blocks, n, units), as the outputs."""

    def __init__(self, layer: LinearLayer, x: Tensor, wants: Wants, ratio: float) -> None:
        super().__init__(layer, x, wants, ratio)
        self.rows = layer.rows(x)
        self.gram = self._gram(x.dtype)
        self._products: Tensor | None = None

    def _gram(self, dtype: torch.dtype) -> Tensor:
        gram = row_gram(self.rows.to(dtype)) if self.wants[0] else self._no_columns(dtype)
        return gram.add_(self.ratio) if self.ratio else gram

    def _no_columns(self, dtype: torch.dtype) -> Tensor:
        blocks, n = self.rows.shape[:2]
        return self.rows.new_zeros(blocks, n, n, dtype=dtype)

    def arrange(self, outputs: Tensor) -> Tensor:
        """As (blocks, n, units)."""
        return self.layer.output_rows(outputs)

    def apply(self, unknown: Tensor, out: Tensor | None = None) -> Tensor:
        """K u."""
        return self.gram @ unknown if out is None else torch.bmm(self.gram, unknown, out=out)

    def adjoint(self, outputs: Tensor) -> Tensor:
        """V itself."""
        return outputs

    def damped(self, weighting: Tensor, applied: Tensor, unknown: Tensor, out: Tensor) -> Tensor:
        """diag(weighting) K u + u."""
        return torch.addcmul(unknown, weighting, applied, out=out)

    def inner(self, first: Tensor, second: Tensor, applied: Tensor) -> Tensor:
        """Sum over n of u K u'."""
        # In one piece of memory for all calls: fresh pages cost more than the products.
        if self._products is None:
            self._products = torch.empty_like(first)
        return torch.mul(first, applied, out=self._products).sum(-2, keepdim=True)

    def square(self, outputs: Tensor) -> Tensor:
        """Sum over n."""
        return self.inner(outputs, outputs, outputs)

    def solve(self, outputs: Tensor, lam: float) -> Tensor:
        """(K + lam I)^{-1} v."""

        def system(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
            return self.gram if dtype == self.gram.dtype else self._gram(dtype), outputs.to(dtype)

        return solve(system, lam, outputs.dtype, _ROWS_FLOOR).to(outputs.dtype)

    def weights(self, unknown: Tensor) -> Gradients:
        """U^T A and c times the sum of u."""
        weight = self.layer.weight(unknown.mT @ self.rows) if self.wants[0] else None
        return weight, self.ratio * unknown.sum(-2).flatten() if self.wants[1] else None


class ByColumns(UnitSystem):
    """Unknowns w: (blocks, units, columns), the bias's column last; outputs as the layer's own."""

    @property
    def _root(self) -> float:
        return math.sqrt(self.ratio)

    def _split(self, unknown: Tensor) -> Gradients:
        weight, bias = self.wants
        of_weight = self.layer.weight(unknown[..., :-1] if bias else unknown) if weight else None
        return of_weight, unknown[..., -1].flatten() if bias else None

    def _join(self, gradients: Gradients) -> Tensor:
        weight, bias = gradients
        parts = [] if weight is None else [self.layer.matrix(weight)]
        if bias is not None:
            parts.append(self.layer.bias_matrix(bias) * self._root)
        return torch.cat(parts, -1)

    def arrange(self, outputs: Tensor) -> Tensor:
        """As it is."""
        return outputs

    def apply(self, unknown: Tensor, out: Tensor | None = None) -> Tensor:
        """The layer itself."""
        weight, bias = self._split(unknown)
        if bias is not None:
            bias = bias * self._root
        if weight is None:
            weight = self.x.new_zeros(self.layer.shape)
        if isinstance(self.layer, Convolution):
            return _convolve(self.layer, self.x, weight, bias)
        z = self.x @ weight.mT
        return z if bias is None else z.add_(bias)

    def adjoint(self, outputs: Tensor) -> Tensor:
        """The layer's weight gradient."""
        return self._join(self.layer.gradients(self.x, outputs, *self.wants))

    def inner(self, first: Tensor, second: Tensor, applied: Tensor) -> Tensor:
        """Sum over columns of w w'."""
        return (first * second).sum(-1, keepdim=True)

    def over_outputs(self, per_unit: Tensor) -> Tensor:
        """Along the channels of a convolution, along the last dimension otherwise."""
        flat = per_unit.flatten()
        return flat.reshape(-1, *[1] * (len(self.layer.shape) - 2))

    def square(self, outputs: Tensor) -> Tensor:
        """Sum over all dimensions but that of the units."""
        last = not isinstance(self.layer, Convolution)
        units = outputs if last else outputs.movedim(1, -1)
        return units.square().flatten(0, -2).sum(0).reshape(self.layer.blocks, -1, 1)

    def solve(self, outputs: Tensor, lam: float) -> Tensor:
        """(A^T A + lam I)^{-1} A^T v."""

        def system(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
            x = self.x.to(dtype)
            right = self._join(self.layer.gradients(x, outputs.to(dtype), *self.wants)).mT
            return self._gram(x), right

        return solve(system, lam, outputs.dtype, _COLUMNS_FLOOR).mT.to(outputs.dtype)

    def _gram(self, x: Tensor) -> Tensor:
        if not self.wants[0]:
            return x.new_full((self.layer.blocks, 1, 1), self.layer.count(x) * self.ratio)
        gram = self.layer.gram(x, self.wants[1])
        if self.wants[1]:
            gram[:, -1] *= self._root
            gram[:, :, -1] *= self._root
        return gram

    def weights(self, unknown: Tensor) -> Gradients:
        """w, and sqrt(c) times its last column."""
        weight, bias = self._split(unknown)
        return weight, None if bias is None else bias * self._root


def unit_system(layer: LinearLayer, x: Tensor, wants: Wants, ratio: float, direct: bool) -> UnitSystem:
    """The system on the cheaper side, for a direct solve or for conjugate gradients."""
    if isinstance(layer, Linear):
        # An iteration costs one product with K, or one with A and one with A^T.
        few_rows = layer.count(x) <= layer.shape[1] * (1 if direct else 2)
    else:
        few_rows = layer.has_rows and layer.count(x) <= layer.columns(wants[1])
    return (ByRows if few_rows else ByColumns)(layer, x, wants, ratio)


def _convolve(layer: Convolution, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    padding = layer.before
    if layer.before != layer.after:
        x, padding = layer.spread(x), (0,) * len(layer.before)
    settings: Any = (layer.stride, padding, layer.dilation, bool(layer.transposed), layer.output_padding, layer.groups)
    z: Tensor = torch.ops.aten.convolution(x, weight, bias, *settings)
    return z
