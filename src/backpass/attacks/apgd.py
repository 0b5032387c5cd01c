"""Auto-PGD: PGD that chooses its own step, halving it where it makes no progress."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from backpass.attacks.jobs import Jobs
from backpass.attacks.noise import make_key, normal, uniform
from backpass.attacks.oracle import Oracle
from backpass.attacks.search import SearchAttack
from backpass.attacks.settings import count
from backpass.attacks.state import State, choose
from backpass.attacks.targets import likely_wrong
from backpass.attacks.threat import per_sample
from backpass.errors import BackpassError

__all__ = ["APGD", "Progress", "checkpoints", "published_checkpoints"]

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


def published_checkpoints(steps: int) -> list[int]:
    """Checkpoints of the authors' code: periods of whole steps, floor(.22 steps) first, each floor(.03 steps) shorter.

    No period is shorter than floor(.06 steps), and none of the three numbers is less than 1.
    """
    period, shorter, shortest = (max(int(share * steps), 1) for share in (0.22, 0.03, 0.06))
    now, found = period, []
    while now <= steps:
        found.append(now)
        period = max(period - shorter, shortest)
        now += period
    return found


@dataclass(frozen=True, eq=False, kw_only=True)
class Progress(State):
    """State of APGD; images (B, ...), numbers (B,).

    `z` is the best point so far, a fooled one before any other.
    """

    point: Tensor
    before: Tensor  # the iterate before `point`
    gradient: Tensor  # at `point`
    size: Tensor  # of the step
    value: Tensor  # at the last observed iterate
    best_point: Tensor
    best_gradient: Tensor
    best_value: Tensor
    kept_value: Tensor
    kept_fooled: Tensor
    rises: Tensor  # since the last checkpoint
    mark_value: Tensor  # the best value at the last checkpoint
    mark_halved: Tensor  # whether the step was halved there
    share: Tensor = field(default_factory=lambda: torch.empty(0))  # l_1: of the entries that a step moves
    support: Tensor = field(default_factory=lambda: torch.empty(0))  # l_1: entries that differ from x


@dataclass(frozen=True, kw_only=True)
class APGD(SearchAttack):
    """z_k = project(x_k + s * direction(g_k)), x_{k+1} = project(x_k + a (z_k - x_k) + (1 - a)(x_k - x_{k-1})).

    Here a = .75, and the direction is sign(g) for l_inf and g / |g|_2 for l_2.
    The step s starts at 2 eps. At every checkpoint it is halved, and the search goes back to its best point, for the
    samples whose loss rose in fewer than three steps of four since the last checkpoint, or for which neither the step
    nor the best loss has changed. Returned is the best point seen; `Result.halvings` says when steps were halved.
    Source: Croce and Hein, Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
    attacks (2020), algorithm 1.

    For l_1 a step moves the share of the entries with the largest gradients, without momentum; every 4 % of the steps
    that share becomes 2/3 of the share of changed entries at the best point, and s is reset to eps where that is less
    than 95 % of the last one, and else divided by 1.5, down to eps / 10. The first 30 % of the steps search in a ball
    of 3 eps, the next 30 % in one of 2 eps. Source: Croce and Hein, Mind the box (2021), section 3.

    Args:
        steps: gradient steps of each restart.
        restarts: random restarts of each sample.
        targets: with ``loss="dlr-targeted"``, each restart is repeated towards the `targets` most likely wrong classes.
        published: follow the authors' code where it departs from the paper (l_inf and l_2): the start lies on the
            ball's surface; checkpoints are `published_checkpoints`; three steps of four count as too few; after going
            back the next loss is compared with that of the abandoned iterate, and the first one with 0; and the best
            loss is not compared at the first checkpoint.
    """

    steps: int = count(100)
    restarts: int = count(1)
    targets: int = count(9)
    published: bool = False

    def __post_init__(self) -> None:
        """Validate the settings."""
        super().__post_init__()
        if self.targeted and self.loss == "dlr-targeted":
            raise BackpassError(
                "loss 'dlr-targeted' leads away from y to classes of its own choice: "
                "with targeted=True use 'ce', 'dlr' or 'margin'."
            )

    @property
    def searches(self) -> int:
        """Restarts, towards every target."""
        return self.restarts * (self.targets if self.loss == "dlr-targeted" else 1)

    @cached_property
    def _marks(self) -> list[int]:
        if self.norm == "l1":
            return list(range(period := max(1, int(0.04 * self.steps)), self.steps + 1, period))
        return published_checkpoints(self.steps) if self.published else checkpoints(self.steps)

    def begin(self, oracle: Oracle, jobs: Jobs) -> Progress:
        """Start at a random point of the ball."""
        if self.loss == "dlr-targeted":
            rank = jobs.restart % self.targets
            jobs = jobs.with_targets(likely_wrong(oracle.forward(jobs.x, jobs), jobs.y, rank))
        ball = jobs.threat.scaled(self._widening(0))
        key = make_key(self.seed, jobs.index, jobs.restart, _START, like=jobs.index)
        drawn = self._on_surface(ball.radius(jobs.x), jobs, key) if self.published else ball.start(jobs.x, key)
        point = self.first_images(jobs, drawn)
        low = point.new_full((len(point),), -torch.inf)
        no = torch.zeros_like(low, dtype=torch.bool)
        eps = torch.as_tensor(jobs.threat.eps, dtype=point.dtype, device=point.device).expand(len(point))
        rows = len(point)
        return Progress(
            jobs=jobs,
            z=jobs.threat.project(jobs.x, point.clone()),
            seen=point,
            record=torch.full((rows, len(self._marks)), -1, dtype=torch.int64, device=point.device),
            point=point,
            before=point,
            gradient=point,
            size=(self._widening(0) if self.norm == "l1" else 2.0) * eps,
            value=torch.zeros_like(low) if self.published else low,
            best_point=point,
            best_gradient=point,
            best_value=low,
            kept_value=low,
            kept_fooled=no,
            rises=torch.zeros_like(low),
            mark_value=low,
            # The authors' code takes the step as halved before the search.
            mark_halved=~no if self.published else no,
            share=torch.full_like(low, 0.2),
            support=torch.full_like(low, float(jobs.x[0].numel())),
        )

    def _on_surface(self, eps: Tensor | float, jobs: Jobs, key: Tensor) -> Tensor:
        """X + eps t / ||t||, t uniform in [-1, 1] for l_inf and normal for l_2, projected."""
        drawn = uniform(key, jobs.x).mul_(2.0).sub_(1.0) if self.norm == "linf" else normal(key, jobs.x)
        if jobs.threat.mask is not None:
            drawn = drawn * jobs.threat.mask
        if self.norm == "l1":
            return jobs.threat.project(jobs.x, jobs.x + drawn)
        length = jobs.threat.size(drawn).clamp_min(1e-12).to(drawn.dtype)
        return jobs.threat.project(jobs.x, jobs.x + eps * drawn / per_sample(length, drawn))

    def _widening(self, iteration: int) -> float:
        """Radius of this step's ball, in eps."""
        if self.norm != "l1":
            return 1.0
        first, second = (math.ceil(share * self.steps) for share in (0.3, 0.6))
        return 3.0 if iteration < first else 2.0 if iteration < second else 1.0

    def advance(self, oracle: Oracle, state: State, iteration: int) -> Progress:
        """One gradient, at a checkpoint a look back, and one step."""
        assert isinstance(state, Progress)  # noqa: S101 -- `begin` made it
        wide = self._widening(iteration)
        if iteration and wide != self._widening(iteration - 1):
            state = self._shrunk(state, wide)
        logits, value, gradient = oracle.gradient(state.point, state.jobs)
        fooled = oracle.fooled(logits, state.jobs.y)
        if wide != 1:
            fooled &= state.jobs.threat.contains(state.jobs.x, state.point)
        state = self._observe(state, value, gradient, fooled, first=not bool(iteration), wide=wide)
        state = replace(state, seen=state.point, logits=logits)
        if wide != 1:  # what fools from outside of the ball is no success
            state = replace(state, logits=None, done=fooled if oracle.exact else torch.zeros_like(fooled))
        else:
            state = replace(state, done=None)
        if iteration in self._marks:
            last = self._marks.index(iteration)
            length = iteration - (self._marks[last - 1] if last else 0)
            state = self._sparser(state, wide) if self.norm == "l1" else self._halve(state, last, length, iteration)
        return self._move(state, wide, first=iteration == 0)

    def end(self, oracle: Oracle, state: State) -> Progress:
        """Observe the last iterate, of which only the loss is wanted."""
        assert isinstance(state, Progress)  # noqa: S101 -- `begin` made it
        logits = oracle.forward(state.point, state.jobs)
        value = oracle.objective(logits, state.jobs.y, state.jobs.target)
        fooled = oracle.fooled(logits, state.jobs.y)
        return self._observe(state, value, None, fooled, first=False, wide=1.0)

    def _observe(
        self, state: Progress, value: Tensor, gradient: Tensor | None, fooled: Tensor, *, first: bool, wide: float
    ) -> Progress:
        gradient = state.gradient if gradient is None else gradient
        better = value > state.best_value
        rose = (value > state.value).to(state.rises.dtype)
        take = (fooled & ~state.kept_fooled) | ((fooled == state.kept_fooled) & (value > state.kept_value))
        if wide != 1:
            take = fooled & ~state.kept_fooled
        return replace(
            state,
            gradient=gradient,
            value=value if not (first and self.published) else torch.zeros_like(value),
            rises=state.rises if first else state.rises + rose,
            best_point=choose(better, state.point, state.best_point),
            best_gradient=choose(better, gradient, state.best_gradient),
            best_value=torch.where(better, value, state.best_value),
            mark_value=value if first else state.mark_value,
            z=choose(take, state.point, state.z),
            kept_value=torch.where(take, value, state.kept_value),
            kept_fooled=state.kept_fooled | fooled,
        )

    def _halve(self, state: Progress, mark: int, length: int, iteration: int) -> Progress:
        """At a checkpoint, `length` iterations after the last, halve the steps that make no progress."""
        stalled = ~state.mark_halved & (state.mark_value >= state.best_value)
        enough = _PROGRESS * length
        halved = (state.rises <= enough if self.published else state.rises < enough) | stalled
        record = state.record.clone() if state.record is not None else None
        if record is not None:
            record[:, mark] = torch.where(halved, iteration, -1)
        return replace(
            state,
            record=record,
            size=torch.where(halved, 0.5 * state.size, state.size),
            point=choose(halved, state.best_point, state.point),
            gradient=choose(halved, state.best_gradient, state.gradient),
            value=state.value if self.published else torch.where(halved, state.best_value, state.value),
            rises=torch.zeros_like(state.rises),
            mark_value=state.best_value,
            mark_halved=halved,
        )

    def _sparser(self, state: Progress, wide: float) -> Progress:
        """The checkpoint of l_1: how many entries a step moves, and how far."""
        support = (state.best_point != state.jobs.x).flatten(1).sum(1).to(state.value.dtype)
        fewer = support < 0.95 * state.support
        eps = wide * torch.as_tensor(state.jobs.threat.eps, dtype=state.size.dtype, device=state.size.device)
        return replace(
            state,
            share=support / (1.5 * state.jobs.x[0].numel()),
            support=support,
            size=torch.where(fewer, eps, (state.size / 1.5).clamp_min(eps / 10)),
            point=choose(fewer, state.best_point, state.point),
            gradient=choose(fewer, state.best_gradient, state.gradient),
        )

    def _shrunk(self, state: Progress, wide: float) -> Progress:
        """Begin anew in a smaller ball, at the projection of the best point."""
        point = state.jobs.threat.scaled(wide).project(state.jobs.x, state.best_point.clone())
        low = torch.full_like(state.value, -torch.inf)
        eps = torch.as_tensor(state.jobs.threat.eps, dtype=low.dtype, device=low.device).expand(len(low))
        support = (point != state.jobs.x).flatten(1).sum(1).to(low.dtype)
        return replace(
            state,
            point=point,
            best_point=point,
            best_value=low,
            size=wide * eps,
            support=support,
            share=support / (1.5 * point[0].numel()),
        )

    def _move(self, state: Progress, wide: float, *, first: bool) -> Progress:
        """The next iterate; the first step has no momentum."""
        jobs = state.jobs
        if self.norm == "l1":
            ahead = state.point + per_sample(state.size, state.point) * _sparse(state.gradient, state.share)
            ahead = jobs.threat.scaled(wide).project(jobs.x, ahead)
            return replace(state, before=state.point, point=ahead)
        direction = jobs.threat.direction(state.gradient).mul_(per_sample(state.size, state.point))
        ahead = jobs.threat.project(jobs.x, direction.add_(state.point))
        if not first:
            ahead = ahead.sub_(state.point).mul_(_INERTIA).add_(state.point)
            ahead = jobs.threat.project(jobs.x, ahead.add_(state.point - state.before, alpha=1.0 - _INERTIA))
        return replace(state, before=state.point, point=ahead)


def _sparse(gradient: Tensor, share: Tensor) -> Tensor:
    """sign(g) / k on the k entries of largest |g|, k a share of them."""
    size = gradient.flatten(1).abs()
    count = (share * size.shape[1]).long().clamp(1, size.shape[1])
    least = size.sort(1, descending=True).values.gather(1, count[:, None] - 1)
    sign = torch.where(size >= least, gradient.flatten(1).sign(), 0.0)
    return (sign / sign.abs().sum(1, keepdim=True).clamp_min(1.0)).view(gradient.shape)
