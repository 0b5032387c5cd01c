"""Base class of rules that replace the derivative of activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from backpass.errors import BackpassError
from backpass.rules import torch_internals
from backpass.rules.activation_calls import ActivationInterception
from backpass.rules.activations import (
    ACTIVATIONS,
    FUSED_ACTIVATIONS,
    SIMPLE,
    WITHOUT_ACTIVATION,
    copied,
    learned_value,
    read_call,
    writes_in_place,
)
from backpass.rules.attaching.attached import Attached
from backpass.rules.attaching.interception import Interception
from backpass.rules.attaching.run import Decision
from backpass.rules.kernels import computed, corrected, eager_kernel, replaced
from backpass.rules.places import Place, check_places
from backpass.rules.rule import Rule
from backpass.rules.sites import Site

__all__ = ["ActivationRule"]


class ActivationAttached(Attached):
    """An activation rule in force on a model."""

    interception: type[Interception] = ActivationInterception


@dataclass(frozen=True, kw_only=True)
class ActivationRule(Rule):
    """Base class of rules that replace the derivative of selected activations.

    y = s(x) forward, exactly; dL/dx = backward(dL/dy, x). A subclass is a frozen dataclass with a ``name`` and
    `backward`. It acts on every activation in any form: module, function, method or in-place call, composition
    x * gate(x), or elementwise module without parameters. A subclass with ``functions = activations("relu", ...)`` acts
    on these activations only.

    Args:
        start: first site: an index from the front (7), from the end (-2: the last two), a fraction of all sites (0.5:
            the second half), or the path of a module (the first site inside it); None: the first site.
        stop: one past the last site, given like ``start``; None: up to the end.
        where: predicate on a `Site` that selects sites from ``start`` to ``stop``; None: all.
        gates: True to include activations that only gate another tensor, as in squeeze-and-excitation.

    Raises:
        BackpassError: a setting is out of its range.
        NoSiteError: at the first call of the model, if no site is selected.
    """

    functions = ACTIVATIONS
    opaque = FUSED_ACTIVATIONS
    skipped = WITHOUT_ACTIVATION
    needs_input: ClassVar[bool] = True
    """True if `backward` uses x; False saves no tensor for the backward pass."""

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
        """True if composed activations are sites, as for rules that act on every activation."""
        return self.functions is ACTIVATIONS

    @property
    def acts_on_nodes(self) -> bool:  # type: ignore[override]
        """True if the rule can be applied to a plain call afterwards: if the input is not needed."""
        return not self.needs_input

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
        return self.replace_planned(func, args, kwargs, None) if torch.is_grad_enabled() else func(*args, **kwargs)

    def replace_planned(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        site: Decision | None,
    ) -> Any:
        """Return the activation's value with this rule's backward, or with the plain one if ``site`` is not active."""
        if len(args) == 1 and func in SIMPLE and not kwargs.get("inplace") and torch_internals.eager_without_modes():
            return eager_kernel(args[0], None, None, self.backward, (self.needs_input, site, func, (), kwargs))
        activation, x, parameters, in_place = read_call(func, args, kwargs)
        learns = parameters and any(isinstance(p, Tensor) and p.requires_grad for p in parameters)
        if site is not None and (learns or activation.name == "rrelu" or torch_internals.transforms()):
            return self.replace_call(func, args, kwargs, site)
        z = copied(x) if in_place and (self.needs_input or site is not None) else x
        if learns:
            y = self.replace_value(z, activation.compute(z.detach(), *parameters), None)
        else:
            y = computed(self, site, z, activation.compute, parameters)
        return x.copy_(y) if in_place else y

    def replace_call(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], site: Decision | None
    ) -> Any:
        """Return the activation's value with the plain graph and this rule's backward; see `replace_value`."""
        if not args:
            args, kwargs = (kwargs["input"],), {name: value for name, value in kwargs.items() if name != "input"}
        x, rest = args[0], args[1:]
        writes = writes_in_place(func, args, kwargs)
        before = copied(x) if writes else x
        plain = func(copied(before) if writes else x, *rest, **kwargs)
        out = self.replace_value(before, plain, site, learned_value(func, before, args, kwargs))
        return x.copy_(out) if writes else out

    def replace_value(self, x: Tensor, value: Tensor, site: Decision | None, learned: Tensor | None = None) -> Any:
        """Return ``value``, computed from x, with this rule's backward; see `kernels.replaced`."""
        return replaced(self, site, x, value, learned)

    def replace_learned(self, x: Tensor, value: Tensor, site: Decision | None) -> Any:
        """Return ``value``, computed from x and from parameters of the model; see `kernels.corrected`."""
        return corrected(self, site, x, value)

    def adjusted(self, of_x: Tensor, plain: Tensor) -> Tensor:
        """Return the gradient of x from the rule's gradient and the plain gradient; see `replace_learned`."""
        return of_x

    def on_node(self, grad_inputs: tuple[Tensor | None, ...], grads: tuple[Tensor | None, ...]) -> Any:
        """Return the gradients that replace those of the graph node of a plain activation."""
        of_x, *others = grad_inputs
        if of_x is None or grads[0] is None:
            return None
        return self.backward(grads[0], grads[0]).to(of_x.dtype), *others
