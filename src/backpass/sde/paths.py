"""Starts, recording times and records of ensembles of paths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from backpass.errors import BackpassError
from backpass.numbers import is_number, is_whole

__all__ = ["ROUNDING", "Observe", "Paths", "record_paths", "record_times", "start_paths"]

Observe = Callable[[Tensor], Tensor]
"""Function of the paths to record, (..., P) -> (...), for instance `AdversarialSDE.gradient_penalty`."""

ROUNDING = 1e-9
"""Relative differences of times below this are rounding."""


class Paths(NamedTuple):
    """Recorded paths.

    Attributes:
        times: (R,) float64; with one record, the final time alone.
        values: the observed values at those times, (R, ...); the parameters, (R, ..., P), without ``observe``.
        theta: the parameters at the end, (..., P).
    """

    times: Tensor
    values: Tensor
    theta: Tensor


def start_paths(theta0: Tensor, paths: int | None) -> Tensor:
    """Return the starts of all paths, (P,) or (M, P)."""
    if not isinstance(theta0, Tensor) or not theta0.is_floating_point() or theta0.ndim not in (1, 2):
        got = tuple(theta0.shape) if isinstance(theta0, Tensor) else type(theta0).__name__
        raise BackpassError(f"theta0 must be a floating-point vector (P,), or one per path (M, P); got {got}.")
    if not torch.isfinite(theta0).all():
        raise BackpassError("theta0 has values that are NaN or infinite.")
    if paths is None:
        return theta0
    if theta0.ndim != 1 or not is_whole(paths, 1):
        raise BackpassError(
            f"paths >= 1 starts that many at one theta0 of shape (P,); got {paths!r} and shape {tuple(theta0.shape)}."
        )
    return theta0.expand(paths, -1)


def record_times(record: int | Sequence[float] | Tensor | None, t: float) -> list[float]:
    """Return the times to record at, the last of which is t."""
    if record is None:
        return [t]
    if isinstance(record, Tensor) and record.ndim == 1:
        record = record.tolist()
    if is_whole(record, 1):
        return [t * k / record for k in range(record + 1)]
    if isinstance(record, Sequence) and not isinstance(record, str) and record and all(map(is_number, record)):
        times = list(map(float, record))
        rising = all(a < b for a, b in pairwise(times))
        if rising and times[0] >= 0 and times[-1] <= t * (1 + ROUNDING):
            return times
    raise BackpassError(
        f"record must be a number of equal intervals >= 1, increasing times in [0, t={t:g}], or None; got {record!r}."
    )


def record_paths(
    advance: Callable[[Tensor, float], Tensor],
    theta: Tensor,
    times: Sequence[float],
    end: float,
    observe: Observe | None,
) -> Paths:
    """Advance the paths from one recording time to the next and to the end."""
    if observe is not None and not callable(observe):
        raise BackpassError(f"observe must be a function (..., P) -> (...), or None; got {observe!r}.")
    observe = observe or (lambda theta: theta)
    values = []
    for time in times:
        theta = advance(theta, time) if time > 0 else theta
        values.append(observe(theta))
    theta = advance(theta, end) if end > times[-1] * (1 + ROUNDING) else theta
    return Paths(torch.tensor(times, dtype=torch.float64), torch.stack(values), theta)
