"""Test of the SDE as a description of a training run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpass.errors import BackpassError, UnknownNameError
from backpass.numbers import is_number, is_whole
from backpass.sde.chain import run_chain
from backpass.sde.checks import (
    Check,
    check_agreement,
    check_normality,
    check_sampling,
    check_stability,
    check_tails,
)
from backpass.sde.control import Schedule, optimal_lr
from backpass.sde.diagnostics import Local, local_numbers
from backpass.sde.dynamics import AdversarialSDE
from backpass.sde.inner import InnerLoop
from backpass.sde.problem import Data, check_data, from_module
from backpass.sde.sampling import Sampling
from backpass.sde.svag import SVAG

__all__ = ["OBSERVABLES", "Certificate", "certify", "ensemble", "process"]

OBSERVABLES = ("expected_loss", "adversarial_loss", "gradient_penalty")
"""Recorded methods of `AdversarialSDE`: clean loss, adversarial loss, E|grad_x L|^2."""


_TRIED = 256
"""Number of samples for the initial evaluation of the loss, which validates model and data."""


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """Verdict on the SDE as a description of training at these settings, with the underlying numbers.

    Attributes:
        checks: the conditions.
        local: drift, noise and curvature at the start.
        values: final value of each replica by amplification l and observable; l = 1 is training itself.
        schedule: the optimal schedule of the linear-quadratic problem with the measured curvature, noise and gradient.
        steps: number of training steps.
    """

    checks: tuple[Check, ...]
    local: Local
    values: dict[int, dict[str, Tensor]]
    schedule: Schedule | None
    steps: int

    @property
    def valid(self) -> bool:
        """True if no check failed."""
        return all(check.verdict != "failed" for check in self.checks)

    def __str__(self) -> str:
        open_ones = sum(check.verdict == "undecided" for check in self.checks)
        head = "The SDE describes this run" if self.valid else "The SDE does not describe this run"
        if self.valid and open_ones:
            head += f" as far as decided: {open_ones} of {len(self.checks)} checks are undecided"
        lines = [
            f"{one.verdict:<11}{one.name:<26}{one.estimate.value:>9.3g} "
            f"{f'[{one.estimate.low:.3g}, {one.estimate.high:.3g}]':<21}{one.limit}"
            for one in self.checks
        ]
        return "\n".join([f"{head}.", *lines])


def process(
    model: nn.Module,
    data: Data,
    eta: float,
    batch_size: int,
    adversary: InnerLoop,
    criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[AdversarialSDE, Tensor]:
    """Return the SDE of adversarial training of a network, and its current parameters (P,)."""
    if not isinstance(adversary, InnerLoop):
        raise BackpassError(
            f"adversary must be an InnerLoop, for instance InnerLoop(steps=3, eta=0.1); got {adversary!r}."
        )
    loss, theta = from_module(model, criterion or _cross_entropy)
    sde = AdversarialSDE(
        loss,
        data,
        eta_outer=eta,
        batch_size=batch_size,
        steps=adversary.steps,
        eta_inner=adversary.eta,
        lam=adversary.lam,
        regulariser=adversary.regulariser,
        inner=adversary.direction,
        eps=adversary.eps,
    )
    try:
        loss(theta, data[0][:_TRIED], data[1][:_TRIED])
        replace(sde, data=(data[0][:2], data[1][:2])).drift(theta[None])
    except BackpassError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise BackpassError(
            f"the loss of this model cannot be evaluated under torch.func: {f'{error}'.splitlines()[0]!r}. The "
            "criterion takes the model's output and y and returns one value per sample, labels lie in 0..classes - 1, "
            "and the model neither changes its input in place nor depends on values by .item() or `if`."
        ) from error
    return sde, theta


def _cross_entropy(output: Tensor, y: Tensor) -> Tensor:
    if not isinstance(output, Tensor) or output.ndim != 2:
        got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise BackpassError(f"expected logits (N, classes) from the model, got {got}. Pass a criterion, or wrap it.")
    if y.dtype != torch.int64 or y.ndim != 1:
        raise BackpassError(
            f"cross-entropy needs int64 class indices y (N,), got {tuple(y.shape)} {y.dtype}. Convert them by "
            "y.long(), or pass a criterion."
        )
    return F.cross_entropy(output, y, reduction="none")


def ensemble(
    sde: AdversarialSDE,
    theta: Tensor,
    steps: int,
    replicas: int,
    *,
    probe: AdversarialSDE,
    amplification: int = 1,
    sampling: Sampling = "iid",
    generator: torch.Generator | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Train replicas from one start; return their final observables and parameters (M, P).

    Args:
        sde: the process.
        theta: (P,) initial parameters.
        steps: training steps; the amplification l takes l times as many.
        replicas: number M of replicas.
        probe: SDE on the samples that the observables are measured on.
        amplification: l of `SVAG`.
        sampling: sampling of the batches.
        generator: random generator of the batches.
    """
    chain = SVAG(sde, amplification)
    end = run_chain(
        chain, theta, steps * amplification, paths=replicas, generator=generator, sampling=sampling
    ).theta.detach()
    return {name: getattr(probe, name)(end).detach() for name in OBSERVABLES}, end


