"""The order of a DataLoader is honoured: no other sample is seen, in no other proportion, and it can be resumed."""

import random
from itertools import chain

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from backpass import BackpassError
from backpass.training import CrossEntropy, Interrupted, Trainer
from backpass.training.batches import Batches

X = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(100) % 3
DATA = TensorDataset(X, Y)
WEIGHTS = torch.where(torch.arange(100) < 10, 9.0, 1.0)


def make(data, record=None, stop_at=None, **settings) -> Trainer:
    """A run that records the positions of each step, and may be stopped by a signal's effect at one."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)

    def prepare(x, batch):
        if record is not None and len(batch) > 2:  # not the two samples that check the targets
            record.append(batch.index.tolist())
        return x

    def on_step(step):
        if step == stop_at:
            raise Interrupted("stopped here")

    prepare.__qualname__ = "prepare"
    return Trainer(
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        data,
        **{"epochs": 2, "prepare": prepare, "on_step": on_step, "log_every": 1, **settings},
    )


def positions(data, **settings) -> list[list[int]]:
    record: list[list[int]] = []
    make(data, record, **settings).fit()
    return record


@pytest.mark.parametrize("batch_size", [10, None], ids=["also the trainer's", "the loader's"])
def test_a_subset_is_all_that_is_seen(batch_size):
    loader = DataLoader(DATA, batch_size=10, sampler=SubsetRandomSampler(range(80)))
    seen = positions(loader, batch_size=batch_size)
    for epoch in (seen[:8], seen[8:]):
        assert sorted(chain(*epoch)) == list(range(80))
    assert seen[:8] != seen[8:]


def test_weights_are_the_proportions():
    sampler = WeightedRandomSampler(WEIGHTS, 5000)
    seen = torch.tensor([*chain(*positions(DataLoader(DATA, batch_size=50, sampler=sampler), epochs=1))])
    assert len(seen) == 5000
    assert abs(float((seen < 10).double().mean()) - 0.5) < 0.03


def test_without_shuffling_the_order_is_that_of_the_data():
    assert positions(DataLoader(DATA, batch_size=25), epochs=1) == torch.arange(100).view(4, 25).tolist()


def test_batches_of_a_batch_sampler_are_the_steps():
    batches = [[0, 1, 2], [7, 7, 9, 11], [5, 4, 3]]
    assert positions(DataLoader(DATA, batch_sampler=batches), epochs=1) == batches
    sampler = BatchSampler(SequentialSampler(DATA), 30, drop_last=True)
    assert positions(DataLoader(DATA, batch_sampler=sampler), epochs=1) == torch.arange(90).view(3, 30).tolist()


def test_the_last_batch_is_the_loaders_decision():
    for drop_last, sizes in ((False, [40, 40, 20]), (True, [40, 40])):
        seen = positions(DataLoader(DATA, batch_size=40, shuffle=True, drop_last=drop_last), epochs=1)
        assert [len(batch) for batch in seen] == sizes


class Halves(Sampler):
    """Even positions in even epochs, odd ones in odd epochs, by ``set_epoch``."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return 50

    def __iter__(self):
        return iter(range(self.epoch % 2, 100, 2))


def test_set_epoch_is_called():
    seen = positions(DataLoader(DATA, batch_size=50, sampler=Halves()))
    assert seen == [list(range(0, 100, 2)), list(range(1, 100, 2))]


class Numpy(Sampler):
    """A sampler with a NumPy generator of its own."""

    def __init__(self):
        self.generator_of_numpy = np.random.default_rng(3)

    def __len__(self):
        return 100

    def __iter__(self):
        return iter(self.generator_of_numpy.permutation(100))


class Globals(Sampler):
    """A sampler that draws from Python's and NumPy's global generators."""

    def __len__(self):
        return 100

    def __iter__(self):
        return iter(random.sample(range(50), 50) + (50 + np.random.permutation(50)).tolist())  # noqa: NPY002


def generator():
    return torch.Generator().manual_seed(11)


