"""The Hamilton-Jacobi-Bellman equation of a controlled law, by finite differences."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from backpass.errors import BackpassError

__all__ = ["HJBSolution", "best_control", "solve_hjb"]

_MOST_STEPS = 200_000
_FINEST = 0.05
"""The largest change of ln m in one step of a path, and the largest spacing of the grid in ln m."""
_DEEPEST = 300.0
"""The largest fall of ln m, and the lowest ln m; exp(-708) is the smallest normal float64."""


class HJBSolution(NamedTuple):
    """The value at the start, and the path from there under the policy that was found.

    Attributes:
        value: V(start, 0), the smallest m(T) as the finite differences see it.
        times: from 0 to T, (steps + 1,).
        control: u along the path, in [0, 1].
        state: m along the path.
    """

    value: float
    times: list[float]
    control: list[float]
    state: list[float]


def best_control(linear: Tensor, quadratic: Tensor) -> Tensor:
    """Minimise linear u + quadratic u^2 over u in [0, 1]: clip(-linear / (2 quadratic), 0, 1), or bang-bang."""
    inside = (-linear / (2 * quadratic.clamp(min=torch.finfo(linear.dtype).tiny))).clamp(0, 1)
    at_an_end = (linear + quadratic < 0).to(linear.dtype)
    return torch.where(quadratic > 0, inside, at_an_end)


def solve_hjb(
    linear: Callable[[float], float],
    quadratic: Callable[[float], float],
    *,
    start: float,
    horizon: float,
    points: int,
    steps: int,
) -> HJBSolution:
    r"""Minimise m(T) for :math:`\dot m = u\,b(m) + u^2 c(m)`, m(0) = start, over controls with values in [0, 1].

    :math:`V_t + \min_{u \in [0, 1]} \{(u b + u^2 c) V_m\} = 0`, V(m, T) = m. The state is the *law variable* m: the
    controller knows the law of the parameters, not the parameters. With x = ln m and W = ln V the equation becomes
    :math:`W_t + \min_u \{(u b + u^2 c) W_x\} / m = 0`, W(x, T) = x, which is exact where m decays exponentially. It is
    solved backwards in time by implicit Euler with W_x upwind and the policy of the previous step, so that each step
    is one tridiagonal system with an M-matrix: monotone for every step length.

    The grid is uniform in x, from below the smallest m that any control reaches (no control falls faster than the
    greedy one) to the start, which no path exceeds because u = 0 keeps m.

    Args:
        linear: b(m) for m > 0.
        quadratic: c(m) for m > 0.
        start: m(0) > 0.
        horizon: T > 0.
        points: of the grid; more are taken where its spacing in x would exceed 0.05.
        steps: in time.

    Raises:
        BackpassError: m falls below the range of floating-point numbers, or the path needs too many steps.
    """
    lowest = _greedy(linear, quadratic, start, horizon)
    depth = 1.25 * math.log(start / lowest) + 0.5  # the margin keeps the boundary's error away from every path
    points = max(points, math.ceil(depth / _FINEST) + 1)
    x = torch.linspace(math.log(start) - depth, math.log(start), points, dtype=torch.float64)
    m = x.exp()
    b = torch.tensor([linear(one) for one in m.tolist()], dtype=torch.float64) / m
    c = torch.tensor([quadratic(one) for one in m.tolist()], dtype=torch.float64) / m
    width, dt = depth / (points - 1), horizon / steps
    value, policies = x.clone(), []
    for _ in range(steps):
        u = _policy(b, c, value.diff() / width)
        speed = (u * b + u * u * c) * dt / width
        down = torch.cat([speed.new_zeros(1), (-speed[1:]).clamp(min=0)])
        up = torch.cat([speed[:-1].clamp(min=0), speed.new_zeros(1)])
        value = _tridiagonal(-down, 1 + down + up, -up, value)
        policies.append(u.tolist())
    policies.reverse()  # the solution proceeds from the end
    times = [dt * k for k in range(steps + 1)]
    return HJBSolution(math.exp(value[-1]), times, *_follow(linear, quadratic, m.tolist(), policies, dt))


def _greedy(
    linear: Callable[[float], float], quadratic: Callable[[float], float], start: float, horizon: float
) -> float:
    """Return m(T) under the control that minimises the present derivative of m; ln m by explicit Euler steps."""
    x, t, count = math.log(start), 0.0, 0
    while t < horizon:
        m = math.exp(x)
        b, c = linear(m) / m, quadratic(m) / m
        u = min(max(-b / (2 * c), 0.0), 1.0) if c > 0 else float(b + c < 0)  # `best_control` of two numbers
        rate = u * b + u * u * c
        step = min(horizon - t, _FINEST / max(abs(rate), 1e-300), horizon / 100)
        x, t, count = x + step * rate, t + step, count + 1
        if min(x, x - math.log(start)) < -_DEEPEST or count > _MOST_STEPS:
            raise BackpassError(
                f"the excess risk falls below exp(-{_DEEPEST:g}) of its start before the horizon {horizon:g}: too deep "
                "for finite differences. Use a shorter horizon or method='closed'."
            )
    return math.exp(x)


def _follow(
    linear: Callable[[float], float],
    quadratic: Callable[[float], float],
    grid: list[float],
    policies: list[list[float]],
    dt: float,
) -> tuple[list[float], list[float]]:
    """Return controls and states from the last grid point under one policy per step: ln m by Heun's method."""
    x, count = math.log(grid[-1]), 0
    controls, states = [], [grid[-1]]

    def parts(x: float, policy: list[float]) -> tuple[float, float]:
        m = math.exp(x)
        u = _interpolate(grid, policy, m)
        return u * linear(m) / m, u * u * quadratic(m) / m

    for policy in policies:
        controls.append(_interpolate(grid, policy, states[-1]))
        inner = max(1, math.ceil(dt * max(map(abs, parts(x, policy))) / _FINEST))
        count += inner
        if count > _MOST_STEPS:
            raise BackpassError(
                f"the path needs more than {_MOST_STEPS:,} steps: ln m changes by {_FINEST} within "
                f"{dt / inner:.2g} of the horizon {dt * len(policies):g}. Use a shorter horizon or method='closed'."
            )
        h = dt / inner
        for _ in range(inner):
            first = sum(parts(x, policy))
            x += h / 2 * (first + sum(parts(x + h * first, policy)))
        states.append(math.exp(x))
    return [*controls, _interpolate(grid, policies[-1], states[-1])], states


