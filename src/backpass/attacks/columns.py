"""Outcomes of all samples, of which every process computes the rows of its batches."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["Columns", "device_of", "processes"]


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter or buffer, the CPU without one."""
    return next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def processes() -> tuple[int, int]:
    """Return this process's number and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


class Columns:
    """A table with a row for each sample, filled batch by batch.

    Args:
        device: where tensors are summed over processes by NCCL.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self.counts: dict[str, int] = {"computed": 0, "reused": 0}
        self.largest: dict[str, int] = {}

    def enter(self, name: str, index: Tensor, part: dict[str, Tensor], keys: Iterable[str]) -> None:
        """Enter values (B,) or (B, K) for samples with these places (B,)."""
        index = index.cpu()
        self._add(f"{name}/entered", index, torch.ones(len(index)))
        for key in keys:
            self._add(f"{name}/{key}", index, part[key])

    def count(self, name: str, number: int, *, largest: bool = False) -> None:
        """Add to a number of which the processes' sum, or their maximum, is wanted."""
        if largest:
            self.largest[name] = max(self.largest.get(name, 0), number)
        else:
            self.counts[name] = self.counts.get(name, 0) + number

    def collect(self, count: int) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Return the columns (count, K) in float64 and the numbers, the same in every process."""
        mine = (
            sorted((name, _width(parts)) for name, parts in self.parts.items()),
            dict(self.counts),
            dict(self.largest),
        )
        found: list[tuple[list[tuple[str, int]], dict[str, int], dict[str, int]]] = [mine]
        _, world = processes()
        if world > 1:
            found = [mine] * world
            dist.all_gather_object(found, mine)
        names = sorted({pair for columns, _, _ in found for pair in columns})
        table = {}
        for name, width in names:
            column = torch.zeros(count, width, dtype=torch.float64)
            for index, value in self.parts.get(name, []):
                column[index] = value
            table[name] = self._sum(column) if world > 1 else column
        numbers: dict[str, int] = {}
        for _, sums, maxima in found:
            for name, number in sums.items():
                numbers[name] = numbers.get(name, 0) + number
            for name, number in maxima.items():
                numbers[name] = max(numbers.get(name, 0), number)
        return table, numbers

    def _add(self, name: str, index: Tensor, value: Tensor) -> None:
        value = value.detach().double().cpu()
        self.parts.setdefault(name, []).append((index, value if value.dim() == 2 else value[:, None]))

    def _sum(self, column: Tensor) -> Tensor:
        # NCCL sums on the device, gloo on the CPU; every row but one is 0, so that float64 holds every value exactly.
        where = column.to(self.device) if dist.get_backend() == "nccl" else column
        dist.all_reduce(where)
        return where.cpu()


def _width(parts: list[tuple[Tensor, Tensor]]) -> int:
    return int(parts[0][1].shape[1])
