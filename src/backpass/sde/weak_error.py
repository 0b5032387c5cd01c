"""Weak errors of SDEs against the chain, without Monte Carlo."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from backpass.errors import BackpassError, UnknownNameError
from backpass.numbers import is_number, is_whole
from backpass.sde.chebyshev import MOST_NODES, ChebyshevGrid
from backpass.sde.dynamics import AdversarialSDE

__all__ = ["VARIANTS", "Variant", "WeakErrors", "fit_slope", "weak_error"]

Function = Callable[[Tensor], Tensor]
"""A test function of the parameters, (..., P) -> (...)."""

_MOST_BATCHES = 2000
_BLOW_UP = 100.0
_BLURRED = 0.05  # of an error, so much of it the oracle's own that its slope says nothing
_MOST_STEPS = 10**6


class Variant(NamedTuple):
    """One SDE beside the chain: `AdversarialSDE`'s mode and order, and whether it keeps the noise."""

    mode: Literal["exact", "expanded"]
    order: Literal[1, 2]
    noise: bool = True


VARIANTS: dict[str, Variant] = {
    "b0": Variant("expanded", 1, noise=False),
    "b0+sigma": Variant("expanded", 1),
    "B": Variant("expanded", 2),
    "C": Variant("exact", 2),
}
"""The SDEs by name: gradient flow of G, with noise, with terms of order eta expanded, and exact in eta_inner."""


@dataclass(frozen=True, kw_only=True)
class WeakErrors:
    """max_{k <= t/eta} |E f(theta_k) - E f(Theta_{k eta})|, by learning rate, test function and SDE.

    Attributes:
        etas: the learning rates.
        errors: ``errors[variant][function]``, one per learning rate.
        resolution: share of an error that is the oracle's own: by variant and function, the largest relative change
            when three nodes per dimension are left out.
    """

    etas: tuple[float, ...]
    errors: dict[str, dict[str, tuple[float, ...]]]
    resolution: dict[str, dict[str, float]]

    def slope(self, variant: str, function: str) -> float:
        """The weak order measured: slope of log error against log eta by least squares."""
        return fit_slope(self.etas, self.errors[variant][function])

    @property
    def slopes(self) -> dict[str, dict[str, float]]:
        """Weak orders, ``slopes[variant][function]``."""
        return {v: {f: fit_slope(self.etas, e) for f, e in row.items()} for v, row in self.errors.items()}

    def __str__(self) -> str:
        wide = max(len(name) for row in self.errors.values() for name in (*self.errors, *row, "SDE")) + 2
        head = "".join(f"{f'eta={eta:g}':>13}" for eta in self.etas)
        lines = [f"{'SDE':<{wide}}{'f':<{wide}}{head}{'slope':>8}{'resolution':>12}"]
        for variant, row in self.errors.items():
            for function, errors in row.items():
                numbers = "".join(f"{error:13.3e}" for error in errors)
                slope, change = self.slope(variant, function), self.resolution[variant][function]
                lines.append(f"{variant:<{wide}}{function:<{wide}}{numbers}{slope:8.2f}{change:12.1%}")
        if any(change > _BLURRED for row in self.resolution.values() for change in row.values()):
            lines.append(f"Where the resolution is above {_BLURRED:.0%}, the slope is the grid's: take a tighter box.")
        return "\n".join(lines)


def fit_slope(etas: Sequence[float], errors: Sequence[float]) -> float:
    """The slope of log error against log eta by least squares.

    Raises:
        BackpassError: fewer than two points, or an error that is not above 0.
    """
    lists = all(isinstance(one, Sequence) for one in (etas, errors)) and len(etas) == len(errors)
    if not lists or len(set(etas)) < 2 or not all(is_number(one) and one > 0 for one in (*etas, *errors)):
        raise BackpassError(
            f"a slope needs two or more positive etas, with an error above 0 each; got {etas!r}, {errors!r}."
        )
    x, y = (torch.tensor(values, dtype=torch.float64).log() for values in (etas, errors))
    x = x - x.mean()
    return ((x @ y) / (x @ x)).item()


