"""The active set: jobs already fooled leave the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from backpass.attacks.jobs import Jobs, fitting, pad
from backpass.attacks.oracle import Oracle

__all__ = ["ActiveSet"]


class ActiveSet:
    """Keeps the images of the jobs that have left, and says which rows go on.

    Args:
        jobs: all jobs at the start; a batch filled up to one of the sizes ends with idle copies.
        real: how many of them are no such copies.
        sizes: the batch sizes there may be, from small to large.
        early_stop: whether fooled samples leave at all.
    """

    def __init__(self, jobs: Jobs, real: int, sizes: list[int], early_stop: bool) -> None:
        self.samples = sizes[-1]  # rows are numbered within the call, which is no larger
        self.sizes, self.early_stop, self.x = sizes, early_stop, jobs.x
        self.row, self.restart = jobs.row, jobs.restart
        self.slot = torch.arange(len(jobs), device=jobs.y.device)
        self.live = self.slot < real
        self.count = real
        self.final: Tensor | None = None

    @property
    def done(self) -> bool:
        """No job is left."""
        return self.count == 0

    def fooled(self, oracle: Oracle, z: Tensor, jobs: Jobs, logits: Tensor, *, exact: bool = True) -> Tensor:
        """(B,) bool: which rows of z may leave, by the logits that the search has seen.

        Args:
            oracle: the model.
            z: (B, ...).
            jobs: the samples of its rows.
            logits: (B, C), of the search.
            exact: the model saw z itself; else, and in half precision, a fooled row is put before the judge.
        """
        if not self.early_stop:
            return torch.zeros_like(self.live)
        fooled = oracle.fooled(logits, jobs.y) & self.live
        if exact and oracle.exact:
            return fooled
        rows = fooled.nonzero().squeeze(1)
        if len(rows):
            padded = pad(rows, self.sizes)
            fooled[rows] = oracle.judge(z[padded], jobs[padded]).success[: len(rows)]
        return fooled

    def retire(self, z: Tensor, fooled: Tensor) -> Tensor | None:
        """Lets the fooled rows of z (B, ...) leave; fooled: (B,) bool.

        Returns:
            The rows (B',) that make up the next, smaller batch; None as long as the batch stays as it is.
        """
        if not self.early_stop:
            return None
        leaving = fooled & self.live
        live = self.live & ~fooled & ~self._superseded(leaving)
        count = int(live.sum())  # the one wait for the device in a step
        if count == self.count:
            return None
        if self.final is None:
            self.final = self.x.clone()
        self.final[self.slot[leaving]] = z[leaving]
        self.live, self.count = live, count
        size = fitting(count, self.sizes)
        if count == 0 or size >= len(live):
            return None
        # Rows that have left fill the batch up to one of the few sizes.
        keep = torch.argsort((~live).to(torch.uint8), stable=True)[:size].sort().values
        self.slot, self.live = self.slot[keep], self.live[keep]
        self.row, self.restart = self.row[keep], self.restart[keep]
        return keep

    def finish(self, z: Tensor) -> Tensor:
        """The final images of all jobs: z (B, ...) for those still in the batch."""
        if self.final is None:
            return z
        if not self.done:
            self.final[self.slot[self.live]] = z[self.live]
        return self.final

    def _superseded(self, leaving: Tensor) -> Tensor:
        """(B,) bool: an earlier restart of the same sample leaves now.

        Only the earliest successful restart counts, so that the answer does not depend on which ran together.
        """
        never = torch.iinfo(torch.int64).max
        first = self.restart.new_full((self.samples,), never)
        first = first.scatter_reduce(0, self.row, torch.where(leaving, self.restart, never), "amin")
        return self.restart > first[self.row]
