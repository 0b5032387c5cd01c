"""The fast gradient sign method and its iterations."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from backpass.attacks.iterative import Iterative
from backpass.attacks.jobs import Jobs
from backpass.attacks.oracle import Oracle
from backpass.attacks.search import SearchAttack
from backpass.attacks.state import State

__all__ = ["FGSM", "IFGSM"]


@dataclass(frozen=True, kw_only=True)
class FGSM(SearchAttack):
    """One step to the edge of the ball, x + eps * sign(grad loss(x)); for l_2, x + eps * g / |g|_2.

    A sample that is misclassified already stays as it is, unless `early_stop` is off.
    Source: Goodfellow, Shlens, Szegedy, Explaining and harnessing adversarial examples (2015), section 4.
    """

    def begin(self, oracle: Oracle, jobs: Jobs) -> State:
        """Start at x, or where the caller says."""
        z = self.first_images(jobs, jobs.x)
        return State(jobs=jobs, z=z, seen=z)

    def advance(self, oracle: Oracle, state: State, iteration: int) -> State:
        """One step to the edge of the ball."""
        jobs = state.jobs
        logits, _, gradient = oracle.gradient(state.z, jobs)
        step = oracle.threat.direction(gradient).mul_(jobs.threat.radius(jobs.x)).add_(state.z)
        return replace(state, z=jobs.threat.project(jobs.x, step), logits=logits)


@dataclass(frozen=True, kw_only=True)
class IFGSM(Iterative):
    """The basic iterative method: FGSM in small steps from x, projected after each.

    Source: Kurakin, Goodfellow, Bengio, Adversarial examples in the physical world (2017), section 2.2.
    """

    def direction(self, oracle: Oracle, gradient: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Steepest ascent, without memory."""
        return oracle.threat.direction(gradient), None
