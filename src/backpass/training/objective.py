"""What a training step minimises: an objective, and what evaluating it on one batch leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpass.errors import BackpassError
from backpass.numbers import is_number
from backpass.training.batches import Batch

__all__ = ["CrossEntropy", "Evaluated", "Loss", "Objective", "PerSample", "Plain", "correct"]

Loss = Callable[[Tensor, Tensor], Tensor]
"""A loss per sample: (output, y) -> (B,)."""

Plain = Callable[[], AbstractContextManager[object]]
"""Gives a context in which the trainer's rules are suspended, so that the backward pass is plain."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluated:
    """An objective on one batch.

    Attributes:
        loss: scalar with graph, the mean over the batch; this is what is differentiated.
        losses: (B,) detached, each sample's own, where the objective has them; the trainer needs only their mean.
        correct: (B,) bool, whether the model's answer was the label; None where this is no classification.
        metrics: further scalars to log, each a mean over the batch, detached.
        again: the loss on some rows of the batch once more, with graph: ``again(model, rows)``. Whatever was searched
            for or drawn, say adversarial examples, stays as it is. None if the objective cannot tell.
        moves: whether adversarial examples in it depend smoothly on the parameters, so that the second derivative of
            ``again`` is not the derivative of the training gradient. False for sign steps.
    """

    loss: Tensor
    losses: Tensor | None = None
    correct: Tensor | None = None
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    again: Callable[[nn.Module, slice], Tensor] | None = None
    moves: bool = False


class Objective(Protocol):
    """What a training step minimises, as a function of the model and a batch.

    An objective may have ``state_dict()`` and ``load_state_dict(state)``; checkpoints then hold its state, which must
    be of tensors, numbers, strings, lists and dicts. It may have ``losses(output, y) -> (B,)``, by which the evaluation
    set is judged; cross-entropy without.
    """

    def __call__(self, model: nn.Module, batch: Batch, plain: Plain) -> Evaluated:
        """Evaluate the objective with graph.

        Args:
            model: in training mode. With several processes it is a ``DistributedDataParallel``: only the forward pass
                that leads to ``loss`` may go through it, and ``model.module`` is for all others.
            batch: this process's part of the batch, prepared, on the model's device.
            plain: gives a context without the trainer's rules.
        """
        ...


def correct(output: Tensor, y: Tensor) -> Tensor | None:
    """Whether the largest of (B, K) outputs is that of the label: (B,) bool; None where this is no classification."""
    if output.dim() != 2 or y.dim() != 1 or y.is_floating_point():
        return None
    return output.detach().argmax(1) == y


@dataclass(frozen=True)
class PerSample:
    """The mean of a loss per sample, L = 1/B sum_i loss(f(x_i), y_i).

    Args:
        loss: (output, y) -> (B,), for instance ``lambda output, y: (output - y).square().mean(1)``.
    """

    loss: Loss

    def losses(self, output: Tensor, y: Tensor) -> Tensor:
        """The loss of each sample, (B,).

        Raises:
            BackpassError: the loss is not one number a sample.
        """
        losses = self.loss(output, y)
        if losses.shape != y.shape[:1]:
            raise BackpassError(
                f"the loss must give one number per sample, shape {tuple(y.shape[:1])}; got {tuple(losses.shape)}: "
                "use reduction='none', and take the mean over everything but the first dimension."
            )
        return losses

    def __call__(self, model: nn.Module, batch: Batch, plain: Plain) -> Evaluated:
        """The mean loss of the model on the batch."""
        output = model(batch.x)
        losses = self.losses(output, batch.y)

        def again(model: nn.Module, rows: slice) -> Tensor:
            return self.losses(model(batch.x[rows]), batch.y[rows]).mean()

        return Evaluated(loss=losses.mean(), losses=losses.detach(), correct=correct(output, batch.y), again=again)


@dataclass(frozen=True, kw_only=True)
class CrossEntropy:
    """The mean cross-entropy of logits (B, K) and labels (B,) in 0..K-1.

    Args:
        label_smoothing: in [0, 1]; the part of the target that is spread evenly over all classes.

    Raises:
        BackpassError: the setting is out of its range.
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not (is_number(self.label_smoothing) and 0 <= self.label_smoothing <= 1):
            raise BackpassError(f"label_smoothing is in [0, 1], got {self.label_smoothing!r}.")

    def losses(self, output: Tensor, y: Tensor) -> Tensor:
        """The cross-entropy of each sample, (B,).

        Raises:
            BackpassError: the output is not one tensor (B, K).
        """
        return self._of(output, y, "none")

    def __call__(self, model: nn.Module, batch: Batch, plain: Plain) -> Evaluated:
        """The mean cross-entropy of the model on the batch."""
        output = model(batch.x)
        loss = self._of(output, batch.y, "mean")

        def again(model: nn.Module, rows: slice) -> Tensor:
            return self._of(model(batch.x[rows]), batch.y[rows], "mean")

        return Evaluated(loss=loss, correct=correct(output, batch.y), again=again)

    def _of(self, output: Tensor, y: Tensor, reduction: str) -> Tensor:
        if (
            not isinstance(output, Tensor)
            or output.dim() != 2
            or len(output) != len(y)
            or not output.is_floating_point()
        ):
            got = f"{tuple(output.shape)} {output.dtype}" if isinstance(output, Tensor) else type(output).__name__
            raise BackpassError(
                f"cross-entropy needs logits (B, K), got {got} for {len(y)} labels: wrap the model so that it returns "
                "them, or give objective=PerSample(loss) with a loss of your own."
            )
        if y.dim() == 1 and y.dtype not in (torch.int64, torch.uint8):
            raise BackpassError(f"labels are int64 or uint8, got {y.dtype}: convert them (y.long()).")
        try:
            return F.cross_entropy(output, y, reduction=reduction, label_smoothing=self.label_smoothing)
        except IndexError as error:  # of a Dataset labels are not known before
            raise BackpassError(
                f"labels are in 0..{output.shape[1] - 1} for a model of {output.shape[1]} outputs, and these are "
                f"{int(y.min())} to {int(y.max())}: number the classes from 0, or give the model more outputs."
            ) from error
