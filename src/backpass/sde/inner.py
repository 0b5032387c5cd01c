"""The inner loop of adversarial training: K steps of ascent on a perturbation of every sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.func import grad

from backpass.errors import BackpassError, UnknownNameError
from backpass.numbers import is_number, is_whole
from backpass.sde.problem import check_rate

__all__ = ["Direction", "InnerLoop", "Regulariser"]

Direction = Literal["gradient", "sign"] | Callable[[Tensor], Tensor]
"""Direction of a step: the gradient, its sign, or a function of the gradient, (N, ...) -> (N, ...), per sample."""

Regulariser = Callable[[Tensor], Tensor]
"""R(delta): perturbations (N, ...) -> penalties (N,)."""


@dataclass(frozen=True, kw_only=True)
class InnerLoop:
    """delta_{k+1} = project(delta_k + eta direction(grad_delta [L(theta, x + delta_k) - lam R(delta_k)])), delta_0 = 0.

    Args:
        steps: K >= 0; with 0 there is no adversary.
        eta: the step size, >= 0; a number or a tensor ().
        direction: ``"gradient"``, ``"sign"``, or a function of the gradient.
        lam: weight of the penalty R, >= 0.
        regulariser: R, a value per sample; None for |delta|^2 / 2.
        eps: radius of the ball that every step is projected on: l_inf for ``"sign"``, l_2 otherwise; None for none.

    Raises:
        BackpassError: a setting is out of its range.
    """

    steps: int
    eta: float | Tensor
    direction: Direction = "gradient"
    lam: float = 0.0
    regulariser: Regulariser | None = None
    eps: float | None = None

    def __post_init__(self) -> None:
        if not is_whole(self.steps, 0):
            raise BackpassError(f"steps, the adversary's, is an integer >= 0 (0: plain SGD); got {self.steps!r}.")
        check_rate("eta_inner", self.eta)
        if not (is_number(self.lam) and self.lam >= 0):
            raise BackpassError(f"lam must be a finite number >= 0, got {self.lam!r}.")
        if self.eps is not None and not (is_number(self.eps) and self.eps > 0):
            raise BackpassError(f"eps, the radius of the ball, is a finite number > 0, or None; got {self.eps!r}.")
        if self.regulariser is not None and not callable(self.regulariser):
            raise BackpassError(f"regulariser is a function (N, ...) -> (N,), or None; got {self.regulariser!r}.")
        if self.regulariser is not None and self.lam == 0:
            raise BackpassError("a regulariser without its weight does nothing: give lam > 0 too.")
        if not callable(self.direction) and self.direction not in ("gradient", "sign"):
            raise UnknownNameError("inner", str(self.direction), ("gradient", "sign"))

    def run(self, gradient: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
        """Return delta_K, from the gradient of L as a function of delta, (N, ...) -> (N, ...)."""
        delta = torch.zeros_like(like)
        for _ in range(self.steps):
            ascent = gradient(delta)
            if self.lam:
                ascent = ascent - self.lam * self._penalty_gradient(delta)
            delta = self._project(delta + self.eta * self._direction(ascent))
        return delta

    def _penalty_gradient(self, delta: Tensor) -> Tensor:
        if self.regulariser is None:
            return delta
        penalty = self.regulariser
        slope: Tensor = grad(lambda d: penalty(d).sum())(delta)
        return slope

    def _direction(self, gradient: Tensor) -> Tensor:
        if callable(self.direction):
            return self.direction(gradient)
        return gradient.sign() if self.direction == "sign" else gradient

    def _project(self, delta: Tensor) -> Tensor:
        if self.eps is None:
            return delta
        if self.direction == "sign":
            return delta.clamp(-self.eps, self.eps)
        # The clamp inside the root: no 0/0 in the derivative where delta = 0.
        length = delta.flatten(1).square().sum(1).clamp(min=self.eps**2).sqrt()
        return delta * (self.eps / length).view(-1, *[1] * (delta.ndim - 1))
