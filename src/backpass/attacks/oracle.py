"""The model as an attack sees it: gradients in the search's precision, and the verdict in full precision."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from backpass.attacks.checks import check_logits
from backpass.attacks.ensemble import Ensemble
from backpass.attacks.first_look import check_first_logits, warn_of_batch, warn_of_flat_loss, warn_of_model
from backpass.attacks.jobs import Jobs
from backpass.attacks.losses import Objective, ce
from backpass.attacks.threat import Threat, per_sample
from backpass.errors import BackpassError

__all__ = ["LogitsSelector", "Oracle", "Pass", "Verdict", "select_logits"]

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
        model: maps (B, ...) to logits (B, C), in eval mode; or an `Ensemble`.
        objective: value to raise, (logits, y, target) -> (B,).
        threat: the norm, whose direction of steepest ascent attacks follow.
        targeted: y is the class to lead the sample to.
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
        self.looks_at_batches = True  # whether warnings about the model are worth up to three more passes
        self._seen = False
        self._has_gradient = False
        self._copies = True  # until a call has shown that the model leaves its input as it is

    @property
    def fixed_sizes(self) -> bool:
        """True if every new batch size is expensive: a compiled module, or cuDNN that measures its algorithms."""
        if torch.backends.cudnn.benchmark and any(p.is_cuda for p in self.model.parameters()):
            return True
        return any(
            hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in self.model.modules()
        )

    @property
    def exact(self) -> bool:
        """True if the search's own logits are the verdict's: full precision, one deterministic forward pass."""
        return self.dtype is None and self.eot == 1

    def gradient(
        self,
        z: Tensor,
        jobs: Jobs,
        *,
        view: Callable[[Tensor], Tensor] | None = None,
        objective: Objective | None = None,
    ) -> Pass:
        """(1/E) sum_e grad_z objective(model(view(z)), y), E = eot; only z is differentiated, inside the mask.

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
            now = self._differentiate(z, z if view is None else view(z), jobs, objective)
            self.gradients += len(z)
            total = now if total is None else Pass(*(a + b for a, b in zip(total, now, strict=True)))
        assert total is not None  # noqa: S101 -- eot >= 1
        return total if self.eot == 1 else Pass(*(t / self.eot for t in total))

    def _differentiate(self, z: Tensor, seen: Tensor, jobs: Jobs, objective: Objective) -> Pass:
        if isinstance(self.model, Ensemble) and self.model.mean != "logits":
            passes = [self._one(z, seen, jobs, objective, member, last=False) for member in self.model.members]
            if self.model.mean == "gradients":
                passes = [p._replace(gradient=p.gradient / _mean_size(p.gradient)) for p in passes]
            result = Pass(*(torch.stack(parts).mean(0) for parts in zip(*passes, strict=True)))
        else:
            result = self._one(z, seen, jobs, objective, self.model, last=True)
        mask = jobs.threat.mask
        return result if mask is None else result._replace(gradient=result.gradient * mask)

    def _one(self, z: Tensor, seen: Tensor, jobs: Jobs, objective: Objective, model: nn.Module, *, last: bool) -> Pass:
        logits = self._forward(seen, jobs.y, self._precision(z), model)
        value = objective(logits, jobs.y, jobs.target)
        gradient = None
        if value.requires_grad:
            (gradient,) = torch.autograd.grad(value.sum(), z, allow_unused=True, retain_graph=not last)
        if gradient is None:
            raise BackpassError(
                "the logits do not depend differentiably on x: the model detaches its input or works under no_grad. "
                "Use Square, which needs no gradient."
            )
        if self.looks_at_batches and not self._has_gradient:
            self._has_gradient = True
            warn_of_flat_loss(model, gradient)
        return Pass(logits.detach(), value.detach(), gradient)

    def probe(self, x: Tensor, y: Tensor) -> Pass:
        """One gradient pass at x itself, in full precision, on the cross-entropy: how the model behaves here."""
        z = x.detach().requires_grad_()
        logits = self._forward(z, y, torch.autocast(z.device.type, enabled=False))
        value = ce(logits, y.long())
        gradient = torch.autograd.grad(value.sum(), z, allow_unused=True)[0] if value.requires_grad else None
        return Pass(logits.detach(), value.detach(), torch.zeros_like(x) if gradient is None else gradient)

    def forward(self, z: Tensor, jobs: Jobs) -> Tensor:
        """Logits (B, C) without a gradient, in the search's precision, averaged over `eot` passes."""
        with torch.no_grad():
            draws = [self._forward(z, jobs.y, self._precision(z)) for _ in range(self.eot)]
        self.forwards += len(z) * self.eot
        return draws[0] if self.eot == 1 else torch.stack(draws).mean(0)

    def fooled(self, logits: Tensor, y: Tensor) -> Tensor:
        """(B,) bool: argmax_j z_j is not y (targeted: is y), and finite; classes of -inf are excluded ones."""
        largest, prediction = logits.max(1)
        hit = prediction == y if self.targeted else prediction != y
        return hit & largest.isfinite()

    def judge(self, z: Tensor, jobs: Jobs) -> Verdict:
        """The plain model's verdict in float32 (float64 where z is), ball, bounds and mask re-checked."""
        success = jobs.threat.contains(jobs.x, z)
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

    def _forward(
        self, z: Tensor, y: Tensor, precision: AbstractContextManager[object], model: nn.Module | None = None
    ) -> Tensor:
        model = self.model if model is None else model
        # A model may write into its input, as in x.sub_(mean): then it gets a copy.
        given = z.clone() if self._copies else z
        version = given._version
        logits = self._answer(model, given, precision)
        if not self._seen:
            self._copies = given._version != version or not torch.equal(given, z)
            check_first_logits(logits.detach(), y)
            self._seen = True
            warn_of_model(model, logits.detach())
            if self.looks_at_batches and self.eot == 1 and not isinstance(model, Ensemble):
                plain = torch.autocast(z.device.type, enabled=False)
                warn_of_batch(model, lambda images: self._answer(model, images, plain), z.detach(), logits.detach())
        return logits

    def _answer(self, model: nn.Module, z: Tensor, precision: AbstractContextManager[object]) -> Tensor:
        """Logits (B, C) of the model, in the type of z; it may write into z."""
        dtype, count = z.dtype, len(z)
        with precision:
            try:
                output = model(z)
            except ValueError as error:
                if "more than 1 value per channel" not in str(error):
                    raise
                raise BackpassError(
                    "the model computes batch statistics, which a batch of one sample does not have. Give it running "
                    "statistics: BatchNorm with track_running_stats=True, in eval mode."
                ) from error
        outputs = output if isinstance(model, Ensemble) else [output]
        found = [check_logits(select_logits(one, self.select), count).to(dtype) for one in outputs]
        if len(classes := {one.shape[1] for one in found}) > 1:
            raise BackpassError(f"members of an ensemble must have the same classes; got {sorted(classes)} outputs.")
        return found[0] if len(found) == 1 else torch.stack(found).mean(0)


def _mean_size(gradient: Tensor) -> Tensor:
    size = gradient.abs().flatten(1).mean(1).clamp_min(torch.finfo(gradient.dtype).tiny)
    return per_sample(size, gradient)


def select_logits(output: object, selector: LogitsSelector) -> object:
    """Return the entry of a model's output that the selector names; the output itself for None.

    Raises:
        BackpassError: the output has no such entry.
    """
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
