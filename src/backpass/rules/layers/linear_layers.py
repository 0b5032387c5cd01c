# ruff: noqa: D102  the methods' docstrings stand at LinearLayer
"""The kinds of layers that are linear in their weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from backpass.rules.gram import bordered, column_gram
from backpass.rules.layers.convolution import Convolution
from backpass.rules.layers.linear_layer import Gradients, LinearLayer, Sizes

__all__ = ["Affine", "Convolution", "Embedding", "Linear", "layer_of"]


class Linear(LinearLayer):
    """F.linear: rows are what the input holds along its last dimension, whatever its rank."""

    has_rows: ClassVar[bool] = True
    blocks = 1

    def count(self, x: Tensor) -> int:
        return x.numel() // max(self.shape[1], 1)

    def gram(self, x: Tensor, ones: bool, border: bool = True) -> Tensor:
        return column_gram(self.rows(x), ones)

    def gradients(self, x: Tensor, grad: Tensor, weight: bool, bias: bool) -> Gradients:
        x, grad = self.rows(x)[0], self.output_rows(grad)[0]
        return grad.mT @ x if weight else None, grad.sum(0) if bias else None

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.unsqueeze(0)

    def weight(self, matrix: Tensor) -> Tensor:
        return matrix.squeeze(0)

    def rows(self, x: Tensor) -> Tensor:
        return x.reshape(1, -1, self.shape[1])

    def output_rows(self, grad: Tensor) -> Tensor:
        return grad.reshape(1, -1, self.shape[0])


@dataclass(frozen=True)
class Embedding(LinearLayer):
    """F.embedding: a row picks one line of the table, so each line is a block with how often it was picked.

    Attributes:
        padding: the line that stays as it is; -1 for none.
    """

    padding: int

    @property
    def geometry(self) -> Sizes:
        return (self.padding,)

    @property
    def blocks(self) -> int:
        return self.shape[0]

    def count(self, x: Tensor) -> int:
        return x.numel()

    def gram(self, x: Tensor, ones: bool, border: bool = True) -> Tensor:
        return torch.bincount(x.flatten(), minlength=self.shape[0]).reshape(-1, 1, 1)

    def gradients(self, x: Tensor, grad: Tensor, weight: bool, bias: bool) -> Gradients:
        by_weight: Tensor = torch.ops.aten.embedding_dense_backward(grad, x, self.shape[0], self.padding, False)
        return by_weight, None

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.unsqueeze(-1)

    def weight(self, matrix: Tensor) -> Tensor:
        return matrix.squeeze(-1)


class Affine(LinearLayer):
    """The scale and shift of a normalization, z = x w + b on normalized x: each feature is a block.

    Inputs and gradients are (rows, features); the weight may have any shape with as many entries.
    """

    @property
    def blocks(self) -> int:
        return torch.Size(self.shape).numel()

    def count(self, x: Tensor) -> int:
        return x.shape[0]

    def gram(self, x: Tensor, ones: bool, border: bool = True) -> Tensor:
        gram = x.square().sum(0).reshape(-1, 1, 1)
        return bordered(gram, x.sum(0).unsqueeze(-1), x.shape[0]) if ones else gram

    def gradients(self, x: Tensor, grad: Tensor, weight: bool, bias: bool) -> Gradients:
        by_weight = (grad * x).sum(0).reshape(self.shape) if weight else None
        return by_weight, grad.sum(0).reshape(self.shape) if bias else None

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.reshape(-1, 1, 1)

    def weight(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(self.shape)


def layer_of(kind: str, shape: Sizes, geometry: Sizes) -> LinearLayer:
    """The layer that ``type(layer).__name__``, its ``shape`` and its ``geometry`` name."""
    if kind == "Convolution":
        return Convolution.of(shape, geometry)
    return Embedding(shape, *geometry) if kind == "Embedding" else {"Linear": Linear, "Affine": Affine}[kind](shape)
