"""Jobs, one per (sample, restart), searched in lockstep, in batches of a few sizes.

A few sizes, because kernels are chosen, and a compiled model compiled, anew for each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

__all__ = ["Jobs", "batch_sizes", "fitting", "pad"]


@dataclass(frozen=True, eq=False)
class Jobs:
    """Rows of a batch: which sample, which restart.

    Attributes:
        x: (B, ...) the original images.
        y: (B,) int64.
        index: (B,) int64, the samples' global indices, which name their random draws.
        row: (B,) int64, the samples' places in the call's batch.
        restart: (B,) int64.
        target: (B,) int64, the class to lead to, for losses that need one.
    """

    x: Tensor
    y: Tensor
    index: Tensor
    row: Tensor
    restart: Tensor
    target: Tensor | None = None

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, keep: Tensor) -> Jobs:
        target = None if self.target is None else self.target[keep]
        return Jobs(self.x[keep], self.y[keep], self.index[keep], self.row[keep], self.restart[keep], target)

    def aimed(self, target: Tensor | None) -> Jobs:
        """The same jobs, each with the class to lead to."""
        return replace(self, target=target)


def batch_sizes(capacity: int, *, compiled: bool = False) -> list[int]:
    """The sizes that a batch may have, from small to large: sixteenths of the capacity.

    A compiled model is compiled anew for every size, and Dynamo gives up after eight, so it has seven of them.
    """
    parts = (1, 2, 4, 7, 10, 13, 16) if compiled else range(1, 17)
    return sorted({max(1, -(-capacity * part // 16)) for part in parts})


def fitting(count: int, sizes: list[int]) -> int:
    """The least of the sizes that holds `count` rows."""
    return next(size for size in sizes if size >= count)


def pad(rows: Tensor, sizes: list[int]) -> Tensor:
    """Repeats rows (B,) until there are as many as the next of the sizes."""
    size = fitting(len(rows), sizes)
    return rows if size == len(rows) else rows.repeat(-(-size // len(rows)))[:size]
