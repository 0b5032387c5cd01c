"""Attacks that search in lockstep: restarts side by side, fooled samples leaving, and the verdict at the end."""

from __future__ import annotations

import logging
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from backpass.attacks.active_set import ActiveSet
from backpass.attacks.attack import Attack
from backpass.attacks.checks import check_images, check_labels, check_model
from backpass.attacks.jobs import Jobs, batch_sizes, pad
from backpass.attacks.losses import Loss
from backpass.attacks.oracle import Oracle
from backpass.attacks.restarts import Best, further_restarts
from backpass.attacks.threat import per_sample
from backpass.preserved import preserved

__all__ = ["Found", "SearchAttack"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Found:
    """What one search ends with.

    Attributes:
        z: (B, ...) images.
        target: (B,) the classes that the search led to, where its loss needs them.
        halvings: (B, K), see `Result`.
    """

    z: Tensor
    target: Tensor | None = None
    halvings: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class SearchAttack(Attack):
    """An attack is one search, `_search`, repeated for every restart on the samples not fooled so far."""

    @property
    def _rounds(self) -> int:
        """How many restarts, the first included."""
        return 1

    @abstractmethod
    def _search(self, oracle: Oracle, jobs: Jobs, active: ActiveSet) -> Found:
        """Searches for all jobs (B) in lockstep; returns a feasible image for each."""

    def search(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        indices: Tensor,
        value: Loss | None = None,
    ) -> Tensor:
        """Where one search of every sample ends, (N, ...): the inner maximum of adversarial training.

        Neither a verdict nor restarts, and nobody leaves early, so that it costs the search's own gradients.

        Args:
            model: as for a call of the attack, as are `x`, `y` and `indices`.
            x: (N, ...).
            y: (N,).
            indices: (N,).
            value: what to raise instead of the attack's loss, (logits (B, C), row (B,)) -> (B,); row: places in x.

        Raises:
            BackpassError: as a call of the attack does.
        """
        check_images(x, self.bounds)
        check_labels(x, y)
        check_model(model, x)
        check_labels(x, indices, "indices")
        with preserved(model):
            oracle = self.ask(model)
            row = torch.arange(len(x), device=x.device)
            if value is not None:
                raised = value
                # A job's target reaches the objective whatever order the search puts the jobs in.
                oracle.objective = lambda logits, _, target: raised(logits, row if target is None else target)
            jobs = Jobs(x.detach(), y.long(), indices.long(), row, torch.zeros_like(row), row)
            z = self._search(oracle, jobs, ActiveSet(jobs, len(x), [len(x)], early_stop=False)).z
            return _keep_finite(z.detach(), jobs)

    def _attack(self, oracle: Oracle, x: Tensor, y: Tensor, index: Tensor, capacity: int) -> Best:
        """All restarts of one batch (N, ...), N <= capacity."""
        sizes = batch_sizes(capacity, compiled=oracle.compiled)
        rows = torch.arange(len(x), device=x.device)
        best = self._run(oracle, Jobs(x, y, index, rows, torch.zeros_like(rows)), sizes)
        for row, restart in further_restarts(best, self._rounds, capacity, self.early_stop):
            found = self._run(oracle, Jobs(x[row], y[row], index[row], row, restart), sizes)
            for r in torch.unique(restart):
                same = restart == r
                best.improve(row[same], found[same], keep_first=self.early_stop)
        return best

    def _run(self, oracle: Oracle, jobs: Jobs, sizes: list[int]) -> Best:
        """One search in lockstep, in a batch of one of the sizes, and the verdict on what it found."""
        real = len(jobs)
        filled = pad(torch.arange(real, device=jobs.y.device), sizes)
        if len(filled) > real:
            jobs = jobs[filled]
        found = self._search(oracle, jobs, ActiveSet(jobs, real, sizes, self.early_stop))
        z = _keep_finite(found.z.detach(), jobs)
        return Best(z, oracle.judge(z, jobs.aimed(found.target)), found.halvings)[:real]


def _keep_finite(z: Tensor, jobs: Jobs) -> Tensor:
    """The images z (B, ...), those that are not finite replaced by the originals."""
    finite = z.flatten(1).isfinite().all(1)
    if bool(finite.all()):
        return z
    logger.warning("%d of %d searches met a gradient that is not finite", int((~finite).sum()), len(jobs))
    return torch.where(per_sample(finite, z), z, jobs.x)
