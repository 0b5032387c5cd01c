"""Training data in the forms that users have it, read by position."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate

from backpass.errors import BackpassError

__all__ = ["Data", "Source"]

Data = tuple[Tensor, Tensor] | Dataset[Any] | DataLoader[Any]
"""(x, y) tensors on any device, also memory-mapped; a map-style data set of pairs; or a loader of one."""

_SAMPLED = 64  # rows that stand for the whole when two data sets are told apart


class Source:
    """Reads the samples at given positions.

    Of a ``DataLoader`` the data set, the workers and ``collate_fn`` are used; order and batches are the trainer's.

    Args:
        data: what to read.

    Raises:
        BackpassError: the data is empty, has no length, or x and y do not match.
    """

    def __init__(self, data: Data) -> None:
        self._workers: dict[str, Any] = {"num_workers": 0, "collate_fn": default_collate}
        if isinstance(data, DataLoader):
            names = ("num_workers", "collate_fn", "prefetch_factor", "worker_init_fn", "multiprocessing_context")
            self._workers = {name: getattr(data, name) for name in names}
            data = data.dataset
        if isinstance(data, TensorDataset) and len(data.tensors) == 2:
            data = (data.tensors[0], data.tensors[1])
        if isinstance(data, tuple | list):
            if len(data) != 2 or not all(map(_has_rows, data)) or len(data[0]) != len(data[1]):
                raise BackpassError(
                    "data must be a pair (x, y) of tensors with as many rows each, a Dataset or a DataLoader; got "
                    + ", ".join(map(_words, data))
                    + "."
                )
            data = (data[0], data[1])
        elif (
            isinstance(data, IterableDataset | str | bytes | Mapping | Tensor)
            or not hasattr(data, "__getitem__")
            or not hasattr(data, "__len__")
        ):
            raise BackpassError(
                f"data of type {type(data).__name__} has no samples by position, so no order could be drawn and no "
                "run resumed: give (x, y), a map-style Dataset (__getitem__ and __len__), or a DataLoader of one."
            )
        self._data: Any = data
        self._count = len(data[1]) if isinstance(data, tuple) else len(data)  # type: ignore[arg-type]
        if not self._count:
            raise BackpassError("the data is empty: there is nothing to learn from.")

    def __len__(self) -> int:
        return self._count

    @property
    def tensors(self) -> tuple[Tensor, Tensor] | None:
        """Inputs and targets, where the data is a pair of tensors."""
        return self._data if isinstance(self._data, tuple) else None

    def describe(self) -> dict[str, Any]:
        """What tells this data from another; some rows stand for all."""
        if self.tensors is None:
            return {"samples": len(self), "type": type(self._data).__qualname__}
        rows = torch.linspace(0, len(self) - 1, min(_SAMPLED, len(self)), dtype=torch.float64).long()
        digest = hashlib.sha256()
        for one in self.tensors:
            digest.update(one[rows.to(one.device)].cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        x, y = self.tensors
        shapes = [f"{one.dtype} {tuple(one.shape)}" for one in (x, y)]
        return {"samples": len(self), "x": shapes[0], "y": shapes[1], "sha256": digest.hexdigest()[:16]}

    def read(
        self, rows: Sequence[Tensor], start: int, device: torch.device, seed: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields x (B, ...) and y (B, ...) of ``rows[start:]``, each (B,) positions, on the device.

        With workers the rows before are read too, and thrown away, so that random draws of the data set in its
        workers are those of a run without a break.
        """
        if self.tensors is not None:
            x, y = self.tensors
            for of_x, of_y in zip(_beside(x, rows[start:]), _beside(y, rows[start:]), strict=True):
                yield _to(x[of_x], device), _to(y[of_y], device)
            return
        loader = DataLoader(
            self._data,
            batch_sampler=[chosen.tolist() for chosen in (rows if self._workers["num_workers"] else rows[start:])],
            generator=torch.Generator().manual_seed(seed),
            **self._workers,
        )
        for pair in islice(loader, start if self._workers["num_workers"] else 0, None):
            if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(isinstance(one, Tensor) for one in pair):
                got = f"{type(pair).__name__} of {len(pair)}" if hasattr(pair, "__len__") else type(pair).__name__
                raise BackpassError(
                    "a sample of the data must be a pair (x, y) that can be put together as tensors; a batch of "
                    f"{type(self._data).__qualname__} is a {got}. Give a Dataset of pairs, or a DataLoader with a "
                    "collate_fn that gives a pair of tensors."
                )
            x, y = pair
            yield _to(x, device), _to(y, device)


def _has_rows(one: object) -> bool:
    return isinstance(one, Tensor) and one.dim() > 0 and one.layout == torch.strided and one.device.type != "meta"


def _words(one: object) -> str:
    """A tensor, or what came instead of one."""
    if not isinstance(one, Tensor):
        return type(one).__name__
    kind = "" if one.layout == torch.strided else "sparse "
    return f"{kind}Tensor {tuple(one.shape)}" + (" on meta" if one.device.type == "meta" else "")


def _beside(tensor: Tensor, rows: Sequence[Tensor]) -> Sequence[Tensor]:
    """The rows on the tensor's device, moved at once."""
    if tensor.device.type == "cpu" or not rows:
        return rows
    return torch.split(torch.cat(list(rows)).to(tensor.device), [len(chosen) for chosen in rows])


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; from pinned memory, so that the host does not wait for it."""
    if tensor.device == device:
        return tensor
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
