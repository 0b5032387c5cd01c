"""The loop that FGSM's descendants share: a projected step of ascent, repeated."""

from __future__ import annotations

from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from backpass.attacks.jobs import Jobs
from backpass.attacks.noise import make_key, uniform
from backpass.attacks.oracle import Oracle, Pass
from backpass.attacks.search import SearchAttack, keep_finite
from backpass.attacks.settings import check_count, check_length, count, setting
from backpass.attacks.state import State
from backpass.attacks.threat import make_threat
from backpass.errors import BackpassError

__all__ = ["Ascent", "Iterative"]

_START, _VIEW = 1, 2  # what a draw is for


@dataclass(frozen=True, eq=False, kw_only=True)
class Ascent(State):
    """State of an ascent; memory: (B, ...) kept by `Iterative.direction` for its next call."""

    memory: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Iterative(SearchAttack):
    """z_{k+1} = project(z_k + step * direction(grad loss(view_k(z_k)))), z_0 = x or a random point.

    A subclass is a frozen dataclass that defines `direction`, and perhaps `view` or `look`.

    Args:
        step: length of a step in the attack's norm.
        steps: gradient steps of each restart.
        restarts: random restarts of each sample; one where nothing is random.
        random_start: start from a uniform draw in the ball instead of x.
        start_eps: radius of the ball that the random start is drawn from; `eps` where None.
        noise: half-width of fresh uniform noise, added at every iteration to the image whose gradient is taken,
            but not to the image that moves (Guo, Li, Chen 2020); 0 for none.
    """

    step: float = 2 / 255
    steps: int = count(10)
    restarts: int = count(1)
    random_start: bool = False
    start_eps: float | None = setting(None, "[0, inf)")
    noise: float = 0.0

    def __post_init__(self) -> None:
        """Validate the settings."""
        super().__post_init__()
        check_length("step", self.step, self.norm, self.bounds)
        check_length("noise", self.noise, "linf", self.bounds)
        if self.start_eps is not None and self.start_eps > self.largest_eps:
            raise BackpassError(f"start_eps must be in [0, eps={self.largest_eps:g}]; got {self.start_eps}.")
        if self.loss == "dlr-targeted":
            raise BackpassError("loss 'dlr-targeted' chooses target classes, which only APGD does.")

    def cost(self, steps: int) -> int:
        """Gradients of an image that so many steps of one search take."""
        return steps * self.eot

    def within(self, gradients: int) -> Self:
        """Return this attack with one search of as many steps as so many gradients of an image allow.

        Raises:
            BackpassError: they do not allow a step.
        """
        check_count("gradients", gradients)
        steps = bisect_right(range(1, gradients + 1), gradients, key=self.cost)
        if not steps:
            raise BackpassError(
                f"a budget of {gradients} gradients is too small: a step of {type(self).__name__} takes {self.cost(1)}."
            )
        return replace(self, steps=steps, restarts=1)

    def path(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        steps: Sequence[int],
        indices: Tensor | None = None,
        batch_size: int | None = None,
        mask: Tensor | None = None,
    ) -> list[Tensor]:
        """Return the images (N, ...) of one search of every sample after each of these numbers of steps.

        No sample is removed early. The last images are those of `__call__` with one restart and without early stop.

        Args:
            model: as for a call of the attack, as are `x`, `y`, `indices`, `batch_size` and `mask`.
            x: (N, ...).
            y: (N,).
            steps: in ascending order, each at least 1 and at most the attack's own.
            indices: (N,).
            batch_size: samples at a time.
            mask: entries that may change.

        Raises:
            BackpassError: as a call of the attack does, or the steps are not as said.
        """
        marks = list(steps)
        if not marks or sorted(marks) != marks or marks[0] < 1 or marks[-1] > self.steps:
            raise BackpassError(f"steps must be numbers in ascending order, from 1 to {self.steps}; got {marks}.")
        found: list[list[Tensor]] = [[] for _ in marks]
        with self.prepared(model, x, y, indices=indices, batch_size=batch_size, mask=mask) as (oracle, whole, capacity):
            for rows in torch.split(whole.row, capacity):
                jobs = whole.at(rows)
                state: State = self.begin(oracle, jobs)
                for iteration in range(marks[-1]):
                    state = self.advance(oracle, state, iteration)
                    for place, mark in enumerate(marks):
                        if mark == iteration + 1:
                            found[place].append(keep_finite(state.z.detach(), jobs))
        return [torch.cat(parts) for parts in found]

    @property
    def searches(self) -> int:
        """Restarts; without a random draw each would repeat the first."""
        return self.restarts if self._random else 1

    @property
    def _random(self) -> bool:
        """True if restarts differ."""
        return self.random_start or self.noise > 0

    @abstractmethod
    def direction(self, oracle: Oracle, gradient: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the direction of the step, and the memory for the next step.

        Args:
            oracle: the model under attack; ``oracle.threat.direction`` is the steepest direction in the attack's norm.
            gradient: (B, ...), of the loss, for the samples that are still searched.
            memory: (B, ...), the memory that the step before returned; None at the first step.

        Returns:
            (B, ...), which the caller may overwrite, and (B, ...) or None.
        """

    def view(self, jobs: Jobs, iteration: int) -> Callable[[Tensor], Tensor] | None:
        """Return the map (B, ...) -> (B, ...) through which the model sees the images at this iteration, or None."""
        if not self.noise:
            return None
        key = make_key(self.seed, jobs.index, jobs.restart, _VIEW, iteration, like=jobs.index)
        noise = uniform(key, jobs.x).mul_(2.0 * self.noise).sub_(self.noise)
        return lambda z: jobs.threat.clamp(z + noise)

    def look(self, oracle: Oracle, state: Ascent, iteration: int) -> tuple[Pass, bool]:
        """Return logits, loss and gradient at `state.z`, and whether the model saw `state.z` itself.

        An attack that needs several gradients for a step, or one at another point, overrides this.
        """
        view = self.view(state.jobs, iteration)
        return oracle.gradient(state.z, state.jobs, view=view), view is None

    def begin(self, oracle: Oracle, jobs: Jobs) -> Ascent:
        """Start at x, at a random point, or where the caller says."""
        z = jobs.x
        if self.random_start:
            ball = jobs.threat if self.start_eps is None else make_threat(
                self.norm, self.start_eps, self.bounds, jobs.threat.mask
            )  # fmt: skip
            z = ball.start(jobs.x, make_key(self.seed, jobs.index, jobs.restart, _START, like=jobs.index))
        z = self.first_images(jobs, z)
        return Ascent(jobs=jobs, z=z, seen=z)

    def advance(self, oracle: Oracle, state: State, iteration: int) -> Ascent:
        """One projected step."""
        assert isinstance(state, Ascent)  # noqa: S101 -- `begin` made it
        (logits, _, gradient), exact = self.look(oracle, state, iteration)
        return replace(self.stepped(oracle, state, gradient), logits=logits, exact=exact)

    def stepped(self, oracle: Oracle, state: Ascent, gradient: Tensor) -> Ascent:
        """Return the state after a step along this gradient (B, ...), and a projection."""
        direction, memory = self.direction(oracle, gradient, state.memory)
        z = state.jobs.threat.project(state.jobs.x, direction.mul_(self.step).add_(state.z))
        return replace(state, z=z, seen=state.z, memory=memory)
