"""One optimizer step: forward, backward, clipping or normalization, step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from backpass.errors import BackpassError
from backpass.rules import Attached
from backpass.training.batches import Batch
from backpass.training.half_batches import Measuring, halves
from backpass.training.meter import Meter
from backpass.training.objective import Evaluated
from backpass.training.processes import unsynchronized, whole, world
from backpass.training.settings import precision

if TYPE_CHECKING:
    from backpass.training.trainer import Trainer

__all__ = ["Update"]


class Update:
    """Optimizer steps of a run.

    Args:
        settings: settings of the run.
        model: the model with its wrappers.
        attached: rules in force.
        meter: collects each step's numbers.
    """

    def __init__(self, settings: Trainer, model: nn.Module, attached: Sequence[Attached], meter: Meter) -> None:
        self._settings, self._model, self._attached, self._meter = settings, model, attached, meter
        self._optimizer, self._objective = settings.optimizer, settings.objective
        self._weights = [p for group in settings.optimizer.param_groups for p in group["params"]]
        self._kind, self._processes = settings.device.type, world()
        self._dtype = precision(settings.dtype)
        self.scaler = GradScaler(self._kind) if self._dtype == torch.float16 else None
        self._measuring = settings.scheduler if isinstance(settings.scheduler, Measuring) else None
        self._norm: Tensor | None = None

    def autocast(self) -> AbstractContextManager[object]:
        """Return the autocast context of forward passes."""
        return nullcontext() if self._dtype is None else torch.autocast(self._kind, dtype=self._dtype)

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Suspend the rules."""
        with ExitStack() as stack:
            for one in self._attached:
                stack.enter_context(one.suspended())
            yield

    def __call__(self, parts: Sequence[Batch], samples: int) -> None:
        """Take one step.

        Args:
            parts: this process's samples.
            samples: number of samples of all processes.
        """
        self._optimizer.zero_grad(set_to_none=True)
        scalars: dict[str, Tensor] = {}
        correct: list[Tensor] = []
        for batch in parts:
            # Processes average their gradients. The weights turn means over parts into the mean over all samples.
            weight = len(batch) * self._processes / samples
            with unsynchronized(self._model, batch is not parts[-1]):
                with self.autocast(), _enough(batch):
                    evaluated = self._objective(self._model, batch, self.plain)
                _check(evaluated)
                loss = evaluated.loss if weight == 1 else evaluated.loss * weight
                torch.autograd.backward(loss if self.scaler is None else self.scaler.scale(loss))
            for name, value in {"loss": evaluated.loss, **evaluated.metrics}.items():
                part = value.detach() if weight == 1 else value.detach() * weight
                scalars[name] = scalars[name] + part if name in scalars else part
            if evaluated.correct is not None:
                correct.append(evaluated.correct)
        self._shape_gradient()
        if self._measuring is not None and self._measuring.due:
            frozen = getattr(self._measuring, "frozen_curvature", False)
            self._measuring.measure(halves(evaluated, parts[-1], self._model, self.autocast, frozen_curvature=frozen))
        if self.scaler is None:
            self._optimizer.step()
        else:
            self.scaler.step(self._optimizer)
            self.scaler.update()
        self._meter.add(scalars, correct, samples)

    def gradient_norm(self) -> float | None:
        """Return the l2 norm of the last gradient before clipping or normalization; None with float16 without these."""
        if self._norm is None and self.scaler is None:
            self._norm = self._total_norm()
        return None if self._norm is None else float(self._norm)

    def _shape_gradient(self) -> None:
        settings, self._norm = self._settings, None
        if settings.clip_norm is None and settings.normalize_gradient is None:
            return
        if self.scaler is not None:
            self.scaler.unscale_(self._optimizer)
        self._norm = self._total_norm()
        if settings.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self._weights, settings.clip_norm, self._norm)
            return
        gradients = self._gradients()
        norms = [self._norm] * len(gradients)
        if settings.normalize_gradient == "tensor":
            norms = [whole(norm) for norm in torch._foreach_norm(gradients)]
        torch._foreach_div_(gradients, [norm.clamp(min=torch.finfo(norm.dtype).tiny) for norm in norms])

    def _total_norm(self) -> Tensor:
        return whole(nn.utils.get_total_norm(self._gradients()))

    def _gradients(self) -> list[Tensor]:
        """Return the gradients; of a sparse one, of an embedding, its values."""
        for p in self._weights:
            if p.grad is not None and p.grad.is_sparse:
                p.grad = p.grad.coalesce()
        gradients = [p.grad for p in self._weights if p.grad is not None]
        return [one._values() if one.is_sparse else one for one in gradients]


@contextmanager
def _enough(batch: Batch) -> Iterator[None]:
    """Explain the remedy if BatchNorm raises an error for a batch of one sample."""
    try:
        yield
    except ValueError as error:
        if len(batch) > 1 or "more than 1 value per channel" not in str(error):
            raise
        raise BackpassError(
            "BatchNorm has no statistics of one value, and one sample is computed at once here: use a larger "
            "batch_size, fewer parts (accumulate), or drop_last=True."
        ) from error


def _check(evaluated: object) -> None:
    if not isinstance(evaluated, Evaluated) or evaluated.loss.dim():
        got = tuple(evaluated.loss.shape) if isinstance(evaluated, Evaluated) else type(evaluated).__name__
        raise BackpassError(
            f"an objective returns Evaluated(loss=...) with a scalar loss, got {got}; of a loss of (output, y), one "
            "number per sample, PerSample(loss) makes an objective."
        )
    if "loss" in evaluated.metrics:
        raise BackpassError("a metric called 'loss' would replace the loss: choose another name.")
    if not evaluated.loss.requires_grad:
        raise BackpassError(
            "the loss does not depend differentiably on a parameter: the model or the objective detaches, or works "
            "under no_grad."
        )
