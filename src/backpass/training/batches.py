"""Batches of a training run: order of the samples, and their distribution over processes."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from backpass.errors import BackpassError
from backpass.training.randomness import mixed, seeded
from backpass.training.sources import Source

if TYPE_CHECKING:
    from backpass.training.trainer import Trainer

_LOG = logging.getLogger(__name__)

__all__ = [
    "Batch",
    "Batches",
    "Order",
    "Prepare",
    "chosen",
    "epoch_order",
    "forward",
    "to_unit_interval",
    "unit_interval",
]


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Samples that a process computes at once: the batch of a step, or a slice of it.

    Attributes:
        x: (B, ...) inputs, prepared, on the model's device; or a dict of these, with which the model is called by
            keyword.
        y: (B,) labels, or (B, ...) targets.
        index: (B,) int64, the samples' positions in the training data.
        epoch: counted from 0.
        step: optimizer steps before this one, over all epochs.
        seed: the run's seed; random draws for a sample are made from (seed, index, epoch).
    """

    x: Any
    y: Tensor
    index: Tensor
    epoch: int
    step: int
    seed: int

    def __len__(self) -> int:
        return len(self.y)


Prepare = Callable[[Any, Batch], Any]
"""(x, batch) -> x, on the model's device: augmentation, normalization. ``batch.x`` is the same x."""


def to_unit_interval(x: Any, batch: Batch) -> Any:
    """Convert uint8 images to floats in [0, 1]; leave other inputs as they are."""
    return unit_interval(x)


def unit_interval(x: Any) -> Any:
    """Convert uint8 images to floats in [0, 1]; leave other inputs as they are."""
    if isinstance(x, Tensor) and x.dtype == torch.uint8:
        return x.to(torch.get_default_dtype()).div_(255)
    return x


def forward(model: nn.Module, x: Any) -> Any:
    """Call the model; with a dict of inputs by keyword."""
    return model(**x) if isinstance(x, Mapping) else model(x)


