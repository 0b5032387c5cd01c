"""Data sets in the forms that users have them, read in batches that keep their places."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

from backpass.errors import BackpassError

__all__ = ["Data", "Source"]

Data = tuple[Tensor, Tensor] | Dataset[Any] | DataLoader[Any]


class Source:
    """Reads (x, y) tensors, a map-style data set of pairs, or a loader of batches that does not shuffle.

    Args:
        data: what to read.
        batch_size: samples per batch; only the last one is smaller.

    Raises:
        BackpassError: the data is empty, has no length, or comes in another order each time.
    """

    def __init__(self, data: Data, batch_size: int) -> None:
        if batch_size < 1:
            raise BackpassError(f"batch_size must be at least 1; got {batch_size}.")
        self.data, self.batch_size = data, batch_size
        if isinstance(data, DataLoader):
            if isinstance(data.sampler, RandomSampler):
                raise BackpassError("the DataLoader shuffles, so samples have no fixed place: pass shuffle=False.")
            self.count = _length(data.sampler) if not data.drop_last else len(data) * int(data.batch_size or 1)
        elif isinstance(data, tuple):
            if len(data) != 2 or len(data[0]) != len(data[1]):
                raise BackpassError("data must be a pair (x, y) of tensors of equal length, a Dataset or a DataLoader.")
            self.count = len(data[0])
        else:
            self.count = _length(data)
        if self.count == 0:
            raise BackpassError("the data is empty: there is nothing to evaluate.")

    def __len__(self) -> int:
        """The number of batches."""
        return -(-self.count // self.batch_size)

    def batches(self, wanted: range) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yields (x, y, index) of the batches with these numbers, in order; index: (B,) places in the data."""
        reader = self._stream(wanted) if isinstance(self.data, DataLoader) else self._pick(wanted)
        for number, (x, y) in zip(wanted, reader, strict=True):
            first = number * self.batch_size
            yield x, y, torch.arange(first, first + len(x))

    def _pick(self, wanted: range) -> Iterator[tuple[Tensor, Tensor]]:
        for number in wanted:
            rows = range(number * self.batch_size, min((number + 1) * self.batch_size, self.count))
            if isinstance(self.data, tuple):
                yield self.data[0][rows.start : rows.stop], self.data[1][rows.start : rows.stop]
            else:
                pairs = [self.data[row] for row in rows]  # type: ignore[index]
                yield torch.stack([x for x, _ in pairs]), torch.as_tensor([int(y) for _, y in pairs])

    def _stream(self, wanted: range) -> Iterator[tuple[Tensor, Tensor]]:
        """Cuts the loader's batches anew, so that only `batch_size` says which samples go together."""
        x, y = torch.empty(0), torch.empty(0, dtype=torch.int64)
        number = 0
        for more_x, more_y in self.data:  # type: ignore[union-attr]
            x, y = (torch.cat([x, more_x]), torch.cat([y, more_y])) if len(x) else (more_x, more_y)
            while len(x) >= self.batch_size:
                if number in wanted:
                    yield x[: self.batch_size], y[: self.batch_size]
                x, y, number = x[self.batch_size :], y[self.batch_size :], number + 1
        if len(x) and number in wanted:
            yield x, y


def _length(data: object) -> int:
    try:
        return len(data)  # type: ignore[arg-type]
    except TypeError:
        raise BackpassError(
            f"data of type {type(data).__name__} has no length: "
            "give (x, y), a map-style Dataset or a DataLoader of one."
        ) from None
