"""Jobs, one per (sample, restart), searched in lockstep."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from backpass.attacks.threat import Threat

__all__ = ["Jobs", "batch_sizes", "fitting", "pad"]


@dataclass(frozen=True, eq=False)
class Jobs:
    """Rows of a batch: sample and restart of each.

    Attributes:
        x: (B, ...) the original images.
        y: (B,) int64.
        index: (B,) int64, the samples' global indices, which name their random draws.
        row: (B,) int64, the samples' places in the call's batch.
        restart: (B,) int64.
        threat: the allowed images of each row.
        target: (B,) int64, the class to lead to, for losses that need one.
        start: (B, ...) images that the first restart begins at; None for the attack's own start.
    """

    x: Tensor
    y: Tensor
    index: Tensor
    row: Tensor
    restart: Tensor
    threat: Threat
    target: Tensor | None = None
    start: Tensor | None = None

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, keep: Tensor) -> Jobs:
        parts: dict[str, Any] = {one.name: getattr(self, one.name) for one in fields(self)}
        return Jobs(**{name: _rows(part, keep) for name, part in parts.items()})

    def at(self, rows: Tensor, restart: Tensor | None = None) -> Jobs:
        """Return jobs (B,) of these samples, restart 0 by default; `row` of each is its place among these jobs."""
        whole = len(rows) == len(self) and bool((rows == torch.arange(len(rows), device=rows.device)).all())
        some = self if whole else self[rows]
        row = torch.arange(len(rows), device=rows.device) if restart is None else rows
        return replace(some, row=row, restart=torch.zeros_like(rows) if restart is None else restart)

    def with_targets(self, target: Tensor | None) -> Jobs:
        """Return the jobs with the class that each is led to."""
        return replace(self, target=target)


def _rows(part: Any, keep: Tensor) -> Any:
    return None if part is None else part[keep]


def batch_sizes(capacity: int, *, compiled: bool = False) -> list[int]:
    """Return the allowed batch sizes, from small to large: sixteenths of the capacity.

    A compiled model is compiled anew for every size, and Dynamo gives up after eight, so it has seven of them.
    """
    parts = (1, 2, 4, 7, 10, 13, 16) if compiled else range(1, 17)
    return sorted({max(1, -(-capacity * part // 16)) for part in parts})


def fitting(count: int, sizes: list[int]) -> int:
    """Return the least of the sizes that holds `count` rows."""
    return next(size for size in sizes if size >= count)


def pad(rows: Tensor, sizes: list[int] | None) -> Tensor:
    """Repeat rows (B,) until there are as many as the next of the sizes; None allows every size."""
    size = len(rows) if sizes is None else fitting(len(rows), sizes)
    return rows if size == len(rows) else rows.repeat(-(-size // len(rows)))[:size]
