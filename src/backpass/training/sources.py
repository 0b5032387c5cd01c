"""Training and evaluation data (tensors, data sets, loaders), read by position."""

from __future__ import annotations

import hashlib
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    default_collate,
)

from backpass.errors import BackpassError

__all__ = ["Data", "Source"]

Data = tuple[Tensor, Tensor] | Dataset[Any] | DataLoader[Any]
"""(x, y) tensors on any device, also memory-mapped; a map-style data set of pairs; or a loader of one."""

_HASHED = 2**28  # bytes up to which all of a data set is hashed; of a larger one, this many rows:
_SAMPLED = 64
_READING = ("num_workers", "collate_fn", "prefetch_factor", "worker_init_fn", "multiprocessing_context")


class Source:
    """Read the samples at given positions.

    Args:
        data: the data. Of a ``DataLoader`` everything is used: data set, workers, ``collate_fn``, sampler or batch
            sampler, batch size and ``drop_last``.

    Attributes:
        sampler: the sampler of a ``DataLoader``, or None for all samples in an order of the trainer's.
        in_batches: whether ``sampler`` yields whole batches of indices.
        batch_size: the batch size of a ``DataLoader``, or None.
        drop_last: that of a ``DataLoader``, or None.

    Raises:
        BackpassError: the data is empty, cannot be read by position, or x and y have different lengths.
    """

    def __init__(self, data: Data) -> None:
        self.sampler: Any = None
        self.in_batches = False
        self.batch_size: int | None = None
        self.drop_last: bool | None = None
        self._reading: dict[str, Any] = {"num_workers": 0, "collate_fn": default_collate}
        given: Any = data
        if isinstance(data, DataLoader):
            self._reading = {name: getattr(data, name) for name in _READING}
            given = data.dataset
        plain = self._reading["collate_fn"] is default_collate and not self._reading.get("worker_init_fn")
        if type(given) is TensorDataset and len(given.tensors) == 2 and plain:
            given = tuple(given.tensors)
        self._data = _checked(given)
        self._count = len(self._data[1]) if isinstance(self._data, tuple) else len(self._data)
        if not self._count:
            raise BackpassError("the data is empty: at least one sample is needed.")
        if isinstance(data, DataLoader):
            self._read_order(data)

    def _read_order(self, loader: DataLoader[Any]) -> None:
        if type(loader).__iter__ is not DataLoader.__iter__:
            raise BackpassError(
                f"{type(loader).__name__} has an __iter__ of its own, which the trainer, reading samples by position, "
                "would ignore: give a plain DataLoader of its data set, with a sampler and collate_fn."
            )
        if loader.batch_sampler is None:
            raise BackpassError("the DataLoader has batch_size=None: the trainer needs batches; give it a batch_size.")
        if type(loader.batch_sampler) is BatchSampler and loader.batch_size is not None:
            self.sampler, self.batch_size, self.drop_last = loader.sampler, loader.batch_size, loader.drop_last
        else:
            self.sampler, self.in_batches = loader.batch_sampler, True
            self.batch_size = getattr(loader.batch_sampler, "batch_size", None)
        inner = getattr(loader.batch_sampler, "sampler", None)
        if any(isinstance(one, DistributedSampler) for one in (self.sampler, inner)):
            raise BackpassError(
                "the DataLoader has a DistributedSampler, and the trainer itself gives every process its part of each "
                "batch: leave the DistributedSampler out."
            )
        one = self.sampler
        if type(one) is RandomSampler and not one.replacement and one.num_samples == self._count:
            self.sampler = None  # every sample once, shuffled: the trainer's own order does that and can be resumed

    def __len__(self) -> int:
        return self._count

    @property
    def sequential(self) -> bool:
        """True if the samples are read in the order of the data."""
        return type(self.sampler) is SequentialSampler

    @property
    def tensors(self) -> tuple[Tensor, Tensor] | None:
        """Inputs and targets, where the data is a pair of tensors."""
        return self._data if isinstance(self._data, tuple) else None

    def describe(self) -> dict[str, Any]:
        """Describe the data in JSON's types; of large data the hash of some rows stands for all."""
        order: dict[str, Any] = {}
        if self.sampler is not None:
            weights = getattr(self.sampler, "weights", None)
            order = {"sampler": type(self.sampler).__qualname__}
            if isinstance(weights, Tensor):
                order["weights"] = _digest([weights])
        if self.tensors is None:
            return {"samples": len(self), "type": type(self._data).__qualname__, **order}
        x, y = self.tensors
        shapes = [f"{one.dtype} {tuple(one.shape)}" for one in (x, y)]
        hashed: Sequence[Tensor] = (x, y)
        if x.nbytes + y.nbytes > _HASHED:
            rows = torch.linspace(0, len(self) - 1, min(_SAMPLED, len(self)), dtype=torch.float64).long()
            hashed = [one[rows.to(one.device)] for one in (x, y)]
        return {"samples": len(self), "x": shapes[0], "y": shapes[1], "sha256": _digest(hashed), **order}

    def read(self, rows: Sequence[Tensor], start: int, device: torch.device, seed: int) -> Iterator[tuple[Any, Tensor]]:
        """Yield x (B, ...), or a dict of such, and y (B, ...) of ``rows[start:]``, each (B,) positions, on the device.

        With workers the rows before ``start`` are read and dropped, so that random numbers drawn in the workers are
        those of an uninterrupted run.

        Raises:
            BackpassError: a sample cannot be read; a batch is no pair of tensors, or has another number of samples
                than asked for; or the data has another length than before.
        """
        if self.tensors is not None:
            x, y = self.tensors
            for of_x, of_y in zip(_beside(x, rows[start:]), _beside(y, rows[start:]), strict=True):
                yield _to(x[of_x], device), _to(y[of_y], device)
            return
        if len(self._data) != self._count:
            raise BackpassError(
                f"the data had {self._count} samples when the trainer was made, and has {len(self._data)} now: train "
                "on data that stays as it is, or make a trainer for each part of the run."
            )
        skipped = start if self._reading["num_workers"] else 0
        loader = DataLoader(
            self._data,
            batch_sampler=[chosen.tolist() for chosen in rows[start - skipped :]],
            generator=torch.Generator().manual_seed(seed),
            **self._reading,
        )
        batches = islice(loader, skipped, None)
        for asked in rows[start:]:
            try:
                pair = next(batches)
            except Exception as error:
                reason = (str(error).strip().splitlines() or [""])[-1]  # a worker gives the whole traceback
                raise BackpassError(
                    f"{type(self._data).__qualname__} cannot read and stack samples {reprlib.repr(asked.tolist())}: "
                    f"{type(error).__name__}: {reason}. Leave broken samples out of the data set or the sampler."
                ) from error
            x, y = self._pair(pair)
            inputs = list(x.values()) if isinstance(x, dict) else [x]
            if {len(one) for one in (*inputs, y)} != {len(asked)}:
                raise BackpassError(
                    f"{len(asked)} samples were asked for, and collate_fn returned {len(inputs[0])} inputs and "
                    f"{len(y)} targets. It must keep every sample: leave broken samples out of the data set or the "
                    "sampler."
                )
            moved = [_to(one, device) for one in inputs]
            yield dict(zip(x, moved, strict=True)) if isinstance(x, dict) else moved[0], _to(y, device)

    def _pair(self, pair: Any) -> tuple[Any, Tensor]:
        if isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[1], Tensor):
            x = dict(pair[0]) if isinstance(pair[0], Mapping) else pair[0]
            if all(isinstance(one, Tensor) for one in (x.values() if isinstance(x, dict) else [x])):
                return x, pair[1]
        got = f"{type(pair).__name__} of {len(pair)}" if hasattr(pair, "__len__") else type(pair).__name__
        raise BackpassError(
            f"a sample must be a pair (x, y) that can be stacked as tensors, x also a dict; "
            f"{type(self._data).__qualname__} gives a batch that is a {got}. Give a Dataset of pairs, or a DataLoader "
            "with a collate_fn that returns a pair."
        )


