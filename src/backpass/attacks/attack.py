"""What every attack shares: its settings, the checks, the guard, restarts and the verdict."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from backpass.attacks.checks import check_images, check_labels, check_model, check_radius
from backpass.attacks.losses import Loss, make_objective
from backpass.attacks.oracle import LogitsSelector, Oracle
from backpass.attacks.restarts import Best
from backpass.attacks.result import Result
from backpass.attacks.threat import make_threat
from backpass.errors import BackpassError
from backpass.preserved import preserved

__all__ = ["Attack"]


@dataclass(frozen=True, kw_only=True)
class Attack(ABC):
    """An attack is its settings; calling it searches for x_adv, ||x_adv - x|| <= eps, that the model mistakes.

    The model is evaluated in eval mode and left as it was found. It is called as it stands, so that a rule attached
    to it acts on the gradients. The random draws of a sample come from (seed, its index, restart) alone.

    Args:
        eps: radius of the ball, in the units of x, at least 0.
        norm: ``"linf"`` or ``"l2"``.
        loss: what to raise: ``"ce"``, ``"dlr"``, ``"margin"``, or a callable (logits (N, C), y (N,)) -> (N,).
        targeted: y is the class to lead each sample to; the loss is then lowered.
        bounds: (lo, hi), the valid pixel range.
        seed: of all random draws.
        early_stop: a fooled sample leaves the batch, and restarts run on the others only. If False, every sample
            has every step of every restart, and the success of the largest loss is returned.
        dtype: search under autocast to this type; the verdict stays in full precision.
        eot: forward passes over which gradients are averaged; a success must then hold in each of `eot` more.
        logits: where the logits are in the model's output: a key, an index, or a function of it.

    Attributes:
        uses_gradients: whether a rule attached to the model can make a difference.

    Raises:
        BackpassError: a setting is out of range.
        UnknownNameError: no norm or loss has this name.
    """

    uses_gradients: ClassVar[bool] = True

    eps: float = 8 / 255
    norm: str = "linf"
    loss: str | Loss = "ce"
    targeted: bool = False
    bounds: tuple[float, float] = (0.0, 1.0)
    seed: int = 0
    early_stop: bool = True
    dtype: torch.dtype | None = None
    eot: int = 1
    logits: LogitsSelector = None

    def __post_init__(self) -> None:
        """Refuses settings that cannot be meant."""
        make_threat(self.norm, self.eps, self.bounds)
        make_objective(self.loss, self.targeted)
        check_radius("eps", self.eps, self.norm, self.bounds)
        if self.eot < 1:
            raise BackpassError(f"eot must be at least 1, the number of draws to average over; got {self.eot}.")
        if self.dtype not in (None, torch.bfloat16, torch.float16):
            raise BackpassError(f"dtype must be torch.bfloat16, torch.float16 or None; got {self.dtype}.")

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, *, indices: Tensor | None = None, batch_size: int | None = None
    ) -> Result:
        """Attacks a batch.

        Args:
            model: maps (N, ...) to logits (N, C).
            x: (N, ...) float32 or float64 in [lo, hi].
            y: (N,) integer labels; where `targeted`, the classes to reach.
            indices: (N,) integers that name the samples' random draws, for instance their places in the data set;
                0, 1, ... by default.
            batch_size: the most samples to search at a time; all by default. The answer does not depend on it.

        Returns:
            The images and the plain model's verdict on them.

        Raises:
            BackpassError: x, y, indices or model cannot be meant; the message says what to do.
        """
        check_images(x, self.bounds)
        check_labels(x, y)
        check_model(model, x)
        if indices is not None:
            check_labels(x, indices, "indices")
        if batch_size is not None and batch_size < 1:
            raise BackpassError(f"batch_size must be at least 1; got {batch_size}.")
        capacity = batch_size or len(x)
        with preserved(model):
            # A clone made here is an ordinary tensor, even if the caller is under inference_mode.
            x = (x.clone() if x.is_inference() else x).detach()
            y = y.clone().long()
            index = torch.arange(len(x), device=x.device) if indices is None else indices.clone().long()
            oracle = self.ask(model)
            parts = []
            for rows in torch.split(torch.arange(len(x), device=x.device), capacity):
                whole = len(rows) == len(x)
                batch = (x, y, index) if whole else (x[rows], y[rows], index[rows])
                parts.append(self._attack(oracle, *batch, capacity))
        best = parts[0] if len(parts) == 1 else Best.concatenate(parts)
        return Result(
            x_adv=best.z,
            success=best.verdict.success,
            loss=-best.verdict.value if self.targeted else best.verdict.value,
            prediction=best.verdict.prediction,
            gradients=oracle.gradients,
            forwards=oracle.forwards,
            halvings=best.halvings,
        )

    def ask(self, model: nn.Module) -> Oracle:
        """The model as this attack sees it."""
        return Oracle(
            model,
            make_objective(self.loss, self.targeted),
            make_threat(self.norm, self.eps, self.bounds),
            targeted=self.targeted,
            logits=self.logits,
            eot=self.eot,
            dtype=self.dtype,
        )

    @abstractmethod
    def _attack(self, oracle: Oracle, x: Tensor, y: Tensor, index: Tensor, capacity: int) -> Best:
        """The best images for one batch x (N, ...), y (N,), N <= capacity; index: (N,) names the random draws."""
