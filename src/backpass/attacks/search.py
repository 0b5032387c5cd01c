"""Attacks that search in lockstep: restarts side by side, fooled samples leaving, and the verdict at the end."""

from __future__ import annotations

import logging
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from backpass.attacks.active_set import ActiveSet
from backpass.attacks.attack import Attack
from backpass.attacks.jobs import Jobs, batch_sizes, pad
from backpass.attacks.oracle import Oracle
from backpass.attacks.restarts import Best, further_restarts
from backpass.attacks.threat import per_sample

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
        z = found.z.detach()
        finite = z.flatten(1).isfinite().all(1)
        if not bool(finite.all()):
            logger.warning("%d of %d searches met a gradient that is not finite", int((~finite).sum()), real)
            z = torch.where(per_sample(finite, z), z, jobs.x)
        return Best(z, oracle.judge(z, jobs.aimed(found.target)), found.halvings)[:real]
