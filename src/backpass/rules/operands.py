"""Base classes of rules that scale the gradient of an operand of a call, such as the branch in a sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from backpass.errors import BackpassError
from backpass.rules.attaching.attached import Attached
from backpass.rules.attaching.interception import Interception
from backpass.rules.attaching.override import TorchFunction
from backpass.rules.attaching.run import ModuleCall, SiteCall
from backpass.rules.places import Place, check_places
from backpass.rules.rule import Rule
from backpass.rules.sites import Site
from backpass.rules.torch_internals import bare_apply, constant_while_tracing, transforms

__all__ = ["OperandAttached", "OperandInterception", "OperandRule", "Operands", "positions"]

Operands = tuple[tuple[int | str, ...], ...]
"""Operands of a call: for each, the position or name of an argument and, for lists, the index inside it."""


class OperandAttached(Attached):
    """An operand rule attached to a model."""

    interception: type[Interception]

    def __init__(self, rule: Any, model: nn.Module, *, strict: bool = False) -> None:
        self.operands: dict[str, Operands] = {}
        super().__init__(rule, model, strict=strict)

    @constant_while_tracing
    def operands_of(self, key: str) -> Operands:
        """Return the operands that an eager call has recorded."""
        return self.operands[key]


class OperandInterception(Interception):
    """Interception that finds the operands whose gradients a rule scales.

    A subclass defines `find`. A call without such an operand is no site.
    """

    found: Operands = ()
    site: SiteCall | None = None

    def find(self, func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operands:
        """Return the operands of a call whose gradients the rule scales."""
        raise NotImplementedError

    def called(self, func: TorchFunction, args: tuple[Any, ...], out: Any) -> None:
        """Record the output of a call."""

    def call_site(self, site: SiteCall, func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function by the decision for its site, if it is a site."""
        operands: dict[str, Operands] = self.attached.operands  # type: ignore[attr-defined]
        if self.replayed is None:
            with torch._C.DisableTorchFunction():
                self.found = self.find(func, args, kwargs)
            if site.counted != bool(self.found):
                self.run.plan, site.counted, site.selected, site.fixed = None, bool(self.found), None, False
            if self.found:
                operands[site.key] = self.found
        else:
            self.found = operands[site.key] if site.counted else ()
        self.site = site
        out = super().call_site(site, func, args, kwargs) if self.found else func(*args, **kwargs)
        self.called(func, args, out)
        return out

    def call_other(self, caller: ModuleCall, func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function that is no site of the rule."""
        out = super().call_other(caller, func, args, kwargs)
        self.called(func, args, out)
        return out

    def replace(self, func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any], site: SiteCall | None) -> Any:
        """Call a function with scaled gradients of its operands."""
        # The backward pass always queries the site: an inner rule may have replaced this one.
        return self.scaled(self.found, func, args, kwargs, self.site)

    def scale(self, x: Tensor, site: SiteCall | None) -> Tensor:
        """Return x with its gradient scaled if the site is active."""
        transformed = is_dynamo_compiling() or transforms()
        apply: Callable[..., Tensor] = _Scaled.apply if transformed else _scale_eagerly
        return apply(x, self.rule.factor, site)

    def scaled(
        self,
        operands: Operands,
        func: TorchFunction,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        site: SiteCall | None,
    ) -> Any:
        """Call a function with scaled gradients of the given operands."""
        given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        for place, *inside in operands:
            if not inside:
                given[place] = self.scale(given[place], site)
            else:
                index = inside[0]
                given[place] = [self.scale(x, site) if i == index else x for i, x in enumerate(given[place])]
        return func(*(given[i] for i in range(len(args))), **{name: given[name] for name in kwargs})

    def _traced(
        self, caller: ModuleCall, name: str | None, func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if name is None:
            return func(*args, **kwargs)
        self.traced += 1
        key = f"{caller.key}:{name}#{caller.count(name + '()')}"
        attached: Any = self.attached
        if not attached.token or not attached.planned(key):
            return func(*args, **kwargs)
        return self.scaled(attached.operands_of(key), func, args, kwargs, None)


@dataclass(frozen=True, kw_only=True)
class OperandRule(Rule):
    """Base class of rules that scale the gradient of an operand.

    Args:
        start: first site, given like that of `ActivationRule`.
        stop: one past the last site.
        where: predicate on a `Site` that selects sites from ``start`` to ``stop``; None: all.

    Raises:
        BackpassError: a setting is out of its range.
        NoSiteError: at the first call of the model that computes gradients, if no site is selected.
    """

    kind: ClassVar[type[OperandAttached]]

    start: Place = None
    stop: Place = None
    where: Callable[[Site], bool] | None = None

    def __post_init__(self) -> None:
        """Validate the settings."""
        check_places(self.start, self.stop)
        if self.where is not None and not callable(self.where):
            raise BackpassError(f"where must be a function of a Site that returns a bool, got {self.where!r}.")

    @property
    def factor(self) -> float:
        """Factor of the gradients of the operands."""
        return 0.0

    @property
    def needs_site(self) -> bool:  # type: ignore[override]
        """True if a call without a site is an error, that is, if gradients are enabled."""
        return torch.is_grad_enabled()

    def attach(self, model: nn.Module, *, strict: bool = False) -> Attached:
        """Override the backward of ``model``; see `Rule.attach`."""
        return self.kind(self, model, strict=strict)


class _Scaled(torch.autograd.Function):
    """x -> x; backward g -> factor g."""

    generate_vmap_rule = True
    passes_on = True
    """True: the detection of skip connections treats the node as the identity."""

    @staticmethod
    def forward(x: Tensor, factor: float, site: SiteCall | None) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.factor, ctx.asked = inputs  # named differently from "site", which `branches` reads to find activations

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        if ctx.asked is not None and not ctx.asked.active():
            return grad, None, None
        return grad * ctx.factor if ctx.factor else torch.zeros_like(grad), None, None


_scale_eagerly = bare_apply(_Scaled)


def positions(
    names: Sequence[str], wanted: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[int | str, Any]:
    """Return the floating-point arguments of the wanted parameters, by position or name."""
    given: dict[int | str, Any] = {i: x for i, (name, x) in enumerate(zip(names, args, strict=False)) if name in wanted}
    given |= {name: x for name, x in kwargs.items() if name in wanted}
    return {place: x for place, x in given.items() if isinstance(x, Tensor) and x.is_floating_point()}
