"""The fast gradient sign method and its iterations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from backpass.attacks.diversity import Diversity
from backpass.attacks.iterative import Iterative
from backpass.attacks.jobs import Jobs
from backpass.attacks.oracle import Oracle
from backpass.attacks.search import SearchAttack
from backpass.attacks.state import State
from backpass.attacks.threat import per_sample
from backpass.errors import BackpassError
from backpass.numbers import is_number

__all__ = ["FGSM", "IFGSM", "MIFGSM"]


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


@dataclass(frozen=True, kw_only=True)
class MIFGSM(Iterative):
    """Iterative FGSM with momentum, m <- decay * m + g / |g|_1, z <- project(z + step * direction(m)).

    Args:
        decay: of the momentum, at least 0.
        diversity: probability that the gradient is taken at a randomly shrunk and padded image (Xie et al., Improving
            transferability of adversarial examples with input diversity, 2019, section 3.3); images (N, C, H, W).
        resize: the least side of the shrunk image, as a fraction in (0, 1].

    Source: Dong et al., Boosting adversarial attacks with momentum (2018), algorithm 1.
    """

    decay: float = 1.0
    diversity: float = 0.0
    resize: float = 0.9

    def __post_init__(self) -> None:
        """Validate the settings."""
        super().__post_init__()
        numbers = all(map(is_number, (self.decay, self.diversity, self.resize)))
        if not numbers or self.decay < 0 or not 0 <= self.diversity <= 1 or not 0 < self.resize <= 1:
            raise BackpassError(
                "decay must be at least 0, diversity in [0, 1] and resize in (0, 1]; "
                f"got decay={self.decay}, diversity={self.diversity}, resize={self.resize}."
            )

    @property
    def _random(self) -> bool:
        return super()._random or self.diversity > 0

    def view(self, jobs: Jobs, iteration: int) -> Callable[[Tensor], Tensor] | None:
        """Add noise, shrink and pad."""
        noisy = super().view(jobs, iteration)
        if not self.diversity:
            return noisy
        diverse = Diversity(self.diversity, self.resize).draw(self.seed, jobs, iteration)
        return diverse if noisy is None else lambda z: diverse(noisy(z))

    def direction(self, oracle: Oracle, gradient: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Steepest ascent along the momentum, which is remembered."""
        length = gradient.abs().flatten(1).sum(1).clamp_min(torch.finfo(gradient.dtype).tiny)
        momentum = gradient / per_sample(length, gradient)
        if memory is not None:
            momentum = momentum.add_(memory, alpha=self.decay)
        return oracle.threat.direction(momentum), momentum