SAMPLERS = {
    "weighted": lambda: WeightedRandomSampler(WEIGHTS, 100),
    "weighted with a generator": lambda: WeightedRandomSampler(WEIGHTS, 100, generator=generator()),
    "subset with a generator": lambda: SubsetRandomSampler(range(70), generator=generator()),
    "with replacement": lambda: RandomSampler(DATA, replacement=True, num_samples=60),
    "a generator of NumPy": Numpy,
    "global generators": Globals,
}


class Drawing(Dataset):
    """Draws from NumPy's global generator."""

    def __len__(self):
        return 100

    def __getitem__(self, place):
        return X[place] + float(np.random.rand()), Y[place]  # noqa: NPY002


@pytest.mark.parametrize(("step", "data"), [(3, DATA), (6, Drawing())], ids=["tensors", "a Dataset that draws"])
@pytest.mark.parametrize("kind", SAMPLERS)
def test_a_resumed_run_meets_the_same_samples(kind, step, data, tmp_path):
    def run(folder, **settings):
        record: list[list[int]] = []
        loader = DataLoader(data, batch_size=25, sampler=SAMPLERS[kind]())
        trainer = make(loader, record, folder=tmp_path / folder, epochs=2, checkpoint_every=1, **settings)
        return trainer, record

    whole, expected = run("whole")
    whole.fit()
    stopped, _ = run("stopped", stop_at=step)
    with pytest.raises(Interrupted):
        stopped.fit()
    np.random.seed(77)  # noqa: NPY002  another process has other global generators
    random.seed(77)
    again, rest = run("stopped")
    again.fit(resume=True)
    assert rest == expected[step - 1 :]  # the checkpoint is of the step before the one that was interrupted
    assert torch.equal(again.model.weight, whole.model.weight)
    logs = [(tmp_path / name / "log.jsonl").read_bytes() for name in ("whole", "stopped")]
    assert logs[0] == logs[1]


def test_an_order_that_cannot_be_repeated_is_refused(tmp_path):
    sampler = Numpy()  # one object for both starts, and nobody knows its state
    loader = DataLoader(DATA, batch_size=25, sampler=sampler)
    with pytest.raises(Interrupted):
        make(loader, folder=tmp_path, checkpoint_every=1, stop_at=3).fit()
    with pytest.raises(BackpassError, match="Numpy yields another order in epoch 1.*torch.Generator"):
        make(loader, folder=tmp_path, checkpoint_every=1).fit(resume=True)


def test_evaluation_is_on_the_samples_of_the_sampler():
    held_out = DataLoader(DATA, batch_size=7, sampler=SubsetRandomSampler(range(80, 100)))
    trainer = make((X, Y), batch_size=20, evaluation=held_out, robust=lambda model, x, y: {"images": len(x)})
    record = trainer.fit().history[-1]
    output = trainer.model(X[80:]).detach()
    assert record["evaluation"]["loss"] == pytest.approx(float(CrossEntropy().losses(output, Y[80:]).mean()), abs=1e-6)
    assert record["evaluation"]["accuracy"] == float((output.argmax(1) == Y[80:]).double().mean())
    assert record["robust"] == {"images": 20}


class Sum(TensorDataset):
    def __getitem__(self, place):
        x, y = super().__getitem__(place)
        return x + 1, y


def test_a_dataset_with_its_own_getitem_or_collate_fn_is_read_by_it():
    def total(data) -> float:
        seen = []
        size = None if isinstance(data, DataLoader) else 10
        make(data, batch_size=size, epochs=1, prepare=lambda x, batch: seen.append(x) or x).fit()
        return float(torch.cat([x for x in seen if len(x) > 2]).sum())

    def collate(samples):
        x, y = torch.utils.data.default_collate(samples)
        return x + 1, y

    expected = float((X + 1).sum())
    assert total(Sum(X, Y)) == pytest.approx(expected, rel=1e-4)
    assert total(list(Sum(X, Y))) == pytest.approx(expected, rel=1e-4)
    assert total(DataLoader(DATA, batch_size=10, collate_fn=collate)) == pytest.approx(expected, rel=1e-4)


