"""SVAG: stochastic variance amplified gradients, a chain that converges to the SDE of SGD."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from backpass.errors import BackpassError
from backpass.numbers import is_whole
from backpass.sde.dynamics import AdversarialSDE

__all__ = ["SVAG", "svag_weights"]


def svag_weights(amplification: int) -> tuple[float, float]:
    """Return the weights a+ = (sqrt(2 l - 1) + 1) / 2 and -a- = -(sqrt(2 l - 1) - 1) / 2 of two independent batches.

    They sum to 1 and their squares to l.

    Args:
        amplification: l >= 1.

    Raises:
        BackpassError: l is no integer >= 1.
    """
    if not is_whole(amplification, 1):
        raise BackpassError(f"the amplification l must be an integer >= 1, got {amplification!r}.")
    root = math.sqrt(2 * amplification - 1)
    return (root + 1) / 2, -(root - 1) / 2


@dataclass(frozen=True)
class SVAG:
    """SVAG chain theta <- theta - (eta/l) (a+ g(batch 1) - a- g(batch 2)), with l steps per unit of time.

    Its gradient has the mean of g and l times its covariance, so that l steps have the drift and the covariance of one
    step of the chain, and l -> infinity is the SDE dTheta = -h dt + sqrt(eta) S^{1/2} dW. l = 1 is the chain itself.
    If statistics agree at l = 1, 4, 16, the SDE describes the chain at this learning rate. Pass it to `run_chain`.

    Args:
        sde: the process; its mode and order have no effect.
        amplification: l >= 1.

    Source: Li, Malladi, Arora, arXiv 2102.12470, for SGD; used here for adversarial training.
    """

    sde: AdversarialSDE
    amplification: int

    def __post_init__(self) -> None:
        svag_weights(self.amplification)

    @property
    def noise_dim(self) -> int:
        """Number of samples."""
        return self.sde.noise_dim

    @property
    def batch_size(self) -> int:
        """Samples per step over both batches; one batch at l = 1."""
        return self.sde.batch_size * (2 if self.amplification > 1 else 1)

    @property
    def time_step(self) -> float:
        """SDE time of one step, eta_outer / l."""
        return self.sde.time_step / self.amplification

    @property
    def order(self) -> int:
        """Weak order of the SDE."""
        return self.sde.order

    def chain_step(self, theta: Tensor, *, index: Tensor) -> Tensor:
        """Take one step on a batch of indices, whose first half is batch 1; returns (..., P)."""
        size, moves = self.sde.batch_size, []
        for place, weight in enumerate(svag_weights(self.amplification)[: index.shape[-1] // size]):
            batch = index[..., place * size : (place + 1) * size]
            moves.append(weight * (self.sde.chain_step(theta, index=batch) - theta))
        return theta + sum(moves) / self.amplification
