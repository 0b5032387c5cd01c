"""Ensembles of paths of a stochastic differential equation, and of the chain beside it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from backpass.errors import BackpassError, UnknownNameError
from backpass.numbers import is_number, is_whole
from backpass.sde.dynamics import AdversarialSDE

__all__ = ["SDE", "ItoSDE", "Paths", "integrate", "run_chain"]

Method = Literal["heun", "euler"]
Observe = Callable[[Tensor], Tensor]
"""What is recorded of the paths: (..., P) -> (...), for instance `AdversarialSDE.gradient_penalty`."""


class SDE(Protocol):
    """dTheta = drift(Theta) dt + noise(Theta, dW), in Ito's sense."""

    @property
    def noise_dim(self) -> int:
        """The dimension of W."""

    def drift(self, theta: Tensor) -> Tensor:
        """(..., P) -> (..., P)."""

    def noise(self, theta: Tensor, xi: Tensor) -> Tensor:
        """Linear in xi: (..., P), (..., noise_dim) -> (..., P)."""


@dataclass(frozen=True)
class ItoSDE:
    """Any SDE, from its two functions.

    Args:
        drift: (..., P) -> (..., P).
        noise: (theta, xi) -> (..., P), linear in xi, (..., noise_dim).
        noise_dim: the dimension of xi.
    """

    drift: Callable[[Tensor], Tensor]
    noise: Callable[[Tensor, Tensor], Tensor]
    _: KW_ONLY
    noise_dim: int


class Paths(NamedTuple):
    """Recorded paths.

    Attributes:
        times: (R,) float64; with one record, the final time alone.
        values: what was observed at those times, (R, ...); the parameters, (R, ..., P), without ``observe``.
        theta: the parameters at the end, (..., P).
    """

    times: Tensor
    values: Tensor
    theta: Tensor


def integrate(
    sde: SDE,
    theta0: Tensor,
    t: float,
    dt: float | None = None,
    method: Method = "heun",
    *,
    paths: int | None = None,
    generator: torch.Generator | None = None,
    record: int | None = None,
    observe: Observe | None = None,
    coarse: bool = False,
) -> Paths:
    """Follow an ensemble of paths from theta0 to time t.

    ``"heun"`` takes the mean of the drift at both ends of the step and the noise at its beginning (Ito); its weak
    error is O(dt^2 + eta dt) where the noise is of size sqrt(eta). ``"euler"`` is Euler-Maruyama, O(dt).

    The trap: an `AdversarialSDE` of order 2 differs from that of order 1 by terms of order eta, as large as what
    Euler-Maruyama gets wrong at dt = eta. So for order 2 only Heun with dt <= eta/4 is allowed, and for order 1 Euler
    with dt <= eta. Euler with dt = eta on mode exact, order 1, is the chain itself with Gaussian noise.

    Args:
        sde: what is integrated.
        theta0: one start (P,), or one per path (M, P).
        t: the final time, > 0; that of k steps of the chain is k eta_outer.
        dt: no step is longer than this; steps are shortened to hit every record. None for eta_outer/4; for an SDE
            that is no `AdversarialSDE` it must be given.
        method: ``"heun"`` or ``"euler"``.
        paths: start M paths at the one theta0.
        generator: of the noise, on theta0's device; None for the global one.
        record: record at time 0 and at this many equal intervals; None to record the end alone.
        observe: what to record; None for the parameters.
        coarse: allow longer steps and lower orders than those above.

    Returns:
        The records. Differentiable in theta0 and in what drift and noise depend on.

    Raises:
        BackpassError: a setting is out of its range, or would lose the SDE's order.
    """
    if method not in ("heun", "euler"):
        raise UnknownNameError("method", str(method), ("heun", "euler"))
    theta = _start(theta0, paths)
    if not (is_number(t) and t > 0):
        raise BackpassError(f"t is the final time, > 0; got {t!r}.")
    dt = _step_length(sde, dt, method, coarse)
    records = _check_record(record)
    per_record = math.ceil(t / records / dt * (1 - 1e-12))
    h = t / records / per_record
    root, euler, shape = math.sqrt(h), method == "euler", (*theta.shape[:-1], sde.noise_dim)

    def advance(theta: Tensor) -> Tensor:
        for _ in range(per_record):
            xi = torch.randn(shape, generator=generator, dtype=theta.dtype, device=theta.device)
            drift, noise = sde.drift(theta), sde.noise(theta, xi)
            end = torch.add(theta, drift, alpha=h).add_(noise, alpha=root)
            # Heun's step moves Euler's end by half of what the drift changes along it.
            theta = end if euler else torch.add(end, sde.drift(end) - drift, alpha=h / 2)
        return theta

    return _record(advance, theta, records, record is not None, t / records, observe)


