"""Autograd functions whose weight gradients are proximal directions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from backpass.errors import BackpassError
from backpass.rules.layers.asked_for import is_asked_for
from backpass.rules.layers.convolution import Convolution
from backpass.rules.layers.linear_layer import LinearLayer
from backpass.rules.layers.linear_layers import layer_of
from backpass.rules.proximal.contributions import Contributions, Use
from backpass.rules.proximal.direction import solve_dtype

__all__ = ["announce", "proximal_affine", "proximal_linear"]

Call = tuple[str, bool]
"""Where the use contributes (a key of `announce`), and whether ``torch.func`` takes the gradients."""

_BY_TOKEN: WeakValueDictionary[str, Contributions] = WeakValueDictionary()


def announce(token: str, contributions: Contributions) -> None:
    """Let uses contribute there under ``token``."""
    _BY_TOKEN[token] = contributions


# One operator from input and output gradient to the directions: what depends on data (which precision will do, what
# contributed before) then happens at run time in compiled code too.
@torch.library.custom_op(
    "backpass::proximal_gradients",
    mutates_args=(),
    schema="(Tensor x, Tensor grad, Tensor weight, Tensor? bias, str kind, int[] geometry, bool[] wants, bool[] how, "
    "str token) -> (Tensor, Tensor)",
)
def _proximal_gradients(
    x: Tensor,
    grad: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kind: str,
    geometry: list[int],
    wants: list[bool],
    how: list[bool],
    token: str,
) -> tuple[Tensor, Tensor]:
    contributions = _BY_TOKEN.get(token)
    if contributions is None:
        raise BackpassError(
            "the backward pass came after the rule, or the model it was attached to, was gone: call backward() while "
            "the rule is attached."
        )
    layer = layer_of(kind, tuple(weight.shape), tuple(geometry))
    grad = grad.to(solve_dtype(weight.dtype))
    with torch.autocast(weight.device.type, enabled=False):
        gradients = contributions.take(Use(layer, x, grad, weight, bias, (wants[0], wants[1]), how[0], how[1]))
    by_weight, by_bias = (None if gradient is None else gradient.to(weight.dtype) for gradient in gradients)
    nothing = weight.new_empty(0)
    by_weight = nothing if by_weight is None else by_weight.reshape(weight.shape).contiguous()
    # An operator's outputs share no memory; of one output row both would be parts of the same solution.
    by_bias = nothing.clone() if by_bias is None or bias is None else by_bias.reshape(bias.shape).clone()
    return by_weight, by_bias


@_proximal_gradients.register_fake
def _(
    x: Tensor,
    grad: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kind: str,
    geometry: list[int],
    wants: list[bool],
    how: list[bool],
    token: str,
) -> tuple[Tensor, Tensor]:
    by_weight = weight.new_empty(weight.shape if wants[0] else (0,))
    return by_weight, weight.new_empty(bias.shape if bias is not None and wants[1] else (0,))


@_proximal_gradients.register_vmap
def _(info: Any, in_dims: Any, *args: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    tensors = [
        [arg] * info.batch_size if dim is None else list(arg.unbind(dim))
        for arg, dim in zip(args[:4], in_dims[:4], strict=True)
    ]
    kind, geometry, wants, (_, borrowed), token = args[4:]
    fixed = (kind, geometry, wants, [True, borrowed], token)
    each = [_proximal_gradients(*one, *fixed) for one in zip(*tensors, strict=True)]
    return (torch.stack([one[0] for one in each]), torch.stack([one[1] for one in each])), (0, 0)


def _gradients(
    ctx: Any, x: Tensor, grad: Tensor, weight: Tensor, bias: Tensor | None, layer: LinearLayer, first: int
) -> tuple[Tensor | None, Tensor | None]:
    """dL/dW and dL/db, where the weight is argument ``first`` of the function and the bias the next."""
    wants = [ctx.needs_input_grad[first], bias is not None and ctx.needs_input_grad[first + 1]]
    asked = [want and is_asked_for(ctx, first + offset) for offset, want in enumerate(wants)]
    if not any(asked):
        return None, None
    borrowed = torch.compiler.is_compiling() or not ctx.needs_input_grad[0]
    token, functional = ctx.call
    how = [functional, borrowed]
    geometry = list(layer.geometry)
    gradients = _proximal_gradients(x, grad, weight, bias, type(layer).__name__, geometry, wants, how, token)
    return gradients[0] if wants[0] else None, gradients[1] if wants[1] else None


class _ProximalLinear(torch.autograd.Function):
    """z = f(x, w, b) forward; backward the plain gradient of x and the proximal directions of w and b."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        compute: Callable[..., Tensor],
        rest: tuple[Any, ...],
        kind: str,
        geometry: tuple[int, ...],
        call: Call,
    ) -> Tensor:
        return compute(x, weight, bias, *rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, _, _, ctx.kind, ctx.geometry, ctx.call = inputs
        ctx.save_for_backward(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        layer = layer_of(ctx.kind, tuple(weight.shape), ctx.geometry)
        of_x = None
        if ctx.needs_input_grad[0]:
            same = weight.to(grad.dtype)
            of_x = layer.input_gradient(x, grad, same) if isinstance(layer, Convolution) else grad @ same
            of_x = of_x.to(x.dtype)
        return of_x, *_gradients(ctx, x, grad, weight, bias, layer, 1), None, None, None, None, None


class _ProximalAffine(torch.autograd.Function):
    """z forward, computed already; backward as of z = normalized w + b, with the proximal directions of w and b."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        normalized: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None, last: bool, call: Call
    ) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        normalized, _, weight, bias, ctx.last, ctx.call = inputs
        ctx.save_for_backward(normalized, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        normalized, weight, bias = ctx.saved_tensors
        of_x = None
        if ctx.needs_input_grad[0]:
            scale = weight if ctx.last else weight.reshape(-1, *[1] * (grad.dim() - 2))
            of_x = (grad * scale).to(normalized.dtype)
        rows, of_rows = (_feature_rows(t, weight.numel(), ctx.last) for t in (normalized, grad))
        layer = layer_of("Affine", tuple(weight.shape), ())
        return of_x, None, *_gradients(ctx, rows, of_rows, weight, bias, layer, 2), None, None


def _feature_rows(tensor: Tensor, features: int, last: bool) -> Tensor:
    return (tensor if last else tensor.movedim(1, -1)).reshape(-1, features)


def proximal_linear(*args: Any) -> Tensor:
    """The value f(x, w, b) with proximal weight gradients; arguments as of ``_ProximalLinear.forward``."""
    function: Callable[..., Tensor] = _ProximalLinear.apply
    return function(*args)


def proximal_affine(*args: Any) -> Tensor:
    """A normalization's value with proximal weight gradients; arguments as of ``_ProximalAffine.forward``."""
    function: Callable[..., Tensor] = _ProximalAffine.apply
    return function(*args)
