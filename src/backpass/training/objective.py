"""Training objectives, and their values on a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpass.attacks.oracle import LogitsSelector
from backpass.errors import BackpassError
from backpass.numbers import is_number
from backpass.training.batches import Batch, chosen, forward

__all__ = [
    "BinaryCrossEntropy",
    "CrossEntropy",
    "Evaluated",
    "Loss",
    "Objective",
    "PerSample",
    "Plain",
    "correct",
    "select",
]

Loss = Callable[[Any, Tensor], Tensor]
"""A loss per sample: (output, y) -> (B,)."""

_NO_LABEL = -(2**31)  # torch would leave samples of label -100 out without a word

Plain = Callable[[], AbstractContextManager[object]]
"""Return a context in which the trainer's rules are suspended, so that the backward pass is plain."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluated:
    """Value of an objective on one batch.

    Attributes:
        loss: scalar with graph, the mean over the batch. The trainer differentiates it.
        correct: (B,) bool, where the prediction is the label; None without classification.
        metrics: further scalars to log, each a mean over the batch, detached.
        again: ``again(model, rows)`` evaluates the loss once more on some rows of the batch, with graph. Adversarial
            examples and other draws stay fixed. None if the objective does not support this.
        moves: True if its adversarial examples depend smoothly on the parameters, so that the second derivative of
            ``again`` is not the derivative of the training gradient. False for sign steps.
    """

    loss: Tensor
    correct: Tensor | None = None
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    again: Callable[[nn.Module, slice], Tensor] | None = None
    moves: bool = False


class Objective(Protocol):
    """Function of the model and a batch that a training step minimises.

    Optional methods, used where they exist:

    - ``state_dict()`` and ``load_state_dict(state)``: saved in checkpoints; tensors, numbers, strings, lists, dicts.
    - ``losses(output, y) -> (B,)``: loss of the evaluation set; without it, cross-entropy.
    - ``correct(output, y) -> (B,) bool or None``: accuracy of the evaluation set; without it, that of `correct`.
    - ``evaluation``: another objective, whose ``losses``, ``correct`` and ``logits`` are those of the evaluation set.
    - ``check_targets(y, output, where)``: raise a `BackpassError` where the targets y (N, ...) do not fit the output
      of two samples, before the first step.
    """

    def __call__(self, model: nn.Module, batch: Batch, plain: Plain) -> Evaluated:
        """Evaluate the objective with graph.

        Args:
            model: in training mode. With several processes it is a ``DistributedDataParallel``: only the forward pass
                that leads to ``loss`` may go through it; use ``model.module`` for all others.
            batch: this process's part of the batch, prepared, on the model's device.
            plain: returns a context without the trainer's rules.
        """
        ...


def select(output: Any, logits: LogitsSelector) -> Any:
    """Return the logits of a model's output: the output, an item by key or index, an attribute, or a function of it.

    Raises:
        BackpassError: the output has no such item.
    """
    if logits is None:
        return output
    if callable(logits):
        return logits(output)
    try:
        if isinstance(logits, str) and not isinstance(output, Mapping) and hasattr(output, logits):
            return getattr(output, logits)
        return output[logits]
    except (KeyError, IndexError, TypeError) as error:
        raise BackpassError(f"logits={logits!r} selects nothing in the model's output, {_kind(output)}.") from error


def correct(output: Any, y: Tensor) -> Tensor | None:
    """Compare the largest of (B, K) outputs, K >= 2, with labels (B,): (B,) bool; None for other shapes or types."""
    if not isinstance(output, Tensor) or output.dim() != 2 or output.shape[1] < 2:
        return None
    if y.dim() != 1 or y.is_floating_point():
        return None
    return output.detach().argmax(1) == y


class _OfOutput:
    """Mean over the batch of a loss of the model's output and the targets."""

    def losses(self, output: Any, y: Tensor) -> Tensor:
        raise NotImplementedError

    def correct(self, output: Any, y: Tensor) -> Tensor | None:
        """Compare predictions with labels, (B,) bool; None without classification."""
        return correct(output, y)

    def mean(self, output: Any, y: Tensor) -> Tensor:
        """Return the mean loss, a scalar."""
        return self.losses(output, y).mean()

    def __call__(self, model: nn.Module, batch: Batch, plain: Plain) -> Evaluated:
        """Evaluate the mean loss on the batch."""
        output = forward(model, batch.x)

        def again(model: nn.Module, rows: slice) -> Tensor:
            return self.mean(forward(model, chosen(batch.x, rows)), batch.y[rows])

        return Evaluated(loss=self.mean(output, batch.y), correct=self.correct(output, batch.y), again=again)


