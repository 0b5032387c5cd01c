"""Backward pass of a layer under `SIBP`: implicit weight steps, input gradients through the updated weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from backpass.errors import BackpassError
from backpass.rules.implicit.attached import LayerAttached
from backpass.rules.implicit.layers import Gradients
from backpass.rules.implicit.proximal import samples, solve_dtype
from backpass.rules.implicit.systems import NotFiniteError
from backpass.rules.implicit.uses import Found, Use
from backpass.rules.semi_implicit.elementwise import Elementwise
from backpass.rules.semi_implicit.interception import SemiImplicitInterception
from backpass.rules.semi_implicit.unit_systems import unit_system
from backpass.rules.semi_implicit.weight_step import Curved, increment

__all__ = ["DivergedError", "SemiImplicitAttached"]

_JUMP = 1e3
"""Limit of |step| / |weights|: near 1 in regular training, about 1e5 in a diverging run."""


class DivergedError(BackpassError):
    """Error: a semi-implicit step is not finite or too long, so the network has diverged."""


class SemiImplicitAttached(LayerAttached):
    """`SIBP` attached to a model; its steps are exact for one use of each weight per optimizer step.

    Attributes:
        scaler: the GradScaler that scales the loss, or None.
    """

    interception = SemiImplicitInterception
    transient = (*LayerAttached.transient, "scaler", "_longest")

    step_name = "semi-implicit"
    settable = (
        *("eta", "lam", "lam_bias", "newton_steps", "cg_steps", "descent_steps", "reduction", "updated_weights"),
        "loss_scale",
    )
    way_out = (
        "make one larger batch of several small ones and train in one process; for shared weights, several batches or "
        'processes use ProxProp(solve="step")'
    )

    def __init__(self, rule: Any, model: nn.Module, scaler: Any, strict: bool) -> None:
        super().__init__(rule, model, strict)
        self.scaler: Any = scaler

    def start(self) -> None:
        """Initialise the state, also in a copy of the model."""
        super().start()
        self.scaler = None
        self._longest: dict[str, float] = {}

    def gradients(self, use: Use) -> Found:
        """Return the input gradient through the updated weights, and the negative steps of weight and bias.

        Raises:
            BackpassError: the weight has another contribution already, or several processes contribute.
            DivergedError: the step is not finite, or a thousand times as long as its weights and as every step before.
        """
        if use.asked and not use.functional:
            self.admit(use)
        rule, layer, weight = self.rule, use.layer, use.weight
        eta = 1 / max(len(self.sites), 1) if rule.eta is None else rule.eta
        dtype = solve_dtype(weight.dtype)
        x, grad = use.x.to(dtype), use.grad.to(dtype)
        scale = rule.loss_scale * (self.scaler.get_scale() if self.scaler is not None else 1.0)
        of_z, weighting, s = grad, None, None
        if use.z is not None:
            s = Elementwise(*use.activation)
            slope = s.derivative(use.z.to(dtype))
            of_z, weighting = grad * slope, slope.square_()
        of_weight = of_bias = None
        if use.wants[1] or use.wants[2]:
            if self.scaler is not None and not bool(grad.isfinite().all()):
                return grad.new_full(use.x.shape, math.nan), grad.new_full(weight.shape, math.nan), None
            system = unit_system(layer, x, use.wants[1:], rule.ratio, direct=s is None)
            curved = None
            if s is not None and use.z is not None and weighting is not None:
                curved = Curved(s, system.arrange(use.z.to(dtype)), system.arrange(grad))
                weighting = system.arrange(weighting)
            # For a loss that is a sum, -eta D g is -length * of_z.
            length = eta / scale * (samples(x) if rule.reduction == "mean" else 1)
            try:
                found = increment(system, system.arrange(of_z), weighting, curved, length, rule)
            except NotFiniteError:
                raise self._not_finite(weight, eta) from None
            # Negate before the expansion to the size of the weight, which may be much larger.
            of_weight, of_bias = system.weights(found.neg_())
            self._check_length(use, (of_weight, of_bias), eta)
        of_x = None
        if use.wants[0]:
            through = weight.to(dtype)
            if of_weight is not None and rule.updated_weights:
                through = through - of_weight.reshape(weight.shape)
            of_x = layer.input_gradient(x, of_z, through)
        if scale != 1.0:
            of_weight, of_bias = (None if one is None else one * scale for one in (of_weight, of_bias))
        return of_x, of_weight, of_bias

    def _check_length(self, use: Use, steps: Gradients, eta: float) -> None:
        """Raise an error for a step that is far too long relative to the weights and to earlier steps.

        The criterion is invariant to the scales of weights, data and loss. The first step always passes, so that
        weights can start from zero.
        """
        step, learning = (steps[0], use.weight) if steps[0] is not None else (steps[1], use.bias)
        if step is None or learning is None:
            return
        length = float(torch.linalg.vector_norm(step))
        if not math.isfinite(length):
            raise self._not_finite(use.weight, eta)
        named = self.parameter(use.weight)
        if named is None:
            return
        longest = self._longest.get(named.name, 0.0)
        if longest and length > _JUMP * longest:
            size = max(longest, float(torch.linalg.vector_norm(learning.detach())))
            if length > _JUMP * size:
                raise DivergedError(
                    f"the semi-implicit step of the layer of {named.name!r} is {length / size:.1e} times as long as "
                    f"its weights and as every step before, {_advice(eta)}"
                )
        self._longest[named.name] = max(length, longest)

    def _not_finite(self, weight: Tensor, eta: float) -> DivergedError:
        return DivergedError(
            f"{self.describe(weight)} has no finite semi-implicit step: its input or its gradient is inf or NaN, "
            f"or its step overflows, {_advice(eta)}"
        )


def _advice(eta: float) -> str:
    return (
        f"so the network has diverged. eta is {eta:g}; about 1 / (number of layers) is usually stable (eta=None takes "
        "that), and a larger lam shortens the steps. Look at the losses of the steps before."
    )
