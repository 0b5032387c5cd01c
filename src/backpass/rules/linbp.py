"""LinBP: linear backpropagation (Li, Guo, Liu, Zhang, arXiv 2112.11018, Eq. 6-9; after Guo, Li, Chen, NeurIPS 2020)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from backpass.errors import BackpassError, UnknownNameError
from backpass.rules.activation_rule import ActivationAttached, ActivationRule
from backpass.rules.attaching.attached import Attached
from backpass.rules.attaching.run import Decision
from backpass.rules.residual import ResidualInterception, ratio
from backpass.rules.torch_internals import constant_while_tracing

__all__ = ["LinBP"]

_RESIDUALS = ("plain", "renormalized", "per_activation")


class _ResidualAttached(ActivationAttached):
    interception = ResidualInterception


@dataclass(frozen=True, kw_only=True)
class LinBP(ActivationRule):
    """Linear backpropagation: selected activations are linear in the backward pass.

    y = s(x) forward, exactly; dL/dx = slope * dL/dy backward, instead of s'(x) dL/dy. The same replacement in the
    weight gradients gives LinBP training.

    Args:
        start: first linear site: an index from the front (7), from the end (-2: the last two), a fraction of all
            sites (0.5: the second half), or the path of a module (the first site inside it); None: the first site.
        stop: one past the last linear site, given like ``start``; None: up to the end.
        where: predicate on a `Site` that selects sites from ``start`` to ``stop``; None: all.
        slope: the constant that replaces s'(x), finite.
        residual: ``"plain"``; ``"renormalized"``: in residual blocks the gradient through the branch is scaled per
            sample to the norm that it has under plain backpropagation, and an activation of the sum stays plain (Guo
            et al., 2020, Section 3.2); ``"per_activation"``: the gradient of each selected activation is scaled so.
        decay: factor of the branches' gradients with ``residual="renormalized"``, in [0, 1] (lambda there).
        gates: as in `ActivationRule`.

    Raises:
        BackpassError: a setting is out of its range.
        NoSiteError: at the first call of the model, if no site is selected.
    """

    name: ClassVar[str] = "linbp"
    needs_input: ClassVar[bool] = False

    slope: float = 1.0
    residual: Literal["plain", "renormalized", "per_activation"] = "plain"
    decay: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.slope, bool) or not isinstance(self.slope, int | float) or not math.isfinite(self.slope):
            raise BackpassError(f"slope must be a finite number, got {self.slope!r}.")
        if self.residual not in _RESIDUALS:
            raise UnknownNameError("residual", str(self.residual), _RESIDUALS)
        if isinstance(self.decay, bool) or not isinstance(self.decay, int | float) or not 0 <= self.decay <= 1:
            raise BackpassError(f"decay must be in [0, 1], got {self.decay!r}.")
        if self.decay != 1.0 and self.residual != "renormalized":
            raise BackpassError(f'decay={self.decay} scales branches: it needs residual="renormalized".')

    @property
    def acts_on_nodes(self) -> bool:  # type: ignore[override]
        """True if the rule can be applied to a plain call afterwards."""
        return self.residual == "plain"

    @property
    def needs_plain(self) -> bool:  # type: ignore[override]
        """True if the norm of the plain gradient is needed."""
        return self.residual == "per_activation"

    def attach(self, model: nn.Module, *, strict: bool = False) -> Attached:
        """Override the backward of ``model``; see `Rule.attach`."""
        kind = _ResidualAttached if self.residual == "renormalized" else ActivationAttached
        return kind(self, model, strict=strict)

    def backward(self, grad: Tensor, x: Tensor) -> Tensor:
        """Return slope * dL/dy."""
        slope = self._slope()
        return grad if slope == 1.0 else grad * slope

    @constant_while_tracing
    def _slope(self) -> float:
        # With dynamic=True, Dynamo would make the attribute symbolic, and its backward pass cannot compare symbols.
        return self.slope

    def replace_planned(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], site: Decision | None
    ) -> Any:
        """Return the activation's value with a linear backward, or with the plain one if ``site`` is not active."""
        if self.residual == "per_activation":
            return self.replace_call(func, args, kwargs, site)
        return super().replace_planned(func, args, kwargs, site)

    def replace_value(self, x: Tensor, value: Tensor, site: Decision | None, learned: Tensor | None = None) -> Any:
        """Return ``value``, computed from x, with a linear backward; see `ActivationRule.replace_value`."""
        if self.residual != "per_activation":
            return super().replace_value(x, value, site, learned)
        if is_dynamo_compiling():
            raise BackpassError('residual="per_activation" does not work under torch.compile: use residual="plain".')
        return self.replace_learned(x, value, site)

    def adjusted(self, of_x: Tensor, plain: Tensor) -> Tensor:
        """Return the gradient of x, scaled to the norm of the plain one with ``residual="per_activation"``."""
        return of_x * ratio(plain, of_x) if self.residual == "per_activation" else of_x
