"""Robust accuracy during training, and detection of catastrophic overfitting."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from backpass.attacks import Attack
from backpass.attacks.first_look import NotFiniteLogitsError
from backpass.errors import BackpassError
from backpass.numbers import is_number, is_whole
from backpass.preserved import preserved
from backpass.training.processes import local_model

__all__ = ["RobustEvaluation"]

logger = logging.getLogger(__name__)

_CLEARLY = 0.2  # minimum gap: a network without any robustness has not collapsed


@dataclass(frozen=True)
class RobustEvaluation:
    """Measure the accuracy of a model under an attack, for ``Trainer(robust=...)``.

    Catastrophic overfitting (Wong, Rice, Kolter, Fast is better than free, 2020): with a weak inner maximiser, say one
    step of FGSM, the accuracy under it suddenly rises while that under several steps goes to 0. With a
    training attack, both are measured on the same images. Overfitting is reported if the accuracy under the attack is
    less than ``collapse`` times that under the training attack, and at least 0.2 below it.

    Args:
        attack: attack of several steps, stronger than the one in training.
        images: number of images, the first of the evaluation set; None for all.
        training_attack: attack that the network trains with; None for no check.
        collapse: part in (0, 1) of the accuracy under the training attack.
        stop: end the run on catastrophic overfitting; a warning is logged in any case.
        batch_size: images attacked at a time.

    Raises:
        BackpassError: a setting is out of its range.
    """

    attack: Attack
    images: int | None = field(default=500, kw_only=True)
    training_attack: Attack | None = field(default=None, kw_only=True)
    collapse: float = field(default=0.5, kw_only=True)
    stop: bool = field(default=False, kw_only=True)
    batch_size: int = field(default=256, kw_only=True)

    def __post_init__(self) -> None:
        given = (self.attack,) if self.training_attack is None else (self.attack, self.training_attack)
        for attack in given:
            if not isinstance(attack, Attack) or attack.targeted:
                raise BackpassError(
                    f"robustness is judged by an untargeted attack such as PGD(eps=8/255); got {attack!r}."
                )
        for name, expected, right in (
            ("images", "a whole number of at least 1, or None", self.images is None or is_whole(self.images, 1)),
            ("batch_size", "a whole number of at least 1", is_whole(self.batch_size, 1)),
            ("collapse", "a part in (0, 1)", is_number(self.collapse) and 0 < self.collapse < 1),
            ("stop", "True or False", isinstance(self.stop, bool)),
        ):
            if not right:
                raise BackpassError(f"{name} must be {expected}; got {getattr(self, name)!r}.")

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
        """Return the metrics of a model on the first images.

        Args:
            model: the network; rules attached to it act on the attack's gradients.
            x: (N, ...) in the attack's bounds.
            y: (N,).

        Returns:
            ``robust_accuracy``; and with a training attack ``training_attack_accuracy`` and
            ``catastrophic_overfitting``, 1 or 0.
        """
        x, y = x[: self.images], y[: self.images]
        x = x.float() / 255 if x.dtype == torch.uint8 else x
        robust = self._accuracy(self.attack, local_model(model), x, y)
        if self.training_attack is None:
            return {"robust_accuracy": robust}
        trained = self._accuracy(self.training_attack, local_model(model), x, y)
        collapsed = robust < min(self.collapse * trained, trained - _CLEARLY)
        if collapsed:
            logger.warning("%s", _explain(robust, trained))
        return {
            "robust_accuracy": robust,
            "training_attack_accuracy": trained,
            "catastrophic_overfitting": float(collapsed),
        }

    def reason_to_stop(self, metrics: Mapping[str, float]) -> str | None:
        """Return the reason for which a run with these metrics should end, or None."""
        if not (self.stop and metrics.get("catastrophic_overfitting")):
            return None
        return _explain(metrics["robust_accuracy"], metrics["training_attack_accuracy"])

    def _accuracy(self, attack: Attack, model: nn.Module, x: Tensor, y: Tensor) -> float:
        """Return the fraction of samples that are correct on x and under the attack."""
        standing = 0
        try:
            for rows in torch.split(torch.arange(len(y), device=y.device), self.batch_size):
                with preserved(model), torch.no_grad():
                    right = rows[attack.make_oracle(model).plain(x[rows], y[rows]).argmax(1) == y[rows]]
                if len(right):
                    standing += int((~attack(model, x[right], y[right], indices=right).success).sum())
        except NotFiniteLogitsError:
            return 0.0  # a diverged network has accuracy 0
        return standing / len(y)


def _explain(robust: float, trained: float) -> str:
    return (
        f"catastrophic overfitting: the network has {trained:.1%} right under the attack that it trains with, and "
        f"{robust:.1%} under a stronger one. Train with more steps, a smaller step or eps, or a longer warmup, from "
        "weights of an earlier epoch."
    )