def _policy(b: Tensor, c: Tensor, slopes: Tensor) -> Tensor:
    """Return the best control, with V_m taken from below where it makes m fall and from above elsewhere."""
    below, above = torch.cat([slopes[:1], slopes]), torch.cat([slopes, slopes[-1:]])
    falling = best_control(b * below, c * below)
    rising = best_control(b * above, c * above)
    return torch.where(falling * b + falling**2 * c <= 0, falling, rising)


def _interpolate(grid: list[float], values: list[float], m: float) -> float:
    """Interpolate grid values linearly in m; constant outside of the grid."""
    i = min(max(bisect_left(grid, m), 1), len(grid) - 1)
    part = min(max((m - grid[i - 1]) / (grid[i] - grid[i - 1]), 0.0), 1.0)
    return values[i - 1] + part * (values[i] - values[i - 1])


def _tridiagonal(lower: Tensor, diagonal: Tensor, upper: Tensor, right: Tensor) -> Tensor:
    """Solve a diagonally dominant tridiagonal system by parallel cyclic reduction, log2(n) vector steps.

    Row i reads lower[i] x[i-1] + diagonal[i] x[i] + upper[i] x[i+1] = right[i]. Each step eliminates the neighbours
    at the present distance, and doubles it.
    """
    n, distance = len(right), 1
    while distance < n:
        back, forth = lower.clone(), upper.clone()
        back[distance:] = -lower[distance:] / diagonal[:-distance]
        back[:distance] = 0
        forth[:-distance] = -upper[:-distance] / diagonal[distance:]
        forth[-distance:] = 0
        diagonal = diagonal + back * _shifted(upper, distance) + forth * _shifted(lower, -distance)
        right = right + back * _shifted(right, distance) + forth * _shifted(right, -distance)
        lower, upper = back * _shifted(lower, distance), forth * _shifted(upper, -distance)
        distance *= 2
    return right / diagonal


def _shifted(values: Tensor, by: int) -> Tensor:
    """values[i - by] at i, zero where there is none."""
    moved = torch.zeros_like(values)
    if by > 0:
        moved[by:] = values[:-by]
    else:
        moved[:by] = values[-by:]
    return moved