@dataclass(frozen=True)
class PerSample(_OfOutput):
    """Mean of a loss per sample, L = 1/B sum_i loss(f(x_i), y_i).

    Args:
        loss: (output, y) -> (B,), for instance ``lambda output, y: (output - y).square().mean(1)``. It receives
            the unmodified output of the model, which may be a dict.
    """

    loss: Loss

    def losses(self, output: Any, y: Tensor) -> Tensor:
        """Return the loss of each sample, (B,).

        Raises:
            BackpassError: the loss is not one number per sample.
        """
        losses = self.loss(output, y)
        if losses.shape != y.shape[:1]:
            raise BackpassError(
                f"the loss must return one number per sample, shape {tuple(y.shape[:1])}; got {tuple(losses.shape)}: "
                "use reduction='none', and take the mean over everything but the first dimension."
            )
        return losses


@dataclass(frozen=True, kw_only=True)
class CrossEntropy(_OfOutput):
    """Mean cross-entropy of logits (B, K) and labels (B,) in 0..K-1, or probabilities (B, K).

    Args:
        label_smoothing: part of the target that is spread evenly over all classes, in [0, 1].
        mixup: alpha >= 0 of mixup. Inputs and targets of each batch are mixed with a permutation of themselves,
            x <- w x + (1 - w) x', with w from Beta(alpha, alpha). 0 disables mixup.
        logits: where the logits are in the model's output: a key, an attribute, an index, or a function of it.

    Raises:
        BackpassError: a setting is out of its range.

    Source: Zhang, Cisse, Dauphin, Lopez-Paz, mixup: beyond empirical risk minimization (2018), equation (1).
    """

    label_smoothing: float = 0.0
    mixup: float = 0.0
    logits: LogitsSelector = None

    def __post_init__(self) -> None:
        if not (is_number(self.label_smoothing) and 0 <= self.label_smoothing <= 1):
            raise BackpassError(f"label_smoothing must be in [0, 1], got {self.label_smoothing!r}.")
        if not (is_number(self.mixup) and self.mixup >= 0):
            raise BackpassError(f"mixup must be a number alpha of at least 0, such as 0.2; got {self.mixup!r}.")

    def losses(self, output: Any, y: Tensor) -> Tensor:
        """Return the cross-entropy of each sample, (B,).

        Raises:
            BackpassError: the output is not one tensor (B, K), or the targets do not fit.
        """
        return self.with_logits(select(output, self.logits), y, "none")

    def mean(self, output: Any, y: Tensor) -> Tensor:
        """Return the mean cross-entropy, a scalar."""
        return self.with_logits(select(output, self.logits), y, "mean")

    def correct(self, output: Any, y: Tensor) -> Tensor | None:
        """Compare predictions with labels, (B,) bool; None for probabilities."""
        return correct(select(output, self.logits), y)

    def check_targets(self, y: Tensor, output: Any, where: str) -> None:
        """Compare all targets with the output's number of classes.

        Raises:
            BackpassError: they do not fit.
        """
        soft = y.dim() == 2 and y.is_floating_point()
        if not soft and (y.dim() != 1 or y.dtype not in (torch.int64, torch.uint8)):
            raise BackpassError(
                f"labels{where} are integers of shape (N,), int64 or uint8, or probabilities (N, K); got {y.dtype} "
                f"{tuple(y.shape)}: convert them (y.long()), or give objective=BinaryCrossEntropy() or PerSample(loss) "
                "for targets of another kind."
            )
        chosen = select(output, self.logits)
        if not isinstance(chosen, Tensor) or chosen.dim() != 2:
            return  # reported with the shapes of the first step
        classes = chosen.shape[1]
        if classes == 1:
            raise BackpassError(
                "the model has one output, and the cross-entropy of one class is always 0: give "
                "objective=BinaryCrossEntropy() for a binary classifier, or PerSample(loss)."
            )
        if soft:
            if y.shape[1] != classes or bool((y < 0).any()) or bool(((y.sum(1) - 1).abs() > 1e-3).any()):
                raise BackpassError(
                    f"probabilities{where} must be at least 0, of shape (N, {classes}), with rows that sum to 1."
                )
            return
        if int(y.min()) < 0 or int(y.max()) >= classes:
            raise _out_of_range(y, classes, where)

    def __call__(self, model: nn.Module, batch: Batch, plain: Plain) -> Evaluated:
        """Evaluate the mean cross-entropy on the batch, or on its mixture."""
        if not self.mixup:
            return super().__call__(model, batch, plain)
        if not isinstance(batch.x, Tensor) or not batch.x.is_floating_point():
            raise BackpassError("mixup mixes images or other floats, and these inputs are none: leave mixup out.")
        weight = float(torch.distributions.Beta(self.mixup, self.mixup).sample())
        other = torch.randperm(len(batch)).to(batch.x.device)
        x, y, partner = torch.lerp(batch.x[other], batch.x, weight), batch.y, batch.y[other]

        def again(model: nn.Module, rows: slice) -> Tensor:
            output = model(x[rows])
            return weight * self.mean(output, y[rows]) + (1 - weight) * self.mean(output, partner[rows])

        return Evaluated(loss=again(model, slice(None)), again=again)

    def with_logits(self, output: Any, y: Tensor, reduction: str) -> Tensor:
        """Return the cross-entropy of logits (B, K) that are selected already: (B,) for ``none``, or its ``mean``."""
        if (
            not isinstance(output, Tensor)
            or output.dim() != 2
            or len(output) != len(y)
            or not output.is_floating_point()
        ):
            advice = (
                "return them from the model, or give objective=PerSample(loss)"
                if isinstance(output, Tensor)
                else "select them by objective=CrossEntropy(logits=...), a key, an index or a function of the output"
            )
            raise BackpassError(
                f"cross-entropy needs logits (B, K), got {_kind(output)} for {len(y)} labels: {advice}."
            )
        if y.dim() == 1 and y.dtype not in (torch.int64, torch.uint8):
            raise BackpassError(f"labels are int64 or uint8, got {y.dtype}: convert them (y.long()).")
        try:
            return F.cross_entropy(
                output, y, reduction=reduction, label_smoothing=self.label_smoothing, ignore_index=_NO_LABEL
            )
        except IndexError as error:  # labels of a Dataset are not validated beforehand
            raise _out_of_range(y, output.shape[1], "") from error


