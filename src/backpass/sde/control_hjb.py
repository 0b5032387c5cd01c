"""The Hamilton-Jacobi-Bellman equation of a controlled law, by finite differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["HJBSolution", "best_control", "solve_hjb"]

_SMALLEST = 1e-4
"""The lowest point of the grid, in units of the start."""


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
    """The u in [0, 1] with the least linear u + quadratic u^2: clip(-linear / (2 quadratic), 0, 1), or bang-bang."""
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
    r"""The smallest m(T) for :math:`\dot m = u\,b(m) + u^2 c(m)`, m(0) = start, over controls with values in [0, 1].

    :math:`V_t + \min_{u \in [0, 1]} \{(u b + u^2 c) V_m\} = 0`, V(m, T) = m, in the *law variable* m: the controller
    knows the law of the parameters, not the parameters. Backwards in time by implicit Euler, V_m upwind, the policy
    lagging by one step, so that each step is one tridiagonal system with an M-matrix: monotone for every step width.

    Args:
        linear: b, of one m > 0.
        quadratic: c, of one m > 0.
        start: m(0) > 0; it is the last point of a grid that is uniform in ln m, since u = 0 never raises m.
        horizon: T > 0.
        points: of the grid.
        steps: in time.
    """
    top, bottom = torch.tensor([start, start * _SMALLEST], dtype=torch.float64).log().tolist()
    grid = torch.linspace(bottom, top, points, dtype=torch.float64).exp()
    b = torch.tensor([linear(m) for m in grid.tolist()], dtype=torch.float64)
    c = torch.tensor([quadratic(m) for m in grid.tolist()], dtype=torch.float64)
    width, dt = grid.diff(), horizon / steps
    value, policies = grid.clone(), []
    for _ in range(steps):
        u = _policy(b, c, value.diff() / width)
        speed = u * b + u * u * c
        down = torch.cat([speed.new_zeros(1), (-speed[1:]).clamp(min=0) / width]) * dt
        up = torch.cat([speed[:-1].clamp(min=0) / width, speed.new_zeros(1)]) * dt
        value = _tridiagonal(-down, 1 + down + up, -up, value)
        policies.append(u)
    policies.reverse()  # they were found from the end

    times = [dt * k for k in range(steps + 1)]
    return HJBSolution(float(value[-1]), times, *_follow(linear, quadratic, grid, policies[::-1], dt))


def _follow(
    linear: Callable[[float], float],
    quadratic: Callable[[float], float],
    grid: Tensor,
    policies: list[Tensor],
    dt: float,
) -> tuple[list[float], list[float]]:
    """Controls and states from the last point of the grid under a policy for every step, by Heun's method."""

    def speed(u: float, m: float) -> float:
        return u * linear(m) + u * u * quadratic(m)

    lowest, state = float(grid[0]), float(grid[-1])
    controls, states = [], [state]
    for policy in policies:
        u = _interpolate(grid, policy, state)
        rate = speed(u, state)
        ahead = max(state + dt * rate, lowest)
        rate_ahead = speed(_interpolate(grid, policy, ahead), ahead)
        state = max(state + dt / 2 * (rate + rate_ahead), lowest)
        controls.append(u)
        states.append(state)
    return [*controls, _interpolate(grid, policies[-1], state)], states


def _policy(b: Tensor, c: Tensor, slopes: Tensor) -> Tensor:
    """The best control with V_m taken from below where it makes m fall, and from above elsewhere."""
    below, above = torch.cat([slopes[:1], slopes]), torch.cat([slopes, slopes[-1:]])
    falling = best_control(b * below, c * below)
    rising = best_control(b * above, c * above)
    return torch.where(falling * b + falling**2 * c <= 0, falling, rising)


def _interpolate(grid: Tensor, values: Tensor, m: float) -> float:
    """Values on the grid at one place, linear between the points and constant outside."""
    i = int(torch.searchsorted(grid, m).clamp(1, len(grid) - 1))
    part = min(max((m - float(grid[i - 1])) / float(grid[i] - grid[i - 1]), 0.0), 1.0)
    return float(values[i - 1] + part * (values[i] - values[i - 1]))


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
