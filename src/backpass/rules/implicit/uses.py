"""Uses of a layer's weights in a backward pass: the autograd function, and where each use contributes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple
from weakref import WeakValueDictionary, ref

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.autograd.function import once_differentiable

from backpass.errors import BackpassError
from backpass.rules.attaching.attached import Attached
from backpass.rules.attaching.run import SiteCall
from backpass.rules.implicit.convolution import Convolution
from backpass.rules.implicit.layers import Affine, Einsum, Embedding, Linear, LinearLayer, Sizes

__all__ = [
    "COMPUTED",
    "Call",
    "Contributions",
    "Named",
    "Use",
    "holds_something",
    "implicit_layer",
    "layer_of",
    "world_size",
]

_KINDS: dict[str, type[LinearLayer]] = {
    kind.__name__: kind for kind in (Affine, Convolution, Einsum, Embedding, Linear)
}


@lru_cache(maxsize=4096)
def layer_of(text: str, shape: Sizes) -> LinearLayer:
    """The layer that a text names, a string because compiled graphs can carry no objects.

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
    """One use of a weight in a backward pass: z = A Theta, or y = s(z).

    Attributes:
        text: the layer (see `layer_of`).
        x: its input.
        grad: the gradient of the output.
        weight: the weight.
        bias: the bias, or None.
        z: the layer's output if an activation follows.
        activation: that activation.
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
        """The layer."""
        return layer_of(self.text, tuple(self.weight.shape))


Found = tuple[Tensor | None, Tensor | None, Tensor | None]


class Named(NamedTuple):
    """A parameter of the model and its name there."""

    name: str
    parameter: nn.Parameter


class Contributions(ABC):
    """The uses of an attached model's weights, and what each passes on.

    Args:
        attached: the rule in force on the model; neither is kept alive.
    """

    step_name = "implicit"
    way_out = ""

    def __init__(self, attached: Attached) -> None:
        self._attached = ref(attached)
        self._named: dict[int, Named] = {}
        self._last: dict[int, tuple[int, list[tuple[int, int]]]] = {}
        self.active = True
        register(attached.token, self)
        self._early: list[Any] = []

    def watch(self) -> None:
        """Refuse gradients of graphs that were built before the rule was attached."""
        self._early = [
            parameter.register_post_accumulate_grad_hook(self._refuse_early)  # type: ignore[no-untyped-call]
            for _, parameter in self.named_parameters()
            if parameter.is_leaf and parameter.requires_grad
        ]

    @abstractmethod
    def gradients(self, use: Use) -> Found:
        """The gradients of input, weight and bias that are wanted."""

    def _refuse_early(self, parameter: Tensor) -> None:
        attached = self._attached()
        while self._early:
            self._early.pop().remove()
        if attached is not None and self.active and not attached.seen:
            raise BackpassError(
                f"{self.describe(parameter)} has a gradient from a forward pass before the rule was attached, which is "
                "plain backpropagation: attach the rule first, then call the model."
            )

    def remove(self) -> None:
        """Forget everything; the rule is removed from the model."""
        while self._early:
            self._early.pop().remove()
        self.active = False
        self._named.clear()

    def named_parameters(self) -> list[Named]:
        """The parameters of the model."""
        attached = self._attached()
        return [Named(name, p) for name, p in attached.model.named_parameters()] if attached is not None else []

    def parameter(self, tensor: Tensor) -> Named | None:
        """The model's parameter in whose memory this tensor lies: compiled code knows no other identity."""
        key = tensor.untyped_storage().data_ptr()
        found = self._named.get(key)
        if found is None or found.parameter.untyped_storage().data_ptr() != key:
            self._named = {one.parameter.untyped_storage().data_ptr(): one for one in self.named_parameters()}
            found = self._named.get(key)
        return found

    def describe(self, weight: Tensor) -> str:
        """The weight's name, for errors."""
        named = self.parameter(weight)
        return f"the layer of {named.name!r}" if named else f"the layer with a weight of shape {tuple(weight.shape)}"

    def admit(self, use: Use) -> None:
        """Admit the one use of a weight whose step is exact.

        Raises:
            BackpassError: the weight has another contribution already, or several processes contribute.
        """
        step = self.step_name
        if world_size() > 1:
            raise BackpassError(
                f"{world_size()} processes contribute to {self.describe(use.weight)}, and the average of their {step} "
                f"steps is not the step of the whole batch: {self.way_out}."
            )
        learning = use.weight if use.wants[1] or use.bias is None else use.bias
        named = self.parameter(learning)
        leaf = named.parameter if named else learning
        if named is None and not (leaf.is_leaf and leaf.requires_grad):
            raise BackpassError(f"{self.describe(learning)} is computed from other parameters. {COMPUTED}")
        now = torch._C._current_graph_task_id()
        task, before = self._last.get(id(leaf), (-1, []))
        before = before if task == now and now >= 0 else []
        begin, end = _extent(learning)
        twice = any(begin < stop and start < end for start, stop in before)
        if twice or holds_something(leaf):
            how = "is used twice in one backward pass" if twice else "has a gradient from a backward pass before"
            raise BackpassError(
                f"{named.name if named else 'a weight'!r} {how}, and the sum of two {step} steps is not the step of "
                f"both: call optimizer.zero_grad() after each step, or {self.way_out}."
            )
        self._last[id(leaf)] = (now, [*before, (begin, end)])


