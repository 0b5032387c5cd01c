"""The optimal learning-rate schedule of a linear-quadratic problem, with and without an adversary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from backpass.errors import BackpassError, UnknownNameError
from backpass.numbers import is_number, is_whole
from backpass.sde.control_hjb import solve_hjb

__all__ = ["LinearQuadratic", "Schedule", "optimal_lr"]


@dataclass(frozen=True, kw_only=True)
class LinearQuadratic:
    r"""Excess risk under a control u: :math:`\dot m = -2 a u m + \tfrac12 a \eta s^2 u^2`, t = steps * eta.

    The law of dTheta = -u a (Theta - theta_bar) dt + u sqrt(eta) s dW enters through m = a/2 E|Theta - theta_bar|^2
    alone, so m is a state without noise. An adversary that adds K eta_I V to the potential, V = 1/2 E|grad_x L|^2,
    replaces a by a + K eta_I V''(theta_bar): u scales the outer rate, and the adversary's drift with it.

    Args:
        curvature: a, of the clean loss at the minimum, above 0.
        noise: s^2, the variance of one minibatch gradient, at least 0.
        eta: the largest learning rate, reached at u = 1; above 0.
        start: m(0), the excess risk at the start, above 0.
        adversarial: K eta_I V''(theta_bar), the adversary's addition to the curvature; the sum is above 0.

    Raises:
        BackpassError: a number is out of its range.
    """

    curvature: float
    noise: float
    eta: float
    start: float
    adversarial: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("curvature", self.curvature), ("eta", self.eta), ("start", self.start)):
            if not (is_number(value) and value > 0):
                raise BackpassError(f"{name} is a finite number above 0, got {value!r}.")
        if not (is_number(self.noise) and self.noise >= 0):
            raise BackpassError(f"noise is the variance of a gradient, finite and at least 0, got {self.noise!r}.")
        if not is_number(self.adversarial):
            raise BackpassError(f"adversarial is a finite number, got {self.adversarial!r}.")
        if not self.effective > 0:
            raise BackpassError(
                f"curvature + adversarial is the curvature at the shifted minimum, above 0; got {self.curvature:g} + "
                f"{self.adversarial:g}: the adversary has turned the minimum into a maximum. Take a smaller eta_inner."
            )

    @property
    def effective(self) -> float:
        """The curvature a + K eta_I V''(theta_bar) of the loss that adversarial training descends."""
        return self.curvature + self.adversarial

    def fixed(self, u: float, t: float) -> float:
        r"""The risk under a constant u, :math:`m_\infty + (m_0 - m_\infty) e^{-2 a u t}`, m_inf = u eta s^2 / 4."""
        level = u * self.eta * self.noise / 4
        return level + (self.start - level) * math.exp(-2 * self.effective * u * t)

    def best_fixed(self, horizon: float) -> tuple[float, float]:
        r"""The constant u in [0, 1] with the smallest m(horizon), and that m, by golden-section search.

        m(T) falls and then rises in u: with x = 2 a T u and m_inf = c u, :math:`e^x \partial_u m(T) = c (e^x - 1) -
        2 a T (m_0 - c u)` increases in u and is negative at 0.
        """
        low, high, ratio = 0.0, 1.0, (math.sqrt(5) - 1) / 2
        for _ in range(100):
            left, right = high - ratio * (high - low), low + ratio * (high - low)
            if self.fixed(left, horizon) < self.fixed(right, horizon):
                high = right
            else:
                low = left
        best = min(((low + high) / 2, 1.0), key=lambda u: self.fixed(u, horizon))
        return best, self.fixed(best, horizon)

    def switch(self) -> float:
        """Return t*, up to which u = 1 is optimal: m(t*) = eta s^2 / 2. Infinite without noise, 0 if m starts lower."""
        level = self.eta * self.noise / 4
        if level == 0:
            return math.inf
        return math.log((self.start - level) / level) / (2 * self.effective) if self.start > 2 * level else 0.0

    def optimal(self, t: float) -> tuple[float, float]:
        """Return u(t), 1 up to t* and then u_0 / (1 + a u_0 (t - t*)), and m(t), u eta s^2 / 2 after t*."""
        switch = self.switch()
        if t < switch:
            return 1.0, self.fixed(1.0, t)
        first = min(1.0, 2 * self.start / (self.eta * self.noise))
        u = first / (1 + self.effective * first * (t - switch))
        return u, u * self.eta * self.noise / 2

    def linear(self, m: float) -> float:
        """Coefficient of u in the derivative of m, -2 a m."""
        return -2 * self.effective * m

    def quadratic(self, m: float) -> float:
        """Coefficient of u^2 in the derivative of m, a eta s^2 / 2 for every m."""
        return self.effective * self.eta * self.noise / 2


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A control of the learning rate over time; pass ``factor`` to `torch.optim.lr_scheduler.LambdaLR`.

    Attributes:
        problem: the linear-quadratic problem.
        times: in SDE time t = steps * eta, increasing, from 0 to the horizon.
        control: u at these times, in [0, 1].
        risk: m at these times.
        value: the smallest m(horizon) as the method computes it.
        switch: the first time at which u is below 1; the horizon if it never is.
        fixed: the best constant u and its m(horizon).
    """

    problem: LinearQuadratic
    times: Sequence[float]
    control: Sequence[float]
    risk: Sequence[float]
    value: float
    switch: float
    fixed: tuple[float, float]

    @property
    def gain(self) -> float:
        """The part of the best constant rate's excess risk that the schedule saves, 1 - m*(T) / m_fixed(T)."""
        return 1 - self.risk[-1] / self.fixed[1]

    def at(self, t: float) -> float:
        """The control at t, linear between the times and constant outside of them."""
        if t <= self.times[0]:
            return self.control[0]
        for (t0, t1), (u0, u1) in zip(pairwise(self.times), pairwise(self.control), strict=True):
            if t <= t1:
                return u0 + (u1 - u0) * (t - t0) / (t1 - t0)
        return self.control[-1]

    def factor(self, step: int) -> float:
        """The control in the middle of a step: the rate of step k acts on [k eta, (k + 1) eta]."""
        return self.at((step + 0.5) * self.problem.eta)


