"""FAB: the fast adaptive boundary attack, which looks for the nearest adversarial image."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from backpass.attacks.hyperplane import towards_hyperplane
from backpass.attacks.jobs import Jobs
from backpass.attacks.minimum import MinimumNorm, Nearest
from backpass.attacks.noise import make_key
from backpass.attacks.oracle import Oracle
from backpass.attacks.settings import count
from backpass.attacks.state import State, choose
from backpass.attacks.targets import likely_wrong
from backpass.attacks.threat import Threat, make_threat, per_sample
from backpass.errors import BackpassError

__all__ = ["FAB"]

_START = 1  # what the draw is for
_ALPHA_MAX, _ETA, _BETA = 0.1, 1.05, 0.9  # section 3.1 of the paper


@dataclass(frozen=True, kw_only=True)
class FAB(MinimumNorm):
    """x_{k+1} = clip((1 - a)(x_k + eta d_k) + a (x + eta d_x)): to the linearised boundary, with a pull towards x.

    d_k and d_x are the shortest ways, within the bounds, from x_k and from x to the hyperplane on which the linearised
    logits of y and of another class are equal; a = min(|d_k| / (|d_k| + |d_x|), .1), eta = 1.05. An image beyond the
    boundary is drawn back, x_k <- x + .9 (x_k - x).
    Source: Croce and Hein, Minimally distorted adversarial examples with a fast adaptive boundary attack (2020),
    algorithm 1.

    Args:
        steps: gradient steps of each restart.
        restarts: random restarts per target class; the first starts at x, the others at random within eps / 2, or
            half of the distance found so far where eps is inf.
        targets: number of the most likely wrong classes, each a search of its own, as in AutoAttack; None for the
            untargeted attack, whose other class is the nearest at every step, at the cost of a gradient for each class.
        published: with a finite eps, an image beyond it is dropped, as in auto-attack, not brought into the ball.
    """

    steps: int = count(100)
    restarts: int = count(1)
    targets: int | None = count(9)
    published: bool = False

    def __post_init__(self) -> None:
        """Validate the settings."""
        super().__post_init__()
        if self.targeted:
            raise BackpassError("FAB leads away from y and chooses its targets itself: leave targeted=False.")

    @property
    def searches(self) -> int:
        """Restarts, towards every target."""
        return self.restarts * (self.targets or 1)

    def begin(self, oracle: Oracle, jobs: Jobs) -> State:
        """Start at x, or at random."""
        targets = self.targets or 1
        if self.targets is not None:
            jobs = jobs.with_targets(likely_wrong(oracle.forward(jobs.x, jobs), jobs.y, jobs.restart % targets))
        point = jobs.x
        if bool((jobs.restart >= targets).any()):
            # Without a radius the draw is from the ball of a tenth of the range.
            eps = torch.as_tensor(jobs.threat.eps, dtype=torch.float64, device=point.device)
            radius = torch.where(eps.isfinite(), 0.5 * eps, 0.1 * jobs.threat.size(torch.ones_like(point[:1])))
            half = make_threat(self.norm, radius.expand(len(point)), self.bounds, jobs.threat.mask)
            key = make_key(self.seed, jobs.index, jobs.restart, _START, like=jobs.index)
            point = choose(jobs.restart < targets, jobs.x, half.start(jobs.x, key))
        far = torch.full((len(point),), torch.inf, dtype=torch.float64, device=point.device)
        return Nearest(jobs=jobs, z=jobs.x, seen=jobs.x, point=point, distance=far)

    def advance(self, oracle: Oracle, state: State, iteration: int) -> State:
        """One step to the linearised boundary and a look at what was reached."""
        assert isinstance(state, Nearest)  # noqa: S101 -- `begin` made it
        jobs, threat = state.jobs, oracle.threat
        logits, gap, w = self._hyperplane(oracle, state)
        if iteration == 0:
            state = self._met(oracle, state, state.point, logits)
        point = jobs.threat.restrict(jobs.x, self._step(threat, state.point, w, gap, jobs.x))
        logits = oracle.forward(point, jobs)
        state = self._met(oracle, state, point, logits)
        beyond = oracle.fooled(logits, jobs.y)
        state = replace(state, point=choose(beyond, jobs.x + _BETA * (point - jobs.x), point))
        return replace(state, seen=state.z, done=self.enough(state))

    def end(self, oracle: Oracle, state: State) -> State:
        """Bring what is too far into the ball, or drop it."""
        if not self.published:
            return super().end(oracle, state)
        inside = state.jobs.threat.contains(state.jobs.x, state.z)
        return replace(state, z=choose(inside, state.z, state.jobs.x))

    def _met(self, oracle: Oracle, state: Nearest, point: Tensor, logits: Tensor) -> Nearest:
        nearer = state.met(oracle.fooled(logits, state.jobs.y), oracle.threat, point)
        size = oracle.threat.size(point - state.jobs.x)
        return replace(state, z=choose(nearer, point, state.z), distance=torch.where(nearer, size, state.distance))

    def _hyperplane(self, oracle: Oracle, state: Nearest) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, and z_t - z_y with its gradient, of the target or of the class whose boundary is nearest."""
        jobs = state.jobs
        if self.targets is not None:
            return tuple(oracle.gradient(state.point, jobs, objective=_logit_difference))  # type: ignore[return-value]
        logits = oracle.forward(state.point, jobs)
        best = torch.full_like(logits[:, 0], torch.inf)
        gap, w = torch.zeros_like(best), torch.zeros_like(state.point)
        for label in range(logits.shape[1]):
            aimed = jobs.with_targets(torch.full_like(jobs.y, label))
            _, value, gradient = oracle.gradient(state.point, aimed, objective=_logit_difference)
            distance = value.abs() / oracle.threat.dual(gradient).clamp_min(1e-12)
            nearer = (distance < best) & (jobs.y != label) & value.isfinite()
            best, gap = torch.where(nearer, distance, best), torch.where(nearer, value, gap)
            w = choose(nearer, gradient, w)
        return logits, gap, w

    def _step(self, threat: Threat, z: Tensor, w: Tensor, gap: Tensor, x: Tensor) -> Tensor:
        """One step of algorithm 1; w: grad of z_t - z_y at z, gap: its value."""
        at_x = gap + (w * (x - z)).flatten(1).sum(1)
        d_z = towards_hyperplane(z, w, -gap, self.norm, self.bounds)
        d_x = towards_hyperplane(x, w, -at_x, self.norm, self.bounds)
        far_z, far_x = threat.size(d_z), threat.size(d_x)
        a = per_sample((far_z / (far_z + far_x).clamp_min(1e-12)).clamp_max(_ALPHA_MAX).to(z.dtype), z)
        return threat.clamp((1 - a) * (z + _ETA * d_z) + a * (x + _ETA * d_x))


def _logit_difference(logits: Tensor, y: Tensor, target: Tensor | None) -> Tensor:
    """z_t - z_y, (B,)."""
    assert target is not None  # noqa: S101 -- FAB aims every job
    return (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None])).squeeze(1)
