"""The samples of a step depend neither on the number of processes or parts nor on the form of the data."""

from itertools import chain, product

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from backpass import BackpassError
from backpass.training import Trainer
from backpass.training.batches import Batches
from backpass.training.sources import Source

X, Y = torch.arange(23.0)[:, None] * torch.ones(2), torch.arange(23)


class Pairs(Dataset):
    def __len__(self) -> int:
        return len(Y)

    def __getitem__(self, place: int):
        return X[place], int(Y[place])


def batches(data=(X, Y), rank=0, processes=1, **settings) -> Batches:
    model = torch.nn.Linear(2, 23)
    settings = {"batch_size": 5, "drop_last": False, "seed": 3, **settings}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return Batches(Trainer(model, optimizer, data, epochs=1, **settings), rank, processes)


def seen(made: Batches, epoch: int = 0, start: int = 0) -> list[list[int]]:
    return [[int(y) for part in parts for y in part.y] for parts, _, _ in made.epoch(epoch, start)]


def test_an_epoch_is_every_sample_once():
    steps = seen(batches())
    assert [len(step) for step in steps] == [5, 5, 5, 5, 3]
    assert sorted(chain(*steps)) == list(range(23))
    assert [len(step) for step in seen(batches(drop_last=True))] == [5, 5, 5, 5]


def test_the_order_belongs_to_seed_and_epoch():
    assert seen(batches(), 1) == seen(batches(), 1) != seen(batches(), 2)


@pytest.mark.parametrize(("processes", "parts"), list(product((1, 2, 3), (1, 2, 4))))
def test_slices_and_parts_in_turn_are_the_batch(processes, parts):
    each = [seen(batches(rank=rank, processes=processes, accumulate=parts)) for rank in range(processes)]
    assert [list(chain(*step)) for step in zip(*each, strict=True)] == seen(batches())


def test_no_part_is_empty():
    for parts, _, _ in batches(accumulate=4).epoch(0):
        assert all(len(part) for part in parts)


@pytest.mark.parametrize("start", range(5))
def test_an_epoch_can_begin_anywhere(start):
    assert seen(batches(), 2, start) == seen(batches(), 2)[start:]


FORMS = {
    "Dataset": Pairs(),
    "TensorDataset": TensorDataset(X, Y),
    "shuffling DataLoader": DataLoader(Pairs(), shuffle=True),
    "list": [X, Y],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_data_gives_the_same_batches(form):
    for (got, *_), (expected, *_) in zip(batches(FORMS[form]).epoch(1, 2), batches().epoch(1, 2), strict=True):
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a.x, b.x)
            assert torch.equal(a.y, b.y)
            assert torch.equal(a.index, b.index)
            assert (a.epoch, a.step, a.seed) == (b.epoch, b.step, b.seed) == (1, a.step, 3)


class Drawing(Pairs):
    def __getitem__(self, place: int):
        return X[place] + torch.rand(()), int(Y[place])


def test_random_draws_in_workers_go_on_where_they_were():
    loader = DataLoader(Drawing(), num_workers=2, shuffle=True)
    whole = [parts[0].x for parts, _, _ in batches(loader).epoch(1)]
    rest = [parts[0].x for parts, _, _ in batches(loader).epoch(1, 3)]
    assert all(torch.equal(a, b) for a, b in zip(whole[3:], rest, strict=True))


def test_memory_mapped_tensors_are_read_by_row(tmp_path):
    file = str(tmp_path / "x")
    torch.from_file(file, shared=True, size=46).view(23, 2).copy_(X)
    mapped = torch.from_file(file, size=46).view(23, 2)
    assert all(
        torch.equal(a[0].x, b[0].x)
        for (a, *_), (b, *_) in zip(batches((mapped, Y)).epoch(0), batches().epoch(0), strict=True)
    )


def test_index_is_the_place_in_the_data():
    for (batch,), _, _ in batches().epoch(0):
        assert torch.equal(batch.index, batch.y)
        assert torch.equal(batch.x, X[batch.index])


def test_uint8_becomes_floats_in_the_unit_interval_and_prepare_replaces_that():
    x = torch.tensor([[0], [51], [255]], dtype=torch.uint8)
    ((whole,), _, _) = next(batches((x, torch.arange(3)), batch_size=3).epoch(0))
    assert sorted(whole.x.flatten().tolist()) == pytest.approx([0, 0.2, 1])
    ((raw,), _, _) = next(
        batches((x, torch.arange(3)), batch_size=3, prepare=lambda x, batch: x + batch.index[:, None]).epoch(0)
    )
    assert torch.equal(raw.x.long(), x[raw.index].long() + raw.index[:, None])


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield X[0], 0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((X[:0], Y[:0]), "empty"),
        ((X, Y[:5]), r"as many rows.*\(23, 2\).*\(5,\)"),
        ((X, [1, 2]), "list"),
        (Endless(), "no samples by position"),
        (DataLoader(Endless()), "no samples by position"),
        (iter([]), "no samples by position"),
    ],
)
def test_data_that_cannot_be_read_by_position(data, message):
    with pytest.raises(BackpassError, match=message):
        Source(data)


def test_batches_that_do_not_fit():
    with pytest.raises(BackpassError, match="batch_size=24 is more than the 23 samples"):
        batches(batch_size=24)
    with pytest.raises(BackpassError, match="3 samples cannot be shared by 4 processes.*drop_last"):
        batches(processes=4)
    with pytest.raises(BackpassError, match="2 samples cannot be shared by 3 processes: use a larger"):
        batches(batch_size=2, processes=3, drop_last=True)
