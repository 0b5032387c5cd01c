"""Every kind of data source: what arrives is counted, or refused with a remedy."""

import logging
from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    ChainDataset,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    StackDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
    get_worker_info,
)
from torch.utils.data.distributed import DistributedSampler

from backpass.attacks import FGSM, evaluate
from backpass.errors import BackpassError

torch.manual_seed(0)
X = (torch.rand(50, 1, 4, 4) * 255).round() / 255
Y = torch.arange(50) % 3
PAIRS = TensorDataset(X, Y)


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 16, generator=torch.Generator().manual_seed(1)))

    def forward(self, x):
        return (x - 0.5).flatten(1) @ self.weight.t()


class Stream(IterableDataset):
    def __iter__(self):
        yield from zip(X, Y, strict=True)


class Sharded(IterableDataset):
    """Every worker reads its own samples; the length is wrong."""

    def __len__(self):
        return 10

    def __iter__(self):
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        yield from ((X[i], int(Y[i])) for i in range(first, 50, step))


class Lying(Sampler):
    """A sampler of twenty samples that claims another number."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __iter__(self):
        return iter(range(20))


class Batched(IterableDataset):
    def __iter__(self):
        yield from DataLoader(PAIRS, batch_size=9)


class Rows(Dataset):
    """A data set whose samples pass through a function."""

    def __init__(self, change):
        self.change = change

    def __len__(self):
        return 50

    def __getitem__(self, row):
        return self.change(X[row], int(Y[row]))


class Short(Dataset):
    """A data set of fifty samples that claims another number."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, row):
        return X[row], Y[row]


class HuggingFace:
    """The shape of a data set of the datasets library: rows are dicts, and it is no torch Dataset."""

    def __init__(self):
        self.features = {"image": None, "label": None}

    def __len__(self):
        return 50

    def __getitem__(self, row):
        if row >= 50:
            raise IndexError
        return {"image": X[row], "label": int(Y[row])}


@dataclass(slots=True)
class Batch:
    image: torch.Tensor
    label: torch.Tensor


Reversed = namedtuple("Reversed", "label image")
Nameless = namedtuple("Nameless", "first second")


def some(batch):
    """Drops the samples whose first pixel is dark: of some batches nothing is left."""
    kept = [pair for pair in batch if pair[0][0, 0, 0] > 0.3]
    return default_collate(kept) if kept else None


def pil(x, y):
    Image = pytest.importorskip("PIL.Image")
    return Image.fromarray((x[0] * 255).byte().numpy()), y


def wide_pil(x, y):
    Image = pytest.importorskip("PIL.Image")
    return Image.fromarray(x[0].numpy()), y


def named(x, y):
    return {"pixel_values": x, "labels": y, "id": 7}


def triples():
    for rows in torch.arange(50).split(7):
        yield X[rows], Y[rows], rows


