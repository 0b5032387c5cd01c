"""Losses of the logits, one value per sample, which an attack raises (or lowers, where it is targeted)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from backpass.errors import BackpassError, UnknownNameError

__all__ = ["LOSSES", "Loss", "ce", "dlr", "dlr_targeted", "make_objective", "margin"]

Loss = Callable[[Tensor, Tensor], Tensor]
Objective = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def _at(logits: Tensor, label: Tensor) -> Tensor:
    return logits.gather(1, label[:, None]).squeeze(1)


def _largest_other(logits: Tensor, label: Tensor) -> Tensor:
    """max_{j != label} z_j."""
    return logits.scatter(1, label[:, None], -torch.inf).amax(1)


def _present(logits: Tensor) -> Tensor:
    """Excluded classes, whose logits are -inf, get the least of the other logits."""
    excluded = logits.isneginf()
    if not bool(excluded.any()):
        return logits
    least = logits.masked_fill(excluded, torch.inf).amin(1, keepdim=True)
    return torch.where(excluded, least, logits)


def ce(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy, log sum_j exp z_j - z_y; logits: (N, C), y: (N,) -> (N,)."""
    return F.cross_entropy(logits, y, reduction="none")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """max_{j != y} z_j - z_y, positive exactly where the prediction is not y; (N, C), (N,) -> (N,).

    Source: Carlini and Wagner (2017), section V.A.
    """
    return _largest_other(logits, y) - _at(logits, y)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio, (max_{j != y} z_j - z_y) / (z_(1) - z_(3)); (N, C), (N,) -> (N,).

    z_(k) is the k-th largest logit. Invariant to the shift and the scale of the logits.
    Source: Croce and Hein (2020), section 4, equation (6).

    Raises:
        BackpassError: fewer than three classes.
    """
    _need_classes(logits, 3, "dlr")
    top = _present(logits).topk(3, dim=1).values
    return margin(logits, y) / (top[:, 0] - top[:, 2] + 1e-12)


def dlr_targeted(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """(z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2); logits: (N, C), y and target: (N,) -> (N,).

    Source: Croce and Hein (2020), section 4, equation (7).

    Raises:
        BackpassError: fewer than four classes.
    """
    _need_classes(logits, 4, "dlr-targeted")
    top = _present(logits).topk(4, dim=1).values
    return (_at(logits, target) - _at(logits, y)) / (top[:, 0] - 0.5 * (top[:, 2] + top[:, 3]) + 1e-12)


LOSSES: dict[str, Loss] = {"ce": ce, "dlr": dlr, "margin": margin}


def _need_classes(logits: Tensor, least: int, name: str) -> None:
    if logits.shape[1] < least:
        raise BackpassError(
            f"loss {name!r} needs at least {least} classes; the model has {logits.shape[1]}. Use 'ce' or 'margin'."
        )


def make_objective(loss: str | Loss, targeted: bool) -> Objective:
    """Return the function (logits, y, target) -> (N,) that an attack raises.

    Args:
        loss: a name in `LOSSES`, ``"dlr-targeted"``, or a callable (logits (N, C), y (N,)) -> (N,).
        targeted: y is the class to lead the sample to, so that the loss is lowered.

    Raises:
        UnknownNameError: no loss has this name.
        BackpassError: the callable does not return one value per sample.
    """
    if loss == "dlr-targeted":
        return _dlr_towards
    if not isinstance(loss, str) and not callable(loss):
        raise BackpassError(f"loss must be a name or a function (logits, y) -> (N,); got {loss!r}.")
    if isinstance(loss, str) and loss not in LOSSES:
        raise UnknownNameError("loss", loss, [*LOSSES, "dlr-targeted"])
    function = LOSSES[loss] if isinstance(loss, str) else loss
    sign = -1.0 if targeted else 1.0

    def objective(logits: Tensor, y: Tensor, target: Tensor | None) -> Tensor:
        value = function(logits, y)
        if value.shape != y.shape:
            raise BackpassError(
                f"the loss must return one value per sample, shape {tuple(y.shape)}; got {tuple(value.shape)}. "
                "Use reduction='none', or sum over all but the first dimension."
            )
        return sign * value

    return objective


def _dlr_towards(logits: Tensor, y: Tensor, target: Tensor | None) -> Tensor:
    if target is None:
        raise BackpassError("loss 'dlr-targeted' needs target classes: use it in APGD, which chooses them.")
    return dlr_targeted(logits, y, target)
