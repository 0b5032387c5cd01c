# ruff: noqa: D102  the methods' docstrings are at LinearLayer
"""Layers that are linear in their weights: their rows, Gram matrices and gradients.

Each is Z = A Theta in independent blocks. A (blocks, rows, columns) has one row per use of the weights, Theta is the
weight with the bias as coefficients of a last column of ones. As a matrix a weight is (blocks, outputs, columns).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from backpass.rules.implicit.systems import column_gram

__all__ = ["Einsum", "Embedding", "Gradients", "Linear", "LinearLayer", "Sizes", "in_parts"]

Sizes = tuple[int, ...]
Gradients = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True)
class LinearLayer(ABC):
    """A kind of layer with its settings; by default everything follows from `rows` and `output_rows`.

    Attributes:
        shape: the shape of the weight.
        has_rows: True if `rows` and `output_rows` are available.
        is_product: True if Z is the product of the rows with the weight as a matrix.
    """

    shape: Sizes
    has_rows: ClassVar[bool] = True
    is_product: ClassVar[bool] = True

    @property
    @abstractmethod
    def blocks(self) -> int:
        """Number of independent blocks, each with its own Gram matrix."""

    @abstractmethod
    def count(self, x: Tensor) -> int:
        """Number of rows of the input ``x``."""

    @abstractmethod
    def matrix(self, weight: Tensor) -> Tensor:
        """Return a tensor of the weight's shape as a matrix (blocks, outputs, columns)."""

    @abstractmethod
    def weight(self, matrix: Tensor) -> Tensor:
        """Return the inverse of `matrix`."""

    def rows(self, x: Tensor) -> Tensor:
        """Return A without the column of ones, (blocks, rows, columns)."""
        raise NotImplementedError

    def output_rows(self, grad: Tensor) -> Tensor:
        """Return the gradient of Z in the order of the rows, (blocks, rows, outputs)."""
        raise NotImplementedError

    def gram(self, x: Tensor, ones: bool, border: bool = True, parts: int = 1) -> Tensor:
        """Return A^T A, (blocks, columns, columns), with the column of ones or without.

        Without ``border`` a convolution's Gram matrix is the larger one of `convolution.correlated_gram` where that is
        cheaper. With ``parts`` above 1 the columns are cut into so many equal pieces, each a block of its own.
        """
        return column_gram(in_parts(self.rows(x), parts), ones)

    def gradients(self, x: Tensor, grad: Tensor, weight: bool, bias: bool) -> Gradients:
        """Return dL/dW and dL/db of plain backpropagation, those that are wanted."""
        outputs = self.output_rows(grad)
        by_weight = self.weight(outputs.mT @ self.rows(x)) if weight else None
        return by_weight, outputs.sum(1).flatten() if bias else None

    def input_gradient(self, x: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
        """Return dL/dx of plain backpropagation; only the shape of ``x`` is used."""
        raise NotImplementedError

    def outputs(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return Z, for layers that are no products."""
        raise NotImplementedError

    def bias_matrix(self, bias: Tensor) -> Tensor:
        """Return a tensor of the bias's shape as a matrix (blocks, outputs, 1)."""
        return bias.reshape(self.blocks, -1, 1)

    def columns(self, ones: bool) -> int:
        """Number of columns of A."""
        return self._columns + ones

    @cached_property
    def _columns(self) -> int:
        return self.matrix(torch.empty(self.shape, device="meta")).shape[-1]

    def parts(self, limit: int) -> int:
        """Smallest number of equal pieces of the columns that are at most ``limit`` long."""
        pieces = -(-self._columns // limit)
        return next(p for p in range(pieces, self._columns + 1) if self._columns % p == 0) if pieces > 1 else 1


def in_parts(rows: Tensor, parts: int) -> Tensor:
    """Return rows with their columns cut into equal pieces, each a block of its own."""
    if parts == 1:
        return rows
    return rows.reshape(*rows.shape[:2], parts, -1).transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True)
class Linear(LinearLayer):
    """F.linear, or a product with a matrix on the right: rows are the input's last dimension, whatever its rank.

    Attributes:
        transposed: 1 if the weight is (inputs, outputs), 0 if (outputs, inputs).
    """

    transposed: int = 0
    blocks = 1

    def count(self, x: Tensor) -> int:
        return x.numel() // max(self.shape[1 - self.transposed], 1)

    def gradients(self, x: Tensor, grad: Tensor, weight: bool, bias: bool) -> Gradients:
        x, grad = self.rows(x)[0], self.output_rows(grad)[0]
        by_weight = (x.mT @ grad if self.transposed else grad.mT @ x) if weight else None
        return by_weight, grad.sum(0) if bias else None

    def input_gradient(self, x: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
        return grad @ (weight.mT if self.transposed else weight)

    def matrix(self, weight: Tensor) -> Tensor:
        return (weight.mT if self.transposed else weight).unsqueeze(0)

    def weight(self, matrix: Tensor) -> Tensor:
        return matrix[0].mT if self.transposed else matrix[0]

    def rows(self, x: Tensor) -> Tensor:
        return x.reshape(1, -1, self.shape[1 - self.transposed])

    def output_rows(self, grad: Tensor) -> Tensor:
        return grad.reshape(1, -1, self.shape[self.transposed])


@dataclass(frozen=True)
class Einsum(LinearLayer):
    """A product of the input with the weight over some of their dimensions, as ``torch.einsum`` writes it.

    Dimensions of the weight alone are outputs, those of input and output rows, those of all three blocks. The scale of
    a normalization is ``"nc,c->nc"`` on normalized input.

    Attributes:
        equation: the dimensions of input, weight and output, as in ``"bnd,hdo->bhno"``.
    """

    equation: str

    @cached_property
    def _labels(self) -> tuple[str, str, str]:
        inputs, z = self.equation.split("->")
        x, w = inputs.split(",")
        return x, w, z

    @cached_property
    def _kinds(self) -> tuple[str, str, str, str]:
        """Labels of blocks, rows, outputs and columns."""
        x, w, z = self._labels
        return (
            "".join(c for c in w if c in x and c in z),
            "".join(c for c in z if c in x and c not in w),
            "".join(c for c in w if c not in x),
            "".join(c for c in w if c in x and c not in z),
        )

    @property
    def blocks(self) -> int:
        return self._size(self._kinds[0])

    def _size(self, labels: str) -> int:
        return math.prod(self.shape[self._labels[1].index(c)] for c in labels)

    def count(self, x: Tensor) -> int:
        return math.prod(x.shape[self._labels[0].index(c)] for c in self._kinds[1])

    def input_gradient(self, x: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
        x_labels, w, z = self._labels
        return torch.einsum(f"{z},{w}->{x_labels}", grad, weight)

    def matrix(self, weight: Tensor) -> Tensor:
        blocks, _, outputs, columns = self._kinds
        return self._arranged(weight, self._labels[1], blocks, outputs, columns)

    def weight(self, matrix: Tensor) -> Tensor:
        blocks, _, outputs, columns = self._kinds
        order, w = blocks + outputs + columns, self._labels[1]
        sizes = [self.shape[w.index(c)] for c in order]
        return matrix.reshape(sizes).permute([order.index(c) for c in w])

    def rows(self, x: Tensor) -> Tensor:
        blocks, rows, _, columns = self._kinds
        return self._arranged(x, self._labels[0], blocks, rows, columns)

    def output_rows(self, grad: Tensor) -> Tensor:
        blocks, rows, outputs, _ = self._kinds
        return self._arranged(grad, self._labels[2], blocks, rows, outputs)

    @staticmethod
    def _arranged(tensor: Tensor, labels: str, *groups: str) -> Tensor:
        sizes = [math.prod(tensor.shape[labels.index(c)] for c in group) for group in groups]
        return tensor.permute([labels.index(c) for group in groups for c in group]).reshape(sizes)


@dataclass(frozen=True)
class Embedding(LinearLayer):
    """F.embedding: a row selects one line of the table, so each line is a block with the number of its uses.

    Attributes:
        padding: the line that stays as it is; -1 for none.
    """

    padding: int
    has_rows: ClassVar[bool] = False
    is_product: ClassVar[bool] = False

    @property
    def blocks(self) -> int:
        return self.shape[0]

    def count(self, x: Tensor) -> int:
        return x.numel()

    def gram(self, x: Tensor, ones: bool, border: bool = True, parts: int = 1) -> Tensor:
        return torch.bincount(x.flatten(), minlength=self.shape[0]).reshape(-1, 1, 1)

    def gradients(self, x: Tensor, grad: Tensor, weight: bool, bias: bool) -> Gradients:
        by_weight: Tensor = torch.ops.aten.embedding_dense_backward(grad, x, self.shape[0], self.padding, False)
        return by_weight, None

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.unsqueeze(-1)

    def weight(self, matrix: Tensor) -> Tensor:
        return matrix.squeeze(-1)
