"""Uses of a layer's weights in a backward pass: the autograd function, also for compiled code and transforms."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from backpass.errors import BackpassError
from backpass.rules import torch_internals
from backpass.rules.attaching.run import SiteCall
from backpass.rules.implicit.convolution import Convolution
from backpass.rules.implicit.layers import Einsum, Embedding, Linear, LinearLayer, Sizes

__all__ = ["Call", "Found", "Use", "implicit_layer", "layer_of", "register"]

_KINDS: dict[str, type[LinearLayer]] = {kind.__name__: kind for kind in (Convolution, Einsum, Embedding, Linear)}


@lru_cache(maxsize=4096)
def layer_of(text: str, shape: Sizes) -> LinearLayer:
    """Return the layer that a text describes; compiled graphs carry strings, but no objects.

    Args:
        text: the class and its settings in order; a tuple ends with a comma: ``"Linear 0"``, ``"Einsum bd,de->be"``.
        shape: the shape of the weight.
    """
    name, *settings = text.split(" ")
    return _KINDS[name](shape, *map(_setting, settings))


def _setting(text: str) -> str | int | Sizes:
    if "->" in text:
        return text
    return tuple(map(int, text[:-1].split(","))) if text.endswith(",") else int(text)


Activation = tuple[str, tuple[float, ...]]
"""Name and numbers of the activation that follows a layer; an empty name for none."""


class Use(NamedTuple):
    """Use of a weight in a backward pass: z = A Theta, or y = s(z) where an activation follows.

    Attributes:
        text: the layer (see `layer_of`).
        grad: the gradient of the output.
        wants: whether gradients of input, weight and bias are needed.
        asked: whether this backward pass computes the gradient of weight or bias; ``autograd.grad`` may not.
        functional: whether ``torch.func`` returns the gradients instead of accumulating them.
        borrowed: whether ``x`` may be modified in place later.
    """

    text: str
    x: Tensor
    grad: Tensor
    weight: Tensor
    bias: Tensor | None
    z: Tensor | None
    activation: Activation
    wants: tuple[bool, bool, bool]
    asked: bool
    functional: bool
    borrowed: bool

    @property
    def layer(self) -> LinearLayer:
        """Layer that `text` describes."""
        return layer_of(self.text, tuple(self.weight.shape))


Found = tuple[Tensor | None, Tensor | None, Tensor | None]


class Call(NamedTuple):
    """Description of a layer's call for its backward pass.

    Attributes:
        text: the layer (see `layer_of`).
        functional: whether ``torch.func`` takes the gradients.
        key: of the attached rule.
        site: asked in the backward pass whether the rule acts; None: it does.
    """

    text: str
    activation: Activation
    functional: bool
    key: str
    site: SiteCall | None = None


_BY_KEY: WeakValueDictionary[str, Any] = WeakValueDictionary()


def register(key: str, attached: Any) -> None:
    """Let calls find the rule in force on their model; a graph of compiled code carries the key as a string."""
    _BY_KEY[key] = attached


def _take(key: str, use: Use) -> Found:
    attached = _BY_KEY.get(key)
    if attached is None or not attached.active:
        raise BackpassError(
            "the backward pass came after the rule, or the model it was attached to, was gone: call backward() while "
            "the rule is attached."
        )
    weight, bias = use.weight, use.bias
    found: Found
    if not use.grad.numel() or not use.x.numel():  # an empty batch
        found = (torch.zeros_like(use.x), torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias))
    elif torch.is_autocast_enabled(weight.device.type):
        with torch.autocast(weight.device.type, enabled=False):
            found = attached.gradients(use)
    else:
        found = attached.gradients(use)
    of_x, of_weight, of_bias = (_like(one, tensor) for one, tensor in zip(found, (use.x, weight, bias), strict=True))
    return of_x if use.wants[0] else None, of_weight if use.wants[1] else None, of_bias if use.wants[2] else None


def _like(found: Tensor | None, tensor: Tensor | None) -> Tensor | None:
    """Convert a gradient to the dtype and shape of its tensor."""
    if found is None or tensor is None:
        return None
    found = found if found.dtype == tensor.dtype else found.to(tensor.dtype)
    return found if found.shape == tensor.shape else found.reshape(tensor.shape)


# One operator for compiled code and transforms: what depends on data happens at run time there too.
@torch.library.custom_op(
    "backpass::implicit_gradients",
    mutates_args=(),
    schema="(Tensor x, Tensor grad, Tensor weight, Tensor? bias, Tensor? z, str text, str activation, float[] numbers, "
    "bool[] wants, bool[] how, str key) -> (Tensor, Tensor, Tensor)",
)
def _operator(
    x: Tensor,
    grad: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None,
    text: str,
    activation: str,
    numbers: list[float],
    wants: list[bool],
    how: list[bool],
    key: str,
) -> tuple[Tensor, Tensor, Tensor]:
    asked, chosen = wants[1] or wants[2], (wants[0], wants[1], wants[2])
    use = Use(text, x, grad, weight, bias, z, (activation, tuple(numbers)), chosen, asked, how[0], how[1])
    of_x, of_weight, of_bias = _take(key, use)
    # The outputs of an operator share no memory with each other or with its inputs.
    return (
        x.new_empty(0) if of_x is None else of_x.contiguous(),
        weight.new_empty(0) if of_weight is None else of_weight.contiguous(),
        weight.new_empty(0) if of_bias is None else of_bias.clone(),
    )


@_operator.register_fake
def _(x: Tensor, grad: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None, *settings: Any) -> Any:
    wants = settings[3]
    return (
        x.new_empty(x.shape if wants[0] else (0,)),
        weight.new_empty(weight.shape if wants[1] else (0,)),
        weight.new_empty(bias.shape if bias is not None and wants[2] else (0,)),
    )


@_operator.register_vmap
def _(info: Any, in_dims: Any, *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    tensors = [
        [arg] * info.batch_size if dim is None else list(arg.unbind(dim))
        for arg, dim in zip(args[:5], in_dims[:5], strict=True)
    ]
    *settings, (_, borrowed), key = args[5:]
    each = [_operator(*one, *settings, [True, borrowed], key) for one in zip(*tensors, strict=True)]
    return tuple(torch.stack(parts) for parts in zip(*each, strict=True)), (0, 0, 0)


class _Eager(torch.autograd.Function):
    """Autograd function of f(x, w, b) or s(z); the attached rule computes the gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        z: Tensor | None,
        compute: Callable[..., Tensor],
        call: Call,
    ) -> Any:
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, z)
        # Without a view of the value, so that an activation may write into the result.
        return (compute(x, weight, bias) if z is None else compute(z)).data

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 6
        x, weight, bias, z = ctx.saved_tensors
        text, activation, functional, _, site = ctx.call
        needs = ctx.needs_input_grad
        if site is not None and not site.active():
            layer = layer_of(text, tuple(weight.shape))
            of_x = layer.input_gradient(x, grad, weight.to(grad.dtype)).to(x.dtype) if needs[0] else None
            x = x.to(grad.dtype) if x.is_floating_point() else x
            return of_x, *layer.gradients(x, grad, needs[1], bias is not None and needs[2]), *[None] * 3
        if functional or torch.compiler.is_compiling():
            return _under_transforms(ctx, grad)
        wants = (bool(needs[0]), bool(needs[1]), bias is not None and bool(needs[2]))
        if torch.is_grad_enabled():
            raise BackpassError(
                "an implicit step is no differentiable function of the input, so it has no double backward: leave out "
                "create_graph=True, or remove the rule where second derivatives are needed."
            )
        asked = any(wants[k] and _is_asked_for(ctx, k) for k in (1, 2))
        use = Use(text, x, grad, weight, bias, z, activation, wants, asked, False, not needs[0])
        return *_take(ctx.call.key, use), *[None] * 3


