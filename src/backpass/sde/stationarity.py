"""Tests of stationarity: fluctuation against dissipation, and the first half of a trajectory against the second."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from backpass.errors import BackpassError, UnknownNameError
from backpass.sde.dynamics import AdversarialSDE

__all__ = ["Balance", "Drifting", "fluctuation_dissipation", "stationarity_test"]

_BATCHES = 16
"""Batch means in each half of a single trajectory."""


class Balance(NamedTuple):
    """Fluctuation by the noise and dissipation by the drift; equal in the stationary law.

    Attributes:
        dissipation: E[(theta - c) . h] of the chain, E[(theta - c) . b] of the SDE.
        fluctuation: eta/2 E|g^|^2 of the chain, eta/2 E tr S of the SDE.
        gap: (dissipation - fluctuation) / fluctuation.
        error: the standard error of the gap; nan for fewer than 2 paths and 32 records.
    """

    dissipation: float
    fluctuation: float
    gap: float
    error: float


class Drifting(NamedTuple):
    """The second half of a trajectory less the first.

    Attributes:
        difference: of the means.
        z: in standard errors.
        p_value: of a |z| this large if the trajectory is stationary, by the normal law.
    """

    difference: float
    z: float
    p_value: float


def fluctuation_dissipation(
    sde: AdversarialSDE, theta: Tensor, *, centre: Tensor | None = None, law: Literal["chain", "sde"] = "chain"
) -> Balance:
    """Compare both sides of E[(theta - c) . h] = eta/2 E|g^|^2, exact for the stationary chain, on a trajectory.

    |theta' - c|^2 = |theta - c|^2 - 2 eta (theta - c) . g^ + eta^2 |g^|^2 has the same mean on both sides, and
    E[g^ | theta] = h, E[|g^|^2 | theta] = |h|^2 + tr S. For the SDE, d|Theta - c|^2 gives E[(Theta - c) . b] =
    eta/2 E tr S with b = -drift. Any c will do; near the mean the sampling error is smallest.

    Args:
        sde: the process; tr S takes a gradient per sample.
        theta: records of one path (R, P) or of several (R, M, P), as `run_chain` and `integrate` give them.
        centre: c, (P,); None for the mean of the records.
        law: ``"chain"`` or ``"sde"``: which of them the records come from.

    Raises:
        BackpassError: the records have another shape, or there is no noise.
    """
    if law not in ("chain", "sde"):
        raise UnknownNameError("law", str(law), ("chain", "sde"))
    if not isinstance(theta, Tensor) or theta.ndim not in (2, 3):
        got = tuple(theta.shape) if isinstance(theta, Tensor) else type(theta).__name__
        raise BackpassError(f"theta holds records (R, P), or (R, M, P) of several paths; got {got}.")
    flat = theta.flatten(0, -2)
    away = flat - (flat.mean(0) if centre is None else centre)
    noise = sde.covariance(flat).diagonal(dim1=-2, dim2=-1).sum(-1)
    pull = sde.mean_field(flat) if law == "chain" else -sde.drift(flat)
    power = noise + pull.square().sum(-1) if law == "chain" else noise
    dissipation, fluctuation = (away * pull).sum(-1), sde.eta_outer / 2 * power
    mean = float(fluctuation.mean())
    if not mean > 0:
        raise BackpassError("the gradient has no noise along these records: nothing fluctuates, nothing to compare.")
    gaps = ((dissipation - fluctuation) / mean).reshape(theta.shape[:-1])
    return Balance(float(dissipation.mean()), mean, float(gaps.mean()), _standard_error(gaps))


def stationarity_test(values: Tensor) -> Drifting:
    """Test whether the mean of an observable is the same in both halves of a trajectory.

    With several paths the halves are compared path by path. One path is cut into 32 batches whose means count as
    independent, so it must be much longer than 32 relaxation times, 32 / `Stationary.rate`.

    Args:
        values: of one path (R,), R >= 64, or of at least 8 independent paths (R, M), R >= 2.

    Raises:
        BackpassError: there are too few records, or they are not finite.
    """
    if not isinstance(values, Tensor):
        raise BackpassError(f"values are a tensor (R,), or (R, M); got {type(values).__name__}.")
    if not torch.isfinite(values).all():
        raise BackpassError("the observable has values that are NaN or infinite: a path has diverged.")
    half, several = len(values) // 2 if values.ndim else 0, values.ndim == 2
    if (
        values.ndim not in (1, 2)
        or (several and (values.shape[1] < 8 or half < 1))
        or (not several and len(values) < 64)
    ):
        raise BackpassError(
            f"a test takes at least 64 records (R,) of one path, or 2 of 8 paths or more, (R, M); got "
            f"{tuple(values.shape)}."
        )
    first, second = values[:half].double(), values[-half:].double()
    if several:
        pairs = second.mean(0) - first.mean(0)
        difference, error = float(pairs.mean()), float(pairs.std()) / math.sqrt(len(pairs))
    else:
        halves = [torch.stack([part.mean() for part in h.tensor_split(_BATCHES)]) for h in (first, second)]
        difference = float(second.mean() - first.mean())
        error = math.sqrt(sum(float(means.var()) / _BATCHES for means in halves))
    z = difference / error if error > 0 else (0.0 if difference == 0 else math.copysign(math.inf, difference))
    return Drifting(difference, z, math.erfc(abs(z) / math.sqrt(2)))


def _standard_error(values: Tensor) -> float:
    """Standard error of the mean, over paths if there are several, else over batch means; (R,) or (R, M)."""
    if values.ndim == 2 and values.shape[1] > 1:
        means = values.mean(0)
    elif len(values) >= 2 * _BATCHES:
        means = torch.stack([part.mean() for part in values.flatten().tensor_split(_BATCHES)])
    else:
        return math.nan
    return float(means.std()) / math.sqrt(len(means))
