"""LinBP: linear backpropagation (Li, Guo, Liu, Zhang, arXiv 2112.11018, Eq. 6-9; after Guo, Li, Chen, NeurIPS 2020)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from backpass.errors import BackpassError, UnknownNameError
from backpass.rules.activations import ACTIVATIONS, Activation, activation_of, is_in_place
from backpass.rules.attached import Attached
from backpass.rules.interception import Interception
from backpass.rules.redefinition import EVERYTHING, no_site
from backpass.rules.residual import ResidualInterception
from backpass.rules.rule import Rule
from backpass.rules.sites import Site, SiteTable
from backpass.rules.wrappers import named_modules

__all__ = ["LinBP"]


class _LinearBackward(torch.autograd.Function):
    """y = s(x) forward, dL/dx = slope dL/dy backward; keeps no tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, compute: Callable[..., Tensor], parameters: tuple[Any, ...], slope: float) -> Any:
        ctx.dtype, ctx.slope = x.dtype, slope
        return compute(x, *parameters)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _times(grad, ctx.slope, ctx.dtype), None, None, None


class _LinearUnderTransforms(torch.autograd.Function):
    """The same for torch.func and torch.compile, which want the context set up apart; in eager calls it is slower."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, compute: Callable[..., Tensor], parameters: tuple[Any, ...], slope: float) -> Tensor:
        return compute(x, *parameters)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.dtype, ctx.slope = inputs[0].dtype, inputs[3]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _times(grad, ctx.slope, ctx.dtype), None, None, None


class _LinearBothWays(_LinearUnderTransforms):
    """The same with a forward-mode derivative; apart, because Dynamo refuses a Function that has one."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Any:
        return tangent * ctx.slope


def _times(grad: Tensor, slope: float, dtype: torch.dtype) -> Tensor:
    if slope != 1.0:
        grad = grad * slope
    return grad if grad.dtype == dtype else grad.to(dtype)


class _ValueAndGradientPath(torch.autograd.Function):
    """value forward; backward gives dL/dy to the value's own graph and slope dL/dy to x."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, value: Tensor, slope: float) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.dtype, ctx.slope = inputs[0].dtype, inputs[2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return _times(grad, ctx.slope, ctx.dtype), grad, None


@dataclass(frozen=True, kw_only=True)
class LinBP(Rule):
    """Linear backpropagation: selected activations pass gradients on as if they were linear.

    y = s(x) forward, exactly; dL/dx = slope * dL/dy backward, instead of s'(x) dL/dy. The same replacement in the
    weight gradients gives LinBP training.

    Args:
        start: first linear site: an index from the front (7), from the end (-2: the last two), a fraction of all
            sites (0.5: the second half), or the path of a module (the first site inside it); None: the first site.
        stop: one past the last linear site, given like ``start``; None: up to the end.
        where: which of the sites from ``start`` to ``stop`` are linear, a function of a `Site`; None: all.
        slope: the constant that replaces s'(x), finite.
        residual: ``"plain"``, or ``"renormalized"``: in residual blocks ReLU(s(z) + f(z)) the activation after the
            sum keeps its own derivative and the gradient of f is scaled per sample to the norm it has under plain
            backpropagation (Guo et al., 2020, Section 3.2).

    Raises:
        BackpassError: a setting is out of its range.
        NoSiteError: at the first call of the model, if no site is selected.
    """

    name: ClassVar[str] = "linbp"
    functions = ACTIVATIONS

    start: int | float | str | None = None
    stop: int | float | str | None = None
    where: Callable[[Site], bool] | None = None
    slope: float = 1.0
    residual: Literal["plain", "renormalized"] = "plain"

    def __post_init__(self) -> None:
        for name, place in (("start", self.start), ("stop", self.stop)):
            if isinstance(place, bool) or not isinstance(place, int | float | str | None):
                raise BackpassError(f"{name} is an int, a fraction, a module path or None, got {place!r}.")
            if isinstance(place, float) and not 0.0 <= place <= 1.0:
                raise BackpassError(f"a fraction {name} lies in [0, 1], got {place!r}; an index is an int.")
        if self.where is not None and not callable(self.where):
            raise BackpassError(f"where is a function of a Site that gives a bool, got {self.where!r}.")
        if isinstance(self.slope, bool) or not isinstance(self.slope, int | float) or not math.isfinite(self.slope):
            raise BackpassError(f"slope is a finite number, got {self.slope!r}.")
        if self.residual not in ("plain", "renormalized"):
            raise UnknownNameError("residual", str(self.residual), ("plain", "renormalized"))

    def check(self, model: nn.Module) -> None:
        """Refuse a module path that the model does not have."""
        paths = [path for path, _ in named_modules(model)]
        for place in (self.start, self.stop):
            if isinstance(place, str) and place not in paths:
                raise UnknownNameError("module", place, [path for path in paths if path])

    def range(self, sites: Callable[[], SiteTable]) -> tuple[int, int]:
        """The site indices from ``start`` to ``stop``."""
        if self.residual == "plain" and all(
            place is None or (isinstance(place, int) and place >= 0) for place in (self.start, self.stop)
        ):
            return self.start or EVERYTHING[0], EVERYTHING[1] if self.stop is None else self.stop  # type: ignore
        table = sites()
        first, stop = _index(self.start, table, 0), _index(self.stop, table, len(table))
        if not 0 <= first < min(stop, len(table)):
            raise no_site(self, len(table), table)
        return first, stop

    def attach(self, model: nn.Module) -> Attached:
        """As `Rule.attach`; where their gradient is renormalized, residual blocks are followed."""
        return Attached(self, model, ResidualInterception if self.residual == "renormalized" else Interception)

    def replace(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The activation with a linear backward."""
        activation, x, parameters = activation_of(func, args, kwargs)
        if not (torch.is_grad_enabled() and x.is_floating_point()):
            return func(*args, **kwargs)
        y = _linear(activation, x, parameters, float(self.slope))
        return x.copy_(y) if is_in_place(func, args, kwargs) else y


def _linear(activation: Activation, x: Tensor, parameters: tuple[Any, ...], slope: float) -> Tensor:
    """The activation of x; dL/dx = slope dL/dy, and the parameters keep their own gradient."""
    if any(isinstance(p, Tensor) and p.requires_grad for p in parameters):
        two_paths: Callable[..., Tensor] = _ValueAndGradientPath.apply
        return two_paths(x, activation.compute(x.detach(), *parameters), slope)
    one_path: Callable[..., Tensor] = _function().apply
    return one_path(x, activation.compute, parameters, slope)


def _function() -> type[torch.autograd.Function]:
    if is_dynamo_compiling():
        return _LinearUnderTransforms
    if forward_ad._current_level >= 0:
        return _LinearBothWays
    return _LinearUnderTransforms if torch._C._are_functorch_transforms_active() else _LinearBackward


def _index(place: int | float | str | None, table: SiteTable, default: int) -> int:
    if place is None:
        return default
    if isinstance(place, str):
        return next((site.index for site in table if site.inside(place)), len(table))
    if isinstance(place, float):
        return int(place * len(table))
    return place if place >= 0 else len(table) + place