EVERY = list(range(50))
# Two workers take turns, with four samples of theirs at a time.
IN_TURNS = [i for k in range(0, 25, 4) for first in (0, 1) for i in range(first, 50, 2)[k : k + 4]]
BRIGHT = [i for i in EVERY if X[i, 0, 0, 0] > 0.3]
KINDS = {
    "tensors": (lambda: (X, Y), EVERY),
    "tensors in a list": (lambda: [X, Y], EVERY),
    "TensorDataset": (lambda: PAIRS, EVERY),
    "Subset": (lambda: Subset(PAIRS, [3, 1, 4, 15]), [3, 1, 4, 15]),
    "ConcatDataset": (lambda: ConcatDataset([Subset(PAIRS, [1]), PAIRS]), [1, *EVERY]),
    "IterableDataset": (Stream, EVERY),
    "IterableDataset of batches": (Batched, EVERY),
    "generator of batches": (lambda: iter(DataLoader(PAIRS, batch_size=9)), EVERY),
    "list of batches": (lambda: list(DataLoader(PAIRS, batch_size=9)), EVERY),
    "Hugging Face data set": (HuggingFace, EVERY),
    "triples": (lambda: TensorDataset(X, Y, Y + 5), EVERY),
    "dicts": (lambda: Rows(named), EVERY),
    "arrays": (lambda: Rows(lambda x, y: (x.numpy(), np.int64(y))), EVERY),
    "labels as tensors": (lambda: Rows(lambda x, y: (x, torch.tensor(y))), EVERY),
    "PIL images": (lambda: Rows(pil), EVERY),
    "loader": (lambda: DataLoader(PAIRS, batch_size=7), EVERY),
    "loader of single samples": (lambda: DataLoader(PAIRS, batch_size=None), EVERY),
    "loader that drops the last batch": (lambda: DataLoader(PAIRS, batch_size=8, drop_last=True), EVERY[:48]),
    "loader with workers": (lambda: DataLoader(PAIRS, batch_size=8, num_workers=2), EVERY),
    "loader of a stream": (lambda: DataLoader(Stream(), batch_size=8), EVERY),
    "loader of a stream that drops the last batch": (
        lambda: DataLoader(Stream(), batch_size=8, drop_last=True),
        EVERY[:48],
    ),
    "loader of triples": (lambda: DataLoader(TensorDataset(X, Y, Y), batch_size=7), EVERY),
    "loader of dicts": (lambda: DataLoader(Rows(named), batch_size=7), EVERY),
    "batch sampler": (
        lambda: DataLoader(PAIRS, batch_sampler=BatchSampler(SequentialSampler(PAIRS), 8, drop_last=True)),
        EVERY[:48],
    ),
    "batch sampler as a list": (
        lambda: DataLoader(PAIRS, batch_sampler=[[4, 2], [9], list(range(20))]),
        [4, 2, 9, *range(20)],
    ),
    "sampler as a list": (lambda: DataLoader(PAIRS, batch_size=3, sampler=[8, 8, 1]), [8, 8, 1]),
    "collate that drops samples": (lambda: DataLoader(PAIRS, batch_size=2, collate_fn=some), BRIGHT),
    "collate to a dataclass": (
        lambda: DataLoader(PAIRS, batch_size=7, collate_fn=lambda b: Batch(*default_collate(b))),
        EVERY,
    ),
    "collate to lists": (
        lambda: DataLoader(Rows(pil), batch_size=7, collate_fn=lambda b: tuple(zip(*b, strict=True))),
        EVERY,
    ),
    "arrays instead of tensors": (lambda: (X.numpy(), Y.numpy()), EVERY),
    "a dict of tensors": (lambda: {"label": Y, "image": X}, EVERY),
    "StackDataset": (lambda: StackDataset(X, Y), EVERY),
    "StackDataset of names": (lambda: DataLoader(StackDataset(label=Y, image=X), batch_size=7), EVERY),
    "ChainDataset": (lambda: ChainDataset([Stream(), Stream()]), [*EVERY, *EVERY]),
    "stream of a wrong length": (Sharded, EVERY),
    "stream in shards": (lambda: DataLoader(Sharded(), batch_size=4, num_workers=2), IN_TURNS),
    "sampler that claims too much": (lambda: DataLoader(PAIRS, batch_size=3, sampler=Lying(90)), EVERY[:20]),
    "sampler that claims too little": (lambda: DataLoader(PAIRS, batch_size=3, sampler=Lying(2)), EVERY[:20]),
    "batch sampler as a generator": (
        lambda: DataLoader(PAIRS, batch_sampler=([i, i + 1] for i in range(0, 20, 2))),
        EVERY[:20],
    ),
    "named tuples, the label first": (lambda: Rows(lambda x, y: Reversed(y, x)), EVERY),
    "loader of named tuples": (lambda: DataLoader(Rows(lambda x, y: Reversed(y, x)), batch_size=7), EVERY),
    "named tuples of other names": (lambda: Rows(lambda x, y: Nameless(x, y)), EVERY),
    "dataclasses": (lambda: Rows(lambda x, y: Batch(x, y)), EVERY),
    "generator of batches with more": (triples, EVERY),
    "generator of samples": (lambda: ((X[i], int(Y[i])) for i in EVERY), EVERY),
    "list of samples": (lambda: [(X[i], Y[i]) for i in EVERY], EVERY),
    "collate that changes nothing": (lambda: DataLoader(PAIRS, batch_size=2, collate_fn=lambda b: b), EVERY),
    "collate to two lists": (
        lambda: DataLoader(PAIRS, batch_size=4, collate_fn=lambda b: [list(t) for t in zip(*b, strict=True)]),
        EVERY,
    ),
    "empty batches": (lambda: [(X[:4], Y[:4]), (X[:0], Y[:0]), None, (X[4:8], Y[4:8])], EVERY[:8]),
    "labels of shape (N, 1)": (lambda: DataLoader(TensorDataset(X, Y[:, None]), batch_size=4), EVERY),
    "labels as floats": (lambda: (X, Y.float()), EVERY),
    "labels as int8": (lambda: TensorDataset(X, Y.to(torch.int8)), EVERY),
    "labels as uint16": (lambda: (X, Y.to(torch.uint16)), EVERY),
    "DistributedSampler": (
        lambda: DataLoader(PAIRS, batch_size=8, sampler=DistributedSampler(PAIRS, 2, 1, shuffle=False)),
        EVERY[1::2],
    ),
}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("batch_size", [6, 256])
def test_the_accuracy_is_that_of_a_hand_loop_over_what_arrives(make, batch_size):
    data, rows = make
    model = Linear()
    report = evaluate(model, data(), FGSM(eps=0.05), batch_size=batch_size)
    predicted = model(X[rows]).argmax(1)
    assert torch.equal(report.y, Y[rows])
    assert torch.equal(report.prediction, predicted)
    assert (report.clean.hits, report.clean.trials) == (int((predicted == Y[rows]).sum()), len(rows))
    x = X[rows].clone().requires_grad_()
    torch.nn.functional.cross_entropy(model(x), Y[rows]).backward()
    attacked = model((X[rows] + 0.05 * x.grad.sign()).clamp(0, 1)).argmax(1)
    assert report.robust().hits == int(((predicted == Y[rows]) & (attacked == Y[rows])).sum())


