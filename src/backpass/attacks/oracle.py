"""The model as an attack sees it: gradients in the search's precision, and the verdict in full precision."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn

from backpass.attacks.checks import check_first_logits, check_logits, warn_of_probabilities
from backpass.attacks.ensemble import Ensemble
from backpass.attacks.jobs import Jobs
from backpass.attacks.losses import Objective, ce
from backpass.attacks.threat import Threat, per_sample
from backpass.errors import BackpassError
from backpass.preserved import preserved

__all__ = ["LogitsSelector", "Oracle", "Pass", "Verdict"]

_LOG = logging.getLogger(__name__)

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
        self.looks_at_batches = True  # whether a model's dependence on the batch is worth two more passes
        self._seen = False
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
        with precision:
            try:
                output = model(given)
            except ValueError as error:
                if "more than 1 value per channel" not in str(error):
                    raise
                raise BackpassError(
                    "the model computes batch statistics, which a batch of one sample does not have. Give it running "
                    "statistics: BatchNorm with track_running_stats=True, in eval mode."
                ) from error
        if not self._seen:
            self._copies = given._version != version or not torch.equal(given, z)
        if isinstance(model, Ensemble):
            logits = torch.stack([check_logits(_select(one, self.select), len(z)).to(z.dtype) for one in output]).mean(
                0
            )
        else:
            logits = check_logits(_select(output, self.select), len(z)).to(z.dtype)
        if not self._seen:
            check_first_logits(logits.detach(), y)
            self._seen = True
            if model not in _looked_at:
                _looked_at.add(model)
                warn_of_probabilities(logits.detach())
            if self.looks_at_batches:
                warn_of_batch_statistics(model, self.select, z.detach(), logits.detach())
        return logits


def _mean_size(gradient: Tensor) -> Tensor:
    size = gradient.abs().flatten(1).mean(1).clamp_min(torch.finfo(gradient.dtype).tiny)
    return per_sample(size, gradient)


_looked_at: WeakSet[nn.Module] = WeakSet()  # models whose first logits were looked at
_known: WeakSet[nn.Module] = WeakSet()  # models whose batches were looked at


def warn_of_batch_statistics(model: nn.Module, select: LogitsSelector, z: Tensor, logits: Tensor) -> None:
    """Warn, once for each model, where the answer to a sample depends on the other samples of its batch."""
    if len(z) < 2 or model in _known or isinstance(model, Ensemble):
        return
    _known.add(model)
    copies = z[:1].expand_as(z).clone(memory_format=torch.preserve_format)
    with preserved(model), torch.no_grad(), torch.autocast(z.device.type, enabled=False):
        among_copies = _select(model(copies), select)
        scale = float(logits[0].nan_to_num(0.0, 0.0, 0.0).abs().amax())
        if not _differ(check_logits(among_copies, len(z))[0], logits[0], 1e-2 * scale):
            return
        among_others = check_logits(_select(model(z.clone()), select), len(z))
        if _differ(among_others, logits, 1e-3 * scale):
            return  # random, or in another precision
    _LOG.warning(
        "the model's answer to a sample depends on the other samples of its batch (batch statistics?), so that success "
        "depends on batch_size. Give the model running statistics, or attack single samples with batch_size=1."
    )


def _differ(one: Tensor, other: Tensor, tolerance: float) -> bool:
    return float((one.to(other.dtype) - other).nan_to_num(0.0, 0.0, 0.0).abs().amax()) > tolerance


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
