"""SIBP: semi-implicit back propagation (Liu, Zhang, 2020, arXiv 2002.03516)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from backpass.errors import BackpassError, UnknownNameError
from backpass.numbers import is_number, is_whole
from backpass.rules.activations import ACTIVATIONS
from backpass.rules.attaching.override import TorchFunction
from backpass.rules.implicit.calls import LINEAR, OPAQUE, PRODUCTS
from backpass.rules.rule import Rule
from backpass.rules.semi_implicit.backward import SemiImplicitAttached
from backpass.rules.sites import Site

__all__ = ["SIBP"]

_LAYERS = {function: name for function, name in LINEAR.items() if name != "embedding"}


@dataclass(frozen=True, kw_only=True)
class SIBP(Rule):
    """Semi-implicit back propagation: explicit steps for neurons, implicit ones for weights.

    A layer z = W a + b, y = s(z) with the gradient g at y gets, instead of its weight gradients, -dW and -db of
    argmin |s(z + dW a + db) - (y - eta g)|^2 + lam |dW|^2 + lam_bias |db|^2 over the batch,
    and its input gets the gradient (W + dW)^T (s'(z) g). SGD with learning rate 1 and without momentum is the algorithm
    of the paper; any optimizer may use the direction. The forward pass is unchanged.

    Layers are F.linear, convolutions (also transposed), matrix products, addmm and einsum with a parameter. s is the
    activation that is called on the layer's own output; if another operation lies in between (a normalization, pooling,
    a sum), or if the activation has weights or is overridden by another rule, s is the identity, g is the gradient at
    z, and the operations in between use ordinary backpropagation.

    Args:
        eta: step size of the neurons, positive, for a loss that is a sum over the batch; None takes
            1 / (number of layers the rule acts on).
        lam: penalty on the weights' increment, positive. lam -> inf gives eta / lam times the gradient.
        lam_bias: penalty on the biases' increment, positive; None takes lam.
        newton_steps: Gauss-Newton steps on the sub-problem if s is not the identity, at least 1.
        cg_steps: conjugate-gradient iterations per Gauss-Newton step, at least 1. If s is the identity, the solve is
            direct.
        descent_steps: number of the last ``cg_steps`` iterations that are steepest-descent steps on the sub-problem
            itself if s is piecewise linear, because the Gauss-Newton model ignores the kinks of s; at most ``cg_steps``
            - 1. From 1 on, a step that raises the objective of a unit is rejected for any s. 0: plain Gauss-Newton
                steps.
        reduction: how the loss combines the samples of a batch, ``"mean"`` or ``"sum"``. With ``"mean"`` gradients are
            multiplied by the size of the first dimension of the layer's input.
        updated_weights: True to propagate input gradients through W + dW; False: through W.
        loss_scale: factor by which the loss is multiplied before the backward pass, positive; the steps are those of
            the loss itself, times this factor. For a ``GradScaler`` use ``attach(model, scaler=scaler)`` instead.
        where: predicate on a `Site` that selects layers; None: all.

    Raises:
        BackpassError: a setting is out of its range.
        NoSiteError: at the first call of the model, if no layer is selected.
    """

    name: ClassVar[str] = "sibp"
    functions: ClassVar[Mapping[TorchFunction, str]] = {**_LAYERS, **PRODUCTS}
    observed: ClassVar[Collection[TorchFunction]] = tuple(ACTIVATIONS)
    opaque: ClassVar[Mapping[TorchFunction, str]] = OPAQUE

    eta: float | None = 0.1
    lam: float = 1.0
    lam_bias: float | None = None
    newton_steps: int = 1
    cg_steps: int = 5
    descent_steps: int = 1
    reduction: Literal["mean", "sum"] = "mean"
    updated_weights: bool = True
    loss_scale: float = 1.0
    where: Callable[[Site], bool] | None = None

    def __post_init__(self) -> None:
        for name, optional in (("eta", True), ("lam", False), ("lam_bias", True), ("loss_scale", False)):
            number = getattr(self, name)
            if not (number is None and optional) and not (is_number(number) and number > 0):
                raise BackpassError(f"{name} must be positive and finite{', or None' * optional}, got {number!r}.")
        for name, least in (("newton_steps", 1), ("cg_steps", 1), ("descent_steps", 0)):
            count = getattr(self, name)
            if not is_whole(count, least):
                raise BackpassError(f"{name} must be an int of at least {least}, got {count!r}.")
        if self.reduction not in ("mean", "sum"):
            raise UnknownNameError("reduction", str(self.reduction), ("mean", "sum"))
        if not isinstance(self.updated_weights, bool):
            raise BackpassError(f"updated_weights must be True or False, got {self.updated_weights!r}.")
        if self.where is not None and not callable(self.where):
            raise BackpassError(f"where must be a function of a Site that returns a bool, got {self.where!r}.")

    def attach(self, model: nn.Module, scaler: Any = None, *, strict: bool = False) -> SemiImplicitAttached:
        """Override the backward of ``model``; see `Rule.attach`.

        Args:
            model: the model.
            scaler: the ``torch.amp.GradScaler`` that scales the loss, if any. A semi-implicit step is nonlinear in the
                scale of the loss, so the rule has to divide by it.
            strict: as in `Rule.attach`.

        Raises:
            BackpassError: the parameters are sharded.
        """
        return SemiImplicitAttached(self, model, scaler, strict)

    @property
    def ratio(self) -> float:
        """Ratio of the penalties, lam / lam_bias."""
        return 1.0 if self.lam_bias is None else self.lam / self.lam_bias
