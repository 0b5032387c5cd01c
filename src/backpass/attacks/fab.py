"""FAB: the fast adaptive boundary attack, which looks for the nearest adversarial image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from backpass.attacks.active_set import ActiveSet
from backpass.attacks.apgd import likely_wrong
from backpass.attacks.hyperplane import towards_hyperplane
from backpass.attacks.jobs import Jobs
from backpass.attacks.noise import make_key
from backpass.attacks.oracle import Oracle
from backpass.attacks.search import Found, SearchAttack
from backpass.attacks.threat import Threat, make_threat, per_sample
from backpass.errors import BackpassError

__all__ = ["FAB"]

_START = 1  # what the draw is for
_ALPHA_MAX, _ETA, _BETA = 0.1, 1.05, 0.9  # section 3.1 of the paper


@dataclass(frozen=True, kw_only=True)
class FAB(SearchAttack):
    """x_{k+1} = clip((1 - a)(x_k + eta d_k) + a (x + eta d_x)): to the linearised boundary, with a pull towards x.

    d_k and d_x are the shortest ways, within the bounds, from x_k and from x to the hyperplane on which the linearised
    logits of y and of the target class are equal; a = min(|d_k| / (|d_k| + |d_x|), .1), eta = 1.05. An image beyond the
    boundary is drawn back, x_k <- x + .9 (x_k - x). A success is an image found within eps. Only `eps`, not the
    `loss`, enters, which merely reports.
    Source: Croce and Hein, Minimally distorted adversarial examples with a fast adaptive boundary attack (2020),
    algorithm 1, in the targeted form of AutoAttack.

    Args:
        steps: gradient steps of each restart.
        restarts: searches per target class; the first starts at x, the others at random within eps / 2.
        targets: the most likely wrong classes, each a search of its own.
    """

    steps: int = 100
    restarts: int = 1
    targets: int = 9
    loss: str = "margin"

    def __post_init__(self) -> None:
        """Refuses settings that cannot be meant."""
        super().__post_init__()
        if min(self.steps, self.restarts, self.targets) < 1:
            raise BackpassError(
                "steps, restarts and targets must be at least 1; "
                f"got steps={self.steps}, restarts={self.restarts}, targets={self.targets}."
            )
        if self.targeted:
            raise BackpassError("FAB leads away from y and chooses its targets itself: leave targeted=False.")

    @property
    def _rounds(self) -> int:
        return self.restarts * self.targets

    def _search(self, oracle: Oracle, jobs: Jobs, active: ActiveSet) -> Found:
        jobs = jobs.aimed(likely_wrong(oracle.forward(jobs.x, jobs), jobs.y, jobs.restart % self.targets))
        threat, half = oracle.threat, make_threat(self.norm, 0.5 * self.eps, self.bounds)
        key = make_key(self.seed, jobs.index, jobs.restart, _START, like=jobs.index)
        z = torch.where(per_sample(jobs.restart < self.targets, jobs.x), jobs.x, half.start(jobs.x, key))
        nearest = jobs.x
        distance = torch.full_like(threat.size(jobs.x), torch.inf)
        for iteration in range(self.steps):
            logits, gap, w = oracle.gradient(z, jobs, objective=_logit_difference)
            if iteration == 0:
                distance = torch.where(oracle.fooled(logits, jobs.y), threat.size(z - jobs.x), distance)
                nearest = torch.where(per_sample(distance.isfinite(), z), z, nearest)
            z = self._step(threat, z, w, gap, jobs.x)
            logits = oracle.forward(z, jobs)
            beyond = oracle.fooled(logits, jobs.y)
            size = threat.size(z - jobs.x)
            closer = beyond & (size < distance)
            nearest = torch.where(per_sample(closer, z), z, nearest)
            distance = torch.where(closer, size, distance)
            z = torch.where(per_sample(beyond, z), jobs.x + _BETA * (z - jobs.x), z)
            # Whatever is inside the ball is enough: nothing nearer is asked for.
            keep = active.retire(nearest, distance <= self.eps)
            if active.done:
                break
            if keep is not None:
                z, nearest, distance, jobs = z[keep], nearest[keep], distance[keep], jobs[keep]
        # The nearest image that is too far may fool the model still when it is brought into the ball.
        return Found(active.finish(threat.project(jobs.x, nearest.clone())))

    def _step(self, threat: Threat, z: Tensor, w: Tensor, gap: Tensor, x: Tensor) -> Tensor:
        """One step of algorithm 1; w: grad of z_t - z_y at z, gap: its value."""
        at_x = gap + (w * (x - z)).flatten(1).sum(1)
        d_z = towards_hyperplane(z, w, -gap, self.norm, self.bounds)
        d_x = towards_hyperplane(x, w, -at_x, self.norm, self.bounds)
        far_z, far_x = threat.size(d_z), threat.size(d_x)
        a = per_sample((far_z / (far_z + far_x).clamp_min(1e-12)).clamp_max(_ALPHA_MAX).to(z.dtype), z)
        return ((1 - a) * (z + _ETA * d_z) + a * (x + _ETA * d_x)).clamp(*self.bounds)


def _logit_difference(logits: Tensor, y: Tensor, target: Tensor | None) -> Tensor:
    """z_t - z_y, (B,)."""
    assert target is not None  # noqa: S101 -- FAB aims every job
    return (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None])).squeeze(1)
