"""A layer that is linear in its weights: what its rows are, and where its gradients go.

Each is Z = A Theta in independent blocks: A (blocks, rows, columns) has one row per use of the weights, Theta is the
weight with the bias as coefficients of a last column of ones. As a matrix a weight is (blocks, outputs, columns).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

__all__ = ["Gradients", "LinearLayer", "Sizes"]

Sizes = tuple[int, ...]
Gradients = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True)
class LinearLayer(ABC):
    """A kind of layer with its settings.

    Attributes:
        shape: the shape of the weight.
    """

    shape: Sizes
    has_rows: ClassVar[bool] = False

    @property
    def geometry(self) -> Sizes:
        """The settings as plain integers, which a compiled graph can carry to `layer_of`."""
        return ()

    @property
    @abstractmethod
    def blocks(self) -> int:
        """How many independent blocks, each with a Gram matrix of its own, the layer has."""

    @abstractmethod
    def count(self, x: Tensor) -> int:
        """How many rows the input ``x`` makes."""

    @abstractmethod
    def gram(self, x: Tensor, ones: bool, border: bool = True) -> Tensor:
        """A^T A, (blocks, columns, columns), with the column of ones or without.

        Without ``border`` a convolution's Gram matrix is the larger one that `patches.correlated_gram` documents.
        """

    @abstractmethod
    def gradients(self, x: Tensor, grad: Tensor, weight: bool, bias: bool) -> Gradients:
        """dL/dW and dL/db of plain backpropagation, those that are asked for."""

    @abstractmethod
    def matrix(self, weight: Tensor) -> Tensor:
        """A tensor shaped like the weight as a matrix (blocks, outputs, columns)."""

    @abstractmethod
    def weight(self, matrix: Tensor) -> Tensor:
        """The inverse of `matrix`."""

    def bias_matrix(self, bias: Tensor) -> Tensor:
        """A tensor shaped like the bias as a matrix (blocks, outputs, 1)."""
        return bias.reshape(self.blocks, -1, 1)

    def columns(self, ones: bool) -> int:
        """How many columns A has."""
        return self.matrix(torch.empty(self.shape, device="meta")).shape[-1] + ones

    def rows(self, x: Tensor) -> Tensor:
        """A without the column of ones, (blocks, rows, columns), where `has_rows`."""
        raise NotImplementedError

    def output_rows(self, grad: Tensor) -> Tensor:
        """The gradient of Z in the order of the rows, (blocks, rows, outputs), where `has_rows`."""
        raise NotImplementedError
