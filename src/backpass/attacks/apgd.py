"""Auto-PGD: PGD that chooses its own step, halving it where it makes no progress."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from backpass.attacks.active_set import ActiveSet
from backpass.attacks.jobs import Jobs
from backpass.attacks.noise import make_key
from backpass.attacks.oracle import Oracle
from backpass.attacks.search import Found, SearchAttack
from backpass.attacks.threat import per_sample
from backpass.errors import BackpassError

__all__ = ["APGD", "checkpoints"]

_START = 1  # what the draw is for
_PROGRESS = 0.75  # rho: the least share of steps that must raise the loss
_INERTIA = 0.75  # alpha: the weight of the new step against the last one


def checkpoints(steps: int) -> list[int]:
    """ceil(p_j * steps) with p_0 = 0, p_1 = .22, p_{j+1} = p_j + max(p_j - p_{j-1} - .03, .06); without w_0 = 0."""
    last, now, found = 0.0, 0.22, []
    while now <= 1.0 + 1e-9:
        found.append(math.ceil(now * steps - 1e-9))
        last, now = now, now + max(now - last - 0.03, 0.06)
    return sorted({w for w in found if 0 < w < steps})


@dataclass(frozen=True, kw_only=True)
class APGD(SearchAttack):
    """z_k = project(x_k + s * direction(g_k)), x_{k+1} = project(x_k + a (z_k - x_k) + (1 - a)(x_k - x_{k-1})).

    Here a = .75, and the direction is sign(g) for l_inf and g / |g|_2 for l_2.
    The step s starts at 2 eps. At every checkpoint it is halved, and the search goes back to its best point, for the
    samples whose loss rose in fewer than three steps of four since the last checkpoint, or for which neither the step
    nor the best loss has changed. Returned is the best point seen; `Result.halvings` says when steps were halved.
    Source: Croce and Hein, Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
    attacks (2020), algorithm 1.

    Args:
        steps: gradient steps of each restart.
        restarts: searches of each sample, each from its own random start.
        targets: with ``loss="dlr-targeted"``, each restart is repeated towards the `targets` most likely wrong classes.
    """

    steps: int = 100
    restarts: int = 1
    targets: int = 9

    def __post_init__(self) -> None:
        """Refuses settings that cannot be meant."""
        super().__post_init__()
        if min(self.steps, self.restarts, self.targets) < 1:
            raise BackpassError(
                "steps, restarts and targets must be at least 1; "
                f"got steps={self.steps}, restarts={self.restarts}, targets={self.targets}."
            )
        if self.targeted and self.loss == "dlr-targeted":
            raise BackpassError(
                "loss 'dlr-targeted' leads away from y to classes of its own choice: "
                "with targeted=True use 'ce', 'dlr' or 'margin'."
            )

    @property
    def _rounds(self) -> int:
        return self.restarts * (self.targets if self.loss == "dlr-targeted" else 1)

    def _search(self, oracle: Oracle, jobs: Jobs, active: ActiveSet) -> Found:
        if self.loss == "dlr-targeted":
            jobs = jobs.aimed(likely_wrong(oracle.forward(jobs.x, jobs), jobs.y, jobs.restart % self.targets))
        target, marks = jobs.target, checkpoints(self.steps)
        halvings = torch.full((len(jobs), len(marks)), -1, dtype=torch.int64, device=jobs.y.device)
        z = oracle.threat.start(jobs.x, make_key(self.seed, jobs.index, jobs.restart, _START, like=jobs.index))
        state = _State.begin(z, self.eps)
        for iteration in range(self.steps):
            logits, value, gradient = oracle.gradient(state.z, jobs)
            fooled = active.fooled(oracle, state.z, jobs, logits)
            keep = active.retire(state.z, fooled)
            if active.done:
                break
            if keep is not None:
                jobs, state, value, gradient, logits = (
                    jobs[keep],
                    state[keep],
                    value[keep],
                    gradient[keep],
                    logits[keep],
                )
            state.observe(value, gradient, None if self.early_stop else oracle.fooled(logits, jobs.y), iteration)
            if iteration in marks:
                j = marks.index(iteration)
                halved = state.halve(iteration - (marks[j - 1] if j else 0))
                at = active.slot[halved & active.live]
                halvings[at, j] = iteration
            state.advance(oracle, jobs, first=iteration == 0)
        if not active.done:
            # The last iterate has had no gradient pass; only its loss is wanted.
            logits = oracle.forward(state.z, jobs)
            value = oracle.objective(logits, jobs.y, jobs.target)
            state.observe(value, None, oracle.fooled(logits, jobs.y), self.steps)
        return Found(active.finish(state.kept), target, halvings)


def likely_wrong(logits: Tensor, y: Tensor, rank: Tensor) -> Tensor:
    """(B,) the class at place `rank` (B,) among the wrong ones, the most likely first; ranks past the last wrap."""
    order = logits.scatter(1, y[:, None], -torch.inf).argsort(1, descending=True)
    return order.gather(1, (rank % (logits.shape[1] - 1))[:, None]).squeeze(1)


@dataclass(eq=False)
class _State:
    """What APGD remembers of each sample; images (B, ...), numbers (B,)."""

    z: Tensor
    before: Tensor  # the iterate before z
    gradient: Tensor  # at z
    step: Tensor
    value: Tensor  # at the last observed iterate
    best_z: Tensor
    best_gradient: Tensor
    best_value: Tensor
    kept: Tensor  # the best point to return: a fooled one before any other
    kept_value: Tensor
    kept_fooled: Tensor
    rises: Tensor  # since the last checkpoint
    mark_value: Tensor  # the best value at the last checkpoint
    mark_halved: Tensor  # whether the step was halved there

    @classmethod
    def begin(cls, z: Tensor, eps: float) -> _State:
        low = z.new_full((len(z),), -torch.inf)
        no = torch.zeros_like(low, dtype=torch.bool)
        return cls(z, z, z, torch.full_like(low, 2.0 * eps), low, z, z, low, z, low, no, torch.zeros_like(low), low, no)

    def __getitem__(self, keep: Tensor) -> _State:
        return _State(*(value[keep] for value in vars(self).values()))

    def observe(self, value: Tensor, gradient: Tensor | None, fooled: Tensor | None, iteration: int) -> None:
        """Takes in the loss at z; fooled: None where fooled samples have left already."""
        if gradient is not None:
            self.gradient = gradient
        if iteration == 0:
            self.best_z, self.best_gradient, self.best_value, self.mark_value = self.z, self.gradient, value, value
            self.kept, self.kept_value = self.z, value
            self.kept_fooled = self.kept_fooled if fooled is None else fooled
        else:
            self.rises = self.rises + (value > self.value)
            better = value > self.best_value
            mask = per_sample(better, self.z)
            self.best_z = torch.where(mask, self.z, self.best_z)
            self.best_gradient = torch.where(mask, self.gradient, self.best_gradient)
            self.best_value = torch.where(better, value, self.best_value)
            if fooled is None:
                self.kept, self.kept_value = self.best_z, self.best_value
            else:
                take = (fooled & ~self.kept_fooled) | ((fooled == self.kept_fooled) & (value > self.kept_value))
                self.kept = torch.where(per_sample(take, self.z), self.z, self.kept)
                self.kept_value = torch.where(take, value, self.kept_value)
                self.kept_fooled = self.kept_fooled | fooled
        self.value = value

    def halve(self, length: int) -> Tensor:
        """At a checkpoint, `length` iterations after the last: halves where there is no progress; (B,) bool where."""
        stalled = ~self.mark_halved & (self.mark_value >= self.best_value)
        halved = (self.rises < _PROGRESS * length) | stalled
        self.step = torch.where(halved, 0.5 * self.step, self.step)
        mask = per_sample(halved, self.z)
        self.z = torch.where(mask, self.best_z, self.z)
        self.gradient = torch.where(mask, self.best_gradient, self.gradient)
        self.value = torch.where(halved, self.best_value, self.value)
        self.rises = torch.zeros_like(self.rises)
        self.mark_value, self.mark_halved = self.best_value, halved
        return halved

    def advance(self, oracle: Oracle, jobs: Jobs, *, first: bool) -> None:
        """The next iterate; the first step has no momentum."""
        threat = oracle.threat
        step = threat.direction(self.gradient).mul_(per_sample(self.step, self.z)).add_(self.z)
        ahead = threat.project(jobs.x, step)
        if not first:
            ahead = ahead.sub_(self.z).mul_(_INERTIA).add_(self.z).add_(self.z - self.before, alpha=1.0 - _INERTIA)
            ahead = threat.project(jobs.x, ahead)
        self.before, self.z = self.z, ahead