_apply_eager = torch_internals.bare_apply(_Eager)


class _UnderTransforms(_Eager):
    """`_Eager` with a separate `setup_context`, which torch.func and torch.compile need; slower in eager calls."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Any:
        x, weight, bias, z, compute, _ = inputs
        return compute(x, weight, bias) if z is None else compute(z)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, z, _, ctx.call = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, z)


@once_differentiable
def _under_transforms(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, z = ctx.saved_tensors
    text, activation, functional, key, _ = ctx.call
    needs = ctx.needs_input_grad
    wants = [bool(needs[0]), bool(needs[1]), bias is not None and bool(needs[2])]
    how = [functional, torch.compiler.is_compiling() or not needs[0]]
    found = _operator(x, grad, weight, bias, z, text, activation[0], list(activation[1]), wants, how, key)
    return *(one if want else None for one, want in zip(found, wants, strict=True)), *[None] * 3


def _is_asked_for(ctx: Any, position: int) -> bool:
    """Return whether this backward pass computes the gradient of an argument; ``autograd.grad`` names what it wants."""
    edges = getattr(ctx, "next_functions", None)
    node = edges[position][0] if edges else None
    if node is None or torch._C._current_graph_task_id() < 0:
        return True
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # a leaf that autograd.grad was asked for
        return True


def implicit_layer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None,
    compute: Callable[..., Tensor],
    call: Call,
) -> Tensor:
    """Return the output of a layer, or of the activation after it, with an implicit backward.

    The value is ``compute(x, weight, bias)``, or ``compute(z)`` with the layer's output z without its graph.
    """
    special = call.functional or torch.compiler.is_dynamo_compiling()
    apply: Callable[..., Tensor] = _UnderTransforms.apply if special else _apply_eager
    return apply(x, weight, bias, z, compute, call)
