"""Stochastic gradient chains, and the interface between a chain and the SDE that models it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from backpass.errors import BackpassError
from backpass.numbers import is_whole
from backpass.sde.ito import at_time
from backpass.sde.paths import Observe, Paths, record_paths, record_times, start_paths
from backpass.sde.sampling import Sampling, draw_batches

__all__ = ["Chain", "run_chain"]


@runtime_checkable
class Chain(Protocol):
    """A stochastic gradient method with the SDE that models it: `AdversarialSDE`, `ControlledSDE`, `MomentumSDE`."""

    @property
    def time_step(self) -> float:
        """SDE time of one step of the chain."""

    @property
    def order(self) -> int:
        """Weak order of the SDE in the time of a step."""

    @property
    def batch_size(self) -> int:
        """Samples in a batch."""

    @property
    def noise_dim(self) -> int:
        """Number of samples, and of normal variates that a path's noise takes."""


def run_chain(
    sde: Chain,
    theta0: Tensor,
    steps: int,
    *,
    paths: int | None = None,
    generator: torch.Generator | None = None,
    record: int | Sequence[float] | Tensor | None = None,
    observe: Observe | None = None,
    sampling: Sampling = "iid",
) -> Paths:
    """Run the chain that an SDE models, ``steps`` steps of SDE time `Chain.time_step` each.

    Args:
        sde: the process.
        theta0: one start (P,), or one per path (M, P).
        steps: number of steps, >= 1.
        paths: start M paths at the one theta0.
        generator: draws the batches.
        record: an int to record at step 0 and at this many equal intervals, a divisor of ``steps``; or the increasing
            SDE times to record at, each a whole number of steps.
        observe: function to record; None for the parameters.
        sampling: ``"iid"``, batches drawn with replacement, which is what the SDE models; or ``"permuted"``, batches
            cut from a new permutation of the samples in each epoch, as trainers do it. See `permuted_law`.

    Raises:
        BackpassError: a setting is out of its range.
    """
    if not isinstance(sde, Chain):
        raise BackpassError(f"sde must model a chain, for instance an AdversarialSDE; got {type(sde).__name__}.")
    theta, step = start_paths(theta0, paths), sde.time_step
    if not is_whole(steps, 1) or (isinstance(record, int) and is_whole(record, 1) and steps % record):
        raise BackpassError(f"steps must be a positive multiple of record={record}; got {steps!r}.")
    times, done = record_times(record, steps * step), 0
    for time in times:
        if abs(time / step - round(time / step)) > 1e-6:
            raise BackpassError(f"times to record the chain at are multiples of its time step {step:g}; got {time:g}.")
    batches = draw_batches(sampling, sde.noise_dim, sde.batch_size, theta.shape[:-1], generator, theta.device)

    def advance(theta: Tensor, until: float) -> Tensor:
        nonlocal done
        for _ in range(round(until / step) - done):
            at = at_time(sde, (done + 0.5) * step)  # type: ignore[arg-type]
            theta = at.chain_step(theta, index=next(batches))  # type: ignore[attr-defined]
            done += 1
        return theta

    return record_paths(advance, theta, times, steps * step, observe)
