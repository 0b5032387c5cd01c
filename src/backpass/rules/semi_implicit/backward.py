"""The autograd function of a layer under `SIBP`: semi-implicit weight steps, neurons through the updated weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.compiler import is_dynamo_compiling

from backpass.errors import BackpassError
from backpass.rules.damped import NotFiniteError
from backpass.rules.layers.asked_for import is_asked_for
from backpass.rules.layers.convolution import Convolution
from backpass.rules.layers.linear_calls import LinearCall
from backpass.rules.layers.linear_layers import layer_of
from backpass.rules.semi_implicit.divergence import StepSizes
from backpass.rules.semi_implicit.elementwise import Elementwise
from backpass.rules.semi_implicit.single_use import SingleUse
from backpass.rules.semi_implicit.unit_systems import UnitSystem, unit_system
from backpass.rules.semi_implicit.weight_step import Curved, SemiImplicitStep, increment

__all__ = ["Call", "Steps", "announce", "semi_implicit_layer"]


@dataclass(eq=False)
class Steps:
    """What the backward passes of one attachment need to know.

    Attributes:
        step: the settings; asked for in every pass, because eta may depend on the depth of the last call.
        uses: which weights were used when.
        sizes: how long their steps were.
    """

    step: Callable[[], SemiImplicitStep]
    uses: SingleUse
    sizes: StepSizes


@dataclass(frozen=True)
class Call:
    """The call of a layer, and of the activation that follows it.

    Attributes:
        token: where the settings are found (a key of `announce`).
        kind: the layer's class.
        geometry: its settings.
        activation: name of the activation; ``""`` for none.
        numbers: its parameters.
        functional: whether ``torch.func`` takes the gradients.
    """

    token: str
    kind: str
    geometry: tuple[int, ...]
    activation: str
    numbers: tuple[float, ...]
    functional: bool


_BY_TOKEN: WeakValueDictionary[str, Steps] = WeakValueDictionary()


def announce(token: str, steps: Steps) -> None:
    """Let calls find their settings under ``token``."""
    _BY_TOKEN[token] = steps


def _solve(
    x: Tensor,
    grad: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None,
    kind: str,
    geometry: Sequence[int],
    activation: str,
    numbers: Sequence[float],
    wants: Sequence[bool],
    writes: bool,
    token: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dL/dx through the updated weights, and the negative steps of weight and bias; None for what is not wanted."""
    steps = _BY_TOKEN.get(token)
    if steps is None:
        raise BackpassError(
            "the backward pass came after the rule, or the model it was attached to, was gone: call backward() while "
            "the rule is attached."
        )
    if writes:
        steps.uses.admit(weight)
    step = steps.step()
    layer = layer_of(kind, tuple(weight.shape), tuple(geometry))
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    with torch.autocast(weight.device.type, enabled=False):
        rows, grad = x.to(dtype), grad.to(dtype)
        of_z, weighting, curved = grad, None, None
        if z is not None:
            curved = Curved(Elementwise(activation, tuple(numbers)), z.to(dtype), grad)
            slope = curved.s.derivative(curved.z)
            of_z, weighting = grad * slope, slope.square_()
        of_weight = of_bias = None
        if wants[1] or wants[2]:
            system = unit_system(layer, rows, (wants[1], wants[2]), step.ratio, direct=z is None)
            of_weight, of_bias = _decrements(system, of_z, weighting, curved, step, steps, weight, bias)
        of_x = None
        if wants[0]:
            through = weight.to(dtype)
            if of_weight is not None and step.updated_weights:
                through = through - of_weight
            of_x = layer.input_gradient(x, of_z, through) if isinstance(layer, Convolution) else of_z @ through
            of_x = of_x.to(x.dtype)
    return of_x, _like(of_weight, weight), _like(of_bias, weight)