def _extent(tensor: Tensor) -> tuple[int, int]:
    """First and one past the last entry of a tensor in its storage."""
    begin = int(tensor.storage_offset())
    if tensor.is_contiguous():
        return begin, begin + tensor.numel()
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + int(reach) + 1


COMPUTED = (
    "An implicit step for it would not be the step of the parameters that it comes from (weight_norm, spectral_norm, a "
    "parametrization, pruning, a merged adapter, a copy in another dtype): leave the layer out by `where`, or remove "
    "the parametrization."
)


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def holds_something(parameter: Tensor) -> bool:
    """Whether a parameter's gradient is there and not zero."""
    return parameter.grad is not None and bool(parameter.grad.any())


class Call(NamedTuple):
    """The call of a layer as its backward pass needs to know it.

    Attributes:
        text: the layer (see `layer_of`).
        activation: the activation that follows.
        functional: whether ``torch.func`` takes the gradients.
        key: of the contributions.
        site: asked in the backward pass whether the rule acts; None: it does.
    """

    text: str
    activation: Activation
    functional: bool
    key: str
    site: SiteCall | None = None


_BY_KEY: WeakValueDictionary[str, Contributions] = WeakValueDictionary()


def register(key: str, contributions: Contributions) -> None:
    """Let calls find their contributions; a graph of compiled code carries the key as a string."""
    _BY_KEY[key] = contributions


def _take(key: str, use: Use) -> Found:
    contributions = _BY_KEY.get(key)
    if contributions is None or not contributions.active:
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
            found = contributions.gradients(use)
    else:
        found = contributions.gradients(use)
    of_x, of_weight, of_bias = (_like(one, tensor) for one, tensor in zip(found, (use.x, weight, bias), strict=True))
    return of_x if use.wants[0] else None, of_weight if use.wants[1] else None, of_bias if use.wants[2] else None


def _like(found: Tensor | None, tensor: Tensor | None) -> Tensor | None:
    """A gradient in the dtype and shape of its tensor."""
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
    """f(x, w, b) or s(z) forward; backward what the contributions say."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        z: Tensor | None,
        compute: Callable[..., Tensor],
        rest: tuple[Any, ...],
        call: Call,
    ) -> Any:
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, z)
        return compute(x, weight, bias, *rest) if z is None else compute(z)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 7
        x, weight, bias, z = ctx.saved_tensors
        text, activation, functional, _, site = ctx.call
        needs = ctx.needs_input_grad
        if site is not None and not site.active():
            layer = layer_of(text, tuple(weight.shape))
            of_x = layer.input_gradient(x, grad, weight.to(grad.dtype)).to(x.dtype) if needs[0] else None
            x = x.to(grad.dtype) if x.is_floating_point() else x
            return of_x, *layer.gradients(x, grad, needs[1], bias is not None and needs[2]), *[None] * 4
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
        return *_take(ctx.call.key, use), *[None] * 4


class _UnderTransforms(_Eager):
    """The same for torch.func and torch.compile, which want the context set up apart; in eager calls it is slower."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Any:
        x, weight, bias, z, compute, rest, _ = inputs
        return compute(x, weight, bias, *rest) if z is None else compute(z)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, z, _, _, ctx.call = inputs
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
    return *(one if want else None for one, want in zip(found, wants, strict=True)), *[None] * 4


def _is_asked_for(ctx: Any, position: int) -> bool:
    """Whether this backward pass computes the gradient of an argument; ``autograd.grad`` names what it wants."""
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
    rest: tuple[Any, ...],
    call: Call,
) -> Tensor:
    """The layer's value, or that of the activation after it, with an implicit backward.

    Args:
        x: the layer's input.
        weight: its weight.
        bias: its bias.
        z: None, or the layer's output without its graph.
        compute: the value as a function of x, weight, bias and ``rest``, or of z.
        rest: other arguments of ``compute``.
        call: what the backward pass needs.
    """
    function = _UnderTransforms if call.functional or torch.compiler.is_dynamo_compiling() else _Eager
    apply: Callable[..., Tensor] = function.apply
    return apply(x, weight, bias, z, compute, rest, call)
