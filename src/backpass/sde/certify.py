"""Certificate that the SDE describes a training run, or does not."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpass.errors import BackpassError
from backpass.numbers import is_number, is_whole
from backpass.sde.chain import run_chain
from backpass.sde.control import Schedule, optimal_lr
from backpass.sde.diagnostics import Local, local_numbers
from backpass.sde.dynamics import AdversarialSDE
from backpass.sde.inner import InnerLoop
from backpass.sde.problem import Data, from_module
from backpass.sde.sampling import Sampling
from backpass.sde.svag import SVAG

__all__ = ["OBSERVABLES", "Certificate", "Check", "Estimate", "certify", "ensemble", "process"]

OBSERVABLES = ("expected_loss", "adversarial_loss", "gradient_penalty")
"""Methods of `AdversarialSDE` that are recorded: clean loss, loss under the adversary, E|grad_x L|^2."""

_LEVEL = 1.96
_STABLE = 0.5
_HEAVY = 0.5
_LONGEST = 20.0
_TAIL = 2.2
_NOISE_SHARE = 0.8

Verdict = Literal["passed", "failed", "undecided"]


class Estimate(NamedTuple):
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Check:
    """One condition for the SDE to describe the run.

    Attributes:
        name: in one or two words.
        estimate: the measured number.
        limit: the condition in words.
        verdict: ``"failed"`` only where the whole interval violates the condition.
    """

    name: str
    estimate: Estimate
    limit: str
    verdict: Verdict


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """Verdict on the SDE as a description of training at these settings, with the numbers behind it.

    Attributes:
        checks: the conditions.
        local: drift, noise and curvature at the start.
        values: by amplification l and observable, the value of each replica at the end; l = 1 is training itself.
        schedule: the optimal schedule of the linear-quadratic problem with the measured curvature, noise and gradient.
        steps: of training.
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
        head = "The SDE describes this run." if self.valid else "The SDE does not describe this run."
        lines = [
            f"{check.verdict:<10}{check.name:<28}{check.estimate.value:>10.3g} "
            f"[{check.estimate.low:.3g}, {check.estimate.high:.3g}]  {check.limit}"
            for check in self.checks
        ]
        return "\n".join([head, *lines])