def _checked(data: Any) -> Any:
    if isinstance(data, tuple) or (isinstance(data, list) and not all(isinstance(one, tuple | list) for one in data)):
        rows = [len(one) if _has_rows(one) else None for one in data]
        if len(data) != 2 or None in rows or rows[0] != rows[1]:
            got = ", ".join(map(_words, data[:3])) + (", ..." if len(data) > 3 else "")
            raise BackpassError(
                f"data must be a pair (x, y) of tensors with as many rows each, a Dataset or a DataLoader; got {got}."
            )
        return data[0], data[1]
    indexed = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    if isinstance(data, IterableDataset | str | bytes | Mapping | Tensor) or not indexed:
        raise BackpassError(
            f"data of type {type(data).__name__} has no samples by position, so a run on it could not be resumed. Give "
            "(x, y), a map-style Dataset (__getitem__ and __len__), or a DataLoader of one; a stream can be read into "
            "tensors or files first."
        )
    return data


def _digest(tensors: Sequence[Tensor]) -> str:
    digest = hashlib.sha256()
    for one in tensors:
        digest.update(one.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _has_rows(one: object) -> bool:
    return isinstance(one, Tensor) and one.dim() > 0 and one.layout == torch.strided and one.device.type != "meta"


def _words(one: object) -> str:
    if not isinstance(one, Tensor):
        return type(one).__name__
    kind = "" if one.layout == torch.strided else "sparse "
    return f"{kind}Tensor {tuple(one.shape)}" + (" on meta" if one.device.type == "meta" else "")


def _beside(tensor: Tensor, rows: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the rows on the tensor's device, moved in one transfer."""
    if tensor.device.type == "cpu" or not rows:
        return rows
    return torch.split(torch.cat(list(rows)).to(tensor.device), [len(chosen) for chosen in rows])


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    """Move the tensor to the device, through pinned memory so that the host does not wait."""
    if tensor.device == device:
        return tensor
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
