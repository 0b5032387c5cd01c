"""The model as an attack sees it: gradients in the search's precision, and the verdict in full precision."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from backpass.attacks.checks import check_first_logits, check_logits
from backpass.attacks.jobs import Jobs
from backpass.attacks.losses import Objective, ce
from backpass.attacks.threat import Threat
from backpass.errors import BackpassError

__all__ = ["LogitsSelector", "Oracle", "Pass", "Verdict"]

LogitsSelector = str | int | Callable[[object], Tensor] | None


class Pass(NamedTuple):
    """One gradient pass: logits (B, C), objective (B,) and its gradient (B, ...)."""

    logits: Tensor
    value: Tensor
    gradient: Tensor


class Verdict(NamedTuple):
    """The plain model's answer on final images: success (B,) bool, objective (B,), prediction (B,)."""

    success: Tensor
    value: Tensor
    prediction: Tensor


class Oracle:
    """Answers gradient and forward queries about one model, and counts them.

    Args:
        model: maps (B, ...) to logits (B, C), in eval mode.
        objective: what to raise, (logits, y, target) -> (B,).
        threat: ball and bounds, for the verdict.
        targeted: y is where to lead the sample.
        logits: selects the logits in the model's output: a key, an index, a function.
        eot: forward passes over which gradients are averaged, for randomised models.
        dtype: autocast to this type while searching.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        threat: Threat,
        *,
        targeted: bool,
        logits: LogitsSelector,
        eot: int,
        dtype: torch.dtype | None,
    ) -> None:
        self.model, self.objective, self.threat = model, objective, threat
        self.targeted, self.select, self.eot, self.dtype = targeted, logits, eot, dtype
        self.gradients = 0
        self.forwards = 0
        self._seen = False

    @property
    def compiled(self) -> bool:
        """The model, or a module in it, went through `torch.compile`."""
        return any(
            hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in self.model.modules()
        )

    @property
    def exact(self) -> bool:
        """The search's own logits are the verdict's: full precision, one deterministic forward pass."""
        return self.dtype is None and self.eot == 1

    def gradient(
        self,
        z: Tensor,
        jobs: Jobs,
        *,
        view: Callable[[Tensor], Tensor] | None = None,
        objective: Objective | None = None,
    ) -> Pass:
        """(1/E) sum_e grad_z objective(model(view(z)), y), E = eot; only z is differentiated.

        Args:
            z: (B, ...).
            jobs: the samples that the rows of z belong to.
            view: a differentiable map through which the model sees z.
            objective: instead of the oracle's own.

        Raises:
            BackpassError: the logits do not depend differentiably on z, or are malformed.
        """
        objective = objective or self.objective
        z = z.detach().requires_grad_()
        total: Pass | None = None
        for _ in range(self.eot):
            logits = self._forward(z if view is None else view(z), jobs.y, self._precision(z))
            value = objective(logits, jobs.y, jobs.target)
            if not value.requires_grad:
                raise BackpassError(
                    "the logits do not depend differentiably on x: the model detaches or works under no_grad. "
                    "Use Square, which needs no gradient."
                )
            (gradient,) = torch.autograd.grad(value.sum(), z)
            self.gradients += len(z)
            now = Pass(logits.detach(), value.detach(), gradient)
            total = now if total is None else Pass(*(a + b for a, b in zip(total, now, strict=True)))
        assert total is not None  # noqa: S101 -- eot >= 1
        return total if self.eot == 1 else Pass(*(t / self.eot for t in total))

    def probe(self, x: Tensor, y: Tensor) -> Pass:
        """One gradient pass at x itself, in full precision, on the cross-entropy: how the model behaves here."""
        z = x.detach().requires_grad_()
        logits = self._forward(z, y, torch.autocast(z.device.type, enabled=False))
        value = ce(logits, y.long())
        gradient = torch.autograd.grad(value.sum(), z)[0] if value.requires_grad else torch.zeros_like(x)
        return Pass(logits.detach(), value.detach(), gradient)

    def forward(self, z: Tensor, jobs: Jobs) -> Tensor:
        """Logits (B, C) without a gradient, in the search's precision, averaged over `eot` passes."""
        with torch.no_grad():
            draws = [self._forward(z, jobs.y, self._precision(z)) for _ in range(self.eot)]
        self.forwards += len(z) * self.eot
        return draws[0] if self.eot == 1 else torch.stack(draws).mean(0)

    def fooled(self, logits: Tensor, y: Tensor) -> Tensor:
        """(B,) bool: argmax_j z_j is not y (targeted: is y), and every logit is finite."""
        prediction = logits.argmax(1)
        hit = prediction == y if self.targeted else prediction != y
        return hit & logits.isfinite().all(1)

    def judge(self, z: Tensor, jobs: Jobs) -> Verdict:
        """The plain model's verdict in float32 (float64 where z is), ball and bounds re-checked."""
        success = self.threat.contains(jobs.x, z)
        for _ in range(self.eot):
            logits = self.plain(z, jobs.y)
            success = success & self.fooled(logits, jobs.y)
        return Verdict(success, self.objective(logits, jobs.y, jobs.target), logits.argmax(1))

    def plain(self, z: Tensor, y: Tensor) -> Tensor:
        """Logits (B, C) of the plain model: no gradient, no autocast."""
        self.forwards += len(z)
        with torch.no_grad():
            return self._forward(z, y, torch.autocast(z.device.type, enabled=False))

    def _precision(self, z: Tensor) -> AbstractContextManager[object]:
        return nullcontext() if self.dtype is None else torch.autocast(z.device.type, self.dtype)

    def _forward(self, z: Tensor, y: Tensor, precision: AbstractContextManager[object]) -> Tensor:
        with precision:
            output = self.model(z)
        logits = check_logits(_select(output, self.select), len(z)).to(z.dtype)
        if not self._seen:
            check_first_logits(logits.detach(), y)
            self._seen = True
        return logits


def _select(output: object, selector: LogitsSelector) -> object:
    if selector is None:
        return output
    if callable(selector):
        return selector(output)
    try:
        if isinstance(output, Tensor) and isinstance(selector, str):
            raise KeyError(selector)
        return output[selector]  # type: ignore[index]
    except (KeyError, IndexError, TypeError):
        if isinstance(selector, str) and hasattr(output, selector):
            return getattr(output, selector)
        raise BackpassError(
            f"logits={selector!r} is not in the model's output, a {type(output).__name__}: "
            "give a key, an index, or a function of the output."
        ) from None
