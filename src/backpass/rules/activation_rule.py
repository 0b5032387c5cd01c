"""The base of rules that give activations another derivative."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from backpass.errors import BackpassError
from backpass.rules import torch_internals
from backpass.rules.activation_calls import ActivationInterception
from backpass.rules.activations import (
    ACTIVATIONS,
    FUSED_ACTIVATIONS,
    WITHOUT_ACTIVATION,
    learned_value,
    read_call,
    writes_in_place,
)
from backpass.rules.attaching.attached import Attached
from backpass.rules.attaching.interception import Interception
from backpass.rules.attaching.run import SiteCall
from backpass.rules.places import Place, check_places
from backpass.rules.rule import Rule
from backpass.rules.sites import Site

__all__ = ["ActivationRule", "kernel"]


class ActivationAttached(Attached):
    """An activation rule in force on a model."""

    interception: type[Interception] = ActivationInterception


@dataclass(frozen=True, kw_only=True)
class ActivationRule(Rule):
    """Base of the rules that give selected activations another derivative.

    y = s(x) forward, exactly; dL/dx = backward(dL/dy, x). A subclass is a frozen dataclass with a ``name`` and
    `backward`. It acts on every activation, however it is called: as a module, a function or a method, in place too,
    composed as x * gate(x), or as an elementwise module without parameters; or on those of
    ``functions = activations("relu", ...)`` alone.

    Args:
        start: first site: an index from the front (7), from the end (-2: the last two), a fraction of all sites (0.5:
            the second half), or the path of a module (the first site inside it); None: the first site.
        stop: one past the last site, given like ``start``; None: up to the end.
        where: which of the sites from ``start`` to ``stop``, a function of a `Site`; None: all.
        gates: whether activations whose value only gates another tensor, as in squeeze-and-excitation, are sites too.

    Raises:
        BackpassError: a setting is out of its range.
        NoSiteError: at the first call of the model, if no site is selected.
    """

    functions = ACTIVATIONS
    opaque = FUSED_ACTIVATIONS
    skipped = WITHOUT_ACTIVATION
    needs_input: ClassVar[bool] = True
    """True if `backward` uses x; without it nothing is kept for the backward pass."""

    start: Place = None
    stop: Place = None
    where: Callable[[Site], bool] | None = None
    gates: bool = False

    def __post_init__(self) -> None:
        """Validate the settings."""
        check_places(self.start, self.stop)
        if self.where is not None and not callable(self.where):
            raise BackpassError(f"where must be a function of a Site that returns a bool, got {self.where!r}.")
        if not isinstance(self.gates, bool):
            raise BackpassError(f"gates must be True or False, got {self.gates!r}.")

    @property
    def compositions(self) -> bool:  # type: ignore[override]
        """Whether composed activations are sites: where the rule acts on every activation."""
        return self.functions is ACTIVATIONS

    @property
    def acts_on_nodes(self) -> bool:  # type: ignore[override]
        """Whether a plain call can be given this rule's backward afterwards: if the input is not needed."""
        return not self.needs_input

    def covers(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return whether a call of one of the functions is a site; its parameters may decide that."""
        return True

    def attach(self, model: nn.Module, *, strict: bool = False) -> Attached:
        """Override the backward of ``model``; see `Rule.attach`."""
        kind = type(self)
        if kind.backward is ActivationRule.backward and kind.replace is ActivationRule.replace:
            raise BackpassError(f"{kind.__name__} does not say what its backward pass is: define backward(grad, x).")
        return ActivationAttached(self, model, strict=strict)

    def backward(self, grad: Tensor, x: Tensor) -> Tensor:
        """Return dL/dx.

        Args:
            grad: dL/dy.
            x: the activation's input, of the shape of ``grad``.

        Returns:
            A tensor of that shape, computed by elementwise operations; here dL/dy itself.
        """
        return grad

    def replace(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the activation's value with this rule's backward; learned parameters keep their own gradients."""
        activation, x, parameters, in_place = read_call(func, args, kwargs)
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        z = x.clone() if in_place and self.needs_input else x  # the backward pass needs the input as it was
        if parameters and any(isinstance(p, Tensor) and p.requires_grad for p in parameters):
            y = self.replace_value(z, activation.compute(z.detach(), *parameters), None)
        else:
            y = kernel(self).apply(z, (activation.compute, parameters, self, None))
        return x.copy_(y) if in_place else y

    def replace_call(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], site: SiteCall | None
    ) -> Any:
        """Return the activation's value with the plain graph and this rule's backward; see `replace_value`."""
        if not args:
            args, kwargs = (kwargs["input"],), {name: value for name, value in kwargs.items() if name != "input"}
        x, rest = args[0], args[1:]
        writes = writes_in_place(func, args, kwargs)
        before = x.clone() if writes else x
        plain = func(before.clone() if writes else x, *rest, **kwargs)
        out = self.replace_value(before, plain, site, learned_value(func, before, args, kwargs))
        return x.copy_(out) if writes else out

    def replace_planned(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], site: SiteCall
    ) -> Any:
        """Return the activation's value with this rule's backward, or, should ``site`` say so, with the plain one."""
        activation, x, parameters, in_place = read_call(func, args, kwargs)
        learns = parameters and any(isinstance(p, Tensor) and p.requires_grad for p in parameters)
        if learns or torch_internals.transforms():
            return self.replace_call(func, args, kwargs, site)
        z = x.clone() if in_place else x
        apply: Callable[..., Any] = _EagerKernel.apply
        y = apply(z, (activation.compute, parameters, self, site))
        return x.copy_(y) if in_place else y

    def replace_value(self, x: Tensor, value: Tensor, site: SiteCall | None, learned: Tensor | None = None) -> Any:
        """Return ``value``, computed from x, with this rule's backward.

        Args:
            x: the input.
            value: the value; with the plain graph, or, if the rule surely acts, with that of learned parameters.
            site: asked in the backward pass whether the rule acts; None: it does.
            learned: the value as a function of learned parameters alone, where ``site`` is given.
        """
        apply: Callable[..., Any] = _Replaced.apply
        return apply(x, value, learned, self, site)

    def replace_learned(self, x: Tensor, value: Tensor, site: SiteCall) -> Any:
        """Return ``value``, computed from x and from parameters that keep their own gradients."""
        apply: Callable[..., Any] = _Learned.apply
        return apply(x, value, self, site)

    def on_node(self, grad_inputs: tuple[Tensor | None, ...], grads: tuple[Tensor | None, ...]) -> Any:
        """Return the gradients that a plain activation's graph node passes on in the place of its own."""
        of_x, *others = grad_inputs
        if of_x is None or grads[0] is None:
            return None
        return self.backward(grads[0], grads[0]).to(of_x.dtype), *others


