"""Data sets in any form, read in batches that keep their places; samples are counted as they arrive."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from backpass.attacks.checks import fields_of
from backpass.attacks.settings import check_count
from backpass.errors import BackpassError

__all__ = ["Data", "Source"]

_LOG = logging.getLogger(__name__)

Data = tuple[Tensor, Tensor] | Dataset[Any] | DataLoader[Any] | Iterable[Any]

_IMAGES = ("image", "images", "img", "pixel_values", "x", "input", "inputs")
_LABELS = ("label", "labels", "target", "targets", "y", "fine_label", "class")
_FORMS = "(x, y) tensors, a Dataset of pairs, a DataLoader or another iterable of batches"
_RANDOM = ("RandomSampler", "SubsetRandomSampler", "WeightedRandomSampler")


class Source:
    """Reads any form of data in batches of one size, and numbers the samples in the order in which they arrive.

    Samples and batches may be pairs (image, label), longer tuples, of which the first two are used, or mappings, named
    tuples and dataclasses with names such as image and label. Images may be tensors, arrays, or PIL images, which
    become floats in [0, 1]; labels may be whole numbers of any type.

    Args:
        data: (x, y) tensors or arrays, also by name in a mapping; a map-style data set; an iterable of samples or of
            batches, for instance a DataLoader with any sampler, batch sampler and collate function.
        batch_size: samples per batch; only the last one is smaller.
        several: whether every process, or every later run, has to read the same order again.

    Raises:
        BackpassError: the data is empty, of no known form, or comes in a random order where it must not.
    """

    def __init__(self, data: Any, batch_size: int, *, several: bool = False) -> None:
        check_count("batch_size", batch_size)
        data = self.data = _as_tensors(data)
        self.batch_size = batch_size
        self.read = 0
        self.head = (torch.empty(0), torch.empty(0))  # the first batch, once it was read
        if self._is_pair():
            if not isinstance(data[1], Tensor) or data[1].shape[:1] != data[0].shape[:1] or not data[1].dim():
                raise BackpassError(
                    f"data must be a pair (x, y) of tensors of equal length, or {_FORMS}; "
                    f"got {_shape(data[0])} and {_shape(data[1])}."
                )
        elif isinstance(data, tuple | str | Mapping) or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
            raise BackpassError(f"data must be {_FORMS}; got {_name(data)}.")
        if isinstance(data, DataLoader):
            _check_order(data, several)
        self.expected = self._expected()
        if self.expected == 0:
            raise BackpassError("the data is empty: there is nothing to evaluate.")

    def _expected(self) -> int | None:
        """The number of samples as far as it is known beforehand, for progress alone."""
        data = self.data
        if isinstance(data, DataLoader):
            if isinstance(data.dataset, IterableDataset) or data.batch_size is None or data.drop_last:
                return None
            data = data.sampler
        if self._is_pair():
            return len(data[0])
        try:
            return len(data) if self._is_samples() or isinstance(data, Sampler) else None
        except (TypeError, ValueError, NotImplementedError):
            return None

    def _is_samples(self) -> bool:
        """True if the data gives single samples, False if batches."""
        if isinstance(self.data, DataLoader):
            return self.data.batch_size is None and self.data.batch_sampler is None
        # Data sets of the Hugging Face library are none of torch's.
        return isinstance(self.data, Dataset) or (hasattr(self.data, "__getitem__") and hasattr(self.data, "features"))

    def batches(self, rank: int = 0, world: int = 1) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield (x, y, index) of every world-th batch from number `rank` on; index: (B,) places in the data.

        Afterwards `read` is the number of samples in the whole data.

        Raises:
            BackpassError: a batch is of no known form, or nothing arrives.
        """
        self.read = 0
        for number, (x, y) in enumerate(self._all(rank, world)):
            index = torch.arange(self.read, self.read + len(y))
            self.read += len(y)
            if number == 0:
                self.head = (x, y)
            if number % world == rank:
                yield x, y, index
        if self.read == 0:
            raise BackpassError("the data is empty: no sample arrived, so there is nothing to evaluate.")

    def own(self, rank: int, world: int) -> int | None:
        """Return the number of samples in the batches of a process, where it is known beforehand."""
        if self.expected is None:
            return None
        firsts = range(rank * self.batch_size, self.expected, world * self.batch_size)
        return sum(min(self.batch_size, self.expected - first) for first in firsts)

    def _all(self, rank: int, world: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All batches; those of other processes only with the right length where nothing has to be read for it."""
        data, size = self.data, self.batch_size
        if self._is_pair():
            for first in range(0, len(data[0]), size):
                yield data[0][first : first + size], _labels(data[1][first : first + size])
        elif not isinstance(data, DataLoader | IterableDataset) and self._is_samples():
            count = _length(data)
            for number, first in enumerate(range(0, count, size)):
                last = min(first + size, count)
                if number and number % world != rank:
                    yield torch.empty(0), torch.empty(last - first)
                    continue
                yield from _collate([_row(data, row, count) for row in range(first, last)])
        else:
            yield from self._cut(self._chunks())

    def _is_pair(self) -> bool:
        return isinstance(self.data, tuple | list) and len(self.data) == 2 and isinstance(self.data[0], Tensor)

    def _chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches as the data gives them; single samples are collected."""
        rows: list[Any] = []
        for one in self.data:
            if one is None:
                continue  # a collate function found nothing to keep
            if _is_sample(one):
                rows.append(one)
            elif isinstance(one, tuple | list) and one and all(map(_is_sample, one)):
                rows += one  # a collate function that leaves the samples as they are
            else:
                yield from _collate(rows)
                rows = []
                yield _batch(*_pair(one))
            if len(rows) >= self.batch_size:
                yield from _collate(rows)
                rows = []
        yield from _collate(rows)

    def _cut(self, chunks: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Cut the batches anew, so that only `batch_size` decides which samples go together."""
        xs: list[Tensor] = []
        ys: list[Tensor] = []
        for x, y in chunks:
            if len(x) != len(y):
                raise BackpassError(
                    f"a batch must hold one label per image; got images of shape {_shape(x)} and labels of shape "
                    f"{_shape(y)}."
                )
            if len(x) == 0:
                continue
            if xs and xs[0].shape[1:] != x.shape[1:]:
                raise BackpassError(
                    f"images must all have one shape; got {tuple(xs[0].shape[1:])} and {tuple(x.shape[1:])}: "
                    "resize them."
                )
            xs, ys = [*xs, x], [*ys, y]
            if sum(map(len, xs)) >= self.batch_size:
                x, y = (one[0] if len(one) == 1 else torch.cat(one) for one in (xs, ys))
                whole = len(x) // self.batch_size * self.batch_size
                for first in range(0, whole, self.batch_size):
                    yield x[first : first + self.batch_size], y[first : first + self.batch_size]
                xs, ys = ([x[whole:]], [y[whole:]]) if whole < len(x) else ([], [])
        if xs:
            yield torch.cat(xs), torch.cat(ys)


def _check_order(loader: DataLoader[Any], several: bool) -> None:
    """Refuse what cannot be numbered; warn where the order is random."""
    inner = loader.batch_sampler if getattr(loader, "batch_sampler", None) is not None else loader.sampler
    samplers = [loader.sampler, getattr(inner, "sampler", inner)]
    names = {type(one).__name__ for one in samplers}
    if "RandomSampler" in names:
        raise BackpassError("the DataLoader shuffles, so samples have no fixed place: pass shuffle=False.")
    distributed = any(isinstance(one, DistributedSampler) for one in samplers)
    if several and distributed and torch.distributed.is_initialized():
        raise BackpassError(
            "every process must be given the whole data, which is shared out here: leave out the DistributedSampler."
        )
    random = bool(names & set(_RANDOM)) or not getattr(loader, "in_order", True)
    random |= any(isinstance(one, DistributedSampler) and one.shuffle for one in samplers)
    if random and several:
        raise BackpassError(
            "the DataLoader's order is random, so that another process or a resumed run would see other samples: use "
            "torch.utils.data.Subset(data, indices), no sampler, and in_order=True."
        )
    if random:
        _LOG.warning(
            "the DataLoader has a random order: samples are numbered as they arrive, and another run will number them "
            "differently."
        )
    known = (SequentialSampler, DistributedSampler)
    if several and not all(isinstance(one, known) or one is None for one in samplers[:1]):
        _LOG.warning("a sampler of type %s must give the same order each time.", type(loader.sampler).__name__)


def _length(data: Any) -> int:
    try:
        return len(data)
    except (TypeError, ValueError, NotImplementedError):
        raise BackpassError(f"data of type {_name(data)} has no valid length: give {_FORMS}.") from None


def _row(data: Any, row: int, count: int) -> Any:
    try:
        return data[row]
    except IndexError as error:
        raise BackpassError(
            f"the data says that it has {count} samples, but sample {row} is out of range: correct its __len__."
        ) from error


def _as_tensors(data: Any) -> Any:
    """Return a pair of arrays, or a mapping of them, as a pair of tensors; other data as it is."""
    if isinstance(data, Mapping) and not hasattr(data, "features"):
        data = _pair(data)
    if isinstance(data, tuple | list) and len(data) == 2 and any(type(one).__module__ == "numpy" for one in data):
        return tuple(map(torch.as_tensor, data))
    return data


def _pair(one: Any) -> tuple[Any, Any]:
    """Image and label of a sample or of a batch: by their names, else the first two entries."""
    named = fields_of(one)
    lower = {key.lower(): key for key in named or ()}
    image, label = (next((lower[k] for k in known if k in lower), None) for known in (_IMAGES, _LABELS))
    if named and image is not None and label is not None:
        return named[image], named[label]
    if isinstance(one, tuple | list) and len(one) >= 2:
        return one[0], one[1]
    if named:
        raise BackpassError(
            f"the data gives a {_name(one)} with keys {sorted(named)}: expected one of {', '.join(_IMAGES)} and one of "
            f"{', '.join(_LABELS)}. Rename them, or give pairs (image, label)."
        )
    raise BackpassError(
        f"the data must give pairs (image, label); got {_name(one)}. Use a DataLoader with collate_fn=."
    )


def _is_sample(one: Any) -> bool:
    """True for one image with its label, False for a batch or anything else."""
    if not isinstance(one, tuple | list) and fields_of(one) is None:
        return False
    if isinstance(one, tuple | list) and len(one) < 2:
        return False
    image, label = _pair(one)
    return _is_scalar(label) and not _is_scalar(image)


def _is_scalar(one: Any) -> bool:
    return isinstance(one, int | float | str) or getattr(one, "shape", None) == ()


def _collate(samples: list[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    if samples:
        pairs = [_pair(one) for one in samples]
        yield _stack([x for x, _ in pairs]), _labels([y for _, y in pairs])


def _batch(x: Any, y: Any) -> tuple[Tensor, Tensor]:
    """Images and labels of a batch as tensors."""
    if isinstance(x, str | bytes | Mapping) or not hasattr(x, "__len__"):
        raise BackpassError(f"data must be {_FORMS}; got a batch of {_name(x)} and {_name(y)}.")
    x = x if isinstance(x, Tensor) else _image(x) if hasattr(x, "shape") else _stack(list(x))
    if x.dim() < 2:
        raise BackpassError(
            f"the first entry of a batch must be its images, the second its labels; got shape {_shape(x)} first. "
            "Name them in a dict, or reorder them with collate_fn=."
        )
    return x, _labels(y)


def _stack(images: list[Any]) -> Tensor:
    tensors = [_image(one) for one in images]
    shapes = sorted({tuple(one.shape) for one in tensors})
    if len(shapes) > 1:
        raise BackpassError(f"images must all have one shape; got {shapes[0]} and {shapes[-1]}: resize them.")
    return torch.stack(tensors)


def _image(one: Any) -> Tensor:
    """A tensor (C, H, W) of one image."""
    if isinstance(one, Tensor):
        return one
    if hasattr(one, "convert") and hasattr(one, "getbands"):  # a PIL image
        if one.mode[0] in "IF":
            raise BackpassError(f"a PIL image must have 8 bits a channel; got mode {one.mode!r}. Scale it to a tensor.")
        one = one if one.mode in ("L", "RGB") else one.convert("RGB")
        flat = torch.frombuffer(bytearray(one.tobytes()), dtype=torch.uint8)
        return flat.view(one.height, one.width, -1).permute(2, 0, 1).float() / 255
    try:
        return torch.as_tensor(one)
    except (TypeError, ValueError, RuntimeError):
        raise BackpassError(f"an image must be a tensor, an array or a PIL image; got {_name(one)}.") from None


def _labels(labels: Any) -> Tensor:
    """Labels (N,) or (N, 1) of any number type as int64.

    Raises:
        BackpassError: they are no whole numbers.
    """
    try:
        if not isinstance(labels, Tensor):
            labels = torch.stack([torch.as_tensor(one) for one in labels])
        whole: Tensor = labels.long()
    except (TypeError, ValueError, RuntimeError):
        raise BackpassError(f"a label must be a whole number; got {labels[0]!r}.") from None
    if whole.dim() == 2 and whole.shape[1] == 1:
        labels, whole = labels.squeeze(1), whole.squeeze(1)
    if whole.dim() != 1:
        raise BackpassError(
            f"labels must have shape (N,); got {tuple(whole.shape)}. One-hot labels and probabilities need argmax(1)."
        )
    if labels.is_floating_point() and not torch.equal(whole.to(labels.dtype), labels):
        wrong = labels[whole.to(labels.dtype) != labels][0]
        raise BackpassError(f"a label must be a whole number; got {wrong.item():g}.")
    return whole


def _name(one: object) -> str:
    return type(one).__name__


def _shape(one: object) -> tuple[int, ...] | str:
    return tuple(one.shape) if isinstance(one, Tensor) else _name(one)