def optimal_lr(
    *,
    curvature: float,
    noise: float,
    eta: float,
    start: float,
    horizon: float,
    adversarial: float = 0.0,
    method: Literal["closed", "hjb"] = "closed",
    points: int = 400,
    steps: int = 400,
) -> Schedule:
    r"""The schedule u(t) in [0, 1] with the smallest excess risk m(T) of a linear-quadratic problem.

    :math:`\dot m = -2 a u m + \tfrac12 a \eta s^2 u^2` gives u* = min(1, 2 m / (eta s^2)): u = 1 up to
    :math:`t^* = \tfrac1{2a} \ln\frac{m_0 - \eta s^2/4}{\eta s^2/4}`, then 1 / (1 + a (t - t*)). In steps, the inverse
    learning rate grows by a in each.

    Args:
        curvature: a > 0.
        noise: s^2, the variance of a minibatch gradient, at least 0.
        eta: the largest learning rate.
        start: m(0) > 0.
        horizon: T, in SDE time: steps * eta; above 0.
        adversarial: K eta_I V''(theta_bar), added to the curvature.
        method: ``"closed"``, or ``"hjb"``: the Hamilton-Jacobi-Bellman equation in m, by finite differences.
        points: of the schedule, and at least as many of the grid in ln m; at least 10.
        steps: implicit Euler steps of the finite differences; at least 10.

    Raises:
        BackpassError: a number is out of its range, or m falls too deep for finite differences.

    Example:
        >>> schedule = optimal_lr(curvature=1.0, noise=1.0, eta=0.1, start=0.5, horizon=10.0)
        >>> round(schedule.value, 6), round(schedule.fixed[1], 6)
        (0.005248, 0.00872)

    Source: derived for this project in the setting of Gu and Guo, arXiv 2105.08037v1 (learning-rate control is a claim
    of version 1 alone), in the manner of Li, Tai and E, arXiv 1511.06251, section 4, for plain SGD.
    """
    problem = LinearQuadratic(curvature=curvature, noise=noise, eta=eta, start=start, adversarial=adversarial)
    if not (is_number(horizon) and horizon > 0):
        raise BackpassError(f"horizon is SDE time, steps * eta, a finite number above 0, got {horizon!r}.")
    if not (is_whole(points, 10) and is_whole(steps, 10)):
        raise BackpassError(f"points and steps are whole numbers of at least 10, got {points!r} and {steps!r}.")
    if method not in ("closed", "hjb"):
        raise UnknownNameError("method", str(method), ("closed", "hjb"))
    fixed = problem.best_fixed(horizon)
    if method == "closed":
        times = [horizon * i / (points - 1) for i in range(points)]
        both = [problem.optimal(t) for t in times]
        control, risk = [u for u, _ in both], [m for _, m in both]
        value, switch = risk[-1], min(problem.switch(), horizon)
    else:
        solution = solve_hjb(
            problem.linear,
            problem.quadratic,
            start=start,
            horizon=horizon,
            points=points,
            steps=steps,
        )
        times, control, risk, value = solution.times, solution.control, solution.state, solution.value
        switch = next((t for t, u in zip(times, control, strict=True) if u < 1), horizon)
    return Schedule(problem=problem, times=times, control=control, risk=risk, value=value, switch=switch, fixed=fixed)
