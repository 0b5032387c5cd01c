"""Max pooling with softmax gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["MAX_POOLS", "OPAQUE_MAX_POOLS", "SoftMaxPool", "read_pool"]

_DIMENSIONS = (1, 2, 3)

MAX_POOLS: Mapping[Callable[..., Any], str] = {
    getattr(place, f"max_pool{n}d"): f"max_pool{n}d" for n in _DIMENSIONS for place in (F, torch)
}
"""Max-pooling functions of torch, with their names."""

OPAQUE_MAX_POOLS: Mapping[Callable[..., Any], str] = {
    getattr(F, name): name
    for n in _DIMENSIONS
    for name in (f"max_pool{n}d_with_indices", f"adaptive_max_pool{n}d", f"adaptive_max_pool{n}d_with_indices")
} | {F.fractional_max_pool2d: "fractional_max_pool2d", F.fractional_max_pool3d: "fractional_max_pool3d"}
"""Max-pooling functions with other windows, which keep their plain gradient, with their names."""


@dataclass(frozen=True)
class SoftMaxPool:
    """Max pooling with the gradient dL/dx[p] = sum over windows w containing p of dL/dy[w] softmax_w(t x)[p].

    Args:
        temperature: factor t of x in the softmax.
        size: size of the window, per dimension.
        stride: stride of the windows.
        padding: padding on each side, with minus infinity.
        dilation: dilation of the windows.
        ceil_mode: True to include an incomplete last window, as in torch.
    """

    needs_input: ClassVar[bool] = True

    temperature: float
    size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    ceil_mode: bool

    def compute(self, x: Tensor) -> Any:
        """Return the maxima, computed by an aten operator."""
        operator = getattr(torch.ops.aten, f"max_pool{len(self.size)}d")
        return operator(x, self.size, self.stride, self.padding, self.dilation, self.ceil_mode)

    def backward(self, grad: Tensor, x: Tensor) -> Tensor:
        """Return dL/dx."""
        n = len(self.size)
        inside, outside = x.shape[-n:], grad.shape[-n:]
        padded, margins = [], []
        for one, count, size, stride, padding, dilation in zip(
            inside, outside, self.size, self.stride, self.padding, self.dilation, strict=True
        ):
            needed = (count - 1) * stride + (size - 1) * dilation + 1
            padded.append(max(needed, one + padding))
            margins += [padded[-1] - one - padding, padding]
        values = F.pad(x, margins[::-1], value=float("-inf"))
        windows: list[Any] = [
            (
                ...,
                *(
                    slice(o * d, o * d + (count - 1) * s + 1, s)
                    for o, d, count, s in zip(offsets, self.dilation, outside, self.stride, strict=True)
                ),
            )
            for offsets in product(*(range(size) for size in self.size))
        ]
        weights = torch.softmax(self.temperature * torch.stack([values[window] for window in windows]), 0)
        total = torch.zeros_like(values)
        for window, weight in zip(windows, weights.unbind(), strict=True):
            total[window] += weight * grad
        for dimension, one, padding in zip(range(-n, 0), inside, self.padding, strict=True):
            total = total.narrow(dimension, padding, one)
        return total


def read_pool(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], temperature: float
) -> tuple[Tensor, SoftMaxPool] | None:
    """Return the input and the pooling of a call of one of `MAX_POOLS`; None if the call also returns indices."""
    names = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    given = {**dict(zip(names[: len(args)], args, strict=True)), **kwargs}
    if given.get("return_indices"):
        return None
    n = int(MAX_POOLS[func][-2])
    size = _tuple(given["kernel_size"], n)
    stride = given.get("stride")
    stride = size if stride is None or stride == () or stride == [] else _tuple(stride, n)
    padding, dilation = _tuple(given.get("padding", 0), n), _tuple(given.get("dilation", 1), n)
    pool = SoftMaxPool(temperature, size, stride, padding, dilation, bool(given.get("ceil_mode", False)))
    return given["input"], pool


def _tuple(value: Any, n: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * n
    return tuple(value) * n if len(value) == 1 else tuple(value)