RANDOM = {
    "SubsetRandomSampler": lambda: SubsetRandomSampler(range(30)),
    "WeightedRandomSampler": lambda: WeightedRandomSampler([1.0] * 50, 40),
    "DistributedSampler": lambda: DistributedSampler(PAIRS, 2, 0),
}


@pytest.mark.parametrize("make", RANDOM.values(), ids=RANDOM)
def test_a_random_order_is_counted_with_a_warning_and_refused_where_it_is_read_again(make, caplog, tmp_path):
    loader = DataLoader(PAIRS, batch_size=8, sampler=make())
    torch.manual_seed(3)
    rows = list(make())
    torch.manual_seed(3)
    with caplog.at_level(logging.WARNING, logger="backpass"):
        report = evaluate(Linear(), loader, FGSM(eps=0.05))
    assert "random order" in caplog.text
    assert sorted(report.y.tolist()) == sorted(Y[rows].tolist()) or len(report.y) == len(rows)
    with pytest.raises(BackpassError, match=r"Subset\(data, indices\)"):
        evaluate(Linear(), loader, FGSM(eps=0.05), resume=tmp_path)


REFUSED = {
    "shuffling loader": (lambda: DataLoader(PAIRS, shuffle=True), "pass shuffle=False"),
    "shuffling batch sampler": (
        lambda: DataLoader(PAIRS, batch_sampler=BatchSampler(RandomSampler(PAIRS), 8, drop_last=False)),
        "pass shuffle=False",
    ),
    "nothing": (list, "empty"),
    "a length that is too large": (lambda: Short(70), "says that it has 70 samples, but sample 50 is out of range"),
    "a length below 0": (lambda: Short(-1), "has no valid length"),
    "a scalar label": (lambda: (X[:1], Y[0]), r"equal length, .*; got \(1, 1, 4, 4\) and \(\)"),
    "images in a dict of a dict": (lambda: [{"inputs": {"image": X}, "label": Y}], "got a batch of dict and Tensor"),
    "PIL images of floats": (lambda: Rows(wide_pil), "8 bits a channel; got mode 'F'"),
    "empty tensors": (lambda: (X[:0], Y[:0]), "the data is empty"),
    "nothing is left by the collate function": (
        lambda: DataLoader(PAIRS, batch_size=8, collate_fn=lambda batch: None),
        "no sample arrived",
    ),
    "tensors of different lengths": (lambda: (X, Y[:7]), "of equal length"),
    "images alone": (lambda: DataLoader(X, batch_size=8), r"pairs \(image, label\); got Tensor"),
    "unknown keys": (lambda: Rows(lambda x, y: {"pic": x, "id": y}), r"keys \['id', 'pic'\]"),
    "images of different sizes": (lambda: Rows(lambda x, y: (x[:, : y + 1], y)), "one shape; got .*: resize them"),
    "labels that are words": (lambda: Rows(lambda x, y: (x, "cat")), "a label must be a whole number; got 'cat'"),
    "images that are none": (lambda: Rows(lambda x, y: ("file.png", y)), "a PIL image; got str"),
    "labels that are no whole numbers": (lambda: TensorDataset(X, Y + 0.5), "a whole number; got 0.5"),
    "one-hot labels": (lambda: TensorDataset(X, torch.eye(3)[Y]), r"One-hot labels and probabilities need argmax\(1\)"),
    "labels of missing classes": (lambda: (X, Y + 5), "label 7 is out of range: the model has 3 classes"),
    "samples without a label": (lambda: (X, Y - 1), "labels must be at least 0; the least of y is -1"),
    "the index first": (lambda: ((i, x, y) for x, y, i in triples()), "the first entry of a batch must be its images"),
    "more images than labels": (lambda: [(X[:4], Y[:3])], "one label per image"),
    "a name": (lambda: "digits", "data must be .*; got str"),
    "uint8 images": (lambda: ((X * 255).byte(), Y), r"x\.float\(\) / 255"),
    "a number": (lambda: 5, "data must be .*; got int"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_the_others_are_refused_with_a_remedy(make, message):
    with pytest.raises(BackpassError, match=message):
        evaluate(Linear(), make(), FGSM(eps=0.05))
