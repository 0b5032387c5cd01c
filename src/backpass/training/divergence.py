"""Criterion for a diverged run."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["Divergence"]


class Divergence:
    """A run has diverged where a loss or gradient is not finite, or the mean loss is far above the first one.

    Far above is more than ``factor`` times the larger of the first step's loss and 1, in the mean over one record of
    the log. The floor of 1 keeps a run that starts near 0 (fine-tuning) from being stopped by noise.

    Args:
        factor: factor above 1; None checks only that numbers are finite.
    """

    def __init__(self, factor: float | None) -> None:
        self._factor = factor
        self.first: float | None = None

    def check(self, losses: Sequence[float], last_step: int, gradient_norm: float | None) -> str | None:
        """Return the reason for which the run has diverged, or None.

        Args:
            losses: losses of the steps since the last check, at least one.
            last_step: number of the last of them, counted from 1.
            gradient_norm: gradient norm of the last of them, where it is known.
        """
        for step, loss in enumerate(losses, last_step - len(losses) + 1):
            if not math.isfinite(loss):
                return f"the loss of step {step} is {loss}"
        if gradient_norm is not None and not math.isfinite(gradient_norm):
            return f"the gradient of step {last_step} is not finite"
        if self.first is None:
            self.first = losses[0]
        mean = math.fsum(losses) / len(losses)
        if self._factor is not None and mean > self._factor * max(self.first, 1.0):
            return (
                f"the mean loss of steps {last_step - len(losses) + 1} to {last_step} is {mean:.4g}, "
                f"more than {self._factor:g} times max(1, first loss {self.first:.4g})"
            )
        return None
