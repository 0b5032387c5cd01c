"""Base class of all attacks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from backpass.attacks.checks import check_images, check_labels, check_mask, check_model
from backpass.attacks.jobs import Jobs
from backpass.attacks.losses import Loss, make_objective
from backpass.attacks.oracle import LogitsSelector, Oracle
from backpass.attacks.restarts import Best
from backpass.attacks.result import Result
from backpass.attacks.settings import check_count, check_settings, count, normalised_bounds, normalised_eps
from backpass.attacks.threat import Bounds, Threat, make_threat
from backpass.errors import BackpassError
from backpass.preserved import preserved

__all__ = ["Attack"]


@dataclass(frozen=True, kw_only=True)
class Attack(ABC):
    """Settings of an attack; a call searches for x_adv, ||x_adv - x|| <= eps, that the model misclassifies.

    The model is evaluated in eval mode and restored. It is called as it stands, so that a rule attached to it acts on
    the gradients. The random draws of a sample come from (seed, its index, restart) alone.

    Args:
        eps: radius of the ball, in the units of x, at least 0; a sequence or a tensor (N,) has a radius for each
            index of a sample.
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        loss: loss to raise: ``"ce"``, ``"dlr"``, ``"margin"``, or a callable (logits (N, C), y (N,)) -> (N,).
        targeted: y is the class to lead each sample to; the loss is then lowered.
        bounds: (lo, hi), the valid pixel range; each a number, or one number per channel.
        seed: seed of all random draws.
        early_stop: remove a fooled sample from the batch, and run restarts on the others only. If False, every sample
            has every step of every restart, and the success of the largest loss is returned.
        dtype: search under autocast to this type; the verdict stays in full precision.
        eot: forward passes over which gradients are averaged; a success must then hold in each of `eot` more.
        logits: place of the logits in the model's output: a key, an index, or a function of it.

    Attributes:
        uses_gradients: whether a rule attached to the model can make a difference.

    Raises:
        BackpassError: a setting is out of range or of a wrong type.
        UnknownNameError: no norm or loss has this name.
    """

    uses_gradients: ClassVar[bool] = True
    minimum_norm: ClassVar[bool] = False  # searches for the nearest image, of which eps is no part

    eps: float | tuple[float, ...] = 8 / 255
    norm: str = "linf"
    loss: str | Loss = "ce"
    targeted: bool = False
    bounds: Bounds = (0.0, 1.0)
    seed: int = 0
    early_stop: bool = True
    dtype: torch.dtype | None = None
    eot: int = count(1)
    logits: LogitsSelector = None

    def __post_init__(self) -> None:
        """Validate the settings."""
        # A tensor can be neither compared nor hashed; settings are both.
        bounds = normalised_bounds(self.bounds)
        object.__setattr__(self, "bounds", bounds)
        make_threat(self.norm, 0.0, bounds)
        eps = normalised_eps(self.eps, self.norm, bounds, infinite=self.minimum_norm)
        object.__setattr__(self, "eps", eps)
        check_settings(self)
        make_objective(self.loss, self.targeted)
        if self.dtype not in (None, torch.bfloat16, torch.float16):
            raise BackpassError(f"dtype must be torch.bfloat16, torch.float16 or None; got {self.dtype}.")

    @property
    def largest_eps(self) -> float:
        """The radius, or the largest of them."""
        return max(self.eps) if isinstance(self.eps, tuple) else self.eps

    def threat(self, index: Tensor, mask: Tensor | None = None) -> Threat:
        """Return the threat model of samples with these indices (N,); mask: (N, ...) bool or None.

        Raises:
            BackpassError: an index has no radius.
        """
        if not isinstance(self.eps, tuple):
            return make_threat(self.norm, self.eps, self.bounds, mask)
        if int(index.max()) >= len(self.eps):
            raise BackpassError(
                f"eps has {len(self.eps)} radii, one for each index of a sample; got index {int(index.max())}. "
                "Give as many radii as there are samples."
            )
        radii = torch.tensor(self.eps, dtype=torch.float64, device=index.device)[index]
        return make_threat(self.norm, radii, self.bounds, mask)

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        indices: Tensor | None = None,
        batch_size: int | None = None,
        mask: Tensor | None = None,
        start: Tensor | None = None,
    ) -> Result:
        """Attack a batch.

        Args:
            model: maps (N, ...) to logits (N, C).
            x: (N, ...) float32 or float64 in [lo, hi].
            y: (N,) integer labels; where `targeted`, the classes to reach.
            indices: (N,) integers that name the samples' random draws and radii, for instance their places in the
                data set; 0, 1, ... by default.
            batch_size: the most samples to search at a time; all by default. The answer does not depend on it.
            mask: bool, of a shape that broadcasts to x: the entries that may change, as for a patch.
            start: (N, ...) images at which the first restart begins, in place of the attack's own start.

        Returns:
            The images and the plain model's verdict on them.

        Raises:
            BackpassError: x, y, indices, mask, start or model is invalid; the message says what to do.
        """
        with self.prepared(model, x, y, indices=indices, batch_size=batch_size, mask=mask, start=start) as found:
            oracle, whole, capacity = found
            y = whole.y
            parts = [self._attack(oracle, whole.at(some), capacity) for some in torch.split(whole.row, capacity)]
            best = parts[0] if len(parts) == 1 else Best.concatenate(parts)
            fooled = (best.verdict.prediction == y) == self.targeted
            distance = torch.where(fooled, whole.threat.size(best.z.double() - whole.x.double()), torch.inf)
            if self.minimum_norm:
                distance = -best.score
        return Result(
            x_adv=best.z,
            ahead=best.ahead,
            success=best.verdict.success,
            loss=-best.verdict.value if self.targeted else best.verdict.value,
            prediction=best.verdict.prediction,
            distance=distance,
            gradients=oracle.gradients,
            forwards=oracle.forwards,
            halvings=best.record,
        )

    @contextmanager
    def prepared(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        indices: Tensor | None = None,
        batch_size: int | None = None,
        mask: Tensor | None = None,
        start: Tensor | None = None,
    ) -> Iterator[tuple[Oracle, Jobs, int]]:
        """Check a call's arguments, and put the model into the state in which it is attacked.

        Yields:
            The model's oracle, the samples, and the most of them to search at a time.

        Raises:
            BackpassError: as a call does.
        """
        check_model(model)
        check_images(x, self.bounds)
        check_labels(x, y)
        check_model(model, x)
        if indices is not None:
            check_labels(x, indices, "indices")
        elif isinstance(self.eps, tuple) and len(self.eps) != len(x):
            raise BackpassError(f"eps has {len(self.eps)} radii for {len(x)} samples: give one for each, or indices=.")
        if batch_size is not None:
            check_count("batch_size", batch_size)
        if start is not None and (not isinstance(start, Tensor) or start.shape != x.shape or start.dtype != x.dtype):
            raise BackpassError("start must be images of x's shape and dtype.")
        mask = check_mask(mask, x)
        capacity = min(batch_size or len(x), len(x))
        with preserved(model):
            # A clone made here is an ordinary tensor, even if the caller is under inference_mode.
            x = (x.clone() if x.is_inference() else x).detach()
            y = y.clone().long()
            row = torch.arange(len(x), device=x.device)
            index = row if indices is None else indices.clone().long()
            start = None if start is None else start.detach().clone()
            jobs = Jobs(x, y, index, row, torch.zeros_like(row), self.threat(index, mask), start=start)
            yield self.make_oracle(model), jobs, capacity

    def make_oracle(self, model: nn.Module) -> Oracle:
        """Return the model with the queries that this attack makes."""
        return Oracle(
            model,
            make_objective(self.loss, self.targeted),
            make_threat(self.norm, 0.0, self.bounds),
            targeted=self.targeted,
            logits=self.logits,
            eot=self.eot,
            dtype=self.dtype,
        )

    @abstractmethod
    def _attack(self, oracle: Oracle, jobs: Jobs, capacity: int) -> Best:
        """Return the best images for a batch of at most `capacity` samples, whose restart is 0."""
