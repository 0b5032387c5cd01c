"""One optimizer step: forward, backward, what happens to the gradient, the step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel

from backpass.errors import BackpassError
from backpass.rules import Attached
from backpass.training.batches import Batch
from backpass.training.measuring import Measuring, halves
from backpass.training.meter import Meter
from backpass.training.objective import Evaluated
from backpass.training.processes import world
from backpass.training.settings import Settings

__all__ = ["Update"]


class Update:
    """Takes the steps of a run.

    Args:
        settings: of the run.
        model: as it is called, with its wrappers.
        attached: the rules in force.
        meter: gets each step's numbers.
    """

    def __init__(self, settings: Settings, model: nn.Module, attached: Sequence[Attached], meter: Meter) -> None:
        self._settings, self._model, self._attached, self._meter = settings, model, attached, meter
        self._optimizer, self._objective = settings.optimizer, settings.objective
        self._weights = [p for group in settings.optimizer.param_groups for p in group["params"]]
        self._kind, self._processes = settings.device.type, world()
        self.scaler = GradScaler(self._kind) if settings.dtype == torch.float16 else None
        self._measuring = settings.scheduler if isinstance(settings.scheduler, Measuring) else None
        self._norm: Tensor | None = None

    def autocast(self) -> AbstractContextManager[object]:
        """The precision of forward passes."""
        dtype = self._settings.dtype
        return nullcontext() if dtype is None else torch.autocast(self._kind, dtype=dtype)

    @contextmanager
    def plain(self) -> Iterator[None]:
        """A context in which the rules are suspended."""
        with ExitStack() as stack:
            for one in self._attached:
                stack.enter_context(one.suspended())
            yield

    def __call__(self, parts: Sequence[Batch], samples: int) -> None:
        """Take one step.

        Args:
            parts: this process's samples.
            samples: how many all processes have.
        """
        self._optimizer.zero_grad(set_to_none=True)
        scalars: dict[str, Tensor] = {}
        correct: list[Tensor] = []
        for batch in parts:
            # Processes average their gradients; the weights turn means over parts into the mean over all samples.
            weight = len(batch) * self._processes / samples
            with self._without_exchange(batch is not parts[-1]):
                with self.autocast():
                    evaluated = self._objective(self._model, batch, self.plain)
                if not isinstance(evaluated, Evaluated) or evaluated.loss.dim():
                    got = tuple(evaluated.loss.shape) if isinstance(evaluated, Evaluated) else type(evaluated).__name__
                    raise BackpassError(
                        f"an objective returns Evaluated(loss=...) with a scalar loss, got {got}; of a loss of "
                        "(output, y), one number per sample, PerSample(loss) makes an objective."
                    )
                if "loss" in evaluated.metrics:
                    raise BackpassError("a metric called 'loss' would take the place of the loss: name it otherwise.")
                if not evaluated.loss.requires_grad:
                    raise BackpassError(
                        "the loss does not depend differentiably on a parameter: the model or the objective detaches, "
                        "or works under no_grad."
                    )
                loss = evaluated.loss if weight == 1 else evaluated.loss * weight
                torch.autograd.backward(loss if self.scaler is None else self.scaler.scale(loss))
            for name, value in {"loss": evaluated.loss, **evaluated.metrics}.items():
                part = value.detach() if weight == 1 else value.detach() * weight
                scalars[name] = scalars[name] + part if name in scalars else part
            if evaluated.correct is not None:
                correct.append(evaluated.correct)
        self._shape_gradient()
        self._measure(evaluated, parts[-1])
        if self.scaler is None:
            self._optimizer.step()
        else:
            self.scaler.step(self._optimizer)
            self.scaler.update()
        self._meter.add(scalars, correct, samples)

    def gradient_norm(self) -> float | None:
        """The l2 norm of the last gradient, before clipping or normalization; with float16 only where there is such."""
        if self._norm is None and self.scaler is None:
            self._norm = self._total_norm()
        return None if self._norm is None else float(self._norm)

    def _without_exchange(self, more_to_come: bool) -> AbstractContextManager[object]:
        if more_to_come and isinstance(self._model, DistributedDataParallel):
            return self._model.no_sync()
        return nullcontext()

    def _shape_gradient(self) -> None:
        settings, self._norm = self._settings, None
        if settings.clip_norm is None and not settings.normalize_gradient:
            return
        if self.scaler is not None:
            self.scaler.unscale_(self._optimizer)
        self._norm = self._total_norm()
        if settings.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self._weights, settings.clip_norm, self._norm)
            return
        gradients = [p.grad for p in self._weights if p.grad is not None]
        torch._foreach_div_(gradients, self._norm.clamp(min=torch.finfo(self._norm.dtype).tiny))

    def _total_norm(self) -> Tensor:
        return nn.utils.get_total_norm([p.grad for p in self._weights if p.grad is not None])

    def _measure(self, evaluated: Evaluated, batch: Batch) -> None:
        if self._measuring is not None and self._measuring.due:
            frozen = self._measuring.frozen_curvature
            self._measuring.measure(halves(evaluated, batch, self._model, self.autocast, frozen_curvature=frozen))
