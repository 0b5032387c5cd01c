"""Learning rate by the optimal control of stochastic gradient descent, from measurements during training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from backpass.errors import BackpassError
from backpass.numbers import is_number, is_whole
from backpass.training.half_batches import half_losses, products

__all__ = ["ControlledLR", "Measured", "half_losses"]

_SHORTEST = 10
_SHORTEST_STEPS = 30
"""Measurements in the shortest window, and steps that it spans; before there are as many the rate stays. The growth of
1/l is held in an interval, so that noise of shorter averages would raise its mean."""


class Measured(NamedTuple):
    """Averages over the current window.

    Attributes:
        progress: N, the mean of g1 . g2, an unbiased estimate of |grad|^2: decrease of the loss per unit of rate.
        loss: D, the mean of (g1 . H2 g1 + a N) / 2: increase of the loss by noise and curvature, per rate^2 / 2.
        curvature: a, the Rayleigh quotient of Dh along the distance of the parameters from their average; 0 before
            the second measurement.
        balance: N / (rate D): 1 where the rate is optimal, 1/2 where it is stationary and a step gains nothing.
    """

    progress: float
    loss: float
    curvature: float
    balance: float


class ControlledLR(LRScheduler):
    r"""Hold the largest rate while it pays, then let its inverse grow with the curvature.

    A step of rate l changes the expected loss by -l N + l^2 D / 2, N = |grad|^2, D = E[g . H g]. For a quadratic loss
    with noise the optimal control is l = N / D where that is below the largest rate; along its path 1/l grows by the
    curvature a in each step. This schedule lets 1/l grow by slope a (2 - q), q = N / (l D), held in [0, 2]: a balance
    q >= 2 holds the rate, and with slope = 1 and equal curvatures q = 1, the optimal control, is its fixed point. The
    growth is linear in q, so that the noise of N does not change its mean.

    N is measured by g1 . g2, gradients of two halves of the batch, and D by (g1 . H2 g1 + a N) / 2 with the second
    half's curvature H2. a is the curvature along d, the distance of the parameters from their running average. Noise
    spreads the parameters most where the curvature is small, so d weighs the curvatures by their inverse, as the
    excess loss does. One curvature product serves both, H2 (g1 + s d) with s of alternating sign. In adversarial
    training H is the derivative of the mean gradient through the attack (`half_losses` with an ``adversary``).
    Averages reach over the last tenth of the measurements, at least 10 of them and 30 steps.

    With unequal curvatures a rate that falls faster than 1 / (2 a_min k) never reaches the flat directions, while one
    that falls too slowly by a factor c costs the factor 1 / (c (2 - c)) in excess loss: hence a slope of 1/2, for which
    c = .63 and the factor is 1.15. In networks and short runs smaller slopes are better.

    Call `measure` before ``optimizer.step()`` whenever `due`, and ``step()`` after it, in every step of training:
    ``Trainer(scheduler=..., step_scheduler="step")`` does. A rate has to be stable to start at; no end is needed.

    Args:
        optimizer: SGD with or without momentum; Adam, AdamW and RMSprop are followed in the metric of their present
            scales; others count as descent along the gradient. Groups keep the ratio of their rates.
        lr_max: the rate to start at, of all groups; None for the groups' own.
        every: measure before each ``every``-th step only. A measurement costs 2.3 to 4.1 plain steps, and
            with an adversary of K steps 3 to 6 training steps of K + 1 gradients.
        window: the part of all measurements so far that averages reach back, in (0, 1].
        slope: the growth of 1/l in a step at q = 1, in units of the curvature; above 0.
        frozen_curvature: in a `Trainer`, accept the curvature at fixed adversarial examples where the attack cannot be
            differentiated (l_2 attacks, FAB). It can be several times too small: then the rate falls too slowly.
        last_epoch: as in torch.

    Raises:
        BackpassError: a setting is out of its range, or parameters lie on several devices.

    Example:
        >>> model = nn.Linear(3, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        >>> scheduler = ControlledLR(optimizer, every=2)
        >>> x, y = torch.randn(8, 3), torch.randn(8, 1)
        >>> for _ in range(4):
        ...     loss = nn.functional.mse_loss(model(x), y)
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     if scheduler.due:
        ...         scheduler.measure(half_losses(model, nn.functional.mse_loss, x, y))
        ...     optimizer.step()
        ...     scheduler.step()

    Source: derived for this project as a plug-in estimate of the control in `backpass.sde.optimal_lr`; the balance of
    N and D is the fluctuation-dissipation relation of Yaida, arXiv 1810.00004.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        lr_max: float | None = None,
        every: int = 1,
        window: float = 0.1,
        slope: float = 0.5,
        frozen_curvature: bool = False,
        last_epoch: int = -1,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise BackpassError(f"optimizer is one of torch's, got {optimizer!r}.")
        if not is_whole(every, 1):
            raise BackpassError(f"every is a whole number of steps, at least 1, got {every!r}.")
        if not (is_number(window) and 0 < window <= 1):
            raise BackpassError(f"window is a part of all measurements, in (0, 1], got {window!r}.")
        for name, value in (("slope", slope), ("lr_max", 1.0 if lr_max is None else lr_max)):
            if not (is_number(value) and value > 0):
                raise BackpassError(f"{name} is a finite number above 0, got {value!r}.")
        devices = {p.device for group in optimizer.param_groups for p in group["params"]}
        if len(devices) > 1:
            raise BackpassError(
                f"ControlledLR takes products of whole gradients: all parameters must be on one device, got "
                f"{', '.join(sorted(map(str, devices)))}."
            )
        if lr_max is not None and last_epoch == -1:
            for group in optimizer.param_groups:
                group["lr"] = lr_max
        if not isinstance(frozen_curvature, bool):
            raise BackpassError(f"frozen_curvature must be True or False, got {frozen_curvature!r}.")
        self.every, self.window, self.slope = every, window, slope
        self.frozen_curvature = frozen_curvature
        self.inverse = 1.0  # of the control u in (0, 1]; every rate is u times its maximum
        self.measurements = 0
        self.progress = self.spread = self.along = self.length = 0.0
        self.average = torch.zeros(0)  # of the parameters
        super().__init__(optimizer, last_epoch)

    @property
    def due(self) -> bool:
        """True if a measurement is due before the next step of the optimizer."""
        return self.last_epoch % self.every == 0

    @property
    def measured(self) -> Measured:
        """Averages over the last window; ``nan`` before the first measurement."""
        if not self.measurements:
            return Measured(math.nan, math.nan, math.nan, math.nan)
        loss = self._loss()
        cost = self._rate() * loss
        return Measured(self.progress, loss, self._curvature(), self.progress / cost if cost else math.inf)

    def get_lr(self) -> list[float | Tensor]:
        """Return the rates of the groups: their maximum times the control."""
        return [base / self.inverse for base in self.base_lrs]

    def measure(self, losses: Sequence[Callable[[], Tensor]]) -> None:
        """Measure on the two halves of the current batch, at the parameters before the step.

        Args:
            losses: two functions, each the scalar mean loss of one half, with graph, as `half_losses` makes them. Each
                is called once. The curvature is the second derivative of these functions; that of adversarial training
                needs ``half_losses(..., adversary=...)``.

        Raises:
            BackpassError: there are not two, or one gives no scalar.
        """
        if not isinstance(losses, Sequence) or len(losses) != 2 or not all(map(callable, losses)):
            got = f"{len(losses)} losses" if isinstance(losses, Sequence) else type(losses).__name__
            raise BackpassError(
                f"measure takes the losses of the two halves of a batch, two functions as half_losses gives; got {got}."
            )
        weights = _step_weights(self.optimizer, self._base_rates())
        if weights is None:
            return  # the scales of Adam exist after its first step
        parameters = self._parameters()
        n = self.measurements + 1
        shortest = max(_SHORTEST, math.ceil(_SHORTEST_STEPS / self.every))
        part = 1 / min(n, max(shortest, n * self.window))
        place = _flat([p.detach() for p in parameters])
        average = self.average if self.measurements else place
        away = place - average
        metric = _flat([w.expand_as(p) for w, p in zip(weights, parameters, strict=True)])
        sign = 1 if n % 2 else -1
        found = products(parameters, losses, metric, sign * away)
        numbers = torch.stack(
            [
                torch.dot(found.first, metric * found.second),
                torch.dot(found.curved, metric * found.first),
                torch.dot(found.curved, away),
                torch.dot(away, torch.where(metric > 0, away / metric, 0.0)),
            ]
        )
        progress, spread, along, length = numbers.tolist()
        if not all(map(math.isfinite, (progress, spread, along))):
            return  # not finite: the step reports the divergence
        self.measurements, self.average = n, torch.lerp(average, place, part)
        self.progress += part * (progress - self.progress)
        self.spread += part * (spread - self.spread)
        if found.scale:
            self.along += part * (sign * along / found.scale - self.along)
            self.length += part * (length - self.length)
        cost = self._rate() * self._loss()
        if n >= shortest and cost > 0:
            pace = min(max(2 - self.progress / cost, 0.0), 2.0)
            largest = _largest_rate(self.optimizer, self._base_rates())
            self.inverse += self.every * self.slope * pace * largest * max(self._curvature(), 0.0)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a checkpoint, on the device of the parameters."""
        super().load_state_dict(state_dict)
        self.average = self.average.to(self._parameters()[0].device)

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _base_rates(self) -> list[float]:
        return [float(rate) for rate in self.base_lrs]

    def _loss(self) -> float:
        """Return D, from E g1 . H2 g1 = grad . H grad + 2 tr(H Cov g): half a batch has twice its variance."""
        return (self.spread + self._curvature() * max(self.progress, 0.0)) / 2

    def _curvature(self) -> float:
        """Return the Rayleigh quotient along the distance from the average, in the metric of the steps."""
        return self.along / self.length if self.length > 0 else 0.0

    def _rate(self) -> float:
        """Return the largest current effective rate."""
        return _largest_rate(self.optimizer, self._base_rates()) / self.inverse


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """Return one vector, in float32 at least."""
    return torch.cat([one.reshape(-1).to(torch.promote_types(one.dtype, torch.float32)) for one in tensors])


def _largest_rate(optimizer: Optimizer, rates: list[float]) -> float:
    """Return the largest effective rate lr / (1 - momentum) of the groups.

    Args:
        optimizer: optimizer with the groups.
        rates: learning rate of each group.
    """
    return max(rate * _momentum(group) for rate, group in zip(rates, optimizer.param_groups, strict=True))


@torch.no_grad()
def _step_weights(optimizer: Optimizer, rates: list[float]) -> list[Tensor] | None:
    """Return w >= 0 with mean step -s w g, s the `_largest_rate`: per parameter a tensor of its shape or a scalar.

    w is the group's rate relative to s, and for Adam and its kin (a state ``exp_avg_sq``) and RMSprop
    (``square_avg``) also divided by their root mean square gradient. Other optimizers count as descent along g.

    Returns:
        The weights of all parameters in order; None before the first step of an optimizer that has yet to see
        gradients.
    """
    largest = _largest_rate(optimizer, rates)
    weights = []
    for rate, group in zip(rates, optimizer.param_groups, strict=True):
        relative = rate * _momentum(group) / largest if largest > 0 else 1.0
        for parameter in group["params"]:
            root = _root_mean_square(optimizer.state.get(parameter, {}), group)
            if root is not None:
                weights.append(relative / (root + group["eps"]))
            elif "eps" in group and parameter.requires_grad and not optimizer.state.get(parameter):
                return None
            else:
                weights.append(parameter.new_tensor(relative))
    return weights


def _momentum(group: dict[str, Any]) -> float:
    momentum = float(group.get("momentum", 0.0))
    dampening = float(group.get("dampening", 0.0)) if momentum else 0.0
    return (1 - dampening) / (1 - momentum) if momentum < 1 else 1.0


def _root_mean_square(state: dict[str, Any], group: dict[str, Any]) -> Tensor | None:
    if "exp_avg_sq" in state:
        squares: Tensor = state.get("max_exp_avg_sq", state["exp_avg_sq"])
        decay: float = group["betas"][1]
        unbiased: Tensor = squares / (1 - decay ** float(state["step"]))
        return unbiased.sqrt()
    return state["square_avg"].sqrt() if "square_avg" in state else None