@dataclass(frozen=True, kw_only=True)
class BinaryCrossEntropy(_OfOutput):
    """Mean binary cross-entropy of logits and targets in [0, 1], for binary and multi-label classifiers.

    The logits are (B,), (B, 1), or (B, K) for K labels that do not exclude each other; the loss of a sample is the
    mean over its labels. With one logit, the prediction is 1 where the logit is above 0; with several, no accuracy is
    reported: give ``Trainer(metrics=...)``.

    Args:
        logits: where the logits are in the model's output: a key, an attribute, an index, or a function of it.
    """

    logits: LogitsSelector = None

    def losses(self, output: Any, y: Tensor) -> Tensor:
        """Return the loss of each sample, (B,).

        Raises:
            BackpassError: the shapes differ.
        """
        z, targets = self._aligned(output, y)
        return F.binary_cross_entropy_with_logits(z, targets.to(z.dtype), reduction="none").flatten(1).mean(1)

    def correct(self, output: Any, y: Tensor) -> Tensor | None:
        """Compare predictions with labels, (B,) bool; None for several labels per sample."""
        z, targets = self._aligned(output, y)
        return None if z.shape[1] > 1 else ((z > 0) == (targets > 0.5)).squeeze(1)

    def check_targets(self, y: Tensor, output: Any, where: str) -> None:
        """Compare all targets with the output's shape.

        Raises:
            BackpassError: they do not fit.
        """
        self._aligned(output, y[:2], where)
        if bool((y < 0).any()) or bool((y > 1).any()):
            raise BackpassError(f"targets{where} must be in [0, 1], and these are {y.min():g} to {y.max():g}.")

    def _aligned(self, output: Any, y: Tensor, where: str = "") -> tuple[Tensor, Tensor]:
        """Return logits and targets as (B, K)."""
        z = select(output, self.logits)
        if isinstance(z, Tensor) and z.dim() == 1:
            z = z[:, None]
        targets = y[:, None] if y.dim() == 1 else y
        if not isinstance(z, Tensor) or z.dim() != 2 or z.shape != targets.shape:
            raise BackpassError(
                f"binary cross-entropy needs as many logits as targets{where}, got {_kind(z)} and {tuple(y.shape)}: "
                "give one logit per label, and select them by logits=... where the output is no tensor."
            )
        return z, targets


def _out_of_range(y: Tensor, classes: int, where: str) -> BackpassError:
    return BackpassError(
        f"labels{where} are in 0..{classes - 1} for a model of {classes} outputs, and these are {int(y.min())} to "
        f"{int(y.max())}: number the classes from 0, or give the model more outputs."
    )


def _kind(output: object) -> str:
    if isinstance(output, Tensor):
        return f"{tuple(output.shape)} {output.dtype}"
    keys = f" with keys {sorted(map(str, output))}" if isinstance(output, Mapping) else ""
    return f"{type(output).__name__}{keys}"
