"""Restarts side by side, and the best image of each sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from backpass.attacks.oracle import Verdict

__all__ = ["Best", "further_restarts"]


@dataclass(eq=False)
class Best:
    """The best image of each sample so far: z (N, ...), the search's next image, its verdict, and its record (N, K)."""

    z: Tensor
    ahead: Tensor
    verdict: Verdict
    score: Tensor
    record: Tensor | None = None

    def __getitem__(self, keep: Tensor | slice) -> Best:
        record = None if self.record is None else self.record[keep]
        return Best(self.z[keep], self.ahead[keep], Verdict(*(t[keep] for t in self.verdict)), self.score[keep], record)

    def improve(self, row: Tensor, other: Best, keep_first: bool) -> None:
        """Take other (B) at row (B,), all different, wherever it is better.

        A success beats a failure, and a larger score a smaller one; among successes only if not `keep_first`.
        """
        mine, theirs = self.verdict, other.verdict
        was, now = mine.success[row], theirs.success
        better = (now & ~was) | ((now == was) & (other.score > self.score[row]))
        if keep_first:
            better &= ~was
        at = row[better]
        self.z = self.z.index_copy(0, at, other.z[better])
        self.ahead = self.ahead.index_copy(0, at, other.ahead[better])
        self.score = self.score.index_copy(0, at, other.score[better].to(self.score.dtype))
        self.verdict = Verdict(*(a.index_copy(0, at, b[better]) for a, b in zip(mine, theirs, strict=True)))
        if self.record is not None and other.record is not None:
            self.record = self.record.index_copy(0, at, other.record[better])

    @classmethod
    def concatenate(cls, parts: Sequence[Best]) -> Best:
        """Join consecutive batches."""
        record = [part.record for part in parts if part.record is not None]
        return cls(
            torch.cat([part.z for part in parts]),
            torch.cat([part.ahead for part in parts]),
            Verdict(*(torch.cat(columns) for columns in zip(*(part.verdict for part in parts), strict=True))),
            torch.cat([part.score for part in parts]),
            torch.cat(record) if record else None,
        )


def further_restarts(best: Best, restarts: int, capacity: int, early_stop: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (row, restart), (B,) each with B <= capacity: restarts 1, 2, ... side by side in few batches.

    Where `early_stop`, only of samples that `best`, which the caller improves meanwhile, has no success for.
    """
    success = best.verdict.success
    rows = (~success).nonzero().squeeze(1) if early_stop else torch.arange(len(success), device=success.device)
    row = rows.repeat(restarts - 1)
    restart = torch.arange(1, restarts, device=rows.device).repeat_interleave(len(rows))
    for some_row, some_restart in zip(torch.split(row, capacity), torch.split(restart, capacity), strict=True):
        keep = ~best.verdict.success[some_row] if early_stop else slice(None)
        if len(some_row[keep]):
            yield some_row[keep], some_restart[keep]