def weak_error(
    sde: AdversarialSDE,
    *,
    bounds: Sequence[tuple[float, float]],
    theta0: Tensor,
    functions: Mapping[str, Function],
    t: float,
    etas: Sequence[float] = (0.1, 0.05, 0.025, 0.0125, 0.00625),
    variants: Mapping[str, Variant] | Sequence[str] = ("b0", "b0+sigma", "B", "C"),
    nodes: int = 18,
) -> WeakErrors:
    """Weak errors of SDEs against the chain they model, exact up to interpolation.

    A function of theta is its values on a grid of Chebyshev nodes. The chain's transfer operator,
    (T f)(theta) = E f(theta'), is the average over all batches of the interpolation at the nodes' images; the SDE's
    is the exponential of its generator, e^{eta A} with A = b . D + (eta/2) S : D^2 and D the grid's differentiation
    matrices. Their powers are compared at theta0. Take several functions: one error can change its sign with
    eta, and then fakes a slope.

    Args:
        sde: problem, adversary and batch size; its ratio eta_inner / eta_outer is kept for every eta.
        bounds: a box (low, high) per parameter, one or two, that the chain hardly leaves from any of its points.
        theta0: the start, (1,) or (2,) float64, in the box.
        functions: test functions by name.
        t: the horizon, in time of the SDE.
        etas: learning rates, usually <= 0.1.
        variants: names of `VARIANTS`, or others by name.
        nodes: per dimension, in [7, 20].

    Raises:
        BackpassError: a setting is out of its range, there are too many batches to average over, or the operators
            blow up because the box does not hold the chain.

    Source: derived for this project.
    """
    chosen = _choose(variants)
    _check(sde, bounds, theta0, functions, t, etas, nodes)
    fine, rough = (
        [_errors(sde, ChebyshevGrid(bounds, n), theta0, functions, t, eta, chosen) for eta in etas]
        for n in (nodes, nodes - 3)
    )
    errors = {v: {f: tuple(at[i][j] for at in fine) for j, f in enumerate(functions)} for i, v in enumerate(chosen)}
    change = {
        v: {
            f: max(abs(a[i][j] - b[i][j]) / max(a[i][j], 1e-300) for a, b in zip(fine, rough, strict=True))
            for j, f in enumerate(functions)
        }
        for i, v in enumerate(chosen)
    }
    return WeakErrors(etas=tuple(etas), errors=errors, resolution=change)


def _errors(
    sde: AdversarialSDE,
    grid: ChebyshevGrid,
    theta0: Tensor,
    functions: Mapping[str, Function],
    t: float,
    eta: float,
    variants: Mapping[str, Variant],
) -> list[list[float]]:
    """At one eta, by variant and function."""
    at = replace(sde, eta_outer=eta, eta_inner=sde.eta_inner / sde.eta_outer * eta)
    values = torch.stack([_at_nodes(name, function, grid) for name, function in functions.items()], 1)
    read, steps = grid.interpolation(theta0), math.floor(t / eta + 1e-9)
    chain = _powers(_transfer_operator(at, grid), values, steps, read, f"the chain at eta={eta:g}")
    found = []
    for name, variant in variants.items():
        operator = torch.linalg.matrix_exp(eta * _generator(at, grid, variant))
        ours = _powers(operator, values, steps, read, f"SDE {name!r} at eta={eta:g}")
        found.append((chain - ours).abs().amax(0).tolist())
    return found


def _at_nodes(name: str, function: Function, grid: ChebyshevGrid) -> Tensor:
    values = function(grid.points)
    if not isinstance(values, Tensor) or values.shape != grid.points.shape[:1] or not values.isfinite().all():
        got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise BackpassError(
            f"function {name!r} must give a finite number per row of theta, shape ({len(grid.points)},), everywhere in "
            f"the box; got {got}."
        )
    return values


def _powers(operator: Tensor, values: Tensor, steps: int, read: Tensor, what: str) -> Tensor:
    """E f at theta0 after 1, ..., steps steps, (steps, functions)."""
    largest = _BLOW_UP * values.abs().max()
    found = []
    for _ in range(steps):
        values = operator @ values
        found.append(read @ values)
    if not values.abs().max() <= largest:
        raise BackpassError(
            f"the operator of {what} blows up: from some points of the box its paths leave it. Take other bounds, "
            "fewer nodes, or smaller etas."
        )
    return torch.stack(found)


def _transfer_operator(sde: AdversarialSDE, grid: ChebyshevGrid) -> Tensor:
    """(T f)(theta) = E f(theta') as a matrix on the grid: the mean over batches, each multiset with its probability."""
    n, size = sde.noise_dim, sde.batch_size
    batches = torch.tensor(list(combinations_with_replacement(range(n), size)))
    counts = torch.stack([(batches == sample).sum(1) for sample in range(n)], 1).double()
    log_probability = math.lgamma(size + 1) - (counts + 1).lgamma().sum(1) - size * math.log(n)
    operator = torch.zeros(len(grid.points), len(grid.points), dtype=torch.float64)
    for batch, weight in zip(batches, log_probability.exp().tolist(), strict=True):
        images = sde.chain_step(grid.points, index=batch.expand(len(grid.points), -1))
        operator += weight * grid.interpolation(images)
    return operator


