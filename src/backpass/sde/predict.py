"""Predict the losses of adversarial training at other learning rates and adversaries, with error bars."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from backpass.errors import BackpassError
from backpass.numbers import is_number, is_whole
from backpass.sde.certify import OBSERVABLES, ensemble
from backpass.sde.checks import Estimate
from backpass.sde.dynamics import AdversarialSDE
from backpass.sde.problem import check_rate
from backpass.sde.sampling import Sampling

__all__ = ["Predictor", "Setting", "explore"]

_LEAST = 6
# Two-sided 95 % quantiles of Student's t by degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


class Setting(NamedTuple):
    """Learning rate, number of the adversary's steps K, and its step size."""

    eta: float
    steps: int
    eta_inner: float


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """Fitted dependence of the observables at a fixed SDE time on eta and on the adversary.

    By the SDE, at a fixed time t = k eta the law depends on eta at order eta alone, and on K and eta_inner through
    what the adversary adds to the potential. Its strength is measured as the work w = E[L(x + delta_K) - L(x)] at the
    start. The logarithm of each observable is fitted by 1, eta, w and w^2 over the explored settings.

    Attributes:
        settings: that were run.
        means: by observable, the mean logarithm over the replicas at each setting.
        base: the setting that the others vary.
        time: SDE time of all runs.
        work: a function from a setting to w.
        spread: by observable, standard deviation of the logarithm over the replicas.
    """

    settings: Sequence[Setting]
    means: dict[str, Tensor]
    base: Setting
    time: float
    work: Callable[[Setting], float]
    spread: dict[str, float]

    def predict(self, eta: float, steps: int, eta_inner: float, *, replicas: int = 1) -> dict[str, Estimate]:
        """Predict the mean of new runs from the same start, after the same SDE time.

        The intervals, of 95 %, hold the error of the fit, the scatter of the explored settings around it, and the
        scatter of the new runs.

        Args:
            eta: the learning rate.
            steps: K of the adversary.
            eta_inner: its step size.
            replicas: number of new runs whose mean is predicted.

        Raises:
            BackpassError: a setting is out of its range.
        """
        check_rate("eta", eta, positive=True)
        check_rate("eta_inner", eta_inner)
        if not (is_whole(steps, 0) and is_whole(replicas, 1)):
            raise BackpassError(f"expected steps >= 0 and replicas >= 1, got {steps!r} and {replicas!r}.")
        X = torch.tensor([self._features(one) for one in self.settings], dtype=torch.float64)
        at = torch.tensor(self._features(Setting(eta, steps, eta_inner)), dtype=torch.float64)
        inverse = torch.linalg.pinv(X.mT @ X)
        freedom = len(X) - X.shape[1]
        found = {}
        for name, y in self.means.items():
            weights = inverse @ (X.mT @ y)
            residual = float((y - X @ weights).square().sum()) / freedom
            own = self.spread[name] ** 2 / replicas
            error = math.sqrt(residual * float(1 + at @ inverse @ at) + own)
            centre, width = float(at @ weights), _T[min(freedom, len(_T)) - 1] * error
            found[name] = Estimate(math.exp(centre), math.exp(centre - width), math.exp(centre + width))
        return found

    def _features(self, setting: Setting) -> tuple[float, ...]:
        base = self.work(self.base)
        w = self.work(setting) / base - 1 if base > 0 else 0.0
        return 1.0, setting.eta / self.base.eta - 1, w, w * w


def explore(
    sde: AdversarialSDE,
    theta: Tensor,
    steps: int,
    *,
    probe: AdversarialSDE,
    settings: Sequence[Setting] | None = None,
    replicas: int = 8,
    sampling: Sampling = "permuted",
    generator: torch.Generator | None = None,
    progress: Callable[[str, float], None] = lambda what, part: None,
) -> Predictor:
    """Train replicas at several settings for the same SDE time, and fit the dependence on them.

    Args:
        sde: the base process.
        theta: (P,), the start of all runs.
        steps: of the base run; the others take the number of steps that gives the same time.
        probe: measures the observables, all under the base's adversary.
        settings: the base and those around it, >= 6; None for eta by factors of .5 and 1.5, eta_inner by .5 and 1.5,
            K less 1 and plus 2, and both rates together.
        replicas: runs at each setting, >= 2.
        sampling: of the batches.
        generator: of the batches.
        progress: called with what is run and the part done.

    Raises:
        BackpassError: there are too few settings, or a run diverges.
    """
    base = Setting(sde.time_step, sde.steps, float(sde.eta_inner))
    if settings is None:
        e, k, i = base
        settings = [
            base,
            Setting(e / 2, k, i),
            Setting(1.5 * e, k, i),
            Setting(e, k, i / 2),
            Setting(e, k, 1.5 * i),
            Setting(e, max(0, k - 1), i),
            Setting(e, k + 2, i),
            Setting(0.75 * e, k, 1.25 * i),
        ]
    if len(settings) < _LEAST or not is_whole(replicas, 2) or not is_number(sde.time_step):
        raise BackpassError(
            f"expected at least {_LEAST} settings and 2 replicas, got {len(settings)} and {replicas!r}."
        )
    time = steps * base.eta
    works: dict[Setting, float] = {}

    def work(setting: Setting) -> float:
        if setting not in works:
            own = replace(probe, steps=setting.steps, eta_inner=setting.eta_inner)
            works[setting] = float(own.adversarial_loss(theta) - own.expected_loss(theta))
        return works[setting]

    logs: dict[str, list[Tensor]] = {name: [] for name in OBSERVABLES}
    for done, one in enumerate(settings):
        progress(f"eta = {one.eta:g}, K = {one.steps}, eta_I = {one.eta_inner:g}", done / len(settings))
        own = replace(sde, eta_outer=one.eta, steps=one.steps, eta_inner=one.eta_inner)
        found, _ = ensemble(
            own, theta, max(1, round(time / one.eta)), replicas, probe=probe, sampling=sampling, generator=generator
        )
        for name, value in found.items():
            if not torch.isfinite(value).all() or not (value > 0).all():
                raise BackpassError(f"the runs at {one} diverge: explore smaller learning rates.")
            logs[name].append(value.double().log())
    return Predictor(
        settings=list(settings),
        means={name: torch.stack([one.mean() for one in row]) for name, row in logs.items()},
        base=base,
        time=time,
        work=work,
        spread={name: math.sqrt(sum(float(one.var()) for one in row) / len(row)) for name, row in logs.items()},
    )
