"""LinBP: linear backpropagation (Li, Guo, Liu, Zhang, arXiv 2112.11018, Eq. 6-9; after Guo, Li, Chen, NeurIPS 2020)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from backpass.errors import BackpassError, UnknownNameError
from backpass.rules.activation_rule import ActivationRule
from backpass.rules.activations import read_call
from backpass.rules.attaching.attached import Attached
from backpass.rules.attaching.interception import Interception
from backpass.rules.ranges import resolve_range
from backpass.rules.residual import ResidualInterception
from backpass.rules.sites import SiteTable

__all__ = ["LinBP"]


class _Linear(NamedTuple):
    """An activation with its parameters, and the slope that stands for its derivative."""

    compute: Callable[..., Tensor]
    parameters: tuple[Any, ...]
    slope: float


class _LinearBackward(torch.autograd.Function):
    """y = s(x) forward, dL/dx = slope dL/dy backward; keeps no tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: _Linear) -> Any:
        ctx.dtype, ctx.slope = x.dtype, activation.slope
        return activation.compute(x, *activation.parameters)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _times(grad, ctx.slope, ctx.dtype), None


class _LinearUnderTransforms(torch.autograd.Function):
    """The same for torch.func and torch.compile, which want the context set up apart; in eager calls it is slower."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, activation: _Linear) -> Tensor:
        return activation.compute(x, *activation.parameters)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, _Linear], output: Tensor) -> None:
        ctx.dtype, ctx.slope = inputs[0].dtype, inputs[1].slope

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _times(grad, ctx.slope, ctx.dtype), None


class _LinearBothWays(_LinearUnderTransforms):
    """The same with a forward-mode derivative; apart, because Dynamo refuses a Function that has one."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Any:
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
class LinBP(ActivationRule):
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
    slope: float = 1.0
    residual: Literal["plain", "renormalized"] = "plain"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.slope, bool) or not isinstance(self.slope, int | float) or not math.isfinite(self.slope):
            raise BackpassError(f"slope is a finite number, got {self.slope!r}.")
        if self.residual not in ("plain", "renormalized"):
            raise UnknownNameError("residual", str(self.residual), ("plain", "renormalized"))

    def range(self, sites: Callable[[], SiteTable]) -> tuple[int, int]:
        """The site indices from ``start`` to ``stop``; residual blocks are looked for in the table of sites."""
        return resolve_range(self.start, self.stop, sites, always_look=self.residual == "renormalized")

    def attach(self, model: nn.Module) -> Attached:
        """As `Rule.attach`; where their gradient is renormalized, residual blocks are followed."""
        return Attached(self, model, ResidualInterception if self.residual == "renormalized" else Interception)

    def replace(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The activation with a linear backward."""
        activation, x, parameters, in_place = read_call(func, args, kwargs)
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if parameters and any(isinstance(p, Tensor) and p.requires_grad for p in parameters):
            y = _ValueAndGradientPath.apply(x, activation.compute(x.detach(), *parameters), self.slope)  # type: ignore[no-untyped-call]
        else:
            y = _function().apply(x, _Linear(activation.compute, parameters, self.slope))  # type: ignore[no-untyped-call]
        return x.copy_(y) if in_place else y


def _function() -> type[torch.autograd.Function]:
    if is_dynamo_compiling():
        return _LinearUnderTransforms
    if forward_ad._current_level >= 0:
        return _LinearBothWays
    return _LinearUnderTransforms if torch._C._are_functorch_transforms_active() else _LinearBackward