def _generator(sde: AdversarialSDE, grid: ChebyshevGrid, variant: Variant) -> Tensor:
    """A f = b . grad f + (eta/2) S : Hess f as a matrix on the grid."""
    ours = replace(sde, mode=variant.mode, order=variant.order)
    first = grid.derivatives
    drift = ours.drift(grid.points)
    generator = torch.zeros(len(grid.points), len(grid.points), dtype=torch.float64)
    for i, slope in enumerate(first):
        generator += drift[:, i, None] * slope
    if variant.noise:
        covariance = ours.covariance(grid.points)
        for i, left in enumerate(first):
            for j, right in enumerate(first):
                generator += sde.eta_outer / 2 * covariance[:, i, j, None] * (left @ right)
    return generator


def _choose(variants: Mapping[str, Variant] | Sequence[str]) -> dict[str, Variant]:
    if isinstance(variants, Mapping):
        if not variants or not all(isinstance(one, Variant) for one in variants.values()):
            raise BackpassError(f"variants are one or more of type Variant by name; got {variants!r}.")
        return dict(variants)
    if isinstance(variants, str) or not isinstance(variants, Sequence) or not variants:
        raise BackpassError(f"variants are names of {list(VARIANTS)}, one or more; got {variants!r}.")
    for name in variants:
        if not isinstance(name, str) or name not in VARIANTS:
            raise UnknownNameError("variant", str(name), VARIANTS)
    return {name: VARIANTS[name] for name in variants}


def _check(
    sde: AdversarialSDE,
    bounds: Sequence[tuple[float, float]],
    theta0: Tensor,
    functions: Mapping[str, Function],
    t: float,
    etas: Sequence[float],
    nodes: int,
) -> None:
    if not isinstance(sde, AdversarialSDE) or not isinstance(theta0, Tensor):
        raise BackpassError(
            f"weak_error takes an AdversarialSDE and a tensor theta0; got {type(sde).__name__} and "
            f"{type(theta0).__name__}."
        )
    if any(part.dtype != torch.float64 or part.device.type != "cpu" for part in (sde.data[0], theta0)):
        raise BackpassError("weak errors go down to 1e-8: give data and theta0 in float64, on the CPU.")
    if not isinstance(bounds, Sequence) or not all(
        isinstance(pair, Sequence) and len(pair) == 2 and all(map(is_number, pair)) for pair in bounds
    ):
        raise BackpassError(f"bounds are finite pairs (low, high), one per parameter; got {bounds!r}.")
    inside = theta0.shape == (len(bounds),) and all(
        low <= value <= high for value, (low, high) in zip(theta0.tolist(), bounds, strict=True)
    )
    if not inside:
        raise BackpassError(f"theta0 is a point of the box, of shape ({len(bounds)},); got {theta0.tolist()}.")
    if not isinstance(functions, Mapping) or not functions or not all(map(callable, functions.values())):
        raise BackpassError(f"functions are one or more test functions by name; got {functions!r}.")
    if not (is_number(t) and t > 0):
        raise BackpassError(f"t is the horizon, a finite number above 0; got {t!r}.")
    if not isinstance(etas, Sequence) or not etas or not all(is_number(eta) and 0 < eta <= t for eta in etas):
        raise BackpassError(f"etas are learning rates in (0, t={t:g}]; got {etas!r}.")
    if t / min(etas) > _MOST_STEPS:
        raise BackpassError(
            f"t={t:g} is {t / min(etas):.3g} steps at eta={min(etas):g}, and the limit is {_MOST_STEPS:,}: take a "
            "nearer horizon or larger etas."
        )
    if not (is_whole(nodes, 7) and nodes <= MOST_NODES):
        raise BackpassError(f"nodes is a whole number per dimension, 7 to {MOST_NODES}; got {nodes!r}.")
    batches = math.comb(sde.noise_dim + sde.batch_size - 1, sde.batch_size)
    if batches > _MOST_BATCHES:
        raise BackpassError(
            f"{batches} different batches of {sde.batch_size} from {sde.noise_dim} samples are too many to average "
            f"over, the limit is {_MOST_BATCHES}: take fewer samples or smaller batches."
        )