def _decrements(
    system: UnitSystem,
    of_z: Tensor,
    weighting: Tensor | None,
    curved: Curved | None,
    step: SemiImplicitStep,
    steps: Steps,
    weight: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """The negative steps of weight and bias."""
    x = system.x
    if not of_z.numel():
        return system.layer.gradients(x, of_z, *system.wants)
    scale = step.eta * (x.shape[0] if step.reduction == "mean" and x.dim() > 1 else 1)
    if curved is not None and step.newton_steps == 1 and not step.corrects(curved.s):
        curved = None
    if curved is not None:
        curved = Curved(curved.s, system.arrange(curved.z), system.arrange(curved.grad))
    weighting = None if weighting is None else system.arrange(weighting)
    try:
        found = increment(system, system.arrange(of_z), weighting, curved, scale, step)
    except NotFiniteError:
        raise steps.sizes.not_finite(weight, step.eta) from None
    # Negated while it is small: the weight's own size may be much larger.
    of_weight, of_bias = system.weights(found.neg_())
    if of_weight is not None:
        steps.sizes.admit(weight, of_weight, weight, step.eta)
    elif of_bias is not None and bias is not None:
        steps.sizes.admit(weight, of_bias, bias, step.eta)
    return of_weight, of_bias


def _like(tensor: Tensor | None, weight: Tensor) -> Tensor | None:
    return None if tensor is None else tensor.to(weight.dtype).contiguous()


# One operator for compiled code and transforms: what depends on data then happens at run time there too.
@torch.library.custom_op(
    "backpass::semi_implicit_gradients",
    mutates_args=(),
    schema="(Tensor x, Tensor grad, Tensor weight, Tensor? bias, Tensor? z, str kind, int[] geometry, str activation, "
    "float[] numbers, bool[] wants, bool writes, str token) -> (Tensor, Tensor, Tensor)",
)
def _operator(
    x: Tensor, grad: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None, *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    by_x, by_weight, by_bias = _solve(x, grad, weight, bias, z, *settings)
    return (
        x.new_empty(0) if by_x is None else by_x.contiguous(),
        weight.new_empty(0) if by_weight is None else by_weight,
        weight.new_empty(0) if by_bias is None else by_bias,
    )


@_operator.register_fake
def _(
    x: Tensor, grad: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None, *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    wants = settings[4]
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
    each = [_operator(*one, *args[5:]) for one in zip(*tensors, strict=True)]
    return tuple(torch.stack(parts) for parts in zip(*each, strict=True)), (0, 0, 0)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, z = ctx.saved_tensors
    call: Call = ctx.call
    within = torch.compiler.is_compiling() or call.functional
    needs = ctx.needs_input_grad
    wants = [bool(needs[0]), bool(needs[1]), bias is not None and bool(needs[2])]
    writes = not call.functional and any(ctx.needs_input_grad[k] and is_asked_for(ctx, k) for k in (1, 2))
    settings = (call.kind, list(call.geometry), call.activation, list(call.numbers), wants, writes, call.token)
    found = (_operator if within else _solve)(x, grad, weight, bias, z, *settings)
    return *(one if want else None for one, want in zip(found, wants, strict=True)), *[None] * 4


class _SemiImplicitLayer(torch.autograd.Function):
    """s(z) with z = f(x, w, b) forward; backward the semi-implicit step of w and b, and x through w plus its step."""

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
        ctx.save_for_backward(x, weight, bias, z)
        return compute(x, weight, bias, *rest) if z is None else compute(z)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise BackpassError(
                "a semi-implicit step is no differentiable function of the input: SIBP has no double backward. Leave "
                "out create_graph=True, or remove the rule where second derivatives are needed."
            )
        return _backward(ctx, grad)


class _UnderTransforms(torch.autograd.Function):
    """The same for torch.func and torch.compile, which want the context set up apart; in eager calls it is slower."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        z: Tensor | None,
        compute: Callable[..., Tensor],
        rest: tuple[Any, ...],
        call: Call,
    ) -> Tensor:
        return compute(x, weight, bias, *rest) if z is None else compute(z)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, z, _, _, ctx.call = inputs
        ctx.save_for_backward(x, weight, bias, z)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(ctx, grad)


def semi_implicit_layer(
    layer: LinearCall, z: Tensor | None, compute: Callable[..., Tensor], rest: tuple[Any, ...], call: Call
) -> Tensor:
    """The layer's value, or its activation's, with the semi-implicit backward.

    Args:
        layer: the layer with its input.
        z: the layer's output, cut off from its own graph, if an activation follows; else None.
        compute: the activation, a function of z; or the layer, a function of x, w, b and ``rest``.
        rest: what else ``compute`` takes.
        call: where the backward pass finds its settings.
    """
    function = _UnderTransforms if call.functional or is_dynamo_compiling() else _SemiImplicitLayer
    apply: Callable[..., Tensor] = function.apply
    return apply(layer.x, layer.weight, layer.bias, z, compute, rest, call)
