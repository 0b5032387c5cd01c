"""Batches of a training run: samples, order, and the part of each process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from backpass.errors import BackpassError
from backpass.training.orders import Order, mixed
from backpass.training.sources import Source

__all__ = ["Batch", "Batches", "Prepare", "to_unit_interval", "unit_interval"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Samples that a process computes at once; with several processes or parts, one slice of a step's samples.

    Attributes:
        x: (B, ...) inputs, prepared, on the model's device.
        y: (B,) labels, or (B, ...) targets.
        index: (B,) int64, the samples' positions in the training data.
        epoch: counted from 0.
        step: optimizer steps before this one, over all epochs.
        seed: the run's seed; random draws for a sample are made from (seed, index, epoch).
    """

    x: Tensor
    y: Tensor
    index: Tensor
    epoch: int
    step: int
    seed: int

    def __len__(self) -> int:
        return len(self.y)


Prepare = Callable[[Tensor, Batch], Tensor]
"""(x, batch) -> x, on the model's device: augmentation, normalization. ``batch.x`` is the same x."""


def to_unit_interval(x: Tensor, batch: Batch) -> Tensor:
    """Convert uint8 images to floats in [0, 1]; leave other tensors as they are."""
    return unit_interval(x)


def unit_interval(x: Tensor) -> Tensor:
    """Convert uint8 images to floats in [0, 1]; leave other tensors as they are."""
    return x.to(torch.get_default_dtype()).div_(255) if x.dtype == torch.uint8 else x


@dataclass(frozen=True, kw_only=True)
class Batches:
    """Batches of a run, independent of the number of processes and of accumulated parts.

    A batch is cut into one slice per process, and each slice into parts whose gradients are accumulated. Concatenated,
    the slices are the batch.

    Args:
        source: training data.
        order: order of the samples.
        seed: the run's seed.
        rank: rank of this process.
        processes: number of processes.
        parts: number of parts in which a process computes its slice.
        device: the model's device.
        prepare: applied to x on the device.
        channels_last: convert images (B, C, H, W) to this memory format.

    Raises:
        BackpassError: a batch would be larger than the data, or smaller than the number of processes.
    """

    source: Source
    order: Order
    seed: int
    rank: int
    processes: int
    parts: int
    device: torch.device
    prepare: Prepare
    channels_last: bool = False

    def __post_init__(self) -> None:
        self._check(self.order.sizes)

    def __len__(self) -> int:
        """Optimizer steps per epoch."""
        return len(self.order)

    def epoch(self, epoch: int, start: int = 0, step: int = 0) -> Iterator[tuple[list[Batch], int, bool]]:
        """Yield the steps of an epoch: this process's parts, the samples of all processes, and if it is the last one.

        Args:
            epoch: counted from 0.
            start: batches of the epoch to leave out.
            step: optimizer steps before the first one.

        Raises:
            BackpassError: a batch of the sampler has fewer samples than there are processes.
        """
        drawn = self.order.draw(epoch)
        sizes = [b - a for a, b in pairwise(drawn.cuts)]
        self._check(sizes)
        rows = [self._slices(a, b) for a, b in pairwise(drawn.cuts)]
        flat = [drawn.samples[one] for parts in rows for one in parts]
        before = sum(len(parts) for parts in rows[:start])
        there = drawn.samples.to(self.device)  # one transfer per epoch: one in each step would wait for the device
        reader = self.source.read(flat, before, self.device, mixed(self.seed, epoch, self.rank))
        for place in range(start, len(sizes)):
            parts = [
                self._batch(
                    *next(reader), there[one], {"epoch": epoch, "step": step + place - start, "seed": self.seed}
                )
                for one in rows[place]
            ]
            yield parts, sizes[place], place + 1 == len(sizes)

    def _check(self, sizes: Sequence[int]) -> None:
        least = min(sizes, default=self.processes)
        if least < self.processes:
            last = ", or drop_last=True" if least < sizes[0] else ""
            raise BackpassError(
                f"a batch of {least} samples cannot be shared by {self.processes} processes: use a larger "
                f"batch_size{last}."
            )

    def _batch(self, x: Tensor, y: Tensor, index: Tensor, numbers: dict[str, Any]) -> Batch:
        prepared = self.prepare(x, Batch(x=x, y=y, index=index, **numbers))
        if self.channels_last and prepared.dim() == 4:
            prepared = prepared.contiguous(memory_format=torch.channels_last)
        return Batch(x=prepared, y=y, index=index, **numbers)

    def _slices(self, first: int, end: int) -> list[slice]:
        """Return the parts of one batch that this process computes, as slices of the epoch's samples."""
        count = end - first
        begin, stop = (first + count * rank // self.processes for rank in (self.rank, self.rank + 1))
        parts = min(self.parts, stop - begin)
        cuts = [begin + (stop - begin) * part // parts for part in range(parts + 1)]
        return [slice(a, b) for a, b in pairwise(cuts)]
