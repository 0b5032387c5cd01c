"""The loop that FGSM's descendants share: a projected step of ascent, repeated."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from backpass.attacks.active_set import ActiveSet
from backpass.attacks.checks import check_radius
from backpass.attacks.jobs import Jobs
from backpass.attacks.noise import make_key, uniform
from backpass.attacks.oracle import Oracle
from backpass.attacks.search import Found, SearchAttack
from backpass.attacks.threat import make_threat
from backpass.errors import BackpassError

__all__ = ["Iterative"]

_START, _VIEW = 1, 2  # what a draw is for


@dataclass(frozen=True, kw_only=True)
class Iterative(SearchAttack):
    """z_{k+1} = project(z_k + step * direction(grad loss(view_k(z_k)))), z_0 = x or a random point.

    A subclass is a frozen dataclass that defines `direction`, and perhaps `view`.

    Args:
        step: length of a step in the attack's norm.
        steps: gradient steps of each restart.
        restarts: searches of each sample, each with its own random draws; one where nothing is random.
        random_start: start from a uniform draw in the ball instead of x.
        start_eps: radius of the ball that the random start is drawn from; `eps` where None.
        noise: half-width of fresh uniform noise, added at every iteration to the image whose gradient is taken,
            but not to the image that moves (Guo, Li, Chen 2020); 0 for none.
    """

    step: float = 2 / 255
    steps: int = 10
    restarts: int = 1
    random_start: bool = False
    start_eps: float | None = None
    noise: float = 0.0

    def __post_init__(self) -> None:
        """Refuses settings that cannot be meant."""
        super().__post_init__()
        check_radius("step", self.step, self.norm, self.bounds)
        if self.start_eps is not None and not 0 <= self.start_eps <= self.eps:
            raise BackpassError(f"start_eps must be in [0, eps={self.eps:g}]; got {self.start_eps}.")
        check_radius("noise", self.noise, "linf", self.bounds)
        if self.loss == "dlr-targeted":
            raise BackpassError("loss 'dlr-targeted' chooses target classes, which only APGD does.")
        if self.steps < 1 or self.restarts < 1:
            raise BackpassError(
                f"steps and restarts must be at least 1; got steps={self.steps}, restarts={self.restarts}."
            )

    @property
    def _rounds(self) -> int:
        # Without a random draw every restart would repeat the first.
        return self.restarts if self._random else 1

    @property
    def _random(self) -> bool:
        """Whether restarts differ."""
        return self.random_start or self.noise > 0

    @abstractmethod
    def direction(self, oracle: Oracle, gradient: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The step's direction, and what the next step needs to remember.

        Args:
            oracle: the model under attack; ``oracle.threat.direction`` is the steepest direction in the attack's norm.
            gradient: (B, ...), of the loss, for the samples that are still searched.
            memory: (B, ...), what the step before gave to remember; None at the first step.

        Returns:
            (B, ...), which the caller may overwrite, and (B, ...) or None.
        """

    def view(self, jobs: Jobs, iteration: int) -> Callable[[Tensor], Tensor] | None:
        """How the model sees the images (B, ...) at this iteration; None for as they are."""
        if not self.noise:
            return None
        key = make_key(self.seed, jobs.index, jobs.restart, _VIEW, iteration, like=jobs.index)
        noise = uniform(key, jobs.x).mul_(2.0 * self.noise).sub_(self.noise)
        return lambda z: (z + noise).clamp(*self.bounds)

    def _search(self, oracle: Oracle, jobs: Jobs, active: ActiveSet) -> Found:
        threat, memory = oracle.threat, None
        z = jobs.x
        if self.random_start:
            radius = self.eps if self.start_eps is None else self.start_eps
            ball = make_threat(self.norm, radius, self.bounds)
            z = ball.start(jobs.x, make_key(self.seed, jobs.index, jobs.restart, _START, like=jobs.index))
        for iteration in range(self.steps):
            view = self.view(jobs, iteration)
            logits, _, gradient = oracle.gradient(z, jobs, view=view)
            keep = active.retire(z, active.fooled(oracle, z, jobs, logits, exact=view is None))
            if active.done:
                break
            if keep is not None:
                z, gradient, jobs = z[keep], gradient[keep], jobs[keep]
                memory = None if memory is None else memory[keep]
            direction, memory = self.direction(oracle, gradient, memory)
            z = threat.project(jobs.x, direction.mul_(self.step).add_(z))
        return Found(active.finish(z))
