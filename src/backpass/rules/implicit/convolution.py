# ruff: noqa: D102  the methods' docstrings are at LinearLayer
"""Convolutions as linear layers: each row of A is the patch of the input under the kernel at one output position.

The Gram matrix A^T A over columns (channel, kernel position) is computed in two exact ways: *unfolded*, by writing the
patches out in chunks; and by *correlation*: for patches that lie densely, the entry of kernel positions i and j depends
on j - i alone up to windows at the border, so that one Fourier transform gives all entries at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from backpass.rules.implicit.layers import Gradients, LinearLayer, Sizes
from backpass.rules.implicit.systems import bordered, column_gram

__all__ = ["Convolution", "correlated_gram", "patch_count", "patch_gram", "patch_rows", "patch_sums", "unfolded_gram"]

aten = torch.ops.aten

_CHUNK = 2**21
"""Number of values written out at once: 8 MiB of float32, which about fit a processor's cache."""


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
    is_product: ClassVar[bool] = False

    @property
    def blocks(self) -> int:
        return self.groups

    @property
    def kernel(self) -> Sizes:
        """Size of the kernel per dimension."""
        return self.shape[2:]

    @property
    def step(self) -> Sizes:
        """Stride between the patches of `spread`."""
        return (1,) * len(self.stride) if self.transposed else self.stride

    def spread(self, x: Tensor) -> Tensor:
        """Return the input with zeros around it and, where transposed, inside it: its patches are the rows."""
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
    """Number of patches along each dimension of ``x`` (N, C, *spatial)."""
    sizes = zip(x.shape[2:], kernel, stride, dilation, strict=True)
    return tuple((size - (k - 1) * d - 1) // s + 1 for size, k, s, d in sizes)


def patch_rows(x: Tensor, kernel: Sizes, stride: Sizes, dilation: Sizes, groups: int) -> Tensor:
    """Return all patches, written out column by column, in the order of the input in memory.

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
    """Return the sum of all patches, (groups, columns): the products of the column of ones with the others."""
    return patch_rows(x.sum(0, keepdim=True), kernel, stride, dilation, groups).sum(1)


def unfolded_gram(x: Tensor, kernel: Sizes, stride: Sizes, dilation: Sizes, groups: int) -> Tensor:
    """Return A^T A, (groups, columns, columns), with patches written out for a few samples at a time."""
    columns = x.shape[1] // groups * math.prod(kernel)
    per_sample = math.prod(patch_count(x, kernel, stride, dilation)) * columns * groups
    gram = x.new_zeros(groups, columns, columns)
    for part in torch.split(x, max(1, _CHUNK // per_sample)):
        gram += column_gram(patch_rows(part, kernel, stride, dilation, groups))
    return gram


def patch_gram(x: Tensor, kernel: Sizes, stride: Sizes, dilation: Sizes, groups: int, border: bool = True) -> Tensor:
    """Return A^T A, (groups, columns, columns), in the cheaper of the two ways.

    Without ``border`` the correlation may leave out its windows (see `correlated_gram`), which makes it cheaper.
    """
    if all(s == d == 1 for s, d in zip(stride, dilation, strict=True)):
        counts = patch_count(x, kernel, stride, dilation)
        if _correlated_cost(x, kernel, counts, groups, border) < _unfolded_cost(x, kernel, counts, groups):
            return correlated_gram(x, kernel, groups, border)
    return unfolded_gram(x, kernel, stride, dilation, groups)


# Nanoseconds on one core of a current server processor; only their ratios matter.
_COPY, _MULTIPLY, _TRANSFORM, _COMPLEX_MULTIPLY, _TRANSFORM_BACK = 1.0, 0.015, 10.0, 0.1, 12.0


def _unfolded_cost(x: Tensor, kernel: Sizes, counts: Sizes, groups: int) -> float:
    columns = x.shape[1] // groups * math.prod(kernel)
    return x.shape[0] * math.prod(counts) * groups * columns * (_COPY + columns * _MULTIPLY)


def _correlated_cost(x: Tensor, kernel: Sizes, counts: Sizes, groups: int, border: bool) -> float:
    n, channels, cost = x.shape[0], x.shape[1] // groups, 0.0
    for in_strip in product((False, True) if border else (False,), repeat=len(kernel)):
        strips = [k - 1 for k, there in zip(kernel, in_strip, strict=True) if there]
        wide = channels * math.prod(strips)
        grid = math.prod(o + 2 * (k - 1) for o, k, there in zip(counts, kernel, in_strip, strict=True) if not there)
        by_transform = grid * wide * (n * _TRANSFORM + wide * (n * _COMPLEX_MULTIPLY + _TRANSFORM_BACK))
        cost += 2 ** len(strips) * (n * wide**2 * _MULTIPLY if all(in_strip) else by_transform)
    return groups * cost


def correlated_gram(x: Tensor, kernel: Sizes, groups: int, border: bool = True) -> Tensor:
    """Return A^T A by Fourier transforms, for stride 1 and dilation 1.

    With i, j kernel positions and p output positions, G[i, j] = sum_p x[p + i] x[p + j] is the correlation
    R[j - i] = sum_q x[q] x[q + j - i] over all of x, minus the q outside the window that belongs to i. Per dimension
    these lie in a strip of k - 1 at the low or at the high end; by inclusion and exclusion over the dimensions each
    combination of strips is a small problem of the same kind, with the strips' positions as channels.

    Without ``border`` the windows are left out: R itself, a larger Gram matrix (R - G is positive semi-definite).

    Returns:
        (groups, columns, columns), in the order of `patch_rows`.
    """
    columns = x.shape[1] // groups * math.prod(kernel)
    gram = x.new_zeros(groups, *(x.shape[1] // groups, *kernel) * 2)
    for ends in product((None, "low", "high") if border else (None,), repeat=len(kernel)):
        if all(end is None or k > 1 for end, k in zip(ends, kernel, strict=True)):
            gram += (-1) ** sum(end is not None for end in ends) * _correlation(x, kernel, ends, groups)
    return gram.reshape(groups, columns, columns)


def _correlation(x: Tensor, kernel: Sizes, ends: tuple[str | None, ...], groups: int) -> Tensor:
    """Return the part of the correlation with q in the given strips, (groups, C, *kernel, C, *kernel)."""
    dims = range(len(kernel))
    strips = [d for d in dims if ends[d]]
    part = x
    for d in strips:
        part = part.narrow(2 + d, 0 if ends[d] == "low" else x.shape[2 + d] - kernel[d] + 1, kernel[d] - 1)
    free = [d for d in dims if not ends[d]]
    n, channels = part.shape[0], part.shape[1] // groups
    sizes = [kernel[d] - 1 for d in strips]
    part = part.reshape(n, groups, channels, *part.shape[2:])
    part = part.permute(1, 0, 2, *(3 + d for d in strips), *(3 + d for d in free))
    part = part.reshape(groups, n, channels * math.prod(sizes), *(x.shape[2 + d] for d in free))
    lags = [kernel[d] for d in free]
    full = _autocorrelation(part, lags)
    full = full.reshape(groups, channels, *sizes, channels, *sizes, *(k for k in lags for _ in "ij"))
    # Now (groups, C, strips i, C, strips j, then i and j of each free dimension): bring all to i's and j's of dims.
    strip_at = {d: position for position, d in enumerate(strips)}
    free_at = {d: position for position, d in enumerate(free)}
    behind = 3 + 2 * len(strips)
    of_i = [2 + strip_at[d] if d in strip_at else behind + 2 * free_at[d] for d in dims]
    of_j = [3 + len(strips) + strip_at[d] if d in strip_at else behind + 2 * free_at[d] + 1 for d in dims]
    full = full.permute(0, 1, *of_i, 2 + len(strips), *of_j)
    for d in strips:
        full = _window(full, 2 + d, 3 + len(kernel) + d, kernel[d], ends[d] == "low")
    return full


def _autocorrelation(part: Tensor, lags: list[int]) -> Tensor:
    """Return sums over n and q of part[a, q] part[b, q + j - i], (groups, a, b, i and j of each dimension)."""
    if not lags:
        return column_gram(part)
    groups, channels = part.shape[0], part.shape[2]
    dims = tuple(range(3, part.dim()))
    sizes = [size + k - 1 for size, k in zip(part.shape[3:], lags, strict=True)]
    # Sizes without a prime factor above 5 transform fast; the last one is even.
    sizes = [next(n for n in range(size, 2 * size + 1) if 30**30 % n == 0 == n % 2) for size in sizes]
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


def _window(strip: Tensor, i: int, j: int, k: int, low: bool) -> Tensor:
    """Sum pairs (q, q + j - i) of positions in a strip over the strip's q outside the window of i.

    Low end: q < i, so W[i, j] = W[i - 1, j - 1] + S[i - 1, j - 1]; high end: W[i, j] = S[i, j] + W[i + 1, j + 1].
    """
    strip = strip.movedim((i, j), (-2, -1))
    window = strip.new_zeros(*strip.shape[:-2], k, k)
    for at in range(1, k) if low else range(k - 2, -1, -1):
        if low:
            window[..., at, 1:] = window[..., at - 1, :-1] + strip[..., at - 1, :]
        else:
            window[..., at, :-1] = window[..., at + 1, 1:] + strip[..., at, :]
    return window.movedim((-2, -1), (i, j))
