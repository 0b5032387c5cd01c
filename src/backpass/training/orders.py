"""Order of the samples in an epoch: drawn from the trainer's seed, or by the sampler of a DataLoader."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from backpass.errors import BackpassError
from backpass.training.sources import Source

__all__ = ["Epoch", "Order", "epoch_order", "mixed", "random_states", "restore_random_states", "seeded"]


def mixed(*words: int) -> int:
    """Return one seed in [0, 2**63) made from several integers."""
    return int.from_bytes(hashlib.sha256(repr(words).encode()).digest()[:8], "big") >> 1


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """Return the trainer's own order of an epoch: a permutation of 0..count-1 for (seed, epoch), int64 on the CPU."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(mixed(seed, epoch)))


def random_states() -> dict[str, Any]:
    """Return the states of the CPU generators of torch, Python and NumPy, as tensors, numbers and lists."""
    version, words, gauss = random.getstate()
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "python": [version, list(words), gauss]}
    if "numpy" in sys.modules:
        _, keys, position, has_gauss, cached = sys.modules["numpy"].random.get_state()
        states["numpy"] = [torch.from_numpy(keys.astype("int64")), int(position), int(has_gauss), float(cached)]
    return states


def restore_random_states(states: dict[str, Any]) -> None:
    """Set the generators to states that `random_states` returned."""
    torch.set_rng_state(states["torch"])
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    if "numpy" in states and "numpy" in sys.modules:
        keys, *rest = states["numpy"]
        sys.modules["numpy"].random.set_state(("MT19937", keys.numpy().astype("uint32"), *rest))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the CPU generators of torch, Python and NumPy, and put back their states afterwards."""
    before = random_states()
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)
    try:
        yield
    finally:
        restore_random_states(before)


@dataclass(frozen=True)
class Epoch:
    """Samples of an epoch, in order.

    Attributes:
        samples: (n,) int64 positions in the data.
        cuts: where the batches begin, and n: batch k is ``samples[cuts[k]:cuts[k + 1]]``.
    """

    samples: Tensor
    cuts: Sequence[int]

    def __len__(self) -> int:
        return len(self.cuts) - 1

    @property
    def digest(self) -> str:
        """Hash of samples and cuts."""
        return hashlib.sha256(self.samples.numpy().tobytes() + repr(list(self.cuts)).encode()).hexdigest()[:16]


class Order:
    """Batches of positions, epoch by epoch.

    A sampler of a ``DataLoader`` is asked once per epoch, with the generators of torch, Python and NumPy seeded by
    (seed, epoch); ``set_epoch`` is called where it exists. To resume, the state of its ``generator`` (or its own
    ``state_dict``) is restored; a sampler without either is iterated once for each epoch that went before. The hash
    of the order proves that the resumed epoch is the interrupted one.

    Args:
        source: the data.
        size: samples of a batch; None where the sampler yields batches.
        seed: seed of the order.
        drop_last: drop an incomplete last batch.

    Raises:
        BackpassError: a batch is larger than the data.
    """

    def __init__(self, source: Source, size: int | None, seed: int, drop_last: bool) -> None:
        self._source, self._size, self._seed, self._drop_last = source, size, seed, drop_last
        self._drawn: tuple[int, Epoch] | None = None
        self._before: dict[str, Any] = {}
        self._count = len(source) if source.sampler is None else _length(source.sampler)
        if size is not None and size > self._count:
            raise BackpassError(f"batch_size={size} is more than the {self._count} samples of the data: lower it.")

    def __len__(self) -> int:
        """Batches of an epoch, as the sampler announces them."""
        return self._count if self._size is None else len(self.sizes)

    @property
    def sizes(self) -> list[int]:
        """Sizes of the batches where they are known before the sampler is asked; else empty."""
        if self._size is None:
            return []
        whole, rest = divmod(self._count, self._size)
        return [self._size] * whole + [rest] * (rest > 0 and not self._drop_last)

    def draw(self, epoch: int) -> Epoch:
        """Return the order of an epoch.

        Raises:
            BackpassError: the sampler yields nothing, or something else than positions.
        """
        if self._drawn is not None and self._drawn[0] == epoch:
            return self._drawn[1]
        self._before = self.states()
        drawn = self._iterate(epoch)
        self._drawn = epoch, drawn
        return drawn

    def _iterate(self, epoch: int) -> Epoch:
        sampler, count = self._source.sampler, len(self._source)
        if sampler is None:
            return self._cut(epoch_order(count, self._seed, epoch))
        for one in self._stateful():
            if hasattr(one, "set_epoch"):
                one.set_epoch(epoch)
        with seeded(mixed(self._seed, epoch)):
            found = list(sampler)
        batches = [list(batch) for batch in found] if self._source.in_batches else [found]
        try:
            samples = torch.tensor([int(one) for batch in batches for one in batch], dtype=torch.int64)
        except (TypeError, ValueError) as error:
            raise BackpassError(f"a sampler must yield positions of samples, whole numbers: {error}.") from error
        name = type(sampler).__name__
        if not len(samples) or not all(batches):
            raise BackpassError(f"{name} yields {'an empty batch' if len(samples) else 'no sample'}.")
        if int(samples.min()) < 0 or int(samples.max()) >= count:
            raise BackpassError(
                f"{name} yields positions {int(samples.min())} to {int(samples.max())} of a data set of {count}."
            )
        if self._source.in_batches:
            return Epoch(samples, [0, *accumulate(map(len, batches))])
        return self._cut(samples)

    def _cut(self, samples: Tensor) -> Epoch:
        assert self._size is not None  # noqa: S101  only batch samplers have none
        count = len(samples) // self._size * self._size if self._drop_last else len(samples)
        return Epoch(samples[:count], [*range(0, count, self._size), count])

    def state_dict(self) -> dict[str, Any]:
        """Return the last epoch drawn, its hash, and the sampler's state before it."""
        if self._source.sampler is None or self._drawn is None:
            return {}
        epoch, drawn = self._drawn
        return {"epoch": epoch, "digest": drawn.digest, "before": self._before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Bring the sampler to where it was.

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
        if drawn.digest != state["digest"]:
            raise BackpassError(
                f"{type(self._source.sampler).__name__} yields another order in epoch {state['epoch'] + 1} than in the "
                "interrupted run, so it cannot be resumed exactly. Make the sampler anew, as for the first start, and "
                "give it a generator (torch.Generator), or state_dict and load_state_dict."
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


def _length(sampler: Any) -> int:
    try:
        return len(sampler)
    except (TypeError, NotImplementedError) as error:
        raise BackpassError(
            f"{type(sampler).__name__} has no __len__, so the steps of the run are not known: define it."
        ) from error
