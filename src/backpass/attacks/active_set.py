"""The active set: jobs that are done are removed from the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from backpass.attacks.jobs import Jobs, fitting, pad
from backpass.attacks.oracle import Oracle
from backpass.attacks.state import State

__all__ = ["ActiveSet"]


class ActiveSet:
    """Collects the results of the jobs and decides which rows go on.

    Args:
        jobs: all jobs at the start; a padded batch ends with idle copies.
        real: number of jobs that are no such copies.
        sizes: batch sizes at which the batch is cut down.
        fixed: whether the batch has to have one of the sizes, filled up with finished rows.
        early_stop: whether finished jobs are removed at all.
    """

    def __init__(self, jobs: Jobs, real: int, sizes: list[int], *, fixed: bool, early_stop: bool) -> None:
        self.sizes, self.fixed, self.early_stop = sizes, fixed, early_stop
        self.slot = torch.arange(len(jobs), device=jobs.y.device)
        self.live = self.slot < real
        self.count = real
        self.size = len(jobs)
        self.final: dict[str, Tensor] = {}

    @property
    def done(self) -> bool:
        """Return whether no job is left."""
        return self.count == 0

    def retire(self, oracle: Oracle, state: State) -> Tensor | None:
        """Remove the rows that are done.

        Returns:
            The rows (B',) that make up the next, smaller batch; None as long as the batch stays as it is.
        """
        if not self.early_stop:
            return None
        leaving = self._finished(oracle, state) & self.live
        live = self.live & ~leaving & ~self._superseded(state.jobs, leaving)
        count = int(live.sum())  # the one wait for the device in a step
        if count == self.count:
            return None
        self._store(state, leaving, state.seen)
        self.live, self.count = live, count
        if count == 0:
            return None
        size = fitting(count, self.sizes)
        if size >= len(live):
            return None
        keep = (
            torch.argsort((~live).to(torch.uint8), stable=True)[:size].sort().values
            if self.fixed
            else live.nonzero().squeeze(1)
        )
        self.slot, self.live = self.slot[keep], self.live[keep]
        return keep

    def finish(self, state: State) -> dict[str, Tensor]:
        """Return the results of all jobs: images z, and where a search has them its targets and its record."""
        if not self.done:
            if not self.final:
                return state.results(state.z)
            self._store(state, self.live, state.z)
        return self.final

    def _finished(self, oracle: Oracle, state: State) -> Tensor:
        """(B,) bool: rows that are done; in half precision or under EOT a fooled row is put before the judge."""
        if state.done is not None:
            return state.done
        if state.logits is None:
            return torch.zeros_like(self.live)
        fooled = oracle.fooled(state.logits, state.jobs.y) & self.live
        if state.exact and oracle.exact:
            return fooled
        rows = fooled.nonzero().squeeze(1)
        if len(rows):
            padded = pad(rows, self.sizes if self.fixed else None)
            fooled[rows] = oracle.judge(state.seen[padded], state.jobs[padded]).success[: len(rows)]
        return fooled

    def _store(self, state: State, rows: Tensor, images: Tensor) -> None:
        for name, value in state.results(images).items():
            if name not in self.final:
                self.final[name] = value.new_zeros(self.size, *value.shape[1:])
            self.final[name][self.slot[rows]] = value[rows]

    def _superseded(self, jobs: Jobs, leaving: Tensor) -> Tensor:
        """(B,) bool: an earlier restart of the same sample leaves now.

        Only the earliest successful restart counts, so that the answer does not depend on which ran together.
        """
        never = torch.iinfo(torch.int64).max
        # Rows are numbered within a call's batch, which is no larger than the largest size.
        first = jobs.restart.new_full((self.sizes[-1],), never)
        first = first.scatter_reduce(0, jobs.row, torch.where(leaving, jobs.restart, never), "amin")
        return jobs.restart > first[jobs.row]