def chosen(x: Any, rows: slice | Tensor) -> Any:
    """Return the given rows of the inputs."""
    return {name: one[rows] for name, one in x.items()} if isinstance(x, Mapping) else x[rows]


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """Return the trainer's own order of an epoch: a permutation of 0..count-1 for (seed, epoch), int64 on the CPU."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(mixed(seed, epoch)))


class Order:
    """Batches of positions in the data, epoch by epoch.

    A sampler of a ``DataLoader`` is asked once per epoch, with the generators of torch, Python and NumPy seeded by
    (seed, epoch); ``set_epoch`` is called where it exists. To resume, the state of its ``generator`` (or its own
    ``state_dict``) is restored; a sampler without either is iterated once per earlier epoch. The hash of the order
    verifies that the resumed epoch equals the interrupted one.

    Args:
        source: the data.
        size: samples of a batch; None where the sampler yields batches.
        seed: seed of the order.
        drop_last: drop an incomplete last batch.

    Raises:
        BackpassError: a batch is larger than the data, or the sampler has no length.
    """

    def __init__(self, source: Source, size: int | None, seed: int, drop_last: bool) -> None:
        self._source, self._size, self._seed, self._drop_last = source, size, seed, drop_last
        self._drawn: tuple[int, list[Tensor]] | None = None
        self._before: dict[str, Any] = {}
        sampler = source.sampler
        self._name = type(sampler).__name__
        try:
            self._count = len(source if sampler is None else sampler)
        except (TypeError, NotImplementedError) as error:
            raise BackpassError(
                f"{self._name} has no __len__, so the steps of the run are not known: define it."
            ) from error
        if size is not None and size > self._count:
            raise BackpassError(f"batch_size={size} is more than the {self._count} samples of the data: lower it.")

    def __len__(self) -> int:
        """Return the number of batches of an epoch according to the sampler."""
        return self._count if self._size is None else len(self.sizes)

    @property
    def sizes(self) -> list[int]:
        """Sizes of the batches if they are known before iterating the sampler; else empty."""
        if self._size is None:
            return []
        whole, rest = divmod(self._count, self._size)
        return [self._size] * whole + [rest] * (rest > 0 and not self._drop_last)

    def draw(self, epoch: int) -> list[Tensor]:
        """Return the batches of an epoch, each (B,) int64 positions.

        Raises:
            BackpassError: the sampler yields nothing, or values that are no positions.
        """
        if self._drawn is None or self._drawn[0] != epoch:
            self._before = self.states()
            self._drawn = epoch, self._iterate(epoch)
        return self._drawn[1]

    def _iterate(self, epoch: int) -> list[Tensor]:
        source, count = self._source, len(self._source)
        if source.sampler is None:
            return self._cut(epoch_order(count, self._seed, epoch))
        for one in self._stateful():
            if hasattr(one, "set_epoch"):
                one.set_epoch(epoch)
        with seeded(mixed(self._seed, epoch)):
            found = list(source.sampler)
        try:
            lists = found if source.in_batches else [found]
            batches = [torch.tensor([int(one) for one in batch], dtype=torch.int64) for batch in lists]
        except (TypeError, ValueError) as error:
            raise BackpassError(f"a sampler must yield positions of samples, whole numbers: {error}.") from error
        if not batches or not all(map(len, batches)):
            raise BackpassError(f"{self._name} yields {'an empty batch' if len(batches) > 1 else 'no sample'}.")
        samples = torch.cat(batches)
        if self._count not in (len(found), len(samples)):
            _LOG.warning(
                "%s announces %d and yields %d in epoch %d: the steps of the run and its schedule are those announced.",
                self._name, self._count, len(found), epoch + 1,
            )  # fmt: skip
        if int(samples.min()) < 0 or int(samples.max()) >= count:
            raise BackpassError(
                f"{self._name} yields positions {int(samples.min())} to {int(samples.max())} of a data set of {count}."
            )
        return batches if source.in_batches else self._cut(samples)

    def _cut(self, samples: Tensor) -> list[Tensor]:
        assert self._size is not None  # noqa: S101  only batch samplers have none
        batches = [one for one in torch.split(samples, self._size) if len(one) == self._size or not self._drop_last]
        if not batches:
            raise BackpassError(f"{self._name} yields {len(samples)} samples, fewer than batch_size={self._size}.")
        return batches

    def state_dict(self) -> dict[str, Any]:
        """Return the last epoch drawn, its hash, and the sampler's state before it."""
        if self._source.sampler is None or self._drawn is None:
            return {}
        epoch, batches = self._drawn
        return {"epoch": epoch, "digest": _digest(batches), "before": self._before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of the sampler.

        Raises:
            BackpassError: the sampler yields another order than before.
        """
        self._drawn = None
        if not state:
            return
        if state["before"]:
            self.restore(state["before"])
        for epoch in range(state["epoch"] if state["before"] else 0, state["epoch"] + 1):
            drawn = self.draw(epoch)
        if _digest(drawn) != state["digest"]:
            raise BackpassError(
                f"{self._name} yields another order in epoch {state['epoch'] + 1} than in the interrupted run, so it "
                "cannot be resumed exactly. Make the sampler anew, as for the first start, and give it a generator "
                "(torch.Generator), or state_dict and load_state_dict."
            )

    def _stateful(self) -> list[Any]:
        outer = self._source.sampler
        return [one for one in (outer, getattr(outer, "sampler", None)) if one is not None]

    def states(self) -> dict[str, Any]:
        """Return the states of the sampler's generators, or its own."""
        states: dict[str, Any] = {}
        for place, one in enumerate(self._stateful()):
            if hasattr(one, "state_dict") and hasattr(one, "load_state_dict"):
                states[f"state {place}"] = one.state_dict()
            elif isinstance(getattr(one, "generator", None), torch.Generator):
                states[f"generator {place}"] = one.generator.get_state()
        return states

    def restore(self, states: dict[str, Any]) -> None:
        """Set the sampler to states that `states` returned."""
        for place, one in enumerate(self._stateful()):
            if f"state {place}" in states:
                one.load_state_dict(states[f"state {place}"])
            elif f"generator {place}" in states:
                one.generator.set_state(states[f"generator {place}"])


def _digest(batches: Sequence[Tensor]) -> str:
    content = torch.cat(list(batches)).numpy().tobytes() + repr(list(map(len, batches))).encode()
    return hashlib.sha256(content).hexdigest()[:16]


class Batches:
    """Batches of a run, independent of the number of processes and of accumulated parts.

    A batch is cut into one slice per process, and each slice into parts whose gradients are accumulated. Concatenated,
    the slices are the batch.

    Args:
        settings: settings of the run.
        rank: rank of this process.
        processes: number of processes.

    Raises:
        BackpassError: a batch has fewer samples than there are processes.
    """

    def __init__(self, settings: Trainer, rank: int, processes: int) -> None:
        self._settings, self._rank, self._processes = settings, rank, processes
        self._check(settings.order.sizes)

    def epoch(self, epoch: int, start: int = 0, step: int = 0) -> Iterator[tuple[list[Batch], int, bool]]:
        """Yield the steps of an epoch: this process's parts, the number of samples of all processes, True if last.

        Args:
            epoch: counted from 0.
            start: number of batches of the epoch to skip.
            step: optimizer steps before the first one.

        Raises:
            BackpassError: a batch of the sampler has fewer samples than there are processes.
        """
        settings = self._settings
        drawn = settings.order.draw(epoch)
        self._check(list(map(len, drawn)))
        steps = [self._parts(batch) for batch in drawn]
        rows = [part for parts in steps for part in parts]
        before = sum(map(len, steps[:start]))
        # One transfer per epoch: a transfer per step would synchronise with the device.
        placed = iter(torch.split(torch.cat(rows).to(settings.device), list(map(len, rows)))[before:])
        reader = settings.source.read(rows, before, settings.device, mixed(settings.seed, epoch, self._rank))
        for place in range(start, len(drawn)):
            numbers = {"epoch": epoch, "step": step + place - start, "seed": settings.seed}
            parts = [self._batch(*next(reader), next(placed), numbers) for _ in steps[place]]
            yield parts, len(drawn[place]), place + 1 == len(drawn)

    def _check(self, sizes: Sequence[int]) -> None:
        least = min(sizes, default=self._processes)
        if least < self._processes:
            last = ", or drop_last=True" if least < sizes[0] else ""
            raise BackpassError(
                f"a batch of {least} samples cannot be shared by {self._processes} processes: use a larger "
                f"batch_size{last}."
            )

    def _parts(self, batch: Tensor) -> Sequence[Tensor]:
        """Return the parts of a batch that this process computes."""
        if self._processes == self._settings.accumulate == 1:
            return [batch]
        own = batch.tensor_split(self._processes)[self._rank]
        return own.tensor_split(min(self._settings.accumulate, len(own)))

    def _batch(self, x: Any, y: Tensor, index: Tensor, numbers: dict[str, Any]) -> Batch:
        prepared = self._settings.prepare(x, Batch(x=x, y=y, index=index, **numbers))
        if not isinstance(prepared, Tensor | Mapping):
            raise BackpassError(f"prepare must return the inputs of the model, got {type(prepared).__name__}.")
        if self._settings.channels_last and isinstance(prepared, Tensor) and prepared.dim() == 4:
            prepared = prepared.contiguous(memory_format=torch.channels_last)
        return Batch(x=prepared, y=y, index=index, **numbers)
