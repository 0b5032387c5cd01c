"""Autograd functions that replace the backward pass of a call by that of a rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from backpass.errors import BackpassError
from backpass.rules import torch_internals
from backpass.rules.attaching.run import Decision

__all__ = ["computed", "corrected", "eager_kernel", "replaced"]


_Call = tuple[bool, Decision | None, Callable[..., Any] | None, tuple[Any, ...], Mapping[str, Any]]
"""True if the rule's backward uses x; the site that the backward pass asks whether the rule acts, or None; the function
of x, or None if its value is given; its further arguments."""

_NONE: Mapping[str, Any] = {}


def computed(
    override: Any,
    site: Decision | None,
    x: Tensor,
    compute: Callable[..., Any],
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] = _NONE,
) -> Any:
    """Return ``compute(x, *args, **kwargs)`` with the backward of ``override``; keeps no more than x."""
    return _apply(x, None, None, override.backward, (override.needs_input, site, compute, args, kwargs))


def replaced(override: Any, site: Decision | None, x: Tensor, value: Tensor, learned: Tensor | None = None) -> Any:
    """Return ``value``, computed from x, with the backward of ``override``.

    Args:
        override: object with ``backward(grad, x)`` and ``needs_input``, True if it uses x.
        site: site queried in the backward pass; None: the rule acts.
        x: input of the call.
        value: output; with the plain graph, or, without a site, with the graph of learned parameters only.
        learned: output as a function of learned parameters only, where ``site`` is given.
    """
    return _apply(x, value, learned, override.backward, (override.needs_input, site, None, (), _NONE))


def corrected(override: Any, site: Decision | None, x: Tensor, value: Tensor) -> Any:
    """Return ``value``, computed from x and parameters, with the backward of ``override`` for x only.

    The backward pass traverses the plain graph twice. ``override.adjusted(of_x, plain)`` is the gradient of x.
    """
    apply: Callable[..., Any] = _Corrected.apply
    return apply(x, value, override, site)


class _Kernel(torch.autograd.Function):
    """(x, value, learned, rule, call) -> value; backward gives x the rule's gradient, or the plain one, as decided.

    ``rule`` is a method ``backward(grad, x)``: Dynamo of torch 2.9 would make a frozen dataclass anew, of symbols.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, value: Tensor | None, learned: Tensor | None, rule: Any, call: _Call) -> Any:
        _, _, compute, args, kwargs = call
        if compute is not None:
            return compute(x, *args, **kwargs)
        assert value is not None  # noqa: S101
        # No view of the value, so that later calls may modify the result in place.
        return value.clone() if is_dynamo_compiling() or torch_internals.transforms() else value.data

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, value, learned, ctx.rule, ctx.call = inputs
        if value is not None:
            ctx.learns = learned is not None
        needs_input, site, *_ = ctx.call
        if site is not None:
            ctx.site = site  # for the search of blocks
        if needs_input or (site is not None and value is None):
            ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs_input, site, compute, *_ = ctx.call
        if site is not None and not site.active():
            given = compute is None
            return None if given else _plain_gradient(ctx, grad), grad if given else None, None, None, None
        of_x = ctx.rule(grad, ctx.saved_tensors[0] if needs_input else grad)
        if compute is not None:
            return of_x, None, None, None, None
        return of_x, grad if site is None else None, grad if ctx.learns else None, None, None


class _ForwardModeKernel(_Kernel):
    """`_Kernel` with a forward-mode derivative, which Dynamo does not support."""

    @staticmethod
    def jvp(ctx: Any, of_x: Tensor | None, of_value: Tensor | None, *_: Any) -> Any:
        needs_input, site, *_ = ctx.call
        if needs_input:
            raise BackpassError(f"{ctx.rule.__self__} has no forward-mode derivative: its backward uses the input.")
        if site is not None and not site.selected:
            return of_value
        return ctx.rule(of_x, of_x)


eager_kernel = torch_internals.bare_apply(_ForwardModeKernel)
"""The kernel in eager calls outside of `torch.func`."""


def _apply(*inputs: Any) -> Any:
    kind: Any = _Kernel if is_dynamo_compiling() else _ForwardModeKernel
    return kind.apply(*inputs) if is_dynamo_compiling() or torch_internals.transforms() else eager_kernel(*inputs)


class _Corrected(torch.autograd.Function):
    """(x, value) -> value; backward adds to the gradient of x the difference between the rule's and the plain one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, override: Any, site: Decision | None) -> Tensor:
        ctx.override, ctx.site = override, site
        edge = torch.autograd.graph.get_gradient_edge
        ctx.way = ([edge(value)], [edge(x)]) if x.requires_grad and value.requires_grad else None
        if override.needs_input:
            ctx.save_for_backward(x)
        return value.data

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.way is None or (ctx.site is not None and not ctx.site.active()):
            return None, grad, None, None
        again = torch.is_grad_enabled()
        outputs, inputs = ctx.way
        (plain,) = torch.autograd.grad(outputs, inputs, [grad], retain_graph=True, create_graph=again)
        x = ctx.saved_tensors[0] if ctx.override.needs_input else grad
        return ctx.override.adjusted(ctx.override.backward(grad, x), plain) - plain, grad, None, None


def _plain_gradient(ctx: Any, grad: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    _, _, compute, args, kwargs = ctx.call
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        z = x if again else x.detach().requires_grad_()
        y = compute(z, *args, **kwargs)
    of_x: Tensor = torch.autograd.grad(y, z, grad, create_graph=again)[0]
    return of_x