def process(
    model: nn.Module,
    data: Data,
    eta: float,
    batch_size: int,
    adversary: InnerLoop,
    criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[AdversarialSDE, Tensor]:
    """Return the SDE of adversarial training of a network, and its present parameters (P,)."""
    if not isinstance(adversary, InnerLoop):
        raise BackpassError(
            f"adversary must be an InnerLoop, for instance InnerLoop(steps=3, eta=0.1); got {adversary!r}."
        )
    loss, theta = from_module(model, criterion or functools.partial(F.cross_entropy, reduction="none"))
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
    return sde, theta


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
    """Train replicas from one start; return each observable of each replica at the end, and the parameters (M, P).

    Args:
        sde: the process.
        theta: (P,), the start.
        steps: of training; l times as many are taken at the amplification l.
        replicas: M.
        probe: measures the observables.
        amplification: l of `SVAG`.
        sampling: of the batches.
        generator: of the batches.
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

    A check fails only where its whole 95 % interval is on the wrong side, and is undecided where the interval has the
    limit inside. The memory of the process is 1 / (eta a) steps, a the curvature along the gradient, and at most 20
    and the steps of the run. The cost is that of (1 + 2 l_2 + ...) replicas of the run: 41 times for (1, 4, 16).

    Args:
        model: the network at the weights to start from, in eval mode where that matters; it is not changed.
        data: x (N, ...) and y (N, ...).
        eta: the learning rate of SGD without momentum.
        batch_size: B.
        adversary: the inner loop.
        criterion: (output, y) -> (N,); None for cross-entropy.
        steps: of the run that the certificate is for.
        sampling: of the training that is certified, ``"permuted"`` as trainers do, or ``"iid"``.
        amplifications: l of SVAG, increasing from 1.
        replicas: independent runs at each l, >= 4.
        tolerance: relative difference of means that counts as agreement.
        probe: samples on which observables and local numbers are measured, the first of the data.
        seed: of all draws.
        progress: called with what is measured and the part done.

    Raises:
        BackpassError: a setting is out of its range.

    Source: amplification by arXiv 2102.12470; the checks are put together for this project.
    """
    ls = list(amplifications)
    if len(ls) < 2 or ls[0] != 1 or ls != sorted(set(ls)) or not all(is_whole(one, 1) for one in ls):
        raise BackpassError(f"amplifications must increase from 1, at least two of them; got {amplifications!r}.")
    if not (is_whole(steps, 1) and is_whole(replicas, 4) and is_whole(probe, 2)):
        raise BackpassError(
            f"expected steps >= 1, replicas >= 4 and probe >= 2, got {steps!r}, {replicas!r} and {probe!r}."
        )
    if not (is_number(tolerance) and tolerance > 0):
        raise BackpassError(f"tolerance must be a finite number > 0, got {tolerance!r}.")
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
        _agreement(name, one, values[1][name], values[one][name], tolerance) for one in ls[1:] for name in OBSERVABLES
    ]
    checks += [_stability(eta, local), _normality(eta, batch_size, steps, local), _tails(local)]
    if sampling == "permuted":
        progress("replicas with permuted batches", done / work)
        # At the end of an epoch, where permuting matters most, if the run has one.
        epoch = max(1, sde.noise_dim // batch_size)
        until = steps if steps < epoch else round(steps / epoch) * epoch
        spreads = {
            one: ends[1]
            if one == "iid" and until == steps
            else ensemble(sde, theta, until, replicas, probe=seen, sampling=one, generator=draws)[1]
            for one in get_args(Sampling)
        }
        checks.append(_sampling(spreads["permuted"], spreads["iid"]))
    return Certificate(
        checks=tuple(checks), local=local, values=values, schedule=_schedule(local, eta, steps), steps=steps
    )


def _agreement(name: str, amplification: int, ours: Tensor, amplified: Tensor, tolerance: float) -> Check:
    """Compare means; the interval is Welch's, of the difference over the mean of training."""
    a, b = ours.double(), amplified.double()
    mean = float(a.mean())
    finite = bool(torch.isfinite(torch.cat([a, b])).all()) and mean != 0
    difference = float(b.mean() - a.mean()) / abs(mean) if finite else math.inf
    error = math.sqrt(float(a.var() / len(a) + b.var() / len(b))) / abs(mean) if finite else 0.0
    low, high = difference - _LEVEL * error, difference + _LEVEL * error
    if low > tolerance or high < -tolerance:
        verdict: Verdict = "failed"
    else:
        verdict = "passed" if -tolerance <= low and high <= tolerance else "undecided"
    words = {"expected_loss": "clean loss", "adversarial_loss": "robust loss", "gradient_penalty": "input gradient"}
    return Check(
        name=f"{words[name]}, l = {amplification}",
        estimate=Estimate(difference, low, high),
        limit=f"within {tolerance:g} of training",
        verdict=verdict,
    )


def _stability(eta: float, local: Local) -> Check:
    value = eta * local.largest
    return Check(
        name="eta times curvature",
        estimate=Estimate(value, value, value),
        limit=f"at most {_STABLE:g}; unstable above 2",
        verdict="failed" if value > _STABLE else "passed",
    )


def _normality(eta: float, batch_size: int, steps: int, local: Local) -> Check:
    relaxation = 1 / (eta * local.curvature) if local.curvature > 0 else math.inf
    memory = max(1.0, min(float(steps), relaxation, _LONGEST))
    scale = 1 / (batch_size * memory)
    value, error = (scale * part for part in local.kurtosis)
    low, high = value - _LEVEL * error, value + _LEVEL * error
    return Check(
        name="kurtosis of the noise",
        estimate=Estimate(value, low, high),
        limit=f"at most {_HEAVY:g}, over {memory:.0f} steps",
        verdict="failed" if low > _HEAVY else "passed" if high <= _HEAVY else "undecided",
    )


def _tails(local: Local) -> Check:
    """Compare Hill's tail index of the gradient noise with the limit of finite variance, with a margin."""
    value, error = local.tail
    low, high = value - _LEVEL * error, value + _LEVEL * error
    estimate = Estimate(*(1 / one if one > 0 else math.inf for one in (value, high, low)))
    return Check(
        name="tail index of the noise",
        estimate=estimate,
        limit=f"at least {_TAIL:g}; the variance is infinite below 2",
        verdict="failed" if estimate.high < _TAIL else "passed" if estimate.low >= _TAIL else "undecided",
    )


def _sampling(permuted: Tensor, independent: Tensor) -> Check:
    """Compare tr Cov of the replicas' parameters; the interval is that of the log of two means of squares."""
    squares = [(part - part.mean(0)).double().square().sum(1) for part in (permuted, independent)]
    finite = all(bool(torch.isfinite(one).all()) and float(one.sum()) > 0 for one in squares)
    if not finite:
        return Check(
            name="spread, permuted batches",
            estimate=Estimate(math.nan, math.nan, math.nan),
            limit="no spread to compare",
            verdict="undecided",
        )
    ratio = float(squares[0].mean() / squares[1].mean())
    error = math.sqrt(sum(float(one.var() / one.mean() ** 2) / len(one) for one in squares))
    low, high = ratio * math.exp(-_LEVEL * error), ratio * math.exp(_LEVEL * error)
    return Check(
        name="spread, permuted batches",
        estimate=Estimate(ratio, low, high),
        limit=f"at least {_NOISE_SHARE:g} of that of independent batches",
        verdict="failed" if high < _NOISE_SHARE else "passed" if low >= _NOISE_SHARE else "undecided",
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
