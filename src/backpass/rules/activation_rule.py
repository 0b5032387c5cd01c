"""The base of rules that give activations another derivative."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from backpass.errors import BackpassError
from backpass.rules.activations import ACTIVATIONS, WITHOUT_ACTIVATION, read_call
from backpass.rules.ranges import check_paths, check_places, resolve_range
from backpass.rules.rule import Rule
from backpass.rules.sites import Site, SiteTable

__all__ = ["ActivationRule"]


class _OwnBackward(torch.autograd.Function):
    """y = s(x) forward; dL/dx is what the rule says."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, compute: Callable[..., Tensor], parameters: tuple[Any, ...], rule: ActivationRule) -> Tensor:
        return compute(x, *parameters)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.rule = inputs[3]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        return ctx.rule.backward(grad, x), None, None, None


class _ValueAndOwnBackward(torch.autograd.Function):
    """The value forward; dL/dx is what the rule says, and dL/dy goes to the value's own graph."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, value: Tensor, rule: ActivationRule) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.rule = inputs[2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (x,) = ctx.saved_tensors
        return ctx.rule.backward(grad, x), grad, None


@dataclass(frozen=True, kw_only=True)
class ActivationRule(Rule):
    """Selected activations get another derivative: y = s(x) forward, exactly; dL/dx = backward(dL/dy, x).

    A subclass is a frozen dataclass with a ``name`` and `backward`. It acts on every activation, however it is called:
    as a module, a function or a method, in place too; or on those of ``functions = activations("relu", ...)``.

    Args:
        start: first site: an index from the front (7), from the end (-2: the last two), a fraction of all sites (0.5:
            the second half), or the path of a module (the first site inside it); None: the first site.
        stop: one past the last site, given like ``start``; None: up to the end.
        where: which of the sites from ``start`` to ``stop``, a function of a `Site`; None: all.

    Raises:
        BackpassError: a setting is out of its range.
        NoSiteError: at the first call of the model, if no site is selected.
    """

    functions = ACTIVATIONS
    silent = WITHOUT_ACTIVATION

    start: int | float | str | None = None
    stop: int | float | str | None = None
    where: Callable[[Site], bool] | None = None

    def __post_init__(self) -> None:
        """Refuses settings that cannot be meant."""
        check_places(self.start, self.stop)
        if self.where is not None and not callable(self.where):
            raise BackpassError(f"where is a function of a Site that gives a bool, got {self.where!r}.")

    def check(self, model: nn.Module) -> None:
        """Refuse a module path that the model does not have, and a rule that does not say what it does."""
        kind = type(self)
        if kind.backward is ActivationRule.backward and kind.replace is ActivationRule.replace:
            raise BackpassError(f"{kind.__name__} does not say what its backward pass is: define backward(grad, x).")
        check_paths(model, self.start, self.stop)

    def range(self, sites: Callable[[], SiteTable]) -> tuple[int, int]:
        """The site indices from ``start`` to ``stop``."""
        return resolve_range(self.start, self.stop, sites)

    def backward(self, grad: Tensor, x: Tensor) -> Tensor:
        """dL/dx, from ``grad`` = dL/dy and the activation's input x, all of one shape; by elementwise operations.

        Here dL/dy itself.
        """
        return grad

    def replace(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The activation with this rule's backward; a learned parameter, such as PReLU's, keeps its own gradient."""
        activation, x, parameters, in_place = read_call(func, args, kwargs)
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        z = x.clone() if in_place else x  # the backward pass needs the input as it was
        if any(isinstance(p, Tensor) and p.requires_grad for p in parameters):
            y = _ValueAndOwnBackward.apply(z, activation.compute(z.detach(), *parameters), self)  # type: ignore[no-untyped-call]
        else:
            y = _OwnBackward.apply(z, activation.compute, parameters, self)  # type: ignore[no-untyped-call]
        return x.copy_(y) if in_place else y
