# ruff: noqa: D102  the methods' docstrings are at LinearLayer
"""Convolutions as linear layers: each row of A is the patch of the input under the kernel at one output position.

The Gram matrix A^T A over columns (channel, kernel position) is computed by writing the patches out in chunks. For
patches that lie densely, the entry of kernel positions i and j depends on j - i alone up to the border: `toeplitz_gram`
ignores that and gives all entries by one Fourier transform.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from backpass.rules.implicit.layers import Gradients, LinearLayer, Sizes
from backpass.rules.implicit.systems import bordered, column_gram

__all__ = ["Convolution", "patch_count", "patch_gram", "patch_rows", "patch_sums", "toeplitz_gram", "unfolded_gram"]

aten = torch.ops.aten

_CHUNK = 2**21
"""How many numbers are written out at once: 8 MiB of float32 stay in a processor's cache, more or less."""


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


def patch_count(x: Tensor, kernel: Sizes, stride: Sizes, dilation: Sizes) -> Sizes:
    """How many patches fit along each dimension of ``x`` (N, C, *spatial)."""
    sizes = zip(x.shape[2:], kernel, stride, dilation, strict=True)
    return tuple((size - (k - 1) * d - 1) // s + 1 for size, k, s, d in sizes)


def patch_rows(x: Tensor, kernel: Sizes, stride: Sizes, dilation: Sizes, groups: int) -> Tensor:
    """All patches written out, column by column, as in memory the input lies.

    Args:
        x: (N, C, *spatial), padded.
        kernel: one size per spatial dimension.
        stride: one step per spatial dimension.
        dilation: one distance between kernel positions per spatial dimension.
        groups: how many groups of channels are convolved apart.

    Returns:
        (groups, N * positions, C / groups * kernel positions).
    """
    n, channels = x.shape[:2]
    counts = patch_count(x, kernel, stride, dilation)
    first, second, *steps = x.stride()
    between = [step * d for step, d in zip(steps, dilation, strict=True)]
    along = [step * s for step, s in zip(steps, stride, strict=True)]
    view = x.as_strided(
        (groups, channels // groups, *kernel, n, *counts),
        (channels // groups * second, second, *between, first, *along),
        x.storage_offset(),
    )
    return view.reshape(groups, channels // groups * math.prod(kernel), -1).mT


def patch_sums(x: Tensor, kernel: Sizes, stride: Sizes, dilation: Sizes, groups: int) -> Tensor:
    """The sum of all patches, (groups, columns): what the column of ones has in common with the others."""
    return patch_rows(x.sum(0, keepdim=True), kernel, stride, dilation, groups).sum(1)


def unfolded_gram(x: Tensor, kernel: Sizes, stride: Sizes, dilation: Sizes, groups: int) -> Tensor:
    """A^T A, (groups, columns, columns), with the patches of `patch_rows` written out for a few samples at a time."""
    columns = x.shape[1] // groups * math.prod(kernel)
    per_sample = math.prod(patch_count(x, kernel, stride, dilation)) * columns * groups
    gram = x.new_zeros(groups, columns, columns)
    for part in torch.split(x, max(1, _CHUNK // per_sample)):
        gram += column_gram(patch_rows(part, kernel, stride, dilation, groups))
    return gram


def patch_gram(x: Tensor, kernel: Sizes, stride: Sizes, dilation: Sizes, groups: int, border: bool = True) -> Tensor:
    """A^T A, (groups, columns, columns); without ``border`` that of `toeplitz_gram` where it is cheaper."""
    dense = all(s == 1 and (d == 1 or k == 1) for s, d, k in zip(stride, dilation, kernel, strict=True))
    if border or not dense or not _transform_pays(x, kernel, groups):
        return unfolded_gram(x, kernel, stride, dilation, groups)
    return toeplitz_gram(x, kernel, groups)


# Nanoseconds on one core of a current server processor; only their ratios matter.
_COPY, _MULTIPLY, _TRANSFORM, _COMPLEX_MULTIPLY, _TRANSFORM_BACK = 0.5, 0.013, 10.0, 0.1, 12.0


def _transform_pays(x: Tensor, kernel: Sizes, groups: int) -> bool:
    n, channels = x.shape[0], x.shape[1] // groups
    columns = channels * math.prod(kernel)
    grid = math.prod(size + k - 1 for size, k in zip(x.shape[2:], kernel, strict=True))
    positions = math.prod(patch_count(x, kernel, (1,) * len(kernel), (1,) * len(kernel)))
    by_transform = grid * channels * (n * _TRANSFORM + channels * (n * _COMPLEX_MULTIPLY + _TRANSFORM_BACK))
    return by_transform < n * positions * columns * (_COPY + columns * _MULTIPLY)


def toeplitz_gram(x: Tensor, kernel: Sizes, groups: int) -> Tensor:
    """R of the same shape as A^T A for stride and dilation 1, R - A^T A positive semi-definite, by Fourier transforms.

    With i, j kernel positions, A^T A[i, j] sums x[p + i] x[p + j] over output positions p. R[i, j] sums
    x[q] x[q + j - i] over all q, which is the correlation of x at the lag j - i.
    """
    channels = x.shape[1] // groups
    dims = len(kernel)
    full = _autocorrelation(x.reshape(len(x), groups, channels, *x.shape[2:]).transpose(0, 1), list(kernel))
    # (groups, C, C, then i and j of each dimension) -> (groups, C, *i, C, *j)
    order = (0, 1, *range(3, 3 + 2 * dims, 2), 2, *range(4, 3 + 2 * dims, 2))
    columns = channels * math.prod(kernel)
    return full.permute(order).reshape(groups, columns, columns)


def _autocorrelation(part: Tensor, lags: list[int]) -> Tensor:
    """Sum over n and q of part[a, q] part[b, q + j - i]: (groups, a, b, then i and j of each dimension)."""
    groups, channels = part.shape[0], part.shape[2]
    dims = tuple(range(3, part.dim()))
    sizes = [_smooth(size + k - 1) for size, k in zip(part.shape[3:], lags, strict=True)]
    sizes[-1] += sizes[-1] % 2
    spectrum: Tensor | None = None
    per_sample = groups * channels * math.prod(sizes)
    for piece in torch.split(part, max(1, 4 * _CHUNK // per_sample), dim=1):
        transformed = torch.fft.rfftn(piece, s=sizes, dim=dims)
        frequency_first = transformed.permute(0, *dims, 1, 2).flatten(0, -3)
        term = frequency_first.mH @ frequency_first
        spectrum = term if spectrum is None else spectrum + term
    assert spectrum is not None  # noqa: S101  a batch has at least one sample
    spectrum = spectrum.reshape(groups, *sizes[:-1], sizes[-1] // 2 + 1, channels, channels)
    spectrum = spectrum.permute(0, -2, -1, *range(1, 1 + len(sizes)))
    full: Tensor = torch.fft.irfftn(spectrum, s=sizes, dim=dims)
    for d, (size, k) in enumerate(zip(sizes, lags, strict=True)):
        positions = torch.arange(k, device=full.device)
        lag = (positions - positions.unsqueeze(1)) % size  # j - i
        full = full.index_select(3 + 2 * d, lag.flatten())
        full = full.reshape(*full.shape[: 3 + 2 * d], k, k, *full.shape[4 + 2 * d :])
    return full


def _smooth(size: int) -> int:
    """The next size without a prime factor above 5, which transforms fast."""
    while True:
        rest = size
        for factor in (2, 3, 5):
            while rest % factor == 0:
                rest //= factor
        if rest == 1:
            return size
        size += 1
