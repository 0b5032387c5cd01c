"""Minimum-norm attacks: the nearest misclassified image at any distance."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from backpass.attacks.jobs import Jobs
from backpass.attacks.losses import margin
from backpass.attacks.oracle import Oracle, Verdict
from backpass.attacks.search import SearchAttack
from backpass.attacks.settings import count, setting
from backpass.attacks.state import State, choose
from backpass.attacks.targets import likely_wrong
from backpass.attacks.threat import Threat, make_threat, per_sample
from backpass.errors import BackpassError

__all__ = ["FMN", "MinimumNorm", "Nearest"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Nearest(State):
    """State of a minimum-norm search; `z` is the nearest misclassified image so far, or x.

    Attributes:
        point: (B, ...) the current iterate.
        distance: (B,) float64 distance of z; inf if no image was found.
    """

    point: Tensor
    distance: Tensor

    def results(self, images: Tensor) -> dict[str, Tensor]:
        """Add the distances."""
        return {**super().results(images), "distance": self.distance}

    def met(self, fooled: Tensor, threat: Threat, point: Tensor | None = None) -> Tensor:
        """Return (B,) bool: rows of the point (B, ...) that fool and are nearer than the best so far."""
        point = self.point if point is None else point
        return fooled & (threat.size(point - self.jobs.x) < self.distance)


@dataclass(frozen=True, kw_only=True)
class MinimumNorm(SearchAttack):
    """Base class of attacks that search the nearest misclassified image.

    `Result.distance` is that of the nearest image found, also beyond `eps`. With a finite `eps`, `Result.success`
    needs distance <= eps, `Result.x_adv` is projected onto the ball if no image was found inside, and `early_stop` ends
    the search at any image inside the ball.

    Args:
        eps: largest distance that counts as success; inf by default.
        loss: loss to report; the search does not use it.
    """

    minimum_norm: ClassVar[bool] = True

    eps: float | tuple[float, ...] = math.inf
    loss: str = "margin"

    @property
    def stops_early(self) -> bool:
        """True if an image inside the ball is enough."""
        return self.early_stop and not math.isinf(self.largest_eps)

    def score(self, oracle: Oracle, z: Tensor, jobs: Jobs, verdict: Verdict, found: dict[str, Tensor]) -> Tensor:
        """Return minus the smallest distance, -inf where no image fools."""
        size = oracle.threat.size(z.double() - jobs.x.double())
        return -torch.minimum(found["distance"], torch.where(verdict.success, size, torch.inf))

    def enough(self, state: Nearest) -> Tensor | None:
        """Return (B,) bool: rows whose search may end; None for none."""
        return state.distance <= state.jobs.threat.eps if self.stops_early else None

    def end(self, oracle: Oracle, state: State) -> State:
        """Project images outside the ball onto it."""
        if math.isinf(self.largest_eps):
            return state
        return replace(state, z=state.jobs.threat.project(state.jobs.x, state.z.clone()))


@dataclass(frozen=True, eq=False, kw_only=True)
class _Boundary(Nearest):
    """State of FMN; radius: (B,) radius of the projection of delta; found: (B,) bool."""

    radius: Tensor
    found: Tensor


@dataclass(frozen=True, kw_only=True)
class FMN(MinimumNorm):
    """Fast minimum-norm attack: delta <- project(delta + a g / |g|_2, ball of radius e), with an adaptive radius e.

    g is the gradient of the margin. e shrinks by (1 - c), to the smallest distance found at most, where the image is
    misclassified, and grows by (1 + c) where it is not; before the first success it is the sum of |delta|
    and the distance of the linearised boundary, |margin| / |g|_dual, but at least the last e, and times (1 + c).
    Without these two, as published, the search may converge to the boundary from inside, or be held by the bounds, and
    never cross it. a and c fall by cosine annealing.
    Such a search often ends at the boundary of a class that is not the nearest, so that further searches lead to the
    next most likely classes.
    Source: Pintor et al., Fast minimum-norm adversarial attacks through adaptive norm constraints (2021), algorithm 1,
    which is one search.

    Args:
        steps: gradient steps of each search.
        restarts: searches of each sample, of which number k > 0 leads to the class of the (k + 1)-th largest wrong
            logit; one where `targeted`.
        step: a at the start, in the l_2 norm; it falls to a hundredth.
        gamma: c at the start; it falls to `gamma_end`.
        gamma_end: c at the end.
    """

    steps: int = count(100)
    restarts: int = count(3)
    step: float = setting(1.0, "[0, inf)")
    gamma: float = setting(0.05, "(0, 1)")
    gamma_end: float = setting(0.001, "(0, 1)")

    def __post_init__(self) -> None:
        """Validate the settings."""
        super().__post_init__()
        if self.gamma_end > self.gamma:
            raise BackpassError(f"gamma_end must be at most gamma={self.gamma}; got {self.gamma_end}.")

    @property
    def searches(self) -> int:
        """Number of searches per sample."""
        return 1 if self.targeted else self.restarts

    def begin(self, oracle: Oracle, jobs: Jobs) -> State:
        """Return the initial state, at x or at the given start."""
        if bool((jobs.restart > 0).any()):
            aim = likely_wrong(oracle.forward(jobs.x, jobs), jobs.y, jobs.restart)
            jobs = jobs.with_targets(torch.where(jobs.restart > 0, aim, jobs.y))
        point = self.first_images(jobs, jobs.x)
        far = torch.full((len(point),), torch.inf, dtype=torch.float64, device=point.device)
        return _Boundary(
            jobs=jobs, z=jobs.x, seen=jobs.x, point=point, distance=far, radius=torch.zeros_like(far), found=far < 0
        )

    def advance(self, oracle: Oracle, state: State, iteration: int) -> State:
        """Take one gradient step and update the radius."""
        assert isinstance(state, _Boundary)  # noqa: S101 -- `begin` made it
        share = (1 + math.cos(math.pi * iteration / self.steps)) / 2
        step, gamma = (end + (start - end) * share for start, end in (
            (self.step, 0.01 * self.step), (self.gamma, self.gamma_end)))  # fmt: skip
        jobs, norm = state.jobs, oracle.threat
        logits, gap, gradient = oracle.gradient(state.point, jobs, objective=self._boundary)
        fooled = oracle.fooled(logits, jobs.y)
        size = norm.size(state.point - jobs.x)
        nearer = state.met(fooled, norm)
        state = replace(
            state,
            z=choose(nearer, state.point, state.z),
            distance=torch.where(nearer, size, state.distance),
            found=state.found | fooled,
        )
        boundary = size + gap.abs().double() / norm.dual(gradient).double().clamp_min(1e-12)
        radius = torch.where(
            fooled,
            torch.minimum(state.radius * (1 - gamma), state.distance),
            torch.where(state.found, state.radius, torch.maximum(boundary, state.radius)) * (1 + gamma),
        )
        length = torch.linalg.vector_norm(gradient.flatten(1), dim=1).clamp_min(1e-12)
        ahead = state.point + step * gradient / per_sample(length, gradient)
        ball = make_threat(self.norm, radius, self.bounds, jobs.threat.mask)
        state = replace(state, radius=radius, point=ball.project(jobs.x, ahead))
        return replace(state, seen=state.z, done=self.enough(state))

    def _boundary(self, logits: Tensor, y: Tensor, target: Tensor | None) -> Tensor:
        """Return the margin (B,) by which the logits miss another class than y, or the class to lead to."""
        if self.targeted:
            return -margin(logits, y)
        away = margin(logits, y)
        return away if target is None else torch.where(target == y, away, -margin(logits, target))
