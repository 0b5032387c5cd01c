# ruff: noqa: D102  the methods' docstrings are at LinearLayer
"""Convolutions as linear layers: each row of A is the patch of the input that one output position sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from backpass.rules.implicit.layers import Gradients, LinearLayer, Sizes
from backpass.rules.implicit.patches import patch_count, patch_gram, patch_rows, patch_sums
from backpass.rules.implicit.systems import bordered

__all__ = ["Convolution"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Convolution(LinearLayer):
    """Convolutions, also transposed ones, of any dimension on batched inputs: rows are patches.

    A transposed convolution of x is the convolution, of stride 1 and with the kernel turned over, of x with
    stride - 1 zeros between its entries.

    Attributes:
        stride: per spatial dimension, as the three that follow.
        before: zeros before the input.
        after: zeros after the input; differs from ``before`` with padding="same" alone.
        dilation: distance between kernel positions.
        output_padding: of a transposed convolution.
        groups: how many groups of channels are convolved apart.
        transposed: 1 for a transposed convolution.
    """

    stride: Sizes
    before: Sizes
    after: Sizes
    dilation: Sizes
    output_padding: Sizes
    groups: int
    transposed: int
    has_rows: ClassVar[bool] = True

    @property
    def blocks(self) -> int:
        return self.groups

    @property
    def kernel(self) -> Sizes:
        """Size of the kernel per dimension."""
        return self.shape[2:]

    @property
    def step(self) -> Sizes:
        """The stride between the patches of `spread`."""
        return (1,) * len(self.stride) if self.transposed else self.stride

    def spread(self, x: Tensor) -> Tensor:
        """The input whose patches are the rows: with zeros around it and, where transposed, inside it."""
        if self.transposed:
            x = self._with_zeros_inside(x)
            reach = [(k - 1) * d for k, d in zip(self.kernel, self.dilation, strict=True)]
            before = [r - p for r, p in zip(reach, self.before, strict=True)]
            after = [start + extra for start, extra in zip(before, self.output_padding, strict=True)]
        else:
            before, after = list(self.before), list(self.after)
        around = [end for ends in reversed(list(zip(before, after, strict=True))) for end in ends]
        return pad(x, around) if any(around) else x

    def _with_zeros_inside(self, x: Tensor) -> Tensor:
        sizes = [(size - 1) * s + 1 for size, s in zip(x.shape[2:], self.stride, strict=True)]
        wide = x.new_zeros(*x.shape[:2], *sizes)
        wide[(..., *[slice(None, None, s) for s in self.stride])] = x  # type: ignore[index]
        return wide

    def count(self, x: Tensor) -> int:
        spread = self.spread(x.new_empty(x.shape, device="meta"))
        positions = patch_count(spread, self.kernel, self.step, self.dilation)
        return spread.shape[0] * torch.Size(positions).numel()

    def gram(self, x: Tensor, ones: bool, border: bool = True, parts: int = 1) -> Tensor:
        x = self.spread(x)
        gram = patch_gram(x, self.kernel, self.step, self.dilation, self.groups * parts, border)
        if not ones:
            return gram
        sums = patch_sums(x, self.kernel, self.step, self.dilation, self.groups)
        positions = patch_count(x, self.kernel, self.step, self.dilation)
        return bordered(gram, sums, x.shape[0] * torch.Size(positions).numel())

    def gradients(self, x: Tensor, grad: Tensor, weight: bool, bias: bool) -> Gradients:
        _, by_weight, by_bias = self._backward(x, grad, x.new_empty(self.shape), (False, weight, bias))
        return by_weight, by_bias

    def input_gradient(self, x: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
        full: Tensor = self._backward(x, grad, weight, (True, False, False))[0]
        if self.before != self.after:
            for d, start in enumerate(self.before):
                full = full.narrow(2 + d, start, x.shape[2 + d])
        return full

    def outputs(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding = self.before
        if self.before != self.after:
            x, padding = self.spread(x), (0,) * len(self.before)
        settings: Any = (self.stride, padding, self.dilation, bool(self.transposed), self.output_padding, self.groups)
        z: Tensor = aten.convolution(x, weight, bias, *settings)
        return z

    def parts(self, limit: int) -> int:
        columns = self.columns(False)
        channels = columns // torch.Size(self.kernel).numel()
        pieces = -(-columns // limit)
        return next(p for p in range(min(pieces, channels), channels + 1) if channels % p == 0) if pieces > 1 else 1

    def _backward(self, x: Tensor, grad: Tensor, weight: Tensor, mask: tuple[bool, ...]) -> Any:
        padding = self.before
        if self.before != self.after:
            x, padding = self.spread(x), (0,) * len(self.before)
        outputs = [grad.shape[1]]
        settings = (self.stride, padding, self.dilation, bool(self.transposed), self.output_padding, self.groups)
        return aten.convolution_backward(grad, x, weight, outputs, *settings, mask)

    def matrix(self, weight: Tensor) -> Tensor:
        weight = weight.reshape(self.groups, -1, *self.shape[1:])
        if self.transposed:
            weight = weight.transpose(1, 2).flip(tuple(range(3, weight.dim())))
        return weight.flatten(2)

    def weight(self, matrix: Tensor) -> Tensor:
        if not self.transposed:
            return matrix.reshape(self.shape)
        weight = matrix.reshape(self.groups, self.shape[1], -1, *self.kernel)
        return weight.flip(tuple(range(3, weight.dim()))).transpose(1, 2).reshape(self.shape)

    def rows(self, x: Tensor) -> Tensor:
        return patch_rows(self.spread(x), self.kernel, self.step, self.dilation, self.groups)

    def output_rows(self, grad: Tensor) -> Tensor:
        outputs = grad.reshape(grad.shape[0], self.groups, -1, *grad.shape[2:])
        return outputs.movedim((1, 2), (0, -1)).flatten(1, -2)