class Endless(Sampler):
    def __iter__(self):
        return iter(range(100))


class Shrinking(Sampler):
    """All samples in the first epoch, then so many."""

    def __init__(self, rest):
        self.rest, self.calls = rest, 0

    def __len__(self):
        return 100

    def __iter__(self):
        self.calls += 1
        return iter(range(100 if self.calls == 1 else self.rest))


def test_a_sampler_that_yields_other_numbers_than_it_announces_is_told_or_refused(caplog):
    assert len(positions(DataLoader(DATA, batch_size=10, sampler=Shrinking(35)))) == 14
    assert "Shrinking announces 100 and yields 35 in epoch 2" in caplog.text
    with pytest.raises(BackpassError, match="Shrinking yields 5 samples, fewer than batch_size=10"):
        positions(DataLoader(DATA, batch_size=10, sampler=Shrinking(5), drop_last=True))


class Skipping(DataLoader):
    def __iter__(self):
        return iter([*super().__iter__()][::2])


def incomplete(samples):
    return torch.utils.data.default_collate(samples[:-1])


def broken(samples):
    raise OSError("broken picture")


@pytest.mark.parametrize(
    ("loader", "settings", "message"),
    [
        ({"batch_size": 7}, {"batch_size": 5}, "batch_size=5, and the batch size of the DataLoader is 7"),
        ({"batch_size": None}, {"batch_size": 5}, "batch_size=None"),
        ({"batch_sampler": [[1, 2]]}, {"batch_size": 2}, "leave out batch_size"),
        ({"batch_sampler": [[1, 2]]}, {"drop_last": True}, "leave out drop_last"),
        ({"batch_size": 5, "sampler": DistributedSampler(DATA, 2, 0)}, {}, "leave the DistributedSampler out"),
        ({"batch_size": 5, "sampler": Endless()}, {}, "no __len__"),
        ({"batch_size": 200}, {}, "batch_size=200 is more than the 100 samples"),
        ({"batch_size": 5, "kind": Skipping}, {}, "Skipping has an __iter__ of its own"),
    ],
)
def test_loaders_that_are_refused(loader, settings, message):
    with pytest.raises(BackpassError, match=message):
        make(loader.pop("kind", DataLoader)(DATA, **loader), **settings)


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ({"batch_size": 5, "sampler": [1, 2, 300, 4, 5]}, "positions 1 to 300 of a data set of 100"),
        ({"batch_size": 5, "sampler": ["a"] * 5}, "whole numbers"),
        ({"batch_sampler": [[1, 2], []]}, "an empty batch"),
        ({"batch_size": 5, "collate_fn": incomplete}, "5 samples were asked for.*4 inputs"),
        ({"batch_size": 5, "collate_fn": broken}, r"samples \[0, 1, 2, 3, 4\]: OSError: broken picture"),
        ({"batch_size": 5, "collate_fn": broken, "num_workers": 1}, r"samples \[0, 1, 2, 3, 4\]: OSError: .*broken"),
    ],
)
def test_samples_that_cannot_be_counted_are_refused(loader, message):
    with pytest.raises(BackpassError, match=message):
        make(DataLoader(DATA, **loader)).fit()


def test_a_batch_size_is_needed_for_tensors():
    with pytest.raises(BackpassError, match="batch_size is missing"):
        make((X, Y))


def test_processes_share_the_batches_of_a_sampler():
    def seen(rank: int, processes: int) -> list[list[int]]:
        trainer = make(DataLoader(DATA, batch_size=11, sampler=WeightedRandomSampler(WEIGHTS, 60)), seed=5)
        return [batch.index.tolist() for (batch,), _, _ in Batches(trainer, rank, processes).epoch(1)]

    parts = [seen(rank, 3) for rank in range(3)]
    assert [list(chain(*step)) for step in zip(*parts, strict=True)] == seen(0, 1)
