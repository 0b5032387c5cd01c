"""Errors of a model's first call, and warnings that are given once for each model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from weakref import WeakSet

import torch
from torch import Tensor, nn

from backpass.errors import BackpassError
from backpass.preserved import preserved

__all__ = ["NotFiniteLogitsError", "check_first_logits", "warn_of_batch", "warn_of_flat_loss", "warn_of_model"]

_LOG = logging.getLogger(__name__)
_known: WeakSet[nn.Module] = WeakSet()
_known_with_batch: WeakSet[nn.Module] = WeakSet()
_known_flat: WeakSet[nn.Module] = WeakSet()


class NotFiniteLogitsError(BackpassError):
    """The model's outputs are not finite, so that it has no prediction."""


def check_first_logits(logits: Tensor, y: Tensor) -> None:
    """Check once, as it waits for the device: a prediction for every sample, and enough classes.

    Classes may be excluded by logits of -inf.
    """
    if not bool(logits.amax(1).isfinite().all()):
        raise NotFiniteLogitsError(
            "the model's logits are not finite: its weights hold NaN or inf, or its forward overflows."
        )
    if int(y.max()) >= logits.shape[1]:
        raise BackpassError(
            f"label {int(y.max())} is out of range: the model has {logits.shape[1]} classes, "
            f"0 to {logits.shape[1] - 1}."
        )


def warn_of_model(model: nn.Module, logits: Tensor) -> None:
    """Warn where outputs look like probabilities, or the model switches itself to training mode."""
    if model in _known:
        return
    _known.add(model)
    if bool(((logits >= 0).all(1) & ((logits.sum(1) - 1).abs() < 1e-4)).all()):
        _LOG.warning(
            "the model's outputs look like probabilities (non-negative, summing to 1): attacks expect logits, and a "
            "softmax hides their gradient. Return the logits, or select them with logits=."
        )
    if any(getattr(module, "training", False) for module in model.modules()):
        _LOG.warning(
            "the model switches itself to training mode in its forward pass, so that dropout and batch statistics act "
            "during the attack. Remove the call of train() from its forward."
        )


def warn_of_batch(model: nn.Module, call: Callable[[Tensor], Tensor], z: Tensor, logits: Tensor) -> None:
    """Warn where the answer to a sample depends on the other samples of its batch, or on chance.

    Args:
        model: that was called.
        call: maps images (B, ...) to its logits (B, C), in full precision.
        z: (B, ...).
        logits: (B, C), its answer to z.
    """
    if len(z) < 2 or model in _known_with_batch:
        return
    _known_with_batch.add(model)
    with preserved(model), torch.no_grad():
        scale = float(logits[0].nan_to_num(0.0, 0.0, 0.0).abs().amax())
        copies = z[:1].expand_as(z).clone(memory_format=torch.preserve_format)
        if not _differ(call(copies)[0], logits[0], 1e-2 * scale):
            return
        again = call(z.clone())
        random = _differ(call(z.clone()), again, 1e-3 * scale)
        if not random and _differ(again, logits, 1e-3 * scale):
            return  # in another precision
    _LOG.warning(
        "the model's answers to the same images differ from call to call (dropout, noise?), so that a success is one "
        "draw. Average over draws with eot=20, or use AutoAttack(version='rand')."
        if random
        else "the model's answer to a sample depends on the other samples of its batch (batch statistics?), so that "
        "success depends on batch_size. Give the model running statistics, or attack single samples with batch_size=1."
    )


def warn_of_flat_loss(model: nn.Module, gradient: Tensor) -> None:
    """Warn where the gradient (B, ...) of at least half of the samples is 0."""
    flat = int((~gradient.flatten(1).any(1)).sum())
    if 2 * flat < len(gradient) or model in _known_flat:
        return
    _known_flat.add(model)
    _LOG.warning(
        "the loss has no gradient at %d of %d images: a saturated softmax, rounding or a dead layer hides it, and "
        "robustness is overestimated. Try loss='margin', or Square, which needs no gradient.",
        flat,
        len(gradient),
    )


def _differ(one: Tensor, other: Tensor, tolerance: float) -> bool:
    return float((one.to(other.dtype) - other).nan_to_num(0.0, 0.0, 0.0).abs().amax()) > tolerance