def run_chain(
    sde: AdversarialSDE,
    theta0: Tensor,
    steps: int,
    *,
    paths: int | None = None,
    generator: torch.Generator | None = None,
    record: int | None = None,
    observe: Observe | None = None,
) -> Paths:
    """The same for the chain: ``steps`` steps of `AdversarialSDE.chain_step`, each of time eta_outer.

    Args:
        sde: whose chain.
        theta0: one start (P,), or one per path (M, P).
        steps: how many, >= 1.
        paths: start M paths at the one theta0.
        generator: draws the batches.
        record: record at step 0 and at this many equal intervals, a divisor of ``steps``.
        observe: what to record; None for the parameters.

    Raises:
        BackpassError: a setting is out of its range.
    """
    theta, records = _start(theta0, paths), _check_record(record)
    if not is_whole(steps, 1) or steps % records:
        raise BackpassError(f"steps is a positive multiple of record={records}; got {steps!r}.")

    def advance(theta: Tensor) -> Tensor:
        for _ in range(steps // records):
            theta = sde.chain_step(theta, generator=generator)
        return theta

    return _record(advance, theta, records, record is not None, steps // records * sde.eta_outer, observe)


def _record(
    advance: Callable[[Tensor], Tensor],
    theta: Tensor,
    records: int,
    with_start: bool,
    interval: float,
    observe: Observe | None,
) -> Paths:
    if observe is not None and not callable(observe):
        raise BackpassError(f"observe is a function (..., P) -> (...), or None; got {observe!r}.")
    observe = observe or (lambda theta: theta)
    values = [observe(theta)] if with_start else []
    for _ in range(records):
        theta = advance(theta)
        values.append(observe(theta))
    times = torch.arange(records + 1, dtype=torch.float64) * interval
    return Paths(times[-len(values) :], torch.stack(values), theta)


def _start(theta0: Tensor, paths: int | None) -> Tensor:
    if not isinstance(theta0, Tensor) or not theta0.is_floating_point() or theta0.ndim not in (1, 2):
        got = tuple(theta0.shape) if isinstance(theta0, Tensor) else type(theta0).__name__
        raise BackpassError(f"theta0 is a floating-point vector (P,), or one per path (M, P); got {got}.")
    if not torch.isfinite(theta0).all():
        raise BackpassError("theta0 has values that are NaN or infinite.")
    if paths is None:
        return theta0
    if theta0.ndim != 1 or not is_whole(paths, 1):
        raise BackpassError(
            f"paths >= 1 starts that many at one theta0 of shape (P,); got {paths!r} and shape {tuple(theta0.shape)}."
        )
    return theta0.expand(paths, -1)


def _check_record(record: int | None) -> int:
    if record is not None and not is_whole(record, 1):
        raise BackpassError(f"record is how many equal intervals, >= 1, or None; got {record!r}.")
    return record or 1


def _step_length(sde: SDE, dt: float | None, method: Method, coarse: bool) -> float:
    """The given dt or its default, unless it would lose the order of the SDE."""
    if dt is not None and not (is_number(dt) and dt > 0):
        raise BackpassError(f"dt is the length of a step, > 0; got {dt!r}.")
    if not isinstance(sde, AdversarialSDE):
        if dt is None:
            raise BackpassError("dt has no default for this SDE: give the length of a step.")
        return dt
    eta = sde.eta_outer
    if not coarse and method == "euler" and sde.order == 2:
        raise BackpassError(
            "Euler-Maruyama errs by as much as an SDE of order 2 adds. Use method='heun', or order=1 (in mode exact "
            "with dt=eta_outer: the chain with Gaussian noise), or pass coarse=True to do it all the same."
        )
    if dt is None:
        return eta if method == "euler" else eta / 4
    longest = eta / 4 if sde.order == 2 else eta
    if not coarse and dt > longest * (1 + 1e-12):
        raise BackpassError(
            f"dt must be at most eta_outer{'/4' if sde.order == 2 else ''} = {longest:g} for an SDE of order "
            f"{sde.order}; got {dt:g}. Pass coarse=True to do it all the same."
        )
    return dt
