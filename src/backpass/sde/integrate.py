"""Integrate ensembles of paths of an SDE, and run the chain that it models."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from backpass.errors import BackpassError, UnknownNameError
from backpass.numbers import is_number
from backpass.sde.brownian import BrownianPath
from backpass.sde.chain import Chain
from backpass.sde.ito import SDE, TimeDependentSDE, at_time
from backpass.sde.paths import ROUNDING, Observe, Paths, record_paths, record_times, start_paths

__all__ = ["METHODS", "integrate"]

Method = Literal["predictor_corrector", "derivative_free", "euler_maruyama"]
METHODS = ("predictor_corrector", "derivative_free", "euler_maruyama")
"""All are for Ito noise. Weak orders: see `integrate`."""


@runtime_checkable
class _Expanded(Protocol):
    """An SDE whose drift is a leading term and terms of order eta."""

    def coefficients(self, theta: Tensor, xi: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...

    def leading_drift(self, theta: Tensor) -> Tensor: ...


def integrate(
    sde: SDE | TimeDependentSDE,
    theta0: Tensor,
    t: float,
    dt: float | None = None,
    method: Method | None = None,
    *,
    paths: int | None = None,
    generator: torch.Generator | None = None,
    brownian: BrownianPath | None = None,
    record: int | Sequence[float] | Tensor | None = None,
    observe: Observe | None = None,
    coarse: bool = False,
) -> Paths:
    """Integrate an ensemble of paths from theta0 to time t.

    | method | calculus | weak order | its error |
    | --- | --- | --- | --- |
    | ``"predictor_corrector"`` | Ito | 2 if the noise does not depend on theta | O(dt^2) |
    | | | 2 if the noise has size sqrt(eta), dt <= eta | O(dt^2 + eta dt) |
    | | | 1 otherwise | O(dt) |
    | ``"derivative_free"`` | Ito | 2 in eta, against the chain, dt <= eta | O(eta^2) |
    | ``"euler_maruyama"`` | Ito | 1 | O(dt) |

    The predictor-corrector method takes the mean of the drift at both ends of a step and the noise at its beginning.
    The derivative-free method is for a process of order 2 in mode exact. With the leading drift f = -h it steps to
    theta + dt f(theta + (dt - eta)/2 f(theta) + noise/2) + noise, which holds eta/2 (Dh) h without a derivative. It
    costs less, but for dt -> 0 it converges to an SDE that differs from the given one by O(eta^2).
    (Stochastic Heun would take the noise at both ends, which is Stratonovich's calculus: not offered.)

    An `AdversarialSDE` of order 2 differs from that of order 1 by terms of order eta, as large as the error of
    Euler-Maruyama at dt = eta. So for order 2 only the other two methods are allowed, the predictor-corrector method
    with dt <= eta/4 and the derivative-free method with dt <= eta; for order 1 Euler-Maruyama with dt <= eta. With
    dt = eta the derivative-free method is the chain itself with Gaussian noise, and so is Euler-Maruyama on mode exact,
    order 1.

    Args:
        sde: an `AdversarialSDE`, `ControlledSDE`, `MomentumSDE`, `ItoSDE`, or any object with their methods.
        theta0: one start (P,), or one per path (M, P).
        t: the final time, > 0; that of k steps of the chain is k eta_outer.
        dt: no step is longer than this; steps are shortened to hit every record. None for eta_outer/4; for an SDE
            that models no chain it must be given.
        method: see the table; None for ``"derivative_free"`` where it applies, else ``"predictor_corrector"``.
        paths: start M paths at the one theta0.
        generator: of the noise, on theta0's device; None for the global one.
        brownian: the path to follow in place of drawing one: a halved dt refines it, several SDEs can share it.
        record: an int to record at time 0 and at this many equal intervals; or the increasing times to record at;
            None to record the end alone.
        observe: function to record; None for the parameters.
        coarse: allow longer steps and lower orders than those above.

    Returns:
        The records. Differentiable in theta0 and in what drift and noise depend on, such as eta_outer and the data.

    Raises:
        BackpassError: a setting is out of its range, or would lose the SDE's order.

    Warns:
        UserWarning: no method was named, and noise that depends on theta and is not small lowers the order of the
            default to 1.
    """
    named = method is not None
    method = method or ("derivative_free" if _models_a_chain_exactly(sde) else "predictor_corrector")
    if method not in METHODS:
        hint = " Stochastic Heun is for Stratonovich noise." if "heun" in str(method) else ""
        raise (
            UnknownNameError("method", f"{method}", METHODS)
            if not hint
            else BackpassError(
                f"unknown method {method!r}.{hint} For Ito noise use 'predictor_corrector' or 'euler_maruyama'."
            )
        )
    theta = start_paths(theta0, paths)
    if not (is_number(t) and t > 0):
        raise BackpassError(f"t must be the final time, a finite number > 0; got {t!r}.")
    dt = _step_length(sde, dt, method, coarse)
    times = record_times(record, t)
    noises = _noises(sde, theta, generator, brownian, t, dt, times)
    euler, now = method == "euler_maruyama", 0.0
    check_order = not named and not isinstance(sde, Chain)

    def advance(theta: Tensor, until: float) -> Tensor:
        nonlocal now, check_order
        begin = now
        count = max(1, math.ceil((until - begin) / dt * (1 - ROUNDING)))
        h = (until - begin) / count
        root = math.sqrt(h)
        for k in range(count):
            here = at_time(sde, now)
            xi = next(noises)
            scale = root if brownian is None else 1.0
            if method == "derivative_free":
                theta = _shifted_step(sde, theta, xi, now, h, scale)
                now = begin + (k + 1) * h
                continue
            drift, noise, leading = _coefficients(here, theta, xi)
            now = begin + (k + 1) * h
            end = torch.add(theta, drift, alpha=h).add_(noise, alpha=scale)
            if check_order:
                _warn_of_lost_order(here, theta, scale * noise, h)
                check_order = False
            if euler:
                theta = end
                continue
            # The corrector moves Euler's end by half of the drift's change along the step. The change of terms of order
            # eta is of order eta dt, like the error, and is left out.
            there = at_time(sde, now)
            change = (there.leading_drift(end) if isinstance(there, _Expanded) else there.drift(end)) - leading
            theta = torch.add(end, change, alpha=h / 2)
        return theta

    return record_paths(advance, theta, times, t, observe)


def _models_a_chain_exactly(sde: object) -> bool:
    """Return True for the processes that the derivative-free method is for."""
    if not isinstance(sde, Chain) or sde.order != 2:
        return False
    expanded = getattr(getattr(sde, "sde", sde), "mode", "exact") == "expanded"
    return not expanded and hasattr(at_time(sde, 0.0), "leading_and_noise")  # type: ignore[arg-type]


def _shifted_step(sde: SDE | TimeDependentSDE, theta: Tensor, xi: Tensor, t: float, h: float, scale: float) -> Tensor:
    """Take a step of the derivative-free method, with the coefficients in its middle."""
    at = at_time(sde, t + h / 2)
    leading, noise = at.leading_and_noise(theta, xi)  # type: ignore[attr-defined]
    noise = scale * noise
    eta = getattr(getattr(sde, "sde", sde), "eta_outer", 0.0)  # a tensor if gradients with respect to it are wanted
    shifted = theta + (h - eta) / 2 * leading + noise / 2
    return torch.add(theta, at.leading_drift(shifted), alpha=h).add_(noise)  # type: ignore[attr-defined]


def _coefficients(sde: SDE, theta: Tensor, xi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return drift, noise and leading drift, at once where the SDE shares work between them."""
    if isinstance(sde, _Expanded):
        return sde.coefficients(theta, xi)
    drift = sde.drift(theta)
    return drift, sde.noise(theta, xi), drift


def _noises(
    sde: SDE | TimeDependentSDE,
    theta: Tensor,
    generator: torch.Generator | None,
    brownian: BrownianPath | None,
    t: float,
    dt: float,
    times: Sequence[float],
) -> Iterator[Tensor]:
    """Yield standard normal numbers of one step after another, or the increments of the given path."""
    shape = (*theta.shape[:-1], sde.noise_dim)
    if brownian is None:
        while True:
            yield torch.randn(shape, generator=generator, dtype=theta.dtype, device=theta.device)
    if not isinstance(brownian, BrownianPath) or brownian.shape != shape or brownian.dtype != theta.dtype:
        got = f"{brownian.shape} {brownian.dtype}" if isinstance(brownian, BrownianPath) else type(brownian).__name__
        raise BackpassError(f"brownian must be a BrownianPath of shape {shape} and {theta.dtype}; got {got}.")
    if abs(brownian.t - t) > ROUNDING * t:
        raise BackpassError(f"the Brownian path ends at {brownian.t:g}, the integration at t={t:g}: they must agree.")
    steps = math.ceil(t / dt * (1 - ROUNDING))
    steps = brownian.steps * 2 ** max(0, math.ceil(math.log2(steps / brownian.steps) - ROUNDING))
    h = t / steps
    for time in times:
        if abs(time / h - round(time / h)) > 1e-6:
            raise BackpassError(f"with a Brownian path the times to record are multiples of dt={h:g}; got {time:g}.")
    yield from brownian.increments(steps)


def _warn_of_lost_order(sde: SDE, theta: Tensor, noise: Tensor, h: float) -> None:
    """Warn where the noise changes along itself: by sqrt(h) times its derivative, of order 1."""
    size = float(noise.detach().norm())
    if not size > 0:
        return
    generator = torch.Generator(theta.device).manual_seed(0)
    shape = (*theta.shape[:-1], sde.noise_dim)
    with torch.no_grad():
        xi = torch.randn(shape, generator=generator, dtype=theta.dtype, device=theta.device)
        here = sde.noise(theta, xi)
        change = float((sde.noise(theta + noise, xi) - here).norm() / here.norm())
    if change > 0.2 * h**0.5:
        warnings.warn(
            "the noise depends on theta and is not small, so the default method has weak order 1 for this SDE. Name "
            "method='euler_maruyama' or method='predictor_corrector' to accept that, and choose dt by halving it.",
            stacklevel=4,
        )


def _step_length(sde: SDE | TimeDependentSDE, dt: float | None, method: Method, coarse: bool) -> float:
    """Return the given dt or its default, unless it would lose the order of the SDE."""
    if dt is not None and not (is_number(dt) and dt > 0):
        raise BackpassError(f"dt must be the length of a step, a finite number > 0; got {dt!r}.")
    if not isinstance(sde, Chain):
        if method == "derivative_free":
            raise BackpassError(
                "method='derivative_free' is for an SDE that models a chain. Use 'predictor_corrector'."
            )
        if dt is None:
            raise BackpassError("dt has no default for this SDE: pass the length of a step.")
        return dt
    step, euler = sde.time_step, method == "euler_maruyama"
    if method == "derivative_free":
        if not _models_a_chain_exactly(sde):
            raise BackpassError(
                "method='derivative_free' is for an AdversarialSDE or ControlledSDE of order 2 in mode 'exact'. Use "
                "'predictor_corrector'."
            )
        if dt is not None and dt > step * (1 + 1e-12) and not coarse:
            raise BackpassError(f"dt must be at most eta_outer = {step:g}; got {dt:g}. Pass coarse=True to allow it.")
        return step / 4 if dt is None else dt
    if not coarse and euler and sde.order == 2:
        raise BackpassError(
            "Euler-Maruyama errs by as much as an SDE of order 2 adds. Use method='predictor_corrector', or order=1 "
            "(in mode exact with dt=eta_outer: the chain with Gaussian noise), or pass coarse=True to allow it."
        )
    if dt is None:
        return step if euler else step / 4
    longest = step / 4 if sde.order == 2 else step
    if not coarse and dt > longest * (1 + 1e-12):
        raise BackpassError(
            f"dt must be at most eta_outer{'/4' if sde.order == 2 else ''} = {longest:g} for an SDE of order "
            f"{sde.order}; got {dt:g}. Pass coarse=True to allow it."
        )
    return dt
