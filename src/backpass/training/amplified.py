"""SVAG objective: amplifies the gradient noise of training towards its SDE limit."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from backpass.errors import BackpassError
from backpass.sde import svag_weights
from backpass.training.batches import Batch, chosen
from backpass.training.objective import Evaluated, Objective, Plain

__all__ = ["Amplified"]


@dataclass(frozen=True)
class Amplified:
    r"""SVAG objective a+ L(first half) - a- L(second half) of a batch, :math:`a_\pm = (\sqrt{2l - 1} \pm 1) / 2`.

    With ``batch_size=2 * B``, the learning rate eta / l and l times as many steps, the mean of an update per unit of
    time and its covariance are those of training with B and eta, and l -> infinity is the SDE. If losses at l = 1, 4,
    16 agree, the SDE describes the run. l = 1 is the objective itself, on the whole batch: use ``batch_size=B``.
    Works for any network and any objective; `backpass.sde.certify` does the comparison for plain SGD.

    Args:
        objective: objective to amplify, for instance `AdversarialTraining`.
        amplification: l >= 1.

    Raises:
        BackpassError: l is no integer >= 1.

    Source: Li, Malladi, Arora, arXiv 2102.12470.
    """

    objective: Objective
    amplification: int

    def __post_init__(self) -> None:
        svag_weights(self.amplification)

    @property
    def evaluation(self) -> Objective:
        """Objective of the evaluation set."""
        return getattr(self.objective, "evaluation", self.objective)

    def __call__(self, model: nn.Module, batch: Batch, plain: Plain) -> Evaluated:
        """Evaluate the objective on both halves; losses and metrics other than ``loss`` are plain means.

        Raises:
            BackpassError: the batch size is odd.
        """
        if self.amplification == 1:
            return self.objective(model, batch, plain)
        if len(batch) % 2:
            raise BackpassError(
                f"an amplified step needs two batches of one size, got {len(batch)} samples: use an even batch_size "
                "and drop_last=True."
            )
        middle = len(batch) // 2

        def on(rows: slice) -> Evaluated:
            part = replace(batch, x=chosen(batch.x, rows), y=batch.y[rows], index=batch.index[rows])
            return self.objective(model, part, plain)

        first, second = halves = [on(slice(0, middle)), on(slice(middle, None))]
        plus, minus = svag_weights(self.amplification)
        answers = [one.correct for one in halves if one.correct is not None]
        return Evaluated(
            loss=plus * first.loss + minus * second.loss,
            correct=torch.cat(answers) if len(answers) == 2 else None,
            metrics={name: (value + second.metrics[name]) / 2 for name, value in first.metrics.items()},
        )