def certify(
    model: nn.Module,
    data: Data,
    eta: float,
    batch_size: int,
    adversary: InnerLoop,
    *,
    criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
    steps: int = 100,
    sampling: Sampling = "permuted",
    amplifications: Sequence[int] = (1, 4, 16),
    replicas: int = 16,
    tolerance: float = 0.1,
    probe: int = 512,
    seed: int = 0,
    progress: Callable[[str, float], None] = lambda what, part: None,
) -> Certificate:
    r"""Check whether the SDE describes adversarial training from the present weights for some steps.

    - **Amplification**: the means of clean loss, adversarial loss and E|L_x|^2 at each l against l = 1 (SVAG). Failed
      where they differ by more than the tolerance.
    - **Stability**: eta times the largest curvature, through the attack. Failed above 1/2; 2 is the limit of stability.
    - **Normality**: excess kurtosis of the noise accumulated over the memory of the process. Failed above 1/2.
    - **Tails**: Hill's tail index of single samples' noise, from the top 2 %. Failed below 2.2.
    - **Sampling**: spread of the replicas, permuted against independent batches, at the nearest end of an epoch if the
      run reaches one. Failed below .8.

    A check fails only where its whole 95 % interval violates the limit, and is undecided if the interval contains the
    limit. The memory of the process is 1 / (eta a) steps, a the curvature along the gradient, and at most 20
    and the steps of the run. The cost is that of (1 + 2 l_2 + ...) replicas of the run: 41 times for (1, 4, 16).

    Args:
        model: network at the initial weights, in the mode to evaluate it in; it is not modified.
        data: x (N, ...) and y (N, ...).
        eta: learning rate of SGD without momentum.
        batch_size: batch size B.
        adversary: inner loop of adversarial training.
        criterion: (output, y) -> (N,); None for cross-entropy.
        steps: number of steps of the certified run.
        sampling: batch sampling of the certified run: ``"permuted"`` (without replacement) or ``"iid"``.
        amplifications: values of l, increasing from 1.
        replicas: independent runs per l, at least 4.
        tolerance: relative difference of means that counts as agreement.
        probe: number of samples, the first of the data, for observables and local measurements.
        seed: random seed.
        progress: called with a description and the finished fraction.

    Raises:
        BackpassError: a setting is out of its range.

    Source: amplification by arXiv 2102.12470; the set of checks is defined by this project.
    """
    ls = list(amplifications) if isinstance(amplifications, Sequence) else []
    if len(ls) < 2 or not all(is_whole(one, 1) for one in ls) or ls[0] != 1 or ls != sorted(set(ls)):
        raise BackpassError(f"amplifications must increase from 1, at least two of them; got {amplifications!r}.")
    if not (is_whole(steps, 1) and is_whole(replicas, 4) and is_whole(probe, 2)):
        raise BackpassError(
            f"expected steps >= 1, replicas >= 4 and probe >= 2, got {steps!r}, {replicas!r} and {probe!r}."
        )
    if not (is_number(tolerance) and tolerance > 0):
        raise BackpassError(f"tolerance must be a finite number > 0, got {tolerance!r}.")
    if sampling not in get_args(Sampling):
        raise UnknownNameError("sampling", str(sampling), get_args(Sampling))
    if not is_whole(seed, 0) or not callable(progress):
        raise BackpassError(f"seed must be an integer >= 0 and progress a function; got {seed!r} and {progress!r}.")
    samples = check_data(data)
    most = samples if sampling == "permuted" else math.inf
    if samples < 2 or not is_whole(batch_size, 1) or batch_size > most:
        raise BackpassError(
            f"expected at least 2 samples and a batch_size from 1, up to their number if sampling='permuted'; got "
            f"{samples} samples and batch_size={batch_size!r}."
        )
    sde, theta = process(model, data, eta, batch_size, adversary, criterion)
    seen = replace(sde, data=(data[0][:probe], data[1][:probe]))
    draws = torch.Generator(theta.device).manual_seed(seed)
    progress("local numbers", 0.0)
    local = local_numbers(seen, theta, generator=draws)
    values: dict[int, dict[str, Tensor]] = {}
    work, done = 1 + sum(2 * one for one in ls[1:]) + (sampling == "permuted"), 0
    ends = {}
    for one in ls:
        progress(f"{replicas} replicas at l = {one}", done / work)
        values[one], ends[one] = ensemble(sde, theta, steps, replicas, probe=seen, amplification=one, generator=draws)
        done += 1 if one == 1 else 2 * one
    checks = [
        check_agreement(name, one, values[1][name], values[one][name], tolerance)
        for one in ls[1:]
        for name in OBSERVABLES
    ]
    checks += [check_stability(eta, local), check_normality(eta, batch_size, steps, local), check_tails(local)]
    if sampling == "permuted":
        progress("replicas with permuted batches", done / work)
        # At the end of an epoch, where permuted sampling has the largest effect, if the run reaches one.
        epoch = max(1, sde.noise_dim // batch_size)
        until = steps if steps < epoch else round(steps / epoch) * epoch
        spreads = {
            one: ends[1]
            if one == "iid" and until == steps
            else ensemble(sde, theta, until, replicas, probe=seen, sampling=one, generator=draws)[1]
            for one in get_args(Sampling)
        }
        checks.append(check_sampling(spreads["permuted"], spreads["iid"]))
    return Certificate(
        checks=tuple(checks), local=local, values=values, schedule=_schedule(local, eta, steps), steps=steps
    )


def _schedule(local: Local, eta: float, steps: int) -> Schedule | None:
    """Return the schedule of m' = -2 a u m + a eta s^2 u^2 / 2 with 2 a m = |h|^2 and a s^2 = tr(Dh S)."""
    a, noise = local.curvature, local.noise_curvature
    if not (a > 0 and noise >= 0 and local.drift > 0):
        return None
    return optimal_lr(
        curvature=a,
        noise=noise / a,
        eta=eta,
        start=local.drift / (2 * a),
        horizon=eta * steps,
        points=max(10, steps + 1),
    )
