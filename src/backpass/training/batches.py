"""The batches of a training run: which samples, in which order, and which part of them in which process."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from backpass.errors import BackpassError
from backpass.training.sources import Source

__all__ = ["Batch", "Batches", "Prepare", "epoch_order", "mixed", "to_unit_interval", "unit_interval"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Samples that a process sees at once; with several processes or parts, one slice of a step's samples.

    Attributes:
        x: (B, ...) inputs, prepared, on the model's device.
        y: (B,) labels, or (B, ...) targets.
        index: (B,) int64, the samples' positions in the training data.
        epoch: counted from 0.
        step: optimizer steps before this one, over all epochs.
        seed: the run's seed; draws of a sample belong to (seed, index, epoch).
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
    """uint8 images become floats in [0, 1]; anything else stays as it is."""
    return unit_interval(x)


def unit_interval(x: Tensor) -> Tensor:
    """The same of images alone."""
    return x.to(torch.get_default_dtype()).div_(255) if x.dtype == torch.uint8 else x


def mixed(*words: int) -> int:
    """One seed in [0, 2**63) from several integers."""
    return int.from_bytes(hashlib.sha256(repr(words).encode()).digest()[:8], "big") >> 1


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch: a permutation of 0..count-1 that (seed, epoch) names, (count,) int64 on the CPU."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(mixed(seed, epoch)))


@dataclass(frozen=True, kw_only=True)
class Batches:
    """The batches of a run, the same whatever the number of processes and of parts.

    A step's batch is a stretch of the epoch's order. It is cut into one slice per process, each of which is cut into
    parts, whose gradients are accumulated: all slices in turn are the batch, in order.

    Args:
        source: the training data.
        size: samples per optimizer step, over all processes and parts.
        seed: of the order.
        drop_last: leave out an incomplete last batch.
        rank: of this process.
        processes: how many there are.
        parts: in how many parts a process computes its slice.
        device: of the model.
        prepare: applied to x on the device.

    Raises:
        BackpassError: a batch would be larger than the data, or smaller than the processes are many.
    """

    source: Source
    size: int
    seed: int
    drop_last: bool
    rank: int
    processes: int
    parts: int
    device: torch.device
    prepare: Prepare

    def __post_init__(self) -> None:
        count = len(self.source)
        if self.size > count:
            raise BackpassError(f"batch_size={self.size} is more than the {count} samples of the data: lower it.")
        last = count % self.size if not self.drop_last else 0
        least = min(self.size, last or self.size)
        if least < self.processes:
            raise BackpassError(
                f"a batch of {least} samples cannot be shared by {self.processes} processes: use a larger batch_size"
                + (", or drop_last=True." if last else ".")
            )

    def __len__(self) -> int:
        """Optimizer steps per epoch."""
        count = len(self.source)
        return count // self.size if self.drop_last else -(-count // self.size)

    def samples(self, position: int) -> int:
        """How many samples the step at this position of an epoch has, over all processes."""
        return min(self.size, len(self.source) - position * self.size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[list[Batch]]:
        """The parts of this process, step by step, from position ``start`` of the epoch on."""
        order = epoch_order(len(self.source), self.seed, epoch)
        rows = [self._slices(position) for position in range(len(self))]
        flat = [order[one] for parts in rows for one in parts]
        before = sum(len(parts) for parts in rows[:start])
        # Moved once an epoch: a transfer in each step would wait for the device.
        there = order.to(self.device)
        reader = self.source.read(flat, before, self.device, mixed(self.seed, epoch, self.rank))
        for position in range(start, len(self)):
            step = epoch * len(self) + position
            yield [self._batch(*next(reader), there[one], epoch, step) for one in rows[position]]

    def _batch(self, x: Tensor, y: Tensor, index: Tensor, epoch: int, step: int) -> Batch:
        raw = Batch(x=x, y=y, index=index, epoch=epoch, step=step, seed=self.seed)
        prepared = self.prepare(x, raw)
        return Batch(x=prepared, y=y, index=index, epoch=epoch, step=step, seed=self.seed)

    def _slices(self, position: int) -> list[slice]:
        """Where in the order this process's parts of a step are; no part is empty."""
        first, count = position * self.size, self.samples(position)
        begin, end = (first + count * rank // self.processes for rank in (self.rank, self.rank + 1))
        parts = min(self.parts, end - begin)
        cuts = [begin + (end - begin) * part // parts for part in range(parts + 1)]
        return [slice(a, b) for a, b in pairwise(cuts)]
