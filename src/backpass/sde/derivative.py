"""Directional derivatives of gradient fields, through an attack."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import jvp, vjp

__all__ = ["along", "value_and_along"]

Field = Callable[..., tuple[Tensor, ...]]


def value_and_along(
    field: Field, primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return a field and its derivative along a direction, by forward-mode differentiation.

    Where an operation has no forward-mode formula in torch (Huber's loss, soft margin), the derivative is the
    transpose of the reverse-mode product, u -> (D field)^T u, which is linear in u: about twice the cost.

    Args:
        field: of as many tensors as there are primals, with a tuple of tensors.
        primals: the point.
        tangents: the direction, of the shapes of the primals.
    """
    # A gradient may be an expanded tensor, depending on how the loss is written; a tangent must not be.
    own = tuple(one.clone(memory_format=torch.contiguous_format) for one in tangents)
    try:
        values, derivatives = jvp(field, primals, own)[:2]
    except (NotImplementedError, RuntimeError):
        values, pull = vjp(field, *primals)[:2]
        transposed = vjp(lambda *u: pull(u), *map(torch.zeros_like, values))[1]
        return values, transposed(own)
    return values, derivatives


def along(field: Callable[[Tensor], Tensor], theta: Tensor, direction: Tensor) -> Tensor:
    """Return the derivative of a vector field along a direction."""
    return value_and_along(lambda p: (field(p),), (theta,), (direction,))[1][0]