class _EagerKernel(torch.autograd.Function):
    """y = s(x) forward; dL/dx = rule.backward(dL/dy, x). In eager calls it is faster to set up the context at once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: tuple[Any, ...]) -> Any:
        compute, parameters, rule, site = ctx.call = call
        ctx.rule, ctx.dtype, ctx.site = rule, x.dtype, site
        if site is not None or rule.needs_input:
            ctx.save_for_backward(x)
        return compute(x, *parameters)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        plain = ctx.site is not None and not ctx.site.active()
        return _plain_gradient(ctx, grad) if plain else _gradient(ctx, grad), None


class _Kernel(torch.autograd.Function):
    """`_EagerKernel` for torch.func and torch.compile, which need the context set up separately."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, call: tuple[Any, ...]) -> Any:
        compute, parameters, _, _ = call
        return compute(x, *parameters)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, (_, _, ctx.rule, _) = inputs
        ctx.dtype = x.dtype
        if ctx.rule.needs_input:
            ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _gradient(ctx, grad), None


class _ForwardModeKernel(_Kernel):
    """`_Kernel` with a forward-mode derivative, for rules without x; Dynamo refuses a Function that has one."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Any:
        return ctx.rule.backward(tangent, tangent)


def kernel(rule: Any) -> Any:
    """Return the autograd function (x, (compute, parameters, rule, site)) -> y for the mode of the running call."""
    if is_dynamo_compiling():
        return _Kernel
    if torch_internals.forward_mode() and not rule.needs_input:
        return _ForwardModeKernel
    return _Kernel if torch_internals.transforms() else _EagerKernel


class _Replaced(torch.autograd.Function):
    """(x, value, learned) -> value; backward gives x the rule's gradient, or the value its own, as decided."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, value: Tensor, learned: Tensor | None, rule: Any, site: SiteCall | None) -> Tensor:
        # Without a view of the value, so that later calls may write into the result.
        return value.clone() if is_dynamo_compiling() or torch_internals.transforms() else value.data

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, _, learned, ctx.rule, ctx.site = inputs
        ctx.dtype, ctx.learns = x.dtype, learned is not None
        if ctx.rule.needs_input:
            ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.site is not None and not ctx.site.active():
            return None, grad, None, None, None
        return _gradient(ctx, grad), grad if ctx.site is None else None, grad if ctx.learns else None, None, None


class _Learned(torch.autograd.Function):
    """(x, value) -> value; backward adds to x what turns the value's gradient of x into the rule's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, rule: Any, site: SiteCall) -> Tensor:
        ctx.rule, ctx.site, ctx.dtype = rule, site, x.dtype
        edge = torch.autograd.graph.get_gradient_edge
        ctx.way = ([edge(value)], [edge(x)]) if x.requires_grad else None
        if rule.needs_input:
            ctx.save_for_backward(x)
        return value.data

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.way is None or not ctx.site.active():
            return None, grad, None, None
        again = torch.is_grad_enabled()
        outputs, inputs = ctx.way
        (plain,) = torch.autograd.grad(outputs, inputs, [grad], retain_graph=True, create_graph=again)
        return _gradient(ctx, grad) - plain, grad, None, None


def _gradient(ctx: Any, grad: Tensor) -> Tensor:
    x = ctx.saved_tensors[0] if ctx.rule.needs_input else grad
    of_x: Tensor = ctx.rule.backward(grad, x)
    return of_x if of_x.dtype == ctx.dtype else of_x.to(ctx.dtype)


def _plain_gradient(ctx: Any, grad: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        z = x if again else x.detach().requires_grad_()
        compute, parameters, *_ = ctx.call
        y = compute(z, *parameters)
    of_x: Tensor = torch.autograd.grad(y, z, grad, create_graph=again)[0]
    return of_x
